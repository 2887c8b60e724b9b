"""The same as pictures: a bar for each subject, the whisker from the least to the most of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks import fan, join
from benchmarks.report import CHATD, HUB, number
from benchmarks.results import Record, Results

OURS, THEIRS = "#0b7285", "#adb5bd"
BAR = 0.32  # inches

PLOTS = (
    ("fanout", "A", fan.PACED, "Server CPU per delivery, µs: one message every 20 ms to 1,000 clients", False),
    ("burst", "B", fan.RATE, "Deliveries per second on one core: 100 messages at once to 1,000 clients", True),
    ("join", "C", join.CPU, "Server CPU to let one client in, ms", False),
    ("memory", "D", join.MEMORY, "Memory of an idle connection, kB", False),
)

matplotlib.rcParams["svg.hashsalt"] = "chatd"  # the same picture from the same figures
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.family"] = "sans-serif"


def draw(results: Results, output: Path) -> list[Path]:
    """One SVG for each of the plots that there are figures for."""
    drawn = []
    for name, goal, measure, title, is_rate in PLOTS:
        if records := results.of(goal, measure):
            path = output / f"{name}.svg"
            _bars(records, title, is_rate).savefig(path, bbox_inches="tight", metadata={"Date": None})
            drawn.append(path)
    return drawn


def _bars(records: Sequence[Record], title: str, is_rate: bool) -> Figure:
    """The best on top; a logarithmic axis for rates, which lie three powers of ten apart."""
    ordered = sorted(records, key=lambda record: record.median, reverse=not is_rate)
    figure = Figure(figsize=(8, 0.8 + BAR * len(ordered)), facecolor="white")
    axes = figure.subplots()
    for place, record in enumerate(ordered):
        colour = OURS if record.subject in (CHATD, HUB) else THEIRS
        axes.barh(place, record.median, color=colour, height=0.7)
        axes.plot([min(record.values), max(record.values)], [place, place], color="#495057", linewidth=1.2)
        axes.text(max(record.values), place, f"  {number(record.median)}", va="center", fontsize=8)
    axes.set_yticks(range(len(ordered)), [record.subject for record in ordered], fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    if is_rate or ordered[0].median > 20 * ordered[-1].median:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    return figure

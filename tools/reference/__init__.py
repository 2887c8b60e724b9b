"""What is generated from the code: `chatd.toml`, and the parts of docs/ that stand between two markers.

options    chatd.toml and docs/configuration.md, from chatd/config/options.py
commands   docs/commands.md, from the commands' own options
http       docs/http.md, from the OpenAPI description

`python -m tools.reference` writes them, and with `--check` only tells which differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tools.reference import commands, http, options

ROOT = Path(__file__).parents[2]
Parts = Mapping[str, str]


def files() -> dict[Path, str]:
    """Each file that holds something generated, and what it should be."""
    pages: dict[str, Callable[[], Parts]] = {
        "docs/configuration.md": options.parts,
        "docs/commands.md": commands.parts,
        "docs/http.md": http.parts,
    }
    made = {ROOT / page: filled((ROOT / page).read_text(), parts()) for page, parts in pages.items()}
    return {ROOT / "chatd.toml": options.sample()} | made


def filled(text: str, parts: Parts) -> str:
    """The text of a page with each part between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n\n{part.strip()}\n\n{end}"
        text, count = pattern.subn(lambda _, block=block: block, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{name}: its markers stand {count} times in the page, and not once")
    return text

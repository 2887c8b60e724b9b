"""`make outdated`: which requirements of pyproject.toml have a newer release, and which are held on purpose.

A release that needs a newer Python than this one counts, too: that is why some are held.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class Behind(NamedTuple):
    name: str
    installed: str
    newest: str


def requirements(project: dict[str, Any]) -> dict[str, SpecifierSet]:
    """The requirements of chatd and of its extras, by name. Empty for one without a version."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return {canonicalize_name(one.name): one.specifier for one in found if one.name != project["name"]}


def behind(wanted: dict[str, SpecifierSet], held: dict[str, str]) -> Iterator[Behind]:
    """What this Python could have; of what is held, what any could."""
    for one in json.loads(_pip("list", "--outdated", "--format", "json")):
        name = canonicalize_name(one["name"])
        if name in wanted and name not in held:
            yield Behind(name, one["version"], one["latest_version"])
    for name in held:
        said = _pip("index", "versions", name, "--ignore-requires-python")
        newest, installed = (re.search(pattern, said) for pattern in (r"\((\S+)\)", r"INSTALLED:\s+(\S+)"))
        if newest and installed and newest[1] != installed[1]:
            yield Behind(name, installed[1], newest[1])


def _pip(*arguments: str) -> str:
    return subprocess.run([*PIP, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def advice(one: Behind, wanted: SpecifierSet, held: dict[str, str]) -> str:
    if one.name in held:
        return f"held: {held[one.name]}"
    if one.newest in wanted:
        return f"{wanted or 'any'} allows it: pip install --upgrade {one.name}"
    return f"pyproject.toml has {wanted}: change it there, and run the tests"


def main() -> None:
    settings = tomllib.loads(PYPROJECT.read_text())
    wanted, held = requirements(settings["project"]), settings["tool"]["chatd"]["held"]
    found = sorted(behind(wanted, held))
    for one in found:
        print(f"{one.name:18} {one.installed:>9} → {one.newest:9} {advice(one, wanted[one.name], held)}")
    for name in sorted(set(held) - {one.name for one in found}):
        print(f"{name:18} is held, but nothing newer is there: remove it from [tool.chatd.held]")
    if not found:
        print("No requirement of pyproject.toml has a newer release.")


if __name__ == "__main__":
    main()

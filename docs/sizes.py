"""Writes the lines of every file and folder into the map of the code in README.md.

    python docs/sizes.py

A row of the map starts with links to files or folders: | [`model.py`](model.py) | 340 | ... |. The second cell is
the number of their lines, to the nearest ten. tests/readme_test.py holds it to within a tenth.
"""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROW = re.compile(r"^(\| (?:\[`[^`]+`\]\([^)]+\)[, ]*)+\| )(\S+)( \|)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")


def lines(path: pathlib.Path) -> int:
    """Lines of a file, or of all Python files of a folder."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def counted(row: re.Match[str]) -> int:
    """Lines of all that a row of the map links to."""
    return sum(lines(ROOT / target) for target in LINK.findall(row[1]))


def filled(text: str) -> str:
    """The text with the sizes of today in its map."""
    return ROW.sub(lambda row: f"{row[1]}{round(counted(row), -1):,}{row[3]}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print(f"wrote {readme.name}")

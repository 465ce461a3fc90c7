"""Writes what the code and the shipped results say into README.md and docs/*.md. tests/readme_test.py holds it there.

  python -m docs.fill

1. The map of the code in README.md. A row starts with links to files or folders, | [`model.py`](model.py) | 340 |.
   The second cell is the number of their lines, to the nearest ten.
2. Numbers that were yet to be measured: {{name}}. A comment right after a table, a paragraph or a block of output
   says what each number is: a field of pretrained/RUN/eval.json.

       <!-- held to pretrained/RUN/eval.json:
       0.416 = apr-desktop accuracy
       {{apr_sft_low}} = apr interval.0
       {{apr_seeds_low}} = apr+apr-1+apr-2 least:accuracy
       -->

   Of several runs it is the mean, or the `least`, the `most` or the standard deviation, `sd`.
   A {{name}} that no comment explains is left for a person.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import statistics
import typing
from collections.abc import Callable

from harness.results import match, opened

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

# ------------------------------------------------------------------- sizes

ROW = re.compile(r"^(\| (?:\[`[^`]+`\]\([^)]+\)[, ]*)+\| )(\S+)( \|)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")


def lines(path: pathlib.Path) -> int:
    """Lines of a file, or of all Python files of a folder."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def size(row: re.Match[str]) -> int:
    """Lines of all that a row of the map links to."""
    return sum(lines(ROOT / target) for target in LINK.findall(row[1]))


# ------------------------------------------------------------------- results

HELD = re.compile(r"((?:^.+\n)+)\n?<!-- held to pretrained/RUN/eval\.json:\n((?:.+\n)*?)-->", re.MULTILINE)
HELD_LINE = re.compile(r"(\S+) = (\S+) (\S+)")
UNMEASURED = re.compile(r"\{\{(\w+)\}\}")


class HeldNumber(typing.NamedTuple):
    """A number of a document, or a {{name}}, and the field of a run's evaluation that it is."""

    document: str
    text: str  # the table, paragraph or block that it stands in
    number: str
    run: str
    name: str


def held() -> list[HeldNumber]:
    """Every number that a comment holds."""
    return [
        HeldNumber(path.name, text, *line)
        for path in DOCUMENTS
        for text, comment in HELD.findall(path.read_text())
        for line in HELD_LINE.findall(comment)
    ]


@functools.cache
def evaluation(run: str) -> dict[str, typing.Any]:
    """The shipped evaluation of a run."""
    value = json.loads((opened(ROOT / "pretrained" / run) / "eval.json").read_text())[0]
    match(value, f"{run}/eval.json")
    return value


Summary = Callable[[list[float]], float]
SUMMARIES: dict[str, Summary] = {"": statistics.fmean, "least": min, "most": max, "sd": statistics.stdev}


def field(runs: str, name: str) -> float:
    """A dotted field of the evaluations of RUN or RUN+RUN: accuracy, interval.0, failures.truncated, sd:children."""
    summary, _, name = name.rpartition(":")
    values: list[typing.Any] = [evaluation(run) for run in runs.split("+")]
    for part in name.split("."):
        values = [value[int(part)] if isinstance(value, list) else value[part] for value in values]
    return SUMMARIES[summary](values)


def shown(value: float) -> str:
    """A number as the documents print it: shares to three decimals, counts to two, tokens to none."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}" if abs(value) < 20 else f"{value:,.0f}"


def main() -> None:
    """Fills in all documents."""
    numbers = {n.number: shown(field(n.run, n.name)) for n in held() if UNMEASURED.fullmatch(n.number)}
    for path in DOCUMENTS:
        text = path.read_text()
        if path == README:
            text = ROW.sub(lambda row: f"{row[1]}{round(size(row), -1):,}{row[3]}", text)
        for name, number in numbers.items():
            text = text.replace(name, number)
        path.write_text(text)
        left = sorted({name for name in UNMEASURED.findall(text)})
        print(f"{path.relative_to(ROOT)}: " + (f"yet to be measured: {', '.join(left)}" if left else "complete"))


if __name__ == "__main__":
    main()

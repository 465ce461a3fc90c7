"""Problems that a user names: one on the command line, or a JSON file of them."""

from __future__ import annotations

import json
import pathlib
import sys
import typing

from checks import require
from harness.cli import UsageError, usage_errors
from protocols import Domain


def read_problem(entry: typing.Any, where: str, domain: Domain) -> typing.Any:
    """A checked problem. One without a solution is accepted, and a note says that it will count as wrong."""
    try:
        problem = domain.from_json(entry)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if not domain.solvable(problem):
        print(f"note: {where}: {problem.target} cannot be reached; it will count as wrong", file=sys.stderr)
    return problem


def read_problems(path: str, domain: Domain) -> list[typing.Any]:
    """Problems of a JSON file. Raises UsageError naming the entry that is wrong, or there twice."""
    with usage_errors():
        try:
            entries = json.loads(pathlib.Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{path} must hold a list of {domain.example}")
        problems = [read_problem(entry, f"{path}, entry {index}", domain) for index, entry in enumerate(entries)]
        places: dict[typing.Any, int] = {}
        for index, problem in enumerate(problems):  # the same problem draws the same rollouts: no new evidence
            first = places.setdefault(problem, index)
            require(first == index, f"{path}, entry {index} is entry {first} again: leave one of them out")
    return problems

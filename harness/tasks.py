"""The registry of tasks: `config.task` names an entry, and everything reaches the task through it.

To add a task, write a `protocols.Task` and a `protocols.Domain`, and enter the domain in `TASKS`.

An entry names its parts as MODULE:NAME, so that a run imports its own task alone. All but the domain are hooks, and
the only way from here into `analysis/`: what explains a failed rollout, draws its search, or counts its habits.
"""

from __future__ import annotations

import importlib
import typing

from checks import require
from protocols import Language
from records import END, Rollout


class Entry(typing.NamedTuple):
    """The parts of a task."""

    domain: str  # a subclass of `Domain`
    explain: str = "harness.tasks:stop_reason"  # (rollout, language) -> kind of failure, "" for a correct rollout
    states: str = "harness.tasks:no_states"  # (rollout, lanes, language) -> search tree that the viewer draws
    habits: str = "harness.tasks:no_habits"  # (rollout, language) -> counts whose means validation logs


TASKS = {
    "countdown": Entry("countdown.domain:CountdownDomain", "analysis.verifier:failure", "analysis.tree:search_tree"),
    "products": Entry("examples.products:ProductsDomain"),
    "zero": Entry("baselines.zero:ZeroDomain", "baselines.zero:failure", habits="baselines.zero:habits"),
}


def part(task: str, name: str) -> typing.Any:
    """What the entry of a task names as one of its parts. Raises ValueError on an unknown task."""
    require(task in TASKS, f"task={task!r} must be one of {', '.join(TASKS)}")
    module, attribute = getattr(TASKS[task], name).split(":")
    return getattr(importlib.import_module(module), attribute)


def no_states(*_: typing.Any) -> tuple:
    """The states of a task without a search tree."""
    return ()


def no_habits(*_: typing.Any) -> dict[str, float]:
    """The habits of a task that counts none."""
    return {}


def stop_reason(rollout: Rollout, _: Language) -> str:
    """The kind of failure of a task without a verifier: why the root stopped, or "wrong_answer"."""
    if rollout.grade.correct:
        return ""
    return "wrong_answer" if rollout.root.stop == END else rollout.root.stop

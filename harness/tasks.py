"""The registry of tasks: `config.task` names an entry, and everything reaches the task through it.

To add a task, write a `protocols.Task` and a `protocols.Domain`, and enter the domain in `TASKS`.

An entry names its parts as MODULE:NAME, so that a run imports its own task alone. Two parts are hooks of
`analysis/`, the only way from here into it: what explains a failed rollout, and what draws its search.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from checks import require
from protocols import Domain, Language
from records import END, Rollout


class Entry(typing.NamedTuple):
    """The parts of a task."""

    domain: str  # a subclass of `Domain`
    explain: str = "harness.tasks:stop_reason"  # (rollout, language) -> kind of failure, "" for a correct rollout
    states: str = ""  # (rollout, lanes, language) -> nodes of the search tree that the viewer draws


TASKS = {
    "countdown": Entry("countdown.domain:CountdownDomain", "analysis.verifier:failure", "analysis.tree:search_tree"),
    "products": Entry("examples.products:ProductsDomain"),
}


def entry(name: str) -> Entry:
    """The entry of a task. Raises ValueError on an unknown name."""
    require(name in TASKS, f"task={name!r} must be one of {', '.join(TASKS)}")
    return TASKS[name]


def resolve(part: str) -> typing.Any:
    """The object that MODULE:NAME names."""
    module, name = part.split(":")
    return getattr(importlib.import_module(module), name)


def make_domain(config: ConfigDict) -> Domain:
    """The domain of a configuration. Raises ValueError, naming the field, on values that cannot work."""
    return resolve(entry(config.task).domain)(config)


def explainer(name: str) -> Callable[[Rollout, Language], str]:
    """What names the fault that a failed rollout failed by."""
    return resolve(entry(name).explain)


def states(name: str) -> Callable[..., Sequence[typing.Any]]:
    """What reads the search tree of a rollout for the viewer; a task without one has no states."""
    part = entry(name).states
    return resolve(part) if part else lambda *_: ()


def stop_reason(rollout: Rollout, _: Language) -> str:
    """The kind of failure of a task without a verifier: why the root stopped, or "wrong_answer"."""
    if rollout.grade.correct:
        return ""
    return "wrong_answer" if rollout.root.stop == END else rollout.root.stop

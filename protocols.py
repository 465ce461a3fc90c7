"""What the runtime asks of a task and an engine, and what training asks of a task. No JAX here.

A `Task` speaks a language: it writes prompts, reads spawn blocks, writes join blocks and grades answers.
An `Engine` decodes: it owns rows (KV caches), fills them and samples. A new task or a new sampler
implements one of these protocols and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from records import Grade, Rollout, Thread


@dataclasses.dataclass(frozen=True)
class Request:
    """One rollout to run: a problem and which of its rollouts this is."""

    problem: typing.Any
    index: int = 0


class MalformedSpawn(ValueError):
    """The ids before a spawn token are no spawn block that the task can read."""


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A parsed spawn block. `start` is the index of its first id in the thread: the rewind point."""

    start: int
    prompts: list[list[int]]  # of the children, at least one


class Task(typing.Protocol):
    """What the runtime needs of a task. All text is ids.

    Budget forcing (`Limits.forced_answer_tokens`, `Limits.min_budget_rounds`) needs a `ForcedTask`.
    """

    @property
    def end_id(self) -> int:
        """Sampling this id ends the thread."""

    @property
    def spawn_id(self) -> int:
        """Sampling this id starts children, and suspends the thread unless it is of an `AsynchronousTask`."""

    def prompt(self, problem: typing.Any) -> list[int]:
        """Prompt of the root thread."""

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads the spawn block that ends `ids` (the last id is `spawn_id`). Raises MalformedSpawn."""

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Join block of finished children, in the order of the spawn. A child that did not end has failed."""

    def grade(self, problem: typing.Any, root: Thread) -> Grade:
        """Verdict on a root thread that has ended. Children that it did not join may still run."""


class AsynchronousTask(Task, typing.Protocol):
    """A task whose threads go on after a spawn, and ask for each join (AsyncThink, arXiv 2510.26658).

    They join in the order of their spawns. With a negative `join_id`, or without one, they wait as in the paper.
    """

    @property
    def join_id(self) -> int:
        """Sampling this id suspends the thread until the children of its oldest spawn without a join have ended."""

    def started(self) -> list[int]:
        """What replaces the spawn block while the children run, at least one id."""


def join_id(task: Task) -> int:
    """The `join_id` of a task, -1 if its threads wait after a spawn."""
    return getattr(task, "join_id", -1)


def stop_ids(task: Task) -> tuple[int, ...]:
    """Ids that end a call, the first of them the thread. No task samples a negative id."""
    return tuple(i for i in (task.end_id, task.spawn_id, join_id(task)) if i >= 0)


class ForcedTask(Task, typing.Protocol):
    """A task that allows budget forcing. Both methods return (number of ids to keep, ids to append)."""

    def force_answer(self, problem: typing.Any, ids: Sequence[int]) -> tuple[int, list[int]]:
        """Makes a root answer that a bound cut at `ids`. Appends at least one id."""

    def force_continue(self, ids: Sequence[int]) -> tuple[int, list[int]] | None:
        """Makes a root continue that ended with `ids`. None if it has answered or nothing is left to try."""


@dataclasses.dataclass
class PrefillRequest:
    """Work for one row: rewind it to its first `keep` ids, append `ids` (at least one), then sample.

    `key` and `num_sampled` (the number of ids that the thread has sampled so far) fix the random draws of
    the thread. The row stops after at most `max_new_tokens` (at least 1) sampled ids.
    """

    row: int
    keep: int
    ids: list[int]
    key: tuple[int, int]
    num_sampled: int
    max_new_tokens: int


@dataclasses.dataclass
class Completion:
    """A row that sampled a stop id or reached its limit, with what it sampled since its `PrefillRequest`.

    `logprobs` are those of the policy at the temperature of the sampler, before top-k and top-p.
    """

    row: int
    ids: list[int]
    logprobs: list[float]


class Engine(typing.Protocol):
    """What the runtime needs of a sampler: `rows` KV caches of `context` ids, spread evenly over `devices`."""

    rows: int
    devices: int
    context: int

    def reset(self) -> None:
        """Stops every row."""

    def prefill(self, fills: list[PrefillRequest]) -> None:
        """Starts rows."""

    def decode(self) -> list[Completion]:
        """Samples until some rows have stopped, and returns those."""


# ------------------------------------------------------------------- training and evaluation


class Language(typing.Protocol):
    """Ids of a task: `vocab_size` of them, and the text of any sequence of them."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class Domain:
    """What training and evaluation need of a task: its problems, its demonstrations and its words.

    A subclass takes the configuration of a run, raises ValueError where that cannot work, and is entered in
    `harness.tasks.TASKS`. The methods from `facts` on have defaults for tasks without a budget or a demonstrator
    to compare with.
    """

    example: str  # a problem as JSON, for error messages
    language: Language
    task: Task  # of rollouts; its prompts state the budget of the configuration, if there is one

    def problem(self, split: str, seed: int, index: int) -> typing.Any:
        """Problem number `index` of the split "train", "validation" or "heldout", the same in every process."""
        raise NotImplementedError

    def problems(self, split: str, n: int) -> Sequence[typing.Any]:
        """`n` distinct problems of a split, always the same. Raises ValueError if there are fewer."""
        raise NotImplementedError

    def demonstration(self, split: str, seed: int, index: int) -> Rollout:
        """Demonstration number `index`, a record as the runtime would have made it."""
        raise NotImplementedError

    @staticmethod
    def to_json(problem: typing.Any) -> dict[str, typing.Any]:
        """A problem as a JSON object."""
        raise NotImplementedError

    @staticmethod
    def from_json(entry: typing.Any) -> typing.Any:
        """The inverse of `to_json`, of any JSON value. Raises ValueError if it is no problem."""
        raise NotImplementedError

    @classmethod
    def read_language(cls, facts: dict[str, typing.Any]) -> Language:
        """The language of a trace file that keeps `facts`."""
        raise NotImplementedError

    def facts(self) -> dict[str, typing.Any]:
        """What an evaluation and a trace file say of the task: at least `method`, `family` and `threads`."""
        return {"method": "", "family": {}, "threads": {}}

    @staticmethod
    def solvable(problem: typing.Any) -> bool:
        """Whether a problem has a solution."""
        return True

    def requested(self) -> str:
        """The budget that prompts state, in words; "" if none."""
        return ""

    def usage(self, rollouts: Sequence[Rollout]) -> tuple[list[int], int, int] | None:
        """What each rollout used of the stated budget, and its bounds (low, high); None if none is stated."""
        return None

    def demonstrators(self, problems: Sequence[typing.Any], context: int) -> list[dict[str, float]]:
        """What one demonstration of each problem achieves, one entry per setting of the demonstrator.

        An entry holds `accuracy` (within `context` ids), `children` and `total_tokens`.
        """
        return []

"""The record of a rollout: a problem, a tree of threads, and their costs.

A demonstration of a symbolic solver and a rollout of the model are the same record. A `Rollout` is a
problem and a tree of `Thread`s. A thread is a list of `Call`s, one per uninterrupted decode. Training,
metrics, grading and pictures read the record and cannot tell who wrote it.

This module knows nothing of JAX and nothing of any task.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence

# Why a call stopped. The first four are the model's own doing.
END = "end"  # the thread is over
SPAWN = "spawn"  # the thread asked for children, and waits for them
FORK = "fork"  # the thread asked for children, and goes on (`protocols.AsynchronousTask`)
JOIN = "join"  # the thread asked for the results of its oldest fork that it has not joined, and waits for them
CONTEXT = "context"  # the context window is full
THREAD_TOKENS = "thread_tokens"  # Limits.thread_tokens reached
ROLLOUT_TOKENS = "rollout_tokens"  # Limits.rollout_tokens reached
# Why a thread that asked for children got none; these replace SPAWN and FORK.
MALFORMED = "malformed"  # the spawn block does not parse, or there is nothing to join (see Thread.detail)
CHILDREN = "children"  # more than Limits.children in one spawn
SPAWNS = "spawns"  # more than Limits.spawns spawns in one thread
DEPTH = "depth"  # deeper than Limits.depth
STOPS = (END, SPAWN, FORK, JOIN, CONTEXT, THREAD_TOKENS, ROLLOUT_TOKENS, MALFORMED, CHILDREN, SPAWNS, DEPTH)
SPAWNED = (SPAWN, FORK)  # calls that started children
WAITED = (SPAWN, JOIN)  # calls after which the thread waited for children
TRUNCATED = (CONTEXT, THREAD_TOKENS, ROLLOUT_TOKENS, CHILDREN, SPAWNS, DEPTH)  # cut by a bound, not by the model


@dataclasses.dataclass
class Call:
    """One uninterrupted decode of a thread.

    Its context is the first `keep` ids of the call before it (context and
    sampled ids together), followed by `injected`. For a first call `keep` is 0
    and `injected` the prompt; for a call after a join `keep` is the rewind point
    and `injected` the join block (after a fork: what says that children have
    started). Injected ids are never training targets.
    """

    keep: int
    injected: list[int]
    sampled: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # one per sampled id; empty in demonstrations
    stop: str = END  # set when the call stops


@dataclasses.dataclass
class Thread:
    """A thread of a rollout.

    `path` is () for the root and, for a child, its parent's path followed by
    (number of the spawn within the parent, number of the child within the
    spawn). `spawns[i]` are the children of the i-th call that stopped at SPAWN or FORK.
    """

    path: tuple[int, ...]
    calls: list[Call] = dataclasses.field(default_factory=list)
    spawns: list[list[Thread]] = dataclasses.field(default_factory=list)
    detail: str = ""  # what was wrong with a malformed spawn block or join

    def ids(self) -> list[int]:
        """Context and sampled ids of the last call: what the thread remembers."""
        ids: list[int] = []
        for call in self.calls:
            ids = ids[: call.keep] + call.injected + call.sampled
        return ids

    @property
    def stop(self) -> str:
        """Why the thread's last call stopped (one of `STOPS`)."""
        return self.calls[-1].stop

    def walk(self) -> Iterator[Thread]:
        """This thread, then its descendants in order of spawn."""
        yield self
        for children in self.spawns:
            for child in children:
                yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Grade:
    """Verdict on a rollout: `answer` are the steps found, `reason` why they are wrong ("" if they are right)."""

    correct: bool
    reason: str
    answer: tuple[str, ...] = ()


@dataclasses.dataclass
class Rollout:
    """A problem, the tree of threads that worked on it, and the verdict.

    `index` tells repeated rollouts of one problem apart; `milliseconds` is the
    wall clock from the root's first prefill to its end (0 in demonstrations).
    """

    problem: typing.Any
    root: Thread
    grade: Grade
    index: int = 0
    milliseconds: float = 0.0

    def threads(self) -> list[Thread]:
        """All threads, parents before their children."""
        return list(self.root.walk())


# ------------------------------------------------------------------- costs


def total_tokens(thread: Thread) -> int:
    """Ids sampled by the thread and all its descendants (paper, section 4: total tokens)."""
    return sum(len(call.sampled) for member in thread.walk() for call in member.calls)


def sequential_tokens(thread: Thread) -> int:
    """Longest chain of dependent ids up to the thread's end: its own, and while it waits its slowest child's."""
    return clock(thread)[-1]


def clock(thread: Thread) -> list[int]:
    """When each call of a thread starts, on a clock of tokens from 0, and when the last one ends.

    Children start when the call that spawned them ends. A call after a join starts when its thread asked for the join
    and the slowest child has ended.
    """
    times, running, spawns = [0], [], iter(thread.spawns)
    for call in thread.calls:
        now = times[-1] + len(call.sampled)
        if call.stop in SPAWNED:
            running.append(now + max(map(sequential_tokens, next(spawns))))
        times.append(max(now, running.pop(0)) if call.stop in WAITED else now)
    return times


def longest_context(thread: Thread) -> int:
    """Most ids that any call of the thread or its descendants had in view, sampled ids included."""
    calls = (call for member in thread.walk() for call in member.calls)
    return max(call.keep + len(call.injected) + len(call.sampled) for call in calls)


def metrics(rollout: Rollout) -> dict[str, float]:
    """Costs of one rollout: tokens (ids), context (ids), threads (counts), wall clock (milliseconds)."""
    threads = rollout.threads()
    return {
        "total_tokens": total_tokens(rollout.root),
        "sequential_tokens": sequential_tokens(rollout.root),
        "longest_context": longest_context(rollout.root),
        "children": len(threads) - 1,
        "width": max(len(children) for thread in threads for children in [*thread.spawns, []]),
        "depth": max(len(thread.path) // 2 for thread in threads),
        "truncated": float(any(thread.stop in TRUNCATED for thread in threads)),
        "malformed": float(any(thread.stop == MALFORMED for thread in threads)),
        "milliseconds": rollout.milliseconds,
    }


def mean_costs(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
    """Means of some of the `metrics` over rollouts."""
    costs = [metrics(rollout) for rollout in rollouts]
    return {name: sum(cost[name] for cost in costs) / len(costs) for name in names}


def rollout_json(rollout: Rollout, problem: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The record as JSON; `problem` is its problem, as the domain writes it (`Domain.to_json`)."""
    return {**dataclasses.asdict(rollout), "problem": problem}


def stored(task: str, facts: dict[str, typing.Any], rollout: Rollout, problem: dict[str, typing.Any]) -> dict:
    """What a trace file keeps: the task, what its domain says of itself (`Domain.facts`), and the record."""
    return {"task": task, "facts": facts, "rollout": rollout_json(rollout, problem)}

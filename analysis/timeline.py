"""When the calls of a rollout run, on a clock of tokens, and which of them the end waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import records
from records import Call, Thread, sequential_tokens


@dataclasses.dataclass
class Lane:
    """A thread on the clock: call i runs from starts[i], in tokens, for as many as it sampled."""

    thread: Thread
    starts: list[int] = dataclasses.field(default_factory=list)
    critical: list[bool] = dataclasses.field(default_factory=list)  # whether the end of the rollout waits for call i
    joins: list[int] = dataclasses.field(default_factory=list)  # when the parent goes on from the join of spawn i

    def runs(self) -> Iterator[tuple[int, Call]]:
        """(start, call) of every call."""
        return zip(self.starts, self.thread.calls, strict=True)


def timeline(thread: Thread, start: int = 0, critical: bool = True) -> list[Lane]:
    """Lanes of a thread and its descendants, in the order of `Thread.walk`.

    A child starts when its parent spawns. A parent that waits goes on when its slowest child (the first such) ends, or
    at once if all have ended. So the last call of the root ends at `sequential_tokens`, which is also the length of all
    critical calls together. A spawn that is never joined has no entry in `joins`.
    """
    lane, spawned, waits = Lane(thread), [], []  # (call that spawned, children, its end); (spawn, call that waits)
    clock, spawns = start, iter(thread.spawns)
    for number, call in enumerate(thread.calls):
        lane.starts.append(clock)
        clock += len(call.sampled)
        if call.stop in records.SPAWNED:
            spawned.append((number, next(spawns), clock))
        if call.stop in (records.SPAWN, records.JOIN):
            _, children, begun = spawned[len(lane.joins)]
            end = begun + max(map(sequential_tokens, children))
            waits.append((len(lane.joins), number, end > clock))
            clock = max(clock, end)
            lane.joins.append(clock)
    # Back from the end: where a child was waited for, the critical path is the child, and its parent's calls before the
    # spawn.
    lane.critical, awaited = [critical] * len(thread.calls), set()
    last = len(thread.calls)
    for spawn, number, late in reversed(waits):
        if late and number < last:
            last = spawned[spawn][0] + 1
            awaited.add(spawn)
            lane.critical[last : number + 1] = [False] * (number + 1 - last)
    below = []
    for spawn, (_, children, begun) in enumerate(spawned):
        slowest = max(children, key=sequential_tokens)
        for child in children:
            below += timeline(child, begun, critical and spawn in awaited and child is slowest)
    return [lane, *below]

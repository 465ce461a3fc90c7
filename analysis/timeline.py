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
    starts: list[int]
    critical: list[bool]  # whether the end of the rollout waits for call i
    joins: list[int]  # when the parent goes on from the join of spawn i

    def runs(self) -> Iterator[tuple[int, Call]]:
        """(start, call) of every call."""
        return zip(self.starts, self.thread.calls, strict=True)


def timeline(thread: Thread, start: int = 0, critical: bool = True) -> list[Lane]:
    """Lanes of a thread and its descendants, in the order of `Thread.walk`.

    A child starts when its parent spawns. A parent that waits goes on when its slowest child (the first such) ends, or
    at once if all have ended. So the last call of the root ends at `sequential_tokens`, which is also the length of all
    critical calls together. A spawn that is never joined has no entry in `joins`.
    """
    calls, times = thread.calls, [start + time for time in records.clock(thread)]
    ends = [time + len(call.sampled) for time, call in zip(times, calls, strict=False)]
    spawns = [number for number, call in enumerate(calls) if call.stop in records.SPAWNED]
    waits = [number for number, call in enumerate(calls) if call.stop in records.WAITED]
    lane = Lane(thread, times[:-1], [critical] * len(calls), [times[number + 1] for number in waits])
    # Back from the end: where a child was waited for, it is critical, and so are its parent's calls up to its spawn.
    late, last = [False] * len(spawns), len(calls)
    for spawn, number in reversed([*enumerate(waits)]):
        if number < last and ends[number] < times[number + 1]:
            late[spawn], last = True, spawns[spawn] + 1
            lane.critical[last : number + 1] = [False] * (number + 1 - last)
    below = []
    for number, children, waited_for in zip(spawns, thread.spawns, late, strict=True):
        slowest = max(children, key=sequential_tokens)
        for child in children:
            below += timeline(child, ends[number], critical and waited_for and child is slowest)
    return [lane, *below]

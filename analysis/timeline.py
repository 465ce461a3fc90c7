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
    critical: bool  # whether the end of the rollout waits for every token of this thread
    starts: list[int] = dataclasses.field(default_factory=list)
    joins: list[int] = dataclasses.field(default_factory=list)  # when the slowest child of spawn i ends

    def runs(self) -> Iterator[tuple[int, Call]]:
        """(start, call) of every call."""
        return zip(self.starts, self.thread.calls, strict=True)


def timeline(thread: Thread, start: int = 0, critical: bool = True) -> list[Lane]:
    """Lanes of a thread and its descendants, in the order of `Thread.walk`.

    A child starts when its parent spawns, the parent goes on when its slowest
    child (the first such) ends. So the last call of the root ends at
    `sequential_tokens`, which is also the length of all critical calls together.
    """
    lane, below = Lane(thread, critical), []
    spawns = iter(thread.spawns)
    for call in thread.calls:
        lane.starts.append(start)
        start += len(call.sampled)
        if call.stop == records.SPAWN:
            children = next(spawns)
            slowest = max(children, key=sequential_tokens)
            for child in children:
                below += timeline(child, start, critical and child is slowest)
            start += sequential_tokens(slowest)
            lane.joins.append(start)
    return [lane, *below]

"""Threads -> fixed rows of tokens: the one batch that SFT and GRPO train on.

A thread becomes one *segment*: prompt, what it sampled, joined message, what it
sampled then, and so on, spliced in the order of time. The ids that a rewind took
out of the thread's memory (its spawn block) stay in the row, because they were
sampled and are trained on, but nothing after the rewind sees them, and positions
restart there. One integer per token says all of that:

    token j is visible to token i of its row  iff  j <= i < until[j]

so `until` is the end of the segment for most tokens, the start of the join block
for a spawn block, and the token's own end for padding. Example (a parent, prompt
P, listing L, spawn block S, joined message J, rest R, in one row with another
segment X):

    row        P P L L S S J J R X X .
    position   0 1 2 3 4 5 4 5 6 0 1 0
    until      9 9 9 9 6 6 9 9 9 . . .
    sampled    0 0 1 1 1 1 0 0 1 0 1 0

Deviation from the paper's code: it encodes a parent once per call, so that a
prefix is computed again for every join, and trains on prompts and joined text
as well; here every sampled id is trained on exactly once and nothing else is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence

import numpy as np

from parallel_runtime import CONTEXT, SPAWN, Call, Thread

Field = typing.Any  # an np.ndarray here, a jax.Array inside a jitted step


class TokenBatch(typing.NamedTuple):
    """Rows of packed segments; every field is [R, T] and aligned with `tokens`.

    `weight` is the share of the token in the loss (0 where the id was not
    sampled), already divided by whatever the loss is averaged over, so that no
    packing, padding, micro-batching or device count can change the loss.
    """

    tokens: Field  # int32
    positions: Field  # int32
    until: Field  # int32
    sampled: Field  # bool: the id was sampled, not injected
    weight: Field  # float32
    kl_weight: Field  # float32, the same for the penalty towards the reference (GRPO)
    advantage: Field  # float32, of the token's rollout (GRPO)
    old_logp: Field  # float32, under the policy that sampled it (GRPO; the sampler's own until replaced)
    ref_logp: Field  # float32, under the reference policy (GRPO)


@dataclasses.dataclass
class Segment:
    """One piece of a row: per-token lists of equal length, `until` counted from the segment's own start."""

    tokens: list[int]
    positions: list[int]
    until: list[int]
    sampled: list[bool]
    logprobs: list[float]  # 0 where not sampled
    thread: Thread  # whose it is
    calls: list[int]  # per token the call that sampled it, -1 where not sampled

    def __len__(self) -> int:
        return len(self.tokens)


def splice(thread: Thread) -> Segment:
    """The thread as one segment, all its calls in the order of time."""
    segment = Segment([], [], [], [], [], thread, [])
    memory: list[int] = []  # where in the segment the ids in the thread's memory are
    for number, call in enumerate(thread.calls):
        for gone in memory[call.keep :]:
            segment.until[gone] = len(segment)
        memory = memory[: call.keep]
        _append(segment, memory, call.injected, [], -1)
        _append(segment, memory, call.sampled, call.logprobs, number)
    segment.until = [until or len(segment) for until in segment.until]
    return segment


def _append(segment: Segment, memory: list[int], ids: list[int], logprobs: list[float], call: int) -> None:
    """Adds ids to a segment and to the thread's memory; demonstrations and injected ids have no log-probs."""
    start, count = len(segment), len(ids)
    segment.tokens += ids
    segment.positions += range(len(memory), len(memory) + count)
    segment.until += [0] * count  # 0: not known to end yet
    segment.sampled += [call >= 0] * count
    segment.logprobs += logprobs or [0.0] * count
    segment.calls += [call] * count
    memory += range(start, start + count)


def segments(thread: Thread, length: int) -> list[Segment]:
    """The thread in segments of at most `length` tokens: spliced if it fits, else one per call.

    Calls that sampled nothing, for want of room, are left out where nothing follows them.
    Raises ValueError if a call alone is longer than `length`.
    """
    calls = [number for number, call in enumerate(thread.calls) if call.sampled]
    if not calls:
        return []
    whole = Thread(thread.path, thread.calls[: calls[-1] + 1])
    if sum(len(call.injected) + len(call.sampled) for call in whole.calls) <= length:
        return [dataclasses.replace(splice(whole), thread=thread)]
    pieces = []
    for number in calls:
        piece = splice(_call_alone(thread, number))
        if len(piece) > length:
            raise ValueError(f"a call of {len(piece)} ids does not fit rows of {length}: use longer rows")
        piece.thread, piece.calls = thread, [number if call == 0 else -1 for call in piece.calls]
        pieces.append(piece)
    return pieces


def _call_alone(thread: Thread, number: int) -> Thread:
    """The thread's call `number` as if it were a first call: all its context is injected."""
    before = Thread(thread.path, thread.calls[:number]).ids()
    call = thread.calls[number]
    return Thread(thread.path, [Call(0, before[: call.keep] + call.injected, call.sampled, call.logprobs)])


class Sized(typing.Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int: ...


Piece = typing.TypeVar("Piece", bound=Sized)


def take_row(waiting: list[Piece], length: int) -> list[Piece]:
    """Takes the pieces of one row of `length` tokens out of `waiting`: the first, and those that best fill the rest.

    The first has waited longest, so that none waits for ever. The others are found by subset sum: bit s of
    `sums[i]` says that some of the first i pieces add up to s tokens. Of equally good choices the one with pieces
    that came earlier is taken. Raises ValueError if the first piece is longer than the row.
    """
    row = [waiting.pop(0)]
    free = length - len(row[0])
    if free < 0:
        raise ValueError(f"a segment of {len(row[0])} tokens does not fit rows of {length}")
    sums, mask = [1], (2 << free) - 1
    for piece in waiting:
        sums.append((sums[-1] | sums[-1] << len(piece)) & mask)
    best = sums[-1].bit_length() - 1
    for i in reversed(range(len(waiting))):
        if not sums[i] >> best & 1:  # out of reach without piece i
            best -= len(waiting[i])
            row.append(waiting.pop(i))
    return row


def lay_out(rows: Sequence[Sequence[Segment]], length: int) -> tuple[TokenBatch, list[tuple[int, slice, Segment]]]:
    """Rows of segments as a batch [R, T], with `weight` 1 on sampled ids and no advantage, and where each one lies."""
    shape = (len(rows), length)
    own_end = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy()
    zeros = [np.zeros(shape, np.float32) for _ in range(5)]
    batch = TokenBatch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), own_end, np.zeros(shape, bool), *zeros)
    where = []
    for row, pieces in enumerate(rows):
        stop = 0
        for segment in pieces:
            start, stop = stop, stop + len(segment)
            span = slice(start, stop)
            batch.tokens[row, span] = segment.tokens
            batch.positions[row, span] = segment.positions
            batch.until[row, span] = np.asarray(segment.until, np.int32) + start
            batch.sampled[row, span] = segment.sampled
            batch.weight[row, span] = segment.sampled
            batch.old_logp[row, span] = segment.logprobs
            where.append((row, span, segment))
    return batch, where


def pack_all(
    pieces: Iterable[Segment], rows: int, length: int
) -> tuple[list[TokenBatch], list[tuple[int, int, slice, Segment]]]:
    """Packs every segment, longest first, into as many batches of `rows` x `length` as it takes.

    Returns the batches and, per segment, (batch, row, columns, segment). Raises ValueError if a segment is
    longer than a row.
    """
    waiting = sorted(pieces, key=len, reverse=True)
    batches: list[TokenBatch] = []
    where: list[tuple[int, int, slice, Segment]] = []
    while waiting:
        batch, placed = lay_out([take_row(waiting, length) if waiting else [] for _ in range(rows)], length)
        where += [(len(batches), *place) for place in placed]
        batches.append(batch)
    return batches, where


def cut(thread: Thread, context: int) -> None:
    """Truncates a thread in place to the first call that overruns `context`, and that call to its limit."""
    for number, call in enumerate(thread.calls):
        room = context - call.keep - len(call.injected)
        if len(call.sampled) > room:
            call.sampled, call.logprobs = call.sampled[: max(room, 0)], call.logprobs[: max(room, 0)]
            call.stop = CONTEXT
            del thread.calls[number + 1 :]
            del thread.spawns[sum(call.stop == SPAWN for call in thread.calls) :]
            return

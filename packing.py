"""Threads -> fixed rows of tokens: the one batch that SFT and GRPO train on.

A thread becomes one *segment*: its prompt, what it sampled, the join block, what it sampled then, and
so on, spliced in the order of time. One longer than a row becomes a segment per call. A rewind takes ids
out of the thread's memory (its spawn block). They stay in the row, because they were sampled and are
trained on, but nothing after the rewind sees them, and positions restart there. One integer per token
says all of that:

    token j is visible to token i of its row  iff  j <= i < until[j]

So `until` is the end of the segment for most tokens, the start of the join block for a spawn block, and the
token's own end for padding. Example (a parent with prompt P, listing L, spawn block S, join block J and
rest R, in one row with another segment X):

    row        P P L L S S J J R X X .
    position   0 1 2 3 4 5 4 5 6 0 1 0
    until      9 9 9 9 6 6 9 9 9 11 11 12
    sampled    0 0 1 1 1 1 0 0 1 0 1 0

    who sees whom (rows look at columns)

         P P L L S S J J R X X .
     P   x
     P   x x
     L   x x x
     L   x x x x
     S   x x x x x
     S   x x x x x x
     J   x x x x . . x                the rewind: S is trained on, but nothing after the join sees it
     J   x x x x . . x x
     R   x x x x . . x x x
     X                     x          another segment sees only itself
     X                     x x
     .                         x      padding sees only itself

A segment carries its weights, advantage and log-probs before it is packed, so packing only copies columns.

Deviation from the paper's code: it encodes a parent once per call, so it computes a prefix again for every
join, and it trains on prompts and join blocks too. Here every sampled id is trained on exactly once, and
nothing else is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence

import numpy as np

from checks import require
from records import CONTEXT, SPAWNED, Call, Thread

Field = typing.Any  # an np.ndarray here, a jax.Array inside a jitted step


class TokenBatch(typing.NamedTuple):
    """Rows of packed segments. Every field is [R, T], or [M, R, T] in M micro-batches, and aligned with `tokens`.

    `weight` is the share of the token in the loss, 0 where the id was not sampled. The caller divides it by what the
    loss is averaged over, so no packing, padding, micro-batching or device count changes the loss.
    """

    tokens: Field  # int32
    positions: Field  # int32
    until: Field  # int32
    sampled: Field  # bool: the id was sampled, not injected
    weight: Field  # float32
    kl_weight: Field  # float32, the share in the penalty towards the reference (GRPO)
    advantage: Field  # float32, of the token's rollout (GRPO)
    old_logp: Field  # float32, under the policy that sampled it (GRPO; the sampler's own until replaced)
    ref_logp: Field  # float32, under the reference policy (GRPO)


@dataclasses.dataclass
class Segment:
    """One piece of a row: per-token lists of equal length. `until` counts from the start of the segment."""

    tokens: list[int]
    positions: list[int]
    until: list[int]
    logprobs: list[float]  # 0 where not sampled
    thread: Thread  # whose it is
    calls: list[int]  # per token the call that sampled it, -1 where not sampled
    weights: Sequence[tuple[float, float]] = ()  # of each call: weight and KL weight of its ids; (): 1 and 0
    advantage: float = 0.0
    source: tuple[int, int] = (0, 0)  # number of its demonstration, and which piece of it (SFT)

    def __len__(self) -> int:
        return len(self.tokens)


def splice(thread: Thread) -> Segment:
    """The thread as one segment, all its calls in the order of time."""
    segment = Segment([], [], [], [], thread, [])
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
    """Adds ids to a segment and to the thread's memory. Demonstrations and injected ids have no log-probs."""
    start, count = len(segment), len(ids)
    segment.tokens += ids
    segment.positions += range(len(memory), len(memory) + count)
    segment.until += [0] * count  # 0: not known to end yet
    segment.logprobs += logprobs or [0.0] * count
    segment.calls += [call] * count
    memory += range(start, start + count)


def segments(thread: Thread, length: int) -> list[Segment]:
    """The thread in segments of at most `length` tokens: spliced if it fits, else one per call.

    Calls that sampled nothing, for want of room, are left out where nothing follows them. Raises ValueError if
    a call alone is longer than `length`.
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
        require(len(piece) <= length, f"a call of {len(piece)} ids does not fit rows of {length}: use longer rows")
        piece.thread, piece.calls = thread, [number if call == 0 else -1 for call in piece.calls]
        pieces.append(piece)
    return pieces


def _call_alone(thread: Thread, number: int) -> Thread:
    """The thread's call `number` as if it were a first call: all its context is injected."""
    before = Thread(thread.path, thread.calls[:number]).ids()
    call = thread.calls[number]
    return Thread(thread.path, [Call(0, before[: call.keep] + call.injected, call.sampled, call.logprobs)])


def take_row(waiting: list[Segment], length: int) -> list[Segment]:
    """Takes the pieces of one row of `length` tokens out of `waiting`: the first, and those that best fill the rest.

    The first piece has waited longest, so none waits for ever. The others are found by subset sum: bit s of
    `sums[i]` says that some of the first i pieces add up to s tokens. From the best sum back, piece i is needed where
    its bit is not in `sums[i]`. Pieces of 3, 4 and 5 fill 8 by 5 and 3. Of equally good choices the one whose pieces
    came earlier is taken. Raises ValueError if the first piece is longer than the row.
    """
    row = [waiting.pop(0)]
    free = length - len(row[0])
    require(free >= 0, f"a segment of {len(row[0])} tokens does not fit rows of {length}")
    sums, mask = [1], (2 << free) - 1
    for piece in waiting:
        sums.append((sums[-1] | sums[-1] << len(piece)) & mask)
    best = sums[-1].bit_length() - 1
    for i in reversed(range(len(waiting))):
        if not sums[i] >> best & 1:  # out of reach without piece i
            best -= len(waiting[i])
            row.append(waiting.pop(i))
    return row


def pack(pieces: Iterable[Segment], length: int) -> list[list[Segment]]:
    """Rows of every piece, longest first. Raises ValueError if a piece is longer than a row."""
    waiting = sorted(pieces, key=len, reverse=True)
    rows = []
    while waiting:
        rows.append(take_row(waiting, length))
    return rows


def places(rows: Sequence[Sequence[Segment]]) -> Iterable[tuple[int, slice, Segment]]:
    """(row, columns, piece) of every piece: they lie one after another from the first column of their row."""
    for row, pieces in enumerate(rows):
        stop = 0
        for piece in pieces:
            start, stop = stop, stop + len(piece)
            yield row, slice(start, stop), piece


def lay_out(rows: Sequence[Sequence[Segment]], length: int) -> TokenBatch:
    """Rows of segments as a batch [R, T]."""
    shape = (len(rows), length)
    own_end = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape).copy()
    zeros = [np.zeros(shape, np.float32) for _ in range(5)]
    batch = TokenBatch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), own_end, np.zeros(shape, bool), *zeros)
    for row, span, segment in places(rows):
        batch.tokens[row, span] = segment.tokens
        batch.positions[row, span] = segment.positions
        batch.until[row, span] = np.asarray(segment.until, np.int32) + span.start
        calls = np.asarray(segment.calls)
        batch.sampled[row, span] = batch.weight[row, span] = calls >= 0
        if segment.weights:
            batch.weight[row, span], batch.kl_weight[row, span] = np.asarray([*segment.weights, (0, 0)])[calls].T
        batch.advantage[row, span] = segment.advantage * batch.sampled[row, span]
        batch.old_logp[row, span] = segment.logprobs
    return batch


def pad_microbatches(rows: list[list[Segment]], micro_rows: int) -> list[list[Segment]]:
    """Rows with empty ones behind them, so that they make 1, 2, 4, 8, ... micro-batches of `micro_rows` rows.

    Few numbers of micro-batches mean few compilations. Empty micro-batches are skipped and cost nothing.
    """
    count = -(-len(rows) // micro_rows)
    return rows + [[]] * ((1 << (count - 1).bit_length()) * micro_rows - len(rows))


def to_microbatches(batch: TokenBatch, micro_rows: int) -> TokenBatch:
    """A batch [R, T] as micro-batches [R / micro_rows, micro_rows, T]."""
    return TokenBatch(*(field.reshape(-1, micro_rows, field.shape[-1]) for field in batch))


def cut(thread: Thread, context: int) -> None:
    """Truncates a thread in place to the first call that overruns `context`, and that call to its limit."""
    for number, call in enumerate(thread.calls):
        room = context - call.keep - len(call.injected)
        if len(call.sampled) > room:
            call.sampled, call.logprobs = call.sampled[: max(room, 0)], call.logprobs[: max(room, 0)]
            call.stop = CONTEXT
            del thread.calls[number + 1 :]
            del thread.spawns[sum(call.stop in SPAWNED for call in thread.calls) :]
            return

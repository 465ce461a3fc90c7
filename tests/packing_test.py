"""Packing, against the definition: what every sampled id was conditioned on, found by brute force in the packed rows."""

from __future__ import annotations

import collections
import copy
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest

import packing
import records
from packing import (
    Segment,
    TokenBatch,
    lay_out,
    pack,
    pad_microbatches,
    places,
    segments,
    splice,
    take_row,
    to_microbatches,
)
from records import Call, Thread

Rows = list[list[Segment]]
P, L, S, J, R, X = range(11, 17)


def parent() -> Thread:
    """The example of the module header."""
    return Thread((), [Call(0, [P, P], [L, L, S, S], stop=records.SPAWN), Call(4, [J, J], [R])])


def random_thread(random_: random.Random, unique: bool = True) -> Thread:
    """One to five calls, each rewound to anywhere in the memory of the one before; no id occurs twice."""
    thread, fresh = Thread(()), iter(range(1, 1000))
    for number in range(random_.randint(1, 5)):
        keep = random_.randint(0, len(thread.ids())) if number else 0
        injected = [next(fresh) for _ in range(random_.randint(1, 4))]
        sampled = [next(fresh) for _ in range(random_.randint(0 if number else 1, 6))]
        thread.calls.append(Call(keep, injected, sampled, [-id_ / 8 for id_ in sampled], records.SPAWN))
    return thread


def seen(batch: TokenBatch, row: int, column: int) -> list[int]:
    """Columns of the row that are visible from this one."""
    return [j for j in range(column + 1) if column < batch.until[row, j]]


def conditions(thread: Thread) -> dict[int, tuple[list[int], float]]:
    """Every sampled id of the thread -> (what it was conditioned on, its log-probability)."""
    told, memory = {}, []
    for call in thread.calls:
        memory = memory[: call.keep] + call.injected
        for id_, logprob in zip(call.sampled, call.logprobs, strict=True):
            told[id_] = list(memory), logprob
            memory.append(id_)
    return told


def check(threads: Sequence[Thread], batch: TokenBatch, rows: Rows) -> None:
    """Every sampled id is trained exactly once, conditioned on exactly what it was sampled from; nothing else is trained."""
    trained: collections.Counter[tuple[int, int]] = collections.Counter()
    for row, span, segment in places(rows):
        told = conditions(segment.thread)
        for column in np.flatnonzero(batch.sampled[row, span]) + span.start:
            context, logprob = told[id_ := int(batch.tokens[row, column])]
            columns = seen(batch, row, column - 1)  # it is predicted one column before
            assert span.start <= min(columns)
            assert batch.tokens[row, columns].tolist() == context
            assert batch.positions[row, columns].tolist() == list(range(len(context)))
            assert (batch.positions[row, column], batch.old_logp[row, column]) == (len(context), np.float32(logprob))
            assert id_ in segment.thread.calls[segment.calls[column - span.start]].sampled
            trained[id(segment.thread), id_] += 1
    assert trained == {(id(thread), id_): 1 for thread in threads for id_ in conditions(thread)}
    assert int(batch.sampled.sum()) == sum(trained.values())
    np.testing.assert_array_equal(batch.weight, batch.sampled)
    assert not batch.old_logp[~batch.sampled].any() and not batch.advantage.any() and not batch.ref_logp.any()


def check_layout(pieces: Sequence[Segment], batch: TokenBatch, rows: Rows) -> None:
    """No segment is lost, none overlaps another, and what no segment covers is padding that nothing sees."""
    assert collections.Counter(map(id, pieces)) == collections.Counter(id(segment) for *_, segment in places(rows))
    count = np.zeros(batch.tokens.shape, int)
    for row, span, segment in places(rows):
        assert span.start >= 0 and span.stop - span.start == len(segment) and span.stop <= count.shape[1]
        count[row, span] += 1
    assert count.max() <= 1
    assert not batch.tokens[count == 0].any() and not batch.sampled[count == 0].any()
    for row, column in np.argwhere(count == 0):
        assert seen(batch, row, column) == [column] and batch.positions[row, column] == 0
        assert batch.until[row, column] == column + 1


def test_the_example_of_the_module_header() -> None:
    rows = [[splice(parent()), splice(Thread((), [Call(0, [X], [X])]))]]
    batch = lay_out(rows, 12)
    assert packing.__doc__
    drawn = {
        name: re.search(rf"    {name} +(.*)\n", packing.__doc__) for name in ("row", "position", "until", "sampled")
    }
    table = {name: line.group(1).split() for name, line in drawn.items() if line}
    assert "".join(table["row"]) == "PPLLSSJJRXX."
    names = {P: "P", L: "L", S: "S", J: "J", R: "R", X: "X", 0: "."}
    assert [names[id_] for id_ in batch.tokens[0].tolist()] == table["row"]
    assert list(map(str, batch.positions[0])) == table["position"]
    assert list(map(str, batch.until[0])) == table["until"]
    assert [str(int(sampled)) for sampled in batch.sampled[0]] == table["sampled"]
    assert [(row, span) for row, span, _ in places(rows)] == [(0, slice(0, 9)), (0, slice(9, 11))]


def test_the_matrix_of_the_module_header() -> None:
    batch = lay_out([[splice(parent()), splice(Thread((), [Call(0, [X], [X])]))]], 12)
    assert packing.__doc__
    lines = packing.__doc__.splitlines()
    head = next(number for number, line in enumerate(lines) if line.strip() == "P P L L S S J J R X X .")
    for row, line in enumerate(lines[head + 1 : head + 13]):
        marks = line[9:33].ljust(24)[::2]
        assert [column for column, mark in enumerate(marks) if mark == "x"] == seen(batch, 0, row), line


def test_a_spawn_block_is_seen_by_itself_and_by_nothing_after_the_rewind() -> None:
    batch = lay_out([[splice(parent())]], 9)
    assert seen(batch, 0, 5) == [0, 1, 2, 3, 4, 5]
    assert seen(batch, 0, 6) == [0, 1, 2, 3, 6]
    assert seen(batch, 0, 8) == [0, 1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("length", [100, 18])
def test_sampled_ids_see_exactly_what_they_were_sampled_from(length: int) -> None:
    """Rows of 100 hold whole threads; rows of 18 only calls, so that many threads fall into pieces."""
    random_, excess = random.Random(length), 0
    for _ in range(20):
        threads = [random_thread(random_) for _ in range(12)]
        threads = [thread for thread in threads if records.longest_context(thread) <= length]
        pieces = [piece for thread in threads for piece in segments(thread, length)]
        excess += len(pieces) - len(threads)
        rows = pad_microbatches(pack(pieces, length), 3)
        batch = lay_out(rows, length)
        check(threads, batch, rows)
        check_layout(pieces, batch, rows)
    assert excess > 50 if length == 18 else excess == 0


def test_a_thread_is_one_segment_if_it_fits_and_one_per_call_if_not() -> None:
    (whole,) = segments(parent(), 9)
    assert len(whole) == 9 and whole.calls == [-1, -1, 0, 0, 0, 0, -1, -1, 1]
    first, second = segments(parent(), 8)
    assert (first.tokens, first.calls) == ([P, P, L, L, S, S], [-1] * 2 + [0] * 4)
    assert (second.tokens, second.calls) == ([P, P, L, L, J, J, R], [-1] * 6 + [1])
    assert (first.until, second.until) == ([6] * 6, [7] * 7)
    with pytest.raises(ValueError, match="a call of 7 ids does not fit rows of 6"):
        segments(parent(), 6)


def test_a_call_that_sampled_nothing_needs_no_room() -> None:
    """A join, or a child's prompt, that fills the context ends the thread there: no id of it is to be trained on."""
    joined = Thread((), [Call(0, [P, P], [L, S], stop=records.SPAWN), Call(3, [J] * 9, stop=records.CONTEXT)])
    assert [(piece.tokens, sum(call >= 0 for call in piece.calls), piece.until) for piece in segments(joined, 8)] == [
        ([P, P, L, S], 2, [4] * 4)
    ]
    assert segments(joined, 8)[0].thread is joined
    assert segments(joined, 100)[0].tokens == [P, P, L, S]
    calls = [Call(0, [P, P], [L, S], stop=records.SPAWN), Call(3, [J], [R, S], stop=records.SPAWN), Call(4, [J] * 9)]
    assert [piece.tokens for piece in segments(Thread((), calls), 6)] == [[P, P, L, S], [P, P, L, J, R, S]]
    assert segments(Thread((0, 0), [Call(0, [P] * 9, stop=records.CONTEXT)]), 8) == []


def piece(length: int) -> Segment:
    return splice(Thread((), [Call(0, [P], [L] * (length - 1))]))


def test_a_row_takes_what_waits_longest_and_fills_the_rest_as_well_as_can_be() -> None:
    waiting = [piece(length) for length in (4, 9, 3, 5, 6, 2, 7)]
    assert [len(taken) for taken in take_row(waiting, 12)] == [4, 5, 3]  # not 6 + 2 or 7: these came later
    assert [len(left) for left in waiting] == [9, 6, 2, 7]
    assert [len(taken) for taken in take_row(waiting, 12)] == [9, 2]
    assert [len(taken) for taken in take_row(waiting, 12)] == [6]
    assert [len(left) for left in waiting] == [7]


def test_no_choice_of_pieces_fills_a_row_better() -> None:
    random_ = random.Random(0)
    for _ in range(100):
        lengths = [random_.randint(2, 30) for _ in range(8)]
        waiting = [piece(length) for length in lengths]
        taken = [len(taken_piece) for taken_piece in take_row(waiting, 40)]
        rest = lengths[1:]
        sums = {sum(x for i, x in enumerate(rest) if chosen >> i & 1) for chosen in range(1 << len(rest))}
        assert taken[0] == lengths[0]
        assert sum(taken) == lengths[0] + max(x for x in sums if x <= 40 - lengths[0])
        assert sorted(taken + [len(left) for left in waiting]) == sorted(lengths)


def test_rows_are_laid_out_one_segment_after_another() -> None:
    rows = [[piece(6), piece(4)], [], [piece(3)]]
    batch = lay_out(rows, 10)
    assert [(row, span.start, span.stop) for row, span, _ in places(rows)] == [(0, 0, 6), (0, 6, 10), (2, 0, 3)]
    assert not batch.sampled[1].any() and batch.until[1].tolist() == list(range(1, 11))


def test_the_fields_of_a_batch_have_the_types_they_say() -> None:
    batch = lay_out([[], []], 3)
    integers, boolean = ("tokens", "positions", "until"), ("sampled",)
    for name, field in batch._asdict().items():
        assert field.dtype == (np.int32 if name in integers else np.bool_ if name in boolean else np.float32), name
        assert field.shape == (2, 3)


def test_pack_packs_tightly_enough() -> None:
    pieces = [piece(length) for length in (2, 3, 5, 7, 5, 8)]
    rows = pack(pieces, 10)
    check_layout(pieces, lay_out(rows, 10), rows)
    assert len(rows) == 3  # 30 tokens: 8 + 2, 7 + 3, 5 + 5
    assert pack([], 10) == []


def test_pack_refuses_a_segment_that_fits_no_row() -> None:
    with pytest.raises(ValueError, match="a segment of 9 tokens does not fit rows of 8"):
        pack([splice(parent())], 8)


def test_what_is_attached_to_a_segment_lies_on_its_sampled_ids() -> None:
    segment = splice(parent())
    segment.weights, segment.advantage = [(0.5, 0.25), (2.0, 1.0)], -3.0
    batch = lay_out([[piece(2), segment]], 12)
    assert batch.weight[0].tolist() == [0, 1, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0, 2, 0]
    assert batch.kl_weight[0].tolist() == [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0, 1, 0]
    assert batch.advantage[0].tolist() == [0, 0, 0, 0, -3, -3, -3, -3, 0, 0, -3, 0]


def test_rows_are_padded_to_a_power_of_two_of_micro_batches() -> None:
    rows = [[piece(3)] for _ in range(5)]
    for micro_rows, count in ((1, 8), (2, 8), (3, 6), (4, 8), (5, 5), (8, 8)):
        padded = pad_microbatches(rows, micro_rows)
        assert padded[:5] == rows and padded[5:] == [[]] * (count - 5)
    micro = to_microbatches(lay_out(pad_microbatches(rows, 2), 4), 2)
    assert micro.tokens.shape == (4, 2, 4)
    assert micro.sampled.any(axis=(1, 2)).tolist() == [True, True, True, False]  # empty micro-batches come last


# ------------------------------------------------------------------- cut


def test_cut_leaves_alone_what_fits() -> None:
    thread, before = parent(), parent()
    packing.cut(thread, 7)  # 2 + 4 ids, then 4 + 2 + 1
    assert thread == before


@pytest.mark.parametrize(
    "context, sampled", [(6, [[L, L, S, S], []]), (5, [[L, L, S]]), (3, [[L]]), (2, [[]]), (1, [[]])]
)
def test_cut_ends_a_thread_at_its_context(context: int, sampled: list[list[int]]) -> None:
    thread = parent()
    for call in thread.calls:
        call.logprobs = [-float(id_) for id_ in call.sampled]
    packing.cut(thread, context)
    assert [call.sampled for call in thread.calls] == sampled
    assert [call.logprobs for call in thread.calls] == [[-float(id_) for id_ in ids] for ids in sampled]
    assert thread.stop == records.CONTEXT
    again = copy.deepcopy(thread)
    packing.cut(thread, context)
    assert thread == again


def test_cut_drops_the_children_of_calls_it_dropped() -> None:
    """`Thread.spawns[i]` are the children of the i-th call that stopped at SPAWN, after a cut too."""
    thread = parent()
    thread.spawns = [[Thread((0, 0), [Call(0, [P], [L])])]]
    packing.cut(thread, 5)
    assert len(thread.spawns) == sum(call.stop == records.SPAWN for call in thread.calls)

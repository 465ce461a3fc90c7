"""The runtime, driven by scripts: no weights, no JAX.

The scripted engine and its toy task are those of `examples/threads_without_a_model.py`; `examples/products.py` is a
second task, the product of two numbers by partial products. The random scripts are in `runtime_fuzz_test.py`.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

import parallel_runtime as pr
import records
from examples.products import Products
from examples.threads_without_a_model import Script, ScriptedEngine, Toy, ids, logprobs, text
from harness import workers
from parallel_runtime import Limits, Run, Runtime
from protocols import Completion, PrefillRequest, Request, Spawn, stop_ids
from records import Rollout, Thread

LIMITS = Limits(children=4, spawns=4, depth=1, thread_tokens=100, rollout_tokens=1000)
SEED = (7, 3)


class Watched(Runtime):
    """A runtime that keeps its last run, to be looked at."""

    last: Run

    def stream(self, requests: Sequence[Request], seed: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        self.last = Run(self, requests, seed)
        return self.last.rollouts()


class AsynchronousToy(Toy):
    """The toy whose parents go on: "~" stands for started children, "&" asks for the results of the oldest spawn."""

    join_id = ord("&")

    def started(self) -> list[int]:
        return ids("~")


def stops(task: Toy) -> str:
    """Letters that end a call of the task."""
    return text(stop_ids(task))


def by_context(told: dict[str, str]) -> Script:
    """The script that continues each of these contexts as told; any other is an error."""
    return lambda context, _: told[context]


def start(
    told: dict[str, str] | Script,
    *problems: str,
    limits: Limits = LIMITS,
    rows: int = 8,
    on_call: Callable[[Thread], None] | None = None,
    task: Toy | None = None,
    **engine: int,
) -> tuple[ScriptedEngine, Watched, list[Request]]:
    task = task or Toy()
    scripted = ScriptedEngine(by_context(told) if isinstance(told, dict) else told, rows, stops=stops(task), **engine)
    return scripted, Watched(scripted, task, limits, on_call), [Request(problem) for problem in problems or ("p:",)]


def solo(told: dict[str, str] | Script, **options: object) -> Thread:
    """Root of the one rollout of the problem "p:"."""
    engine, runtime, requests = start(told, **options)  # type: ignore[arg-type]
    rollouts = runtime.run(requests, SEED)
    check(rollouts, requests, engine, runtime)
    return rollouts[0].root


def check(rollouts: list[Rollout], requests: list[Request], engine: ScriptedEngine, runtime: Watched) -> None:
    """Every request is answered in order; what the engine held and sampled is what the record says; no row is leaked."""
    assert [(rollout.problem, rollout.index) for rollout in rollouts] == [(r.problem, r.index) for r in requests]
    expected = {}
    for request, rollout in zip(requests, rollouts, strict=True):
        for thread in rollout.threads():
            key, drawn, memory = pr.thread_key(SEED, request, thread.path), 0, ""
            for call in thread.calls:
                memory = memory[: call.keep] + text(call.injected)
                if call.sampled:
                    expected[key, drawn] = memory, text(call.sampled)
                drawn += len(call.sampled)
                memory += text(call.sampled)
                assert call.logprobs == logprobs(call.sampled)
            assert text(thread.ids()) == memory
    assert expected == engine.calls
    run = runtime.last
    assert run.rows == [None] * engine.rows and not (run.waiting or run.ready or run.active or run.ended)


def story(thread: Thread) -> list[tuple[str, str, str]]:
    """(injected, sampled, stop) of every call."""
    return [(text(call.injected), text(call.sampled), call.stop) for call in thread.calls]


# ------------------------------------------------------------------- spawn and join


def test_a_thread_that_spawns_nothing() -> None:
    assert story(solo({"p:": "abc."})) == [("p:", "abc.", records.END)]


def test_a_parent_is_rewound_to_before_its_spawn_and_extended_by_the_join() -> None:
    told = {"p:": "ab<c|d>", "c:": "1.", "d:": "22.", "p:ab[1,22]": "e."}
    engine, runtime, requests = start(told)
    root = runtime.run(requests, SEED)[0].root
    assert story(root) == [("p:", "ab<c|d>", records.SPAWN), ("[1,22]", "e.", records.END)]
    assert [call.keep for call in root.calls] == [0, len("p:ab")]
    assert text(root.ids()) == "p:ab[1,22]e."
    assert [[(child.path, story(child)) for child in spawn] for spawn in root.spawns] == [
        [((0, 0), [("c:", "1.", records.END)]), ((0, 1), [("d:", "22.", records.END)])]
    ]
    first, *_, last = engine.fills  # the parent kept its row and its cache: only the join block is new to it
    assert (last.row, last.keep, text(last.ids), last.num_sampled) == (first.row, len("p:ab"), "[1,22]", len("ab<c|d>"))
    assert runtime.evictions == 0


def test_several_joins_in_one_thread() -> None:
    told = {"p:": "<a>", "a:": "1.", "p:[1]": "x<b|c>", "b:": "2.", "c:": "3.", "p:[1]x[2,3]": "<a>"}
    told["p:[1]x[2,3][1]"] = "y."
    root = solo(told)
    assert text(root.ids()) == "p:[1]x[2,3][1]y."
    assert [[child.path for child in spawn] for spawn in root.spawns] == [[(0, 0)], [(1, 0), (1, 1)], [(2, 0)]]
    assert [call.keep for call in root.calls] == [0, len("p:"), len("p:[1]x"), len("p:[1]x[2,3]")]


def test_identical_children_are_different_threads_and_keep_their_order() -> None:
    results = iter(("1.", "2."))
    script: Script = lambda context, _: next(results) if context == "a:" else {"p:": "<a|a>", "p:[1,2]": "x."}[context]
    root = solo(script)
    assert [story(child) for child in root.spawns[0]] == [[("a:", "1.", records.END)], [("a:", "2.", records.END)]]
    assert text(root.ids()) == "p:[1,2]x."


def test_joins_are_in_order_of_spawn_whichever_child_ends_first() -> None:
    told = {"p:": "<a|b|c>", "a:": "11111.", "b:": "2.", "c:": "333.", "p:[11111,2,333]": "x."}
    for rows in (1, 2, 3, 4):
        assert text(solo(told, rows=rows).ids()) == "p:[11111,2,333]x."


def test_a_child_that_is_cut_has_failed_and_the_others_count() -> None:
    told = {"p:": "<a|b>", "a:": "x" * 200, "b:": "2.", "p:[!,2]": "y."}
    root = solo(told, limits=dataclasses.replace(LIMITS, thread_tokens=9))
    assert [child.stop for child in root.spawns[0]] == [records.THREAD_TOKENS, records.END]
    assert root.stop == records.END


def test_a_child_sees_its_prompt_only() -> None:
    told = {"p:": "secret<a>", "a:": "1.", "p:secret[1]": "."}
    engine, runtime, requests = start(told, rows=1)  # the child takes over the very row of its parent
    runtime.run(requests, SEED)
    assert [context for context, _ in engine.calls.values()] == ["p:", "a:", "p:secret[1]"]


@pytest.mark.parametrize(
    "block, detail",
    [("<>", "no children"), ("<a|7>", "unknown node '7'"), ("a>", "no block"), ("<a||b>", "unknown node ''")],
)
def test_a_malformed_spawn_ends_the_thread_and_says_why(block: str, detail: str) -> None:
    root = solo({"p:": block})
    assert (root.stop, root.detail, root.spawns) == (records.MALFORMED, detail, [])
    child = solo({"p:": "<a>", "a:": block, "p:[!]": "."}, limits=dataclasses.replace(LIMITS, depth=2)).spawns[0][0]
    assert (child.stop, child.detail) == (records.MALFORMED, detail)


def test_a_spawn_of_no_children_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "spawn", lambda task, ids: Spawn(0, []))
    root = solo({"p:": "<a>"})
    assert (root.stop, root.detail, root.spawns) == (records.MALFORMED, "no child", [])


# ------------------------------------------------------------------- bounds


def nested(result_of_c: str) -> dict[str, str]:
    told = {"p:": "ab<c|d>", "c:": "1<e|f>", "d:": "55555555.", "e:": "22.", "f:": "333.", "c:1[22,333]": "4."}
    return {**told, f"p:ab[{result_of_c},55555555]": "e."}


def test_a_spawn_inside_a_child_ends_it_at_depth_1() -> None:
    root = solo(nested("!"))
    assert [child.stop for child in root.spawns[0]] == [records.DEPTH, records.END]
    assert text(root.spawns[0][0].calls[-1].sampled) == "1<e|f>"


def test_depth_0_forbids_spawning() -> None:
    assert solo({"p:": "<a>"}, limits=dataclasses.replace(LIMITS, depth=0)).stop == records.DEPTH


def test_metrics_of_a_nested_tree_worked_out_by_hand() -> None:
    """root 7 + 2 ids; c 6 + 2 with e 3 and f 4 in between; d 9: after the root's 7 come max(6 + 4 + 2, 9), then 2."""
    engine, runtime, requests = start(nested("4"), limits=dataclasses.replace(LIMITS, depth=2))
    (rollout,) = runtime.run(requests, SEED)
    check([rollout], requests, engine, runtime)
    assert [thread.path for thread in rollout.threads()] == [(), (0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 1)]
    measured = records.metrics(rollout)
    assert measured.pop("milliseconds") >= 0
    assert measured == {
        "total_tokens": 7 + 2 + 6 + 2 + 3 + 4 + 9,
        "sequential_tokens": 7 + (6 + 4 + 2) + 2,
        "longest_context": len("p:ab[4,55555555]e."),
        "children": 4,
        "width": 2,
        "depth": 2,
        "truncated": 0.0,
        "malformed": 0.0,
    }
    assert engine.steps == 21  # with rows for all, the chain of dependent ids is what the engine waits for


def test_metrics_say_what_was_cut_or_malformed_anywhere_in_the_tree() -> None:
    told = {"p:": "<7>", "q:": "abcdef", "r:": "<a>", "a:": "xyzxyz", "r:[!]": "."}
    engine, runtime, requests = start(told, "p:", "q:", "r:", limits=dataclasses.replace(LIMITS, thread_tokens=4))
    malformed, cut, child_cut = map(records.metrics, runtime.run(requests, SEED))
    assert (malformed["malformed"], malformed["truncated"], malformed["width"], malformed["depth"]) == (1.0, 0.0, 0, 0)
    assert (cut["malformed"], cut["truncated"], cut["longest_context"]) == (0.0, 1.0, len("q:abcd"))
    assert (child_cut["truncated"], child_cut["children"], child_cut["sequential_tokens"]) == (1.0, 1, 3 + 4 + 1)


def test_spawns_and_children_are_bounded() -> None:
    told = {"p:": "<a|b>", "a:": "1.", "b:": "2.", "p:[1,2]": "<a>"}
    root = solo(told, limits=dataclasses.replace(LIMITS, spawns=1))
    assert root.stop == records.SPAWNS and len(root.spawns) == 1 and text(root.ids()) == "p:[1,2]<a>"
    root = solo(told, limits=dataclasses.replace(LIMITS, children=1))
    assert root.stop == records.CHILDREN and root.spawns == []
    assert solo({**told, "p:[1,2]": "."}, limits=dataclasses.replace(LIMITS, children=2, spawns=1)).stop == records.END


def test_a_root_that_is_cut_is_made_to_answer_once() -> None:
    limits = dataclasses.replace(LIMITS, thread_tokens=5, forced_answer_tokens=4)
    root = solo({"p:": "abcdefgh", "p:abcde=": "xy."}, limits=limits)
    assert story(root) == [("p:", "abcde", records.THREAD_TOKENS), ("=", "xy.", records.END)]
    assert text(root.ids()) == "p:abcde=xy."
    root = solo({"p:": "abcdefgh", "p:abcde=": "stuvwxyz"}, limits=limits)
    assert story(root) == [("p:", "abcde", records.THREAD_TOKENS), ("=", "stuv", records.THREAD_TOKENS)]
    assert solo({"p:": "abcd."}, limits=limits).stop == records.END  # nothing is cut
    assert len(solo({"p:": "a" * 50}, limits=limits, context=7).calls) == 1  # no room for an answer


def test_a_child_that_is_cut_is_not_made_to_answer() -> None:
    limits = dataclasses.replace(LIMITS, thread_tokens=5, forced_answer_tokens=4, min_budget_rounds=3)
    root = solo({"p:": "k<a>", "a:": "bcdefg", "p:k[!]": "."}, limits=limits)
    assert story(root.spawns[0][0]) == [("a:", "bcdef", records.THREAD_TOKENS)]


def test_a_root_that_gives_up_is_sent_on_so_many_times() -> None:
    told = {"p:": "ab.", "p:ab+": "c<d>", "d:": "1.", "p:ab+c[1]": "e.", "p:ab+c[1]e+": "f."}
    root = solo(told, limits=dataclasses.replace(LIMITS, min_budget_rounds=2))
    assert story(root) == [
        ("p:", "ab.", records.END), ("+", "c<d>", records.SPAWN), ("[1]", "e.", records.END), ("+", "f.", records.END)
    ]  # fmt: skip
    assert text(root.ids()) == "p:ab+c[1]e+f."  # the end is taken back
    assert records.sequential_tokens(root) == len("ab.c<d>e.f.") + len("1.")
    assert [call.stop for call in solo(told, limits=dataclasses.replace(LIMITS, min_budget_rounds=1)).calls][-1:] == [records.END]
    assert story(solo({"p:": "ak."}, limits=dataclasses.replace(LIMITS, min_budget_rounds=2))) == [("p:", "ak.", records.END)]
    assert story(solo(told)) == [("p:", "ab.", records.END)]


def test_a_root_sent_on_without_a_token_left_answers_from_what_it_was_sent_on_with() -> None:
    limits = dataclasses.replace(LIMITS, thread_tokens=3, forced_answer_tokens=2, min_budget_rounds=1)
    root = solo({"p:": "ab.", "p:ab+=": "k."}, limits=limits)
    assert story(root) == [("p:", "ab.", records.END), ("+", "", records.THREAD_TOKENS), ("=", "k.", records.END)]


def test_the_context_runs_out_in_a_parent() -> None:
    assert story(solo({"p:": "x" * 50}, context=10)) == [("p:", "x" * 8, records.CONTEXT)]


def test_the_context_runs_out_in_a_child() -> None:
    root = solo({"p:": "<a>", "a:": "x" * 50, "p:[!]": "."}, context=10)
    assert [story(child) for child in root.spawns[0]] == [[("a:", "x" * 8, records.CONTEXT)]]
    assert root.stop == records.END


def test_a_child_whose_prompt_fills_the_context_never_starts() -> None:
    told = {"p:": "<A|b>", "b:": "2.", "p:[!,2]": "."}
    root = solo(told, context=20)  # "A" has a prompt of 20 ids
    assert story(root.spawns[0][0]) == [("A" * 19 + ":", "", records.CONTEXT)]
    assert root.stop == records.END
    told["A" * 19 + ":"] = "xx"
    assert story(solo(told, context=21).spawns[0][0])[0][1:] == ("x", records.CONTEXT)
    engine, runtime, requests = start({"p:": "<A|B>", "p:[!,!]": "."}, context=20, rows=1)
    check(runtime.run(requests, SEED), requests, engine, runtime)
    assert runtime.evictions == 0  # no child ever takes a row


def test_the_context_runs_out_at_the_join() -> None:
    told = {"p:": "x<a>", "a:": "1234567.", "p:x[1234567]": "yz"}
    assert story(solo(told, context=12))[1] == ("[1234567]", "", records.CONTEXT)  # 3 + 9 ids
    assert story(solo(told, context=13))[1] == ("[1234567]", "y", records.CONTEXT)


def test_thread_tokens_count_all_calls_of_a_thread_and_not_its_children() -> None:
    told = {"p:": "<a>", "a:": "1234567", "p:[!]": "xxxxxxx"}
    root = solo(told, limits=dataclasses.replace(LIMITS, thread_tokens=5))
    assert story(root.spawns[0][0]) == [("a:", "12345", records.THREAD_TOKENS)]
    assert story(root)[1] == ("[!]", "xx", records.THREAD_TOKENS)
    exact = solo({"p:": "abcd."}, limits=dataclasses.replace(LIMITS, thread_tokens=5))
    assert exact.stop == records.END  # ending on the last id allowed is ending


def test_a_thread_that_used_up_its_tokens_before_a_join_ends_there() -> None:
    root = solo({"p:": "<a>", "a:": "1."}, limits=dataclasses.replace(LIMITS, thread_tokens=3))
    assert story(root) == [("p:", "<a>", records.SPAWN), ("[1]", "", records.THREAD_TOKENS)]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_children_share_what_is_left_of_the_rollouts_tokens_equally(rows: int) -> None:
    """24 - 7 = 17 ids are left: 5 for each of three children. b leaves 3 of its 5, so the root has 17 - 12 = 5 more."""
    told = {"p:": "<a|b|c>", "a:": "x" * 50, "b:": "1.", "c:": "y" * 50, "p:[!,1,!]": "z" * 50}
    root = solo(told, limits=dataclasses.replace(LIMITS, rollout_tokens=24), rows=rows)
    assert [story(child)[0][1:] for child in root.spawns[0]] == [
        ("x" * 5, records.ROLLOUT_TOKENS),
        ("1.", records.END),
        ("y" * 5, records.ROLLOUT_TOKENS),
    ]
    assert story(root)[1] == ("[!,1,!]", "z" * 5, records.ROLLOUT_TOKENS)
    assert records.total_tokens(root) == 24


def test_grandchildren_share_their_parents_part() -> None:
    """30 - 5 leaves 12 for each child; a spends 3 and leaves 9, which its child may use up."""
    told = {"p:": "<a|b>", "a:": "<c>", "b:": ".", "c:": "x" * 50, "p:[!,]": "."}
    limits = dataclasses.replace(LIMITS, rollout_tokens=30, depth=2)
    child = solo(told, limits=limits).spawns[0][0]
    assert story(child.spawns[0][0]) == [("c:", "x" * 9, records.ROLLOUT_TOKENS)]
    assert story(child)[1] == ("[!]", "", records.ROLLOUT_TOKENS)


def test_children_for_whom_nothing_is_left_never_start() -> None:
    root = solo({"p:": "<a|b>", "p:[!,!]": "xxx"}, limits=dataclasses.replace(LIMITS, rollout_tokens=6))
    assert [story(child) for child in root.spawns[0]] == [
        [("a:", "", records.ROLLOUT_TOKENS)],
        [("b:", "", records.ROLLOUT_TOKENS)],
    ]
    assert story(root)[1] == ("[!,!]", "x", records.ROLLOUT_TOKENS)


@pytest.mark.parametrize(
    "field, least", [("children", 0), ("spawns", 0), ("depth", 0), ("thread_tokens", 1), ("rollout_tokens", 1)]
)
def test_limits_are_validated(field: str, least: int) -> None:
    dataclasses.replace(LIMITS, **{field: least})
    with pytest.raises(ValueError, match=f"limits.{field}={least - 1} must be at least {least}"):
        dataclasses.replace(LIMITS, **{field: least - 1})


def test_a_prompt_that_leaves_no_room_is_an_error_with_the_remedy() -> None:
    engine, runtime, requests = start({"p:": "x", "long:": "x"}, "p:", "long:", context=5)
    with pytest.raises(ValueError, match="prompt of long: has 5 ids and the context 5.*longer context"):
        runtime.run(requests, SEED)
    assert story(solo({"p:": "x"}, context=3)) == [("p:", "x", records.CONTEXT)]


# ------------------------------------------------------------------- scheduling

BUSY = {
    "p:": "ab<a|a|b>",
    "q:": "<b|a>",
    "r:": "no.",
    "a:": "<c|d>",
    "b:": "12345.",
    "c:": "1.",
    "d:": "22<e>",
    "a:[1,!]": "3<d>",
    "a:[1,!]3[!]": "4.",
    "p:ab[4,4,12345]": "x<b>",
    "p:ab[4,4,12345]x[12345]": "y.",
    "q:[12345,4]": "z.",
}


def busy(
    rows: int, devices: int = 1, patience: int = 1
) -> tuple[ScriptedEngine, Runtime, list[Request], list[Rollout]]:
    limits = dataclasses.replace(LIMITS, depth=2)
    engine, runtime, requests = start(
        BUSY, "p:", "q:", "r:", "q:", limits=limits, rows=rows, devices=devices, patience=patience
    )
    requests[3] = Request("q:", index=1)
    rollouts = runtime.run(requests, SEED)
    check(rollouts, requests, engine, runtime)
    return engine, runtime, requests, rollouts


def same(rollouts: list[Rollout]) -> list[Rollout]:
    return [dataclasses.replace(rollout, milliseconds=0.0) for rollout in rollouts]


def test_rollouts_do_not_depend_on_rows_devices_or_bursts() -> None:
    *_, expected = busy(rows=32)
    cases = [(rows, 1) for rows in range(1, 10)] + [(2, 2), (8, 2), (4, 4), (8, 4)]
    for rows, devices in cases:
        for patience in (1, 2, 5):
            engine, *_, rollouts = busy(rows, devices, patience)
            assert same(rollouts) == same(expected), (rows, devices, patience)
            assert {fill.row for fill in engine.fills} <= set(range(rows))


def test_the_draws_of_a_call_are_fixed_by_its_thread_and_how_much_that_has_drawn() -> None:
    def draws(engine: ScriptedEngine) -> set[tuple[tuple[int, int], int]]:
        return {(fill.key, fill.num_sampled) for fill in engine.fills}

    engine, _, requests, rollouts = busy(rows=32)
    assert draws(engine) == draws(busy(rows=1)[0]) == draws(busy(rows=8, devices=4, patience=3)[0])
    root = rollouts[0].root
    key = pr.thread_key(SEED, requests[0], ())
    assert [fill.num_sampled for fill in engine.fills if fill.key == key] == [0, 9, 13]  # "ab<a|a|b>", "x<b>", "y."
    keys = {
        pr.thread_key(SEED, r, thread.path) for r, o in zip(requests, rollouts, strict=True) for thread in o.threads()
    }
    assert len(keys) == sum(len(rollout.threads()) for rollout in rollouts)
    assert all(0 <= word < 2**32 for pair in keys for word in pair)
    alone, runtime, _ = start(BUSY, limits=dataclasses.replace(LIMITS, depth=2))
    assert runtime.run([requests[0]], SEED)[0].root == root  # with neighbours or without
    assert draws(alone) < draws(engine)


def test_thread_keys_differ_in_whatever_they_belong_to() -> None:
    request = Request("p:")
    keys = {
        pr.thread_key(seed, of, path)
        for seed in [(0, 0), (0, 1), (1, 0)]
        for of in [request, Request("q:"), Request("p:", 1)]
        for path in [(), (0, 0), (0, 1), (1, 0), (0, 0, 0, 0)]
    }
    assert len(keys) == 3 * 3 * 5
    assert pr.thread_key([1, 2], request, [0, 1]) == pr.thread_key((1, 2), Request("p:"), (0, 1))


def test_results_are_in_order_of_requests_and_stream_is_in_order_of_ends() -> None:
    told = {"p:": "long one.", "q:": "<a>", "a:": "1.", "q:[1]": ".", "r:": "."}
    engine, runtime, requests = start(told, "p:", "q:", "r:")
    assert [rollout.problem for rollout in runtime.run(requests, SEED)] == ["p:", "q:", "r:"]
    assert [number for number, _ in runtime.stream(requests, SEED)] == [2, 1, 0]
    for number, rollout in runtime.stream(requests, SEED):  # yielded as they finish, not at the end
        assert (number, rollout.problem) == (2, "r:") and len(engine.calls) == 3
        break


@pytest.mark.parametrize("rows", [2, 32])
def test_a_stream_that_was_abandoned_leaves_nothing_behind(rows: int) -> None:
    engine, runtime, requests, expected = busy(rows)
    for taken in range(1, 4):
        for some in (slice(None), slice(2, 3)):
            stream = runtime.stream(requests, SEED)
            for _ in range(taken):
                next(stream)
            rollouts = runtime.run(requests[some], SEED)
            check(rollouts, requests[some], engine, runtime)
            assert same(rollouts) == same(expected[some])


def test_an_interrupted_run_hands_over_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"p:": "long one.", "q:": "<a>", "a:": "1.", "q:[1]": ".", "r:": "."}
    engine, runtime, requests = start(told, "p:", "q:", "r:")
    expected = runtime.run(requests, SEED)
    decode, calls = engine.decode, []

    def interrupted() -> list[Completion]:
        calls.append(1)
        if len(calls) == 4:  # "r:" has ended by now, "p:" has not
            raise KeyboardInterrupt
        return decode()

    monkeypatch.setattr(engine, "decode", interrupted)
    with pytest.raises(workers.Interrupted) as caught:
        workers.run_on_workers([runtime], requests, SEED)
    assert isinstance(caught.value, KeyboardInterrupt)  # what does not know of it is interrupted all the same
    finished = [rollout.problem for rollout in caught.value.rollouts]
    assert finished and set(finished) < {"p:", "q:", "r:"} and finished == sorted(finished)
    by_problem = {rollout.problem: rollout for rollout in expected}
    assert same(caught.value.rollouts) == same([by_problem[problem] for problem in finished])


# ------------------------------------------------------------------- parents that go on

GOING_ON = {
    "p:": "ab<c>",
    "p:ab~": "<d|e>",
    "p:ab~~": "f&",
    "c:": "1.",
    "d:": "22.",
    "e:": "long one.",
    "p:ab~~f[1]": "&",
    "p:ab~~f[1][22,long one]": "g.",
}


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_parent_goes_on_after_a_spawn_and_joins_its_oldest_children_when_it_asks(rows: int) -> None:
    root = solo(GOING_ON, task=AsynchronousToy(), rows=rows)
    assert story(root) == [
        ("p:", "ab<c>", records.FORK),
        ("~", "<d|e>", records.FORK),
        ("~", "f&", records.JOIN),
        ("[1]", "&", records.JOIN),
        ("[22,long one]", "g.", records.END),
    ]
    assert [call.keep for call in root.calls] == [0, len("p:ab"), len("p:ab~"), len("p:ab~~f"), len("p:ab~~f[1]")]
    assert [[(child.path, text(child.calls[-1].sampled)) for child in children] for children in root.spawns] == [
        [((0, 0), "1.")],
        [((1, 0), "22."), ((1, 1), "long one.")],
    ]


def test_the_critical_path_of_a_parent_that_goes_on() -> None:
    """On the clock: 5 letters, "c" from 5 to 7; 5 more, the others from 10, to 19 at last; f& at 12, & at 13, g. at 21."""
    assert records.sequential_tokens(solo(GOING_ON, task=AsynchronousToy())) == 21
    quick = GOING_ON | {"d:": "2.", "e:": "1.", "p:ab~~f[1][2,1]": "g."}  # the parent is never late: its own tokens alone
    assert records.sequential_tokens(solo(quick, task=AsynchronousToy())) == 5 + 5 + 2 + 1 + 2


def test_children_that_nobody_joined_run_on_and_the_rollout_waits_for_them() -> None:
    told = {"p:": "<a>", "p:~": ".", "a:": "<b>", "a:~": "xyz&", "b:": "7.", "a:~xyz[7]": "."}
    limits = dataclasses.replace(LIMITS, depth=2)
    for rows in (1, 8):
        _, runtime, requests = start(told, task=AsynchronousToy(), limits=limits, rows=rows)
        stops = [[thread.stop for thread in rollout.threads()] for _, rollout in runtime.stream(requests, SEED)]
        assert stops == [[records.END] * 3]  # when the rollout is handed over
        root = solo(told, task=AsynchronousToy(), limits=limits, rows=rows)
        assert [thread.stop for thread in root.walk()] == [records.END] * 3
        assert records.sequential_tokens(root) == len("<a>.") < records.total_tokens(root)


def test_a_thread_without_children_left_to_join_is_malformed() -> None:
    for told in ({"p:": "x&"}, {"p:": "<a>", "p:~": "&", "a:": "1.", "p:~[1]": "&"}):
        root = solo(told, task=AsynchronousToy())
        assert (root.stop, root.detail) == (records.MALFORMED, "no children left to join")


def test_a_parent_that_goes_on_shares_its_tokens_with_the_spawns_to_come() -> None:
    """100 ids are left and 4 spawns: each gets a fifth. The second child may sample 19 and wants 21."""
    limits = dataclasses.replace(LIMITS, rollout_tokens=103, thread_tokens=200)
    told = {"p:": "<a>", "p:~": "<b>", "p:~~": "&", "a:": "k" * 19 + ".", "b:": "k" * 20 + "."}
    told |= {f"p:~~[{'k' * 19}]": "&", f"p:~~[{'k' * 19}][!]": "."}
    root = solo(told, task=AsynchronousToy(), limits=limits)
    # (103 - 3) // 5 = 20, then (83 - 6) // 4 = 19
    assert [thread.stop for thread in root.walk()] == [records.END, records.END, records.ROLLOUT_TOKENS]
    assert [records.total_tokens(children[0]) for children in root.spawns] == [20, 19]


@pytest.mark.parametrize(("rows", "patience"), [(1, 1), (2, 2), (8, 1), (8, 3)])
def test_what_a_grandchild_may_yet_sample_is_not_given_back(rows: int, patience: int) -> None:
    """The root joins "a" while its child "b" runs. 197 // 2 = 98 for a, (98 - 3) // 2 = 47 for b, which samples 5."""
    told = {"p:": "<a>", "p:~": "&", "a:": "<b>", "a:~": "zzzzzzzzzz.", "b:": "yyyy."}
    script: Script = lambda context, _: told.get(context, "x" * 400)
    limits = Limits(children=4, spawns=1, depth=2, thread_tokens=1000, rollout_tokens=200)
    root = solo(script, task=AsynchronousToy(), limits=limits, rows=rows, context=900, patience=patience)
    assert [sum(len(call.sampled) for call in thread.calls) for thread in root.walk()] == [200 - 14 - 47, 14, 5]
    assert (root.stop, records.total_tokens(root)) == (records.ROLLOUT_TOKENS, 200 - 47 + 5)


# ------------------------------------------------------------------- several runtimes side by side


def echo(context: str, _: PrefillRequest) -> str:
    return context[0] * (3 + ord(context[0]) % 5) + "."


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_lanes_do_the_work_of_one_runtime_each_an_equal_share(lanes: int) -> None:
    _, runtime, requests = start(echo, "p:", "q:", "r:", "s:", "t:")
    expected = runtime.run(requests, SEED)
    started = [start(echo, rows=1) for _ in range(lanes)]
    told: list[bool] = []
    rollouts = workers.run_on_workers([runtime for _, runtime, _ in started], requests, SEED, lambda: told.append(True))
    assert same(rollouts) == same(expected) and len(told) == 5
    shares = [len(scripted.calls) for scripted, _, _ in started]
    assert sum(shares) == 5 and max(shares) - min(shares) <= 1


def test_lanes_decode_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started, meeting = [start(echo) for _ in range(2)], threading.Barrier(2, timeout=60)
    for engine, _, _ in started:
        decode = engine.decode
        monkeypatch.setattr(engine, "decode", lambda decode=decode: (meeting.wait(), decode())[1])
    requests = [Request("p:"), Request("q:")]
    assert len(workers.run_on_workers([runtime for _, runtime, _ in started], requests, SEED)) == 2


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_what_stops_one_lane_stops_the_others(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    (broken, first, _), (endless, second, _) = start(echo), start(echo, rows=1)
    requests = [Request("p:", index) for index in range(200)]
    decode, going = endless.decode, threading.Event()

    def slow() -> list[Completion]:
        if len(endless.calls) > 3:
            going.set()
            time.sleep(0.01)
        return decode()

    def fail() -> list[Completion]:
        going.wait()
        raise fault

    monkeypatch.setattr(endless, "decode", slow)
    monkeypatch.setattr(broken, "decode", fail)
    with pytest.raises(fault) as caught:
        workers.run_on_workers([first, second], requests, SEED)
    assert len(endless.calls) < len(requests) // 2  # its share
    if fault is KeyboardInterrupt:
        done = [rollout.index for rollout in caught.value.rollouts]  # type: ignore[attr-defined]
        assert len(done) >= 3 and done == list(range(1, 200, 2))[: len(done)]


def test_no_requests_are_no_rollouts() -> None:
    engine, runtime, _ = start({})
    assert runtime.run([], SEED) == []


def test_one_row_does_one_problem_after_the_other() -> None:
    engine, runtime, requests, rollouts = busy(rows=1)
    owner = {
        pr.thread_key(SEED, request, thread.path): number
        for number, request in enumerate(requests)
        for thread in rollouts[number].threads()
    }
    order = [owner[fill.key] for fill in engine.fills]
    assert order == sorted(order)  # children and joins come before new problems
    spawned = sum(len(thread.spawns) for rollout in rollouts for thread in rollout.threads())
    assert runtime.evictions == spawned  # every parent that waits must give the only row to a child
    assert engine.steps == sum(records.total_tokens(rollout.root) for rollout in rollouts)


def test_a_waiting_parent_keeps_its_row_as_long_as_there_are_rows() -> None:
    engine, runtime, _, rollouts = busy(rows=32)
    assert runtime.evictions == 0
    joins = [fill for fill in engine.fills if fill.num_sampled]
    assert joins and all(fill.keep > 0 for fill in joins)
    assert engine.steps == max(records.sequential_tokens(rollout.root) for rollout in rollouts)


def test_the_parent_that_began_to_wait_last_gives_up_its_row() -> None:
    told = {"p:": "<a>", "a:": "1" * 20 + ".", "q:": "xxx<b>", "b:": "2.", "q:xxx[2]": "."}
    told["p:[" + "1" * 20 + "]"] = "."
    engine, runtime, requests = start(told, "p:", "q:", rows=3)  # p and its child hold two; q yields the third to b
    check(runtime.run(requests, SEED), requests, engine, runtime)
    joins = {text(fill.ids)[:2]: fill.keep for fill in engine.fills if fill.num_sampled}
    assert runtime.evictions == 1
    assert joins == {"[1": len("p:"), "q:": 0}  # p is extended in its row, q is prefilled again


def test_while_half_of_the_rows_are_busy_no_parent_gives_up_its_row() -> None:
    told = {"p:": "<a>", "a:": "1" * 20 + ".", "q:": "1" * 25 + ".", "r:": "xxx<b>", "b:": "2.", "r:xxx[2]": "."}
    told["p:[" + "1" * 20 + "]"] = "."
    engine, runtime, requests = start(told, "p:", "q:", "r:", rows=4)  # p and r wait in two, a and q decode in two
    check(runtime.run(requests, SEED), requests, engine, runtime)
    assert runtime.evictions == 0


def test_a_new_problem_never_evicts() -> None:
    told = {"p:": "<a>", "a:": "11111.", "q:": "xx.", "r:": ".", "p:[11111]": "."}
    engine, runtime, requests = start(told, "p:", "q:", "r:", rows=2)  # p and q stop together; a takes q's row
    check(runtime.run(requests, SEED), requests, engine, runtime)
    assert [text(fill.ids) for fill in engine.fills] == ["p:", "q:", "a:", "[11111]", "r:"]
    assert runtime.evictions == 0


def test_new_threads_go_to_the_least_busy_device() -> None:
    told = {"p:": "x" * 9 + ".", "q:": ".", "r:": "x" * 9 + ".", "s:": "<a|b>", "a:": "1.", "b:": "2.", "s:[1,2]": "."}
    engine, runtime, requests = start(told, "p:", "q:", "r:", "s:", rows=8, devices=2)
    runtime.run(requests, SEED)
    placed = [(text(fill.ids), fill.row // 4) for fill in engine.fills]
    assert placed[:4] == [("p:", 0), ("q:", 1), ("r:", 0), ("s:", 1)]
    assert placed[4:] == [("a:", 1), ("b:", 1), ("[1,2]", 1)]  # q has ended and s waits: device 1 has nothing to do


def test_watch_is_called_with_the_thread_whenever_a_call_of_it_has_stopped() -> None:
    seen: list[tuple[tuple[int, ...], int]] = []
    limits = dataclasses.replace(LIMITS, depth=2)
    root = solo(BUSY, limits=limits, on_call=lambda thread: seen.append((thread.path, len(thread.calls))))
    assert sorted(seen) == sorted((thread.path, n + 1) for thread in root.walk() for n in range(len(thread.calls)))


def test_watch_is_called_for_calls_that_found_no_room_too() -> None:
    seen: list[tuple[tuple[int, ...], str]] = []
    solo({"p:": "<A>", "p:[!]": "."}, context=20, on_call=lambda thread: seen.append((thread.path, thread.stop)))
    assert ((0, 0), records.CONTEXT) in seen


# ------------------------------------------------------------------- a second task


def calculate(context: str, _: PrefillRequest) -> str:
    """A policy for `Products`; it believes that 7 * 7 is 48."""
    if partial := re.search(r"\[([\d+]*)\]$", context):
        return f"{sum(map(int, partial.group(1).split('+')))}."
    left, right = context.rstrip("=").split("*")
    if not right.rstrip("0")[1:]:
        return "48." if (left, right) == ("7", "7") else f"{int(left) * int(right)}."
    digits = [(digit, "0" * power) for power, digit in enumerate(reversed(right)) if digit != "0"]
    return "<" + "|".join(f"{left}*{digit}{zeros}" for digit, zeros in digits) + ">"


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_new_task_is_a_new_protocol_object_and_nothing_else(rows: int) -> None:
    engine = ScriptedEngine(calculate, rows)
    runtime = Watched(engine, Products(), LIMITS)
    problems = [(12, 34), (7, 7), (999, 1203), (5, 20), (0, 11)]
    requests = [Request(problem) for problem in problems]
    rollouts = runtime.run(requests, SEED)
    check(rollouts, requests, engine, runtime)
    assert [rollout.grade.answer for rollout in rollouts] == [("408",), ("48",), ("1201797",), ("100",), ("0",)]
    assert [rollout.grade.correct for rollout in rollouts] == [True, False, True, True, True]
    assert rollouts[1].grade.reason == "48 is not 7 * 7"
    assert text(rollouts[2].root.ids()) == "999*1203=[2997+199800+999000]1201797."
    assert [records.metrics(rollout)["children"] for rollout in rollouts] == [2, 0, 3, 0, 2]

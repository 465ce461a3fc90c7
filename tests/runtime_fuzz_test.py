"""The runtime under scripts that write at random, within random limits, on random rows.

Half of the scripts write noise, half know the grammar and get it wrong now and
then. Whatever they write: no crash, no hang, no leaked row, every request
answered, every thread ended for a reason that is true, and the
same rollouts on other rows. 2,000 rollouts by
default, 100,000 with `python -m pytest -m slow tests/runtime_fuzz_test.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import random

import pytest

import records
from examples.threads_without_a_model import Script, ScriptedEngine, Toy, ids, text
from parallel_runtime import Limits
from protocols import PrefillRequest, Request
from records import Rollout, Thread
from tests.parallel_runtime_test import AsynchronousToy, Watched, check, stops

SEED = (7, 3)
ROLLOUTS = 20  # per run


LETTERS = "kb<|>.,&"


def noise(context: str, fill: PrefillRequest) -> str:
    random_ = random.Random(f"{fill.key} {fill.num_sampled}")
    return "".join(random_.choices(LETTERS, (4, 4, 3, 2, 2, 1, 1, 1), k=fill.max_new_tokens))


def grammar(context: str, fill: PrefillRequest) -> str:
    random_ = random.Random(f"{fill.key} {fill.num_sampled}")
    kind = random_.random()
    before = "x" * random_.randrange(12)
    if kind < 0.35:
        return before + "." + "z" * fill.max_new_tokens
    if kind < 0.45:
        return "y" * fill.max_new_tokens
    if kind < 0.65 and "~" in context:  # else "&" is a letter
        return before + "&" + "z" * fill.max_new_tokens
    names = random_.choices(
        ["a", "b", "cc", "A", "7", ""], (8, 8, 8, 2, 0.3, 0.3), k=random_.choice((0, 1, 1, 2, 2, 3, 4))
    )
    mark = "<" if kind < 0.97 else ""
    return before + mark + "|".join(names) + ">" + "z" * fill.max_new_tokens


def random_limits(random_: random.Random) -> Limits:
    return Limits(
        children=random_.randint(0, 4),
        spawns=random_.randint(0, 4),
        depth=random_.randint(0, 4),
        thread_tokens=random_.choice((1, 5, 20, 60)),
        rollout_tokens=random_.choice((1, 10, 50, 200, 1000)),
        forced_answer_tokens=random_.choice((0, 0, 1, 7)),
        min_budget_rounds=random_.choice((0, 0, 1, 3)),
    )


def fuzz(number: int, reasons: collections.Counter[str]) -> None:
    """One run of `ROLLOUTS` rollouts, fixed by its number."""
    random_ = random.Random(number)
    script: Script = random_.choice((noise, grammar))
    task = random_.choice((Toy(), AsynchronousToy()))
    limits, context = random_limits(random_), random_.choice((8, 25, 60, 200))
    requests = [Request(random_.choice(("p:", "quite:")), number * ROLLOUTS + index) for index in range(ROLLOUTS)]

    def rollouts_on(devices: int, rows: int, patience: int) -> list[Rollout]:
        engine = ScriptedEngine(script, rows, devices, context, patience, stops(task))
        runtime = Watched(engine, task, limits)
        rollouts = runtime.run(requests, SEED)
        check(rollouts, requests, engine, runtime)
        return [dataclasses.replace(rollout, milliseconds=0.0) for rollout in rollouts]

    devices = random_.choice((1, 2, 4))
    rows = devices * random_.randint(1, 9)
    rollouts = rollouts_on(devices, rows, random_.randint(1, rows))
    assert rollouts == rollouts_on(1, random_.randint(1, 9), 1)
    for rollout in rollouts:
        assert text(rollout.root.calls[0].injected) == rollout.problem
        reasons.update(thread.stop for thread in rollout.threads())
        verify(rollout.root, task, limits, context, limits.rollout_tokens)


def verify(thread: Thread, task: Toy, limits: Limits, context: int, allowance: int) -> int:
    """The thread and its descendants keep every bound, and each ended for the reason it gives.

    Returns what the thread might still have sampled, without what it granted to children that it did not join.
    """
    memory: list[int] = []
    bound = limits.thread_tokens
    own, extended, answering, spawns, granted = 0, 0, False, iter(enumerate(thread.spawns)), allowance
    unjoined: list[tuple[list[Thread], int]] = []  # with what they leave unused
    for number, call in enumerate(thread.calls):
        memory = memory[: call.keep] + call.injected + call.sampled
        own += len(call.sampled)
        assert not call.sampled or len(memory) <= context
        if call is thread.calls[-1]:
            break
        if call.stop == records.END:
            extended += 1
            assert memory[-1:] == ids(".") and (thread.calls[number + 1].keep, thread.path) == (len(memory) - 1, ())
            continue
        if call.stop == records.THREAD_TOKENS:
            assert not answering and thread.path == () and own == bound
            answering, bound = True, bound + limits.forced_answer_tokens
            continue
        keep, given = len(memory) - 1, ids("~")
        if call.stop != records.JOIN:
            assert call.stop == (records.FORK if isinstance(task, AsynchronousToy) else records.SPAWN)
            spawned, children = next(spawns)
            spawn = task.spawn(memory)
            keep = spawn.start
            assert [child.calls[0].injected for child in children] == spawn.prompts
            assert 1 <= len(children) <= limits.children
            share = (allowance - own) // (len(children) * (limits.spawns - spawned + 1 if call.stop == records.FORK else 1))
            unused = 0
            for place, child in enumerate(children):
                assert child.path == (*thread.path, spawned, place)
                unused += verify(child, task, limits, context, share)
            unjoined.append((children, unused))
            allowance -= share * len(children)
        if call.stop != records.FORK:
            children, unused = unjoined.pop(0)
            allowance += unused
            given = task.join(children)
        assert (thread.calls[number + 1].keep, thread.calls[number + 1].injected) == (keep, given)
    assert not list(spawns) and len(thread.spawns) <= limits.spawns and len(thread.path) // 2 <= limits.depth
    spent = records.total_tokens(thread)
    assert spent <= granted and own <= min(bound, allowance) and extended <= limits.min_budget_rounds
    assert own <= records.sequential_tokens(thread) <= spent
    last = thread.calls[-1].sampled[-1:]
    asked = last == ids(">")
    nothing = last == ids("&") and not unjoined and thread.detail == "no children left to join"
    assert {
        records.END: last == ids(".") and (thread.path or extended == limits.min_budget_rounds or "k" in text(memory)),
        records.CONTEXT: len(memory) >= context,
        records.THREAD_TOKENS: own == bound and (thread.path or answering or not limits.forced_answer_tokens),
        records.ROLLOUT_TOKENS: own == allowance,
        records.MALFORMED: (asked and thread.detail) or nothing,
        records.DEPTH: asked and len(thread.path) // 2 == limits.depth,
        records.SPAWNS: asked and len(thread.spawns) == limits.spawns,
        records.CHILDREN: asked and text(memory).rpartition("<")[2].count("|") >= limits.children,
    }[thread.stop]
    assert (text(last) in stops(task) and last != []) == (thread.stop not in (records.CONTEXT, records.THREAD_TOKENS, records.ROLLOUT_TOKENS))
    assert bool(thread.detail) == (thread.stop == records.MALFORMED)
    return allowance - own


def run_many(numbers: range) -> None:
    reasons: collections.Counter[str] = collections.Counter()
    for number in numbers:
        fuzz(number, reasons)
    assert set(reasons) == set(records.STOPS) - {*records.SPAWNED, records.JOIN}, reasons  # the scripts went everywhere


def test_2000_random_rollouts() -> None:
    run_many(range(2000 // ROLLOUTS))


@pytest.mark.slow
def test_100000_random_rollouts() -> None:
    run_many(range(1000, 1000 + 100_000 // ROLLOUTS))

"""Demonstrations whose parents go on after a spawn: one by hand, and against those whose parents wait."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import pytest

import records
import solver
from configs import apr, common
from countdown.asynchronous import Asynchronous
from countdown.grader import Problem
from countdown.language import Tokenizer
from countdown.search import Node, Parallel, Rules, Search, Trace
from countdown.task import Countdown, record
from harness.build import build
from records import Rollout
from solver import ProblemRange, problem

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer(100)
TASK = Countdown(TOKENIZER, "apr", asynchronous=True)
RULES = Rules(fixed_order=True, prunes=True, heuristic="near", cost_limit=5, spawn_probability=1.0, sub_beam=8)
FAMILY = ProblemRange(4, 1, 12, 10, 24)

FORK = "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> Moving to Node #0,{}\n<End Calling Sub Searches>\n"
ROOT = "Moving to Node #0\nCurrent State: 8:[4, 2, 2], Operations: []\n"
FIRST = "Exploring Operation: 4+2=6, Resulting Numbers: [2, 6]\nGenerated Node #0,0: 8:[2, 6] Operation: 4+2=6\n"
SECOND = "Exploring Operation: 4*2=8, Resulting Numbers: [2, 8]\nGenerated Node #0,1: 8:[2, 8] Operation: 4*2=8\n"
CHILD = "Moving to Node #0,0\nCurrent State: 8:[2, 6], Operations: ['4+2=6']\n"
GOAL = "Exploring Operation: 2+6=8, Resulting Numbers: [8]\n8,8 equal: Goal Reached\n"
OTHER = (
    "Exploring Operation: 2+8=10, Resulting Numbers: [10]\n10,8 unequal: No Solution\n"
    "Exploring Operation: 2*8=16, Resulting Numbers: [16]\n16,8 unequal: No Solution\n"
    "Exploring Operation: 8-2=6, Resulting Numbers: [6]\n6,8 unequal: No Solution\n"
    "Exploring Operation: 8/2=4, Resulting Numbers: [4]\n4,8 unequal: No Solution\n"
    "No solution found.\n"
)


def demonstrate(kind: type[Search], drawn: Problem, **rules: object) -> Trace:
    root = Node("0", list(drawn.numbers), "", 0, "", None)
    search = kind(root, drawn.target, 8, random.Random(0), dataclasses.replace(RULES, **rules))  # type: ignore[arg-type]
    search.run()
    return search.trace


def test_a_child_starts_when_it_is_listed_and_the_first_success_ends_the_list_by_hand() -> None:
    trace = demonstrate(Asynchronous, Problem((4, 2, 2), 8), unjoined=1, prunes=False, cost_limit=-1)
    assert trace.calls == [
        FIRST + FORK.format(0),
        SECOND + FORK.format(1),
        "<Sub Searches>\n",
        f"8,8 equal: Goal Reached\n{ROOT}{FIRST}{CHILD}{GOAL}",
    ]
    children = [children[0].calls for children in trace.spawns]
    assert children[0] == [GOAL + CHILD + GOAL]
    assert children[1][0].startswith(OTHER.partition("\n10,8")[0]) and len(children) == 2


def problems() -> list[Problem]:
    return [problem(FAMILY, "train", 0, index) for index in range(60)]


def threads(trace: Trace) -> list[list[str]]:
    """What the children of a trace write, in the order of their spawns."""
    return [child.calls for children in trace.spawns for child in children]


@pytest.mark.parametrize("unjoined", [0, 1, 3, 99])
def test_the_children_are_those_of_a_parent_that_waits_as_far_as_they_are_started(unjoined: int) -> None:
    """As many as run when the first success is joined, or all. The answer is the same."""
    stopped = 0
    for drawn in problems():
        waits, goes_on = demonstrate(Parallel, drawn), demonstrate(Asynchronous, drawn, unjoined=unjoined)
        if not waits.spawns:  # an only child is no thread of a parent that waits
            continue
        every = threads(waits)
        first = next((number for number, calls in enumerate(every) if "No solution" not in calls[-1]), len(every))
        started = min(len(every), first + unjoined + 1)
        assert threads(goes_on) == every[:started]
        joins = [text for text in goes_on.calls if text.endswith("<Sub Searches>\n")]
        assert len(joins) == min(first + 1, len(every))
        assert goes_on.calls[-1].endswith(waits.calls[-1])  # without a success it may have listed more before
        stopped += started < len(every)
    assert (stopped > 10) == (unjoined < 99)


def rollouts(unjoined: int) -> list[Rollout]:
    return [record(drawn, demonstrate(Asynchronous, drawn, unjoined=unjoined), TASK) for drawn in problems()]


def test_records_are_what_the_runtime_would_have_made() -> None:
    joins = 0
    for rollout in rollouts(1):
        ids: list[int] = []
        oldest, started = iter(rollout.root.spawns), iter(rollout.root.spawns)
        for call, after in zip(rollout.root.calls, rollout.root.calls[1:], strict=False):
            ids = ids[: call.keep] + call.injected + call.sampled
            if call.stop == records.FORK:
                spawn = TASK.spawn(ids)
                assert spawn.prompts == [child.calls[0].injected for child in next(started)]
                assert (after.keep, after.injected) == (spawn.start, TASK.started()) and ids[-1] == TASK.spawn_id
            else:
                assert call.stop == records.JOIN and ids[-1] == TASK.join_id
                assert (after.keep, after.injected) == (len(ids) - 1, TASK.join(next(oldest)))
                joins += 1
    assert joins > 100


def test_fewer_tokens_than_parents_that_wait_and_a_shorter_critical_path() -> None:
    waits = [record(drawn, demonstrate(Parallel, drawn), Countdown(TOKENIZER, "apr")) for drawn in problems()]
    goes_on = rollouts(1)
    assert [rollout.grade.correct for rollout in waits] == [rollout.grade.correct for rollout in goes_on]
    for name in ("total_tokens", "sequential_tokens", "longest_context", "children"):
        many, few = (records.mean_costs(of, [name])[name] for of in (waits, goes_on))
        assert few < many
    for rollout in goes_on:  # a child is never slower than its parent and itself one after the other
        own = sum(len(call.sampled) for call in rollout.root.calls)
        assert own <= records.sequential_tokens(rollout.root) <= records.total_tokens(rollout.root)


def test_a_parent_that_waits_never_asks_for_a_join() -> None:
    assert Countdown(TOKENIZER, "apr").join_id == -1


def table() -> list[list[str]]:
    """Rows of the demonstrators in docs/results.md: preset, unjoined, solved, children, total, sequential, context."""
    section = (REPOSITORY / "docs/results.md").read_text().partition("### Asynchronous join\n")[2].partition("\n#")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines()]
    return [row for row in rows if len(row) == 7 and row[0] in common.PRESETS]


@pytest.mark.parametrize("row", table(), ids=lambda row: " ".join(row[:2]))
def test_what_the_documents_say_of_parents_that_go_on(row: list[str]) -> None:
    preset, unjoined, *expected = row
    config = apr.get_config(preset)
    config.demonstrator.update(unjoined=int(unjoined.split()[0]), beam_low=8)
    parts = build(config)
    demonstrator, task = parts.domain.demonstrator, parts.domain.task
    made = []
    for index, drawn in enumerate(parts.test_set()):
        trace = solver.demonstrate(drawn, demonstrator, random.Random(f"demonstrator 8 {index}"))
        made.append(record(drawn, trace, task))
    fitting = [r for r in made if r.grade.correct and records.longest_context(r.root) <= config.model.context]
    costs = records.mean_costs(made, ("children", "total_tokens", "sequential_tokens", "longest_context"))
    found = [f"{len(fitting) / len(made):.3f}", f"{costs.pop('children'):.2f}", *(f"{mean:,.0f}" for mean in costs.values())]
    assert found == expected


def test_the_table_has_both_kinds_of_parents_at_two_presets() -> None:
    assert len(table()) == 8

"""Explanations of failures: each fault injected into a demonstration, right demonstrations, and arbitrary ids."""

import copy
import dataclasses
import functools
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import verifier
from countdown.grader import Problem, grade_steps
from countdown.language import END_ID, GOAL_TEXT, JOIN_TEXT, Tokenizer
from countdown.search import Trace, spawn_block
from countdown.task import Countdown, record
from records import CONTEXT, MALFORMED, SPAWN, STOPS, THREAD_TOKENS, TRUNCATED, Call, Grade, Rollout, Thread
from solver import DemonstratorConfig, ProblemRange, demonstration

TOKENIZER = Tokenizer(100)
TASK = Countdown(TOKENIZER, "apr")
ASYNCHRONOUS = Countdown(TOKENIZER, "apr", asynchronous=True)
REFERENCES = pathlib.Path(__file__).parents[1] / "reference_traces"
CONFIGS = {
    "apr": DemonstratorConfig("apr", 1, 10, 15, 0.9, budget_fraction=0.3, token_bin=512),
    "sosp": DemonstratorConfig("sosp", 1, 5, 0, 0.5, budget_fraction=0.3, token_bin=512),
    "sos": DemonstratorConfig("sos", 1, 5, 0, 0.0, budget_fraction=0, token_bin=512),
}
FAMILIES = {3: ProblemRange(3, 1, 20, 10, 50), 4: ProblemRange(4, 1, 99, 10, 100)}

# One problem, its two children, the second of which has the solution: 12/4=3, 18+3=21.
PROBLEM = Problem((4, 12, 18), 21)
ROOT = "Moving to Node #0\nCurrent State: 21:[4, 12, 18], Operations: []\n"
FIRST = "Exploring Operation: 12-4=8, Resulting Numbers: [18, 8]\nGenerated Node #0,0: 21:[18, 8] Operation: 12-4=8\n"
SECOND = "Exploring Operation: 12/4=3, Resulting Numbers: [18, 3]\nGenerated Node #0,1: 21:[18, 3] Operation: 12/4=3\n"
CHILDREN = [
    "Moving to Node #0,0\nCurrent State: 21:[18, 8], Operations: ['12-4=8']\n",
    "Moving to Node #0,1\nCurrent State: 21:[18, 3], Operations: ['12/4=3']\n",
]
HOPELESS = (
    "Exploring Operation: 18+8=26, Resulting Numbers: [26]\n26,21 unequal: No Solution\n"
    "Exploring Operation: 18-8=10, Resulting Numbers: [10]\n10,21 unequal: No Solution\nNo solution found.\n"
)
MISSED = "Exploring Operation: 18*3=54, Resulting Numbers: [54]\n54,21 unequal: No Solution\n"
LAST = "Exploring Operation: 18+3=21, Resulting Numbers: [21]\n21,21 equal: Goal Reached\n"
NOTHING = "No solution found.\n"
# (thread, call): what it writes
SOLVED = {
    ((), 0): FIRST + SECOND + spawn_block(["0,0", "0,1"], 1),
    ((0, 0), 0): HOPELESS,
    ((0, 1), 0): MISSED + LAST + CHILDREN[1] + LAST,
    ((), 1): f"21,21{GOAL_TEXT}{ROOT}{SECOND}{CHILDREN[1]}{LAST}",
}
FAILED = {**SOLVED, ((0, 1), 0): MISSED + NOTHING, ((), 1): NOTHING}
RETURNED = {**FAILED, ((), 1): CHILDREN[0] + CHILDREN[1] + NOTHING}  # the parent looks at both once more


def rollout_of(texts, problem=PROBLEM, task=TASK):
    """The record of a demonstration with these texts; the join is what the children's texts come to."""
    children = [Trace(prompt, [texts[(0, i), 0]], []) for i, prompt in enumerate(CHILDREN)]
    return record(problem, Trace(ROOT, [texts[(), 0], texts[(), 1]], [children]), task)


def inject(texts, thread, call, old, new):
    """`texts` with one piece of text replaced, where it first occurs."""
    assert old in texts[thread, call] and old != new
    return {**texts, (thread, call): texts[thread, call].replace(old, new, 1)}


def call_of(rollout, thread, call):
    (found,) = (member for member in rollout.threads() if member.path == thread)
    return found.calls[call]


def line_of(rollout, thread, call, text):
    """Number of the first line of a call that starts with `text`, given lines and written ones together."""
    found = call_of(rollout, thread, call)
    lines = TOKENIZER.decode([*found.injected, *found.sampled]).splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.startswith(text))


def faults_of(rollout):
    """Faults by which a rollout differs from a right demonstration."""
    return [fault for fault in verifier.verify(rollout, TOKENIZER) if fault.kind != verifier.EXHAUSTED]


def explained(rollout):
    """The fault that a rollout failed by."""
    fault = verifier.explain(rollout, TOKENIZER)
    assert fault is not None
    return fault


def kind_of(rollout):
    return "" if rollout.grade.correct else explained(rollout).kind


# ------------------------------------------------------------------- right demonstrations


@pytest.mark.parametrize("count", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_right_demonstrations_have_no_faults(method, count):
    solved = 0
    for index in range(200):
        rollout = demonstration(FAMILIES[count], CONFIGS[method], Countdown(TOKENIZER, method), "train", 0, index)
        assert faults_of(rollout) == []
        assert kind_of(rollout) == ("" if rollout.grade.correct else verifier.EXHAUSTED)
        solved += rollout.grade.correct
    assert 50 < solved < 190


def test_a_direct_solution_goes_on_from_what_its_last_operation_left():
    direct = DemonstratorConfig("direct", 1, 1, 1, 0.0, budget_fraction=0, token_bin=512)
    task = Countdown(TOKENIZER, "direct")
    for index in range(100):
        assert faults_of(demonstration(FAMILIES[4], direct, task, "train", 0, index)) == []
    prompt, goal = "Current State: 21:[4, 12, 18], Operations: []\n", f"21,21{GOAL_TEXT}"
    first = "Exploring Operation: 12/4=3, Resulting Numbers: [18, 3]\n"
    faults = {
        "Exploring Operation: 18+3=20, Resulting Numbers: [20]\n": verifier.WRONG_ARITHMETIC,
        "Exploring Operation: 18+4=22, Resulting Numbers: [22]\n": verifier.UNAVAILABLE_NUMBER,
        "Exploring Operation: 18*3=54, Resulting Numbers: [54]\n": verifier.FALSE_GOAL,
    }
    for second, kind in faults.items():
        rollout = record(PROBLEM, Trace(prompt, [first + second + goal], []), task)
        assert kind_of(rollout) == kind


@pytest.mark.parametrize("method", ["sos", "sosp"])
def test_the_released_serial_traces_have_no_faults(method):
    for case in json.loads((REFERENCES / f"{method}.json").read_text()):
        prompt, _, text = case["trace"].partition("\n")
        problem = Problem(tuple(case["nums"]), case["target"])
        rollout = record(problem, Trace(f"{prompt}\n", [text], []), Countdown(TOKENIZER, method))
        assert faults_of(rollout) == []
        assert kind_of(rollout) == ("" if rollout.grade.correct else verifier.EXHAUSTED)


def test_the_defect_of_the_released_parallel_traces_is_found():
    """Five of them go on after a join without the line that says which node they move to (see search.py)."""

    def trace(released):
        calls = [text.rpartition("<End Sub Searches>\n")[2] for text in released["main_calls"]]
        prompt = "".join(calls[0].splitlines(keepends=True)[:2])
        children = [[trace(child) for child in spawned] for spawned in released["sub_calls"]]
        return Trace(prompt, [calls[0].removeprefix(prompt), *calls[1:]], children)

    defects = 0
    for case in json.loads((REFERENCES / "apr.json").read_text()):
        rollout = record(Problem(tuple(case["nums"]), case["target"]), trace(case["trace"]), TASK)
        for fault in faults_of(rollout):
            given = TOKENIZER.decode(rollout.root.calls[fault.call].injected).count("\n")
            assert (fault.kind, fault.thread, fault.line) == (verifier.WRONG_STATE, (), given + 1)
            defects += 1
    assert defects == 5


def test_a_state_that_is_the_target_alone_has_no_better_child():
    reader = verifier._Reader(PROBLEM, TOKENIZER, Thread((), [Call(0, [])]))
    assert not reader._missed("0", [PROBLEM.target])


@pytest.mark.parametrize("method", ["apr", "sosp"])
def test_an_operation_that_is_explored_and_not_kept_is_no_fault(method):
    config = dataclasses.replace(CONFIGS[method], order="fixed", heuristic="near", cost_limit=6)
    for index in range(100):
        rollout = demonstration(FAMILIES[4], config, Countdown(TOKENIZER, method), "train", 0, index)
        assert faults_of(rollout) == []


@pytest.mark.parametrize("unjoined", [0, 2])
def test_demonstrations_whose_parents_go_on_have_no_faults(unjoined):
    config, right = dataclasses.replace(CONFIGS["apr"], unjoined=unjoined), 0
    for index in range(100):
        rollout = demonstration(FAMILIES[4], config, ASYNCHRONOUS, "train", 0, index)
        assert faults_of(rollout) == []
        right += rollout.grade.correct and len(rollout.threads()) > 1
    assert right > 30


def test_a_child_that_is_joined_answers_for_itself_where_parents_go_on():
    """The first of two children reaches the goal without restating it; the second, joined after it, does not."""
    children = [Trace(CHILDREN[1], [LAST], []), Trace(CHILDREN[0], [HOPELESS], [])]
    calls = [SECOND + spawn_block(["0,1"], 1), FIRST.replace("0,0", "0,2") + spawn_block(["0,2"], 1), JOIN_TEXT]
    trace = Trace(ROOT, [*calls, JOIN_TEXT, NOTHING], [[child] for child in children])
    rollout = record(PROBLEM, trace, ASYNCHRONOUS)
    lost = [fault for fault in verifier.verify(rollout, TOKENIZER) if fault.kind == verifier.UNREPORTED]
    assert [(fault.thread, fault.call, fault.line) for fault in lost] == [((), 3, 2)]
    malformed = [fault for fault in verifier.verify(rollout, TOKENIZER) if fault.kind == verifier.MALFORMED_LINE]
    assert malformed == []


@pytest.mark.parametrize("inherit", [False, True])
def test_the_demonstrations_of_this_file_are_right(inherit):
    """Children that inherit do not visit what they were shown."""
    task = Countdown(TOKENIZER, "apr", inherit_context=inherit)
    solved, failed = rollout_of(SOLVED, task=task), rollout_of(FAILED, task=task)
    assert solved.grade.correct and verifier.verify(solved, TOKENIZER) == []
    (fault,) = verifier.verify(failed, TOKENIZER)
    assert (fault.kind, fault.thread, fault.call, fault.line) == (verifier.EXHAUSTED, (), 1, 5)


# ------------------------------------------------------------------- one fault each

LISTED = "Exploring Operation: {0}, Resulting Numbers: {1}\nGenerated Node #0,1: 21:{1} Operation: {0}\n"
BEST = "Exploring Operation: 18-12=6, Resulting Numbers: [4, 6]\nGenerated Node #0,0: 21:[4, 6] Operation: 18-12=6\n"
# kind, whether it cost the answer, the demonstration, thread, call, text, what is injected in its place
FAULTS = {
    "remainder": ("illegal_operation", False, FAILED, (), 0, SECOND, LISTED.format("18/4=4", "[12, 4]")),
    "negative": ("illegal_operation", False, FAILED, (), 0, FIRST, FIRST.replace("12-4", "4-12")),
    "by zero": ("illegal_operation", False, FAILED, (0, 0), 0, "18-8=10", "18/0=10"),
    "7+5=13": ("wrong_arithmetic", True, FAILED, (), 0, SECOND, LISTED.format("12/4=2", "[18, 2]")),
    "hopeless 7+5=13": ("wrong_arithmetic", False, FAILED, (0, 0), 0, "18-8=10", "18-8=11"),
    "goal not seen": ("wrong_arithmetic", True, FAILED, (0, 1), 0, "18*3=54", "18+3=54"),
    "used before": ("unavailable_number", True, FAILED, (0, 1), 0, "18*3=54", "18*4=72"),
    "used twice": ("unavailable_number", False, FAILED, (0, 0), 0, "18+8=26", "18+18=36"),
    "wrong rest": ("wrong_state", True, FAILED, (), 0, SECOND, LISTED.format("12/4=3", "[12, 3]")),
    "too few left": ("wrong_state", True, FAILED, (), 0, SECOND, LISTED.format("12/4=3", "[3]")),
    "copied to node": ("wrong_state", True, FAILED, (), 0, "Generated Node #0,1: 21:[18", "Generated Node #0,1: 21:[19"),
    "copied target": ("wrong_state", True, FAILED, (), 0, "Generated Node #0,1: 21", "Generated Node #0,1: 22"),
    "copied operation": ("wrong_state", False, FAILED, (), 0, "8] Operation: 12", "8] Operation: 18"),
    "node of another": ("wrong_state", True, FAILED, (), 0, "Generated Node #0,1", "Generated Node #0,0"),
    "node too deep": ("wrong_state", True, FAILED, (), 0, "Generated Node #0,1", "Generated Node #0,0,1"),
    "state, numbers": ("wrong_state", True, SOLVED, (), 1, "Current State: 21:[18, 3]", "Current State: 21:[18, 8]"),
    "state, operations": ("wrong_state", True, SOLVED, (), 1, "['12/4=3']", "['12-4=3']"),
    "state, target": ("wrong_state", True, SOLVED, (0, 1), 0, "Current State: 21", "Current State: 12"),
    "leaf": ("wrong_state", False, FAILED, (0, 0), 0, "26,21", "25,21"),
    "leaf's target": ("wrong_state", False, FAILED, (0, 0), 0, "26,21", "26,20"),
    "state": ("wrong_state", True, RETURNED, (), 1, "21:[18, 3]", "21:[18, 4]"),
    "hopeless state": ("wrong_state", False, RETURNED, (), 1, "21:[18, 8]", "21:[18, 9]"),
    "state, its own": ("wrong_state", True, SOLVED, (0, 1), 0, "21:[18, 3]", "21:[18, 4]"),
    "unknown node": ("unknown_node", False, FAILED, (), 1, NOTHING, "Moving to Node #0,7\n" + NOTHING),
    "unseen node": ("unknown_node", False, FAILED, (0, 1), 0, NOTHING, "Moving to Node #0\n" + NOTHING),
    "goal missed": ("goal_missed", True, SOLVED, (0, 1), 0, "21,21 equal: Goal Reached", "21,21 unequal: No Solution"),
    "another number": ("false_goal", False, FAILED, (0, 0), 0, "26,21 unequal: No Solution", "26,21 equal: Goal Reached"),
    "another target": ("false_goal", True, FAILED, (0, 1), 0, "54,21 unequal: No Solution", "54,54 equal: Goal Reached"),
    "target misread": ("false_goal", True, SOLVED, (0, 1), 0, "21,21 equal", "21,20 equal"),
    "out of nothing": ("false_goal", True, FAILED, (), 1, NOTHING, f"21,21{GOAL_TEXT}"),
    "unused number": ("false_goal", True, SOLVED, (), 1, "21:[18, 3] Operation: 12/4=3\n", f"21:[18, 3] Operation: 12/4=3\n21,21{GOAL_TEXT}"),
    "operator": ("malformed_line", True, FAILED, (0, 1), 0, "18*3=54", "18**3=54"),
    "no line": ("malformed_line", False, FAILED, (0, 0), 0, "26,21 unequal", "26, 21 unequal"),
    "join of its own": ("malformed_line", False, FAILED, (0, 0), 0, NOTHING, "<Sub Searches>\n" + NOTHING),
    "budget": ("malformed_line", False, FAILED, (0, 0), 0, NOTHING, "Token Budget: 512 " + NOTHING),
    "duplicate": ("duplicate", False, FAILED, (), 0, SECOND, FIRST.replace("#0,0", "#0,2") + SECOND),
    # The best children of the state are 18-12=6, from which 21 cannot be reached, and then SECOND, from which it can.
    "duplicate instead of the best": ("duplicate", False, FAILED, (), 0, SECOND, FIRST.replace("#0,0", "#0,1")),
    "duplicate, turned": ("duplicate", False, FAILED, (0, 0), 0, NOTHING, "Exploring Operation: 8+18=26, Resulting Numbers: [26]\n" + NOTHING),
}


@pytest.mark.parametrize(
    ("listed", "wasted", "kind"),
    [
        (FIRST, [FIRST], verifier.EXHAUSTED),  # the best child left is BEST, and hopeless
        (FIRST, [FIRST, FIRST], verifier.DUPLICATE),  # the next is SECOND: from [18, 3] 21 is reached
        (BEST, [BEST], verifier.DUPLICATE),
        (BEST, [LISTED.format("18/4=4", "[12, 4]")], verifier.ILLEGAL_OPERATION),
        (BEST + SECOND, [BEST], verifier.EXHAUSTED),  # it was listed after all
    ],
)
def test_a_wasted_line_costs_the_answer_only_if_the_best_child_in_its_place_would_have_led_there(listed, wasted, kind):
    rollout = rollout_of(inject(FAILED, (), 0, FIRST + SECOND, listed + "".join(wasted)))
    faults = [fault for fault in faults_of(rollout) if fault.kind in (verifier.DUPLICATE, verifier.ILLEGAL_OPERATION)]
    assert len(faults) == len(wasted)
    assert {fault.fatal for fault in faults} == {kind != verifier.EXHAUSTED}


@pytest.mark.parametrize(("kind", "fatal", "texts", "thread", "call", "old", "new"), FAULTS.values(), ids=FAULTS)
def test_an_injected_fault_is_found_where_it_is(kind, fatal, texts, thread, call, old, new):
    rollout = rollout_of(inject(texts, thread, call, old, new))
    found = [fault for fault in faults_of(rollout) if fault.kind != verifier.LOST_AT_JOIN]
    changed = call_of(rollout, thread, call)
    given, written = TOKENIZER.decode(changed.injected), TOKENIZER.decode(changed.sampled)
    same = next(i for i, (a, b) in enumerate(zip(texts[thread, call], written, strict=False)) if a != b)
    assert (found[0].kind, found[0].fatal, found[0].thread, found[0].call) == (kind, fatal, thread, call)
    assert found[0].line == (given + written[:same]).count("\n") + 1
    if texts is not SOLVED:
        assert kind_of(rollout) == (kind if fatal else verifier.EXHAUSTED)
        assert len(found) == 1 or kind == verifier.MALFORMED_LINE  # a line that cannot be read cannot be believed


def three_children(last, answer):
    """The solved demonstration with a third child, in the state of the second, that writes `last`."""
    children = [Trace(prompt, [SOLVED[(0, i), 0]], []) for i, prompt in enumerate(CHILDREN)]
    children.append(Trace(CHILDREN[1].replace("#0,1", "#0,2"), [last], []))
    listed = FIRST + SECOND + SECOND.replace("#0,1", "#0,2") + spawn_block(["0,0", "0,1", "0,2"], 1)
    return record(PROBLEM, Trace(ROOT, [listed, answer], [children]), TASK)


def test_an_operation_that_is_listed_twice_is_noted_at_the_later_one():
    rollout = three_children(FAILED[(0, 1), 0], SOLVED[(), 1])
    assert rollout.grade.correct and kind_of(rollout) == ""
    (duplicate,) = verifier.verify(rollout, TOKENIZER)
    assert (duplicate.kind, duplicate.thread, duplicate.call, duplicate.line) == (verifier.DUPLICATE, (), 0, 7)
    assert not duplicate.fatal


def test_a_goal_may_rest_on_any_path_of_the_join():
    """The last child hands over a false path; the parent goes on with the first that succeeded, as it should."""
    path = CHILDREN[1].replace("#0,1", "#0,2") + LAST.replace("18+3=21", "18-3=21")
    rollout = three_children(f"21,21{GOAL_TEXT}{path}", SOLVED[(), 1])
    assert rollout.grade.correct and "18-3=21" in TOKENIZER.decode(rollout.root.calls[1].injected)
    assert {fault.thread for fault in faults_of(rollout) if fault.kind != verifier.DUPLICATE} == {(0, 2)}


def test_a_goal_does_not_rest_on_what_came_before_the_last_operation():
    """The goal was there and not seen; then it is claimed for 18*3."""
    unseen = LAST.replace("equal: Goal Reached", "unequal: No Solution")
    rollout = rollout_of({**FAILED, ((0, 1), 0): unseen + MISSED.replace("54,21 unequal: No Solution", "21,21 equal: Goal Reached")})
    assert [fault.kind for fault in faults_of(rollout)] == [verifier.GOAL_MISSED, verifier.FALSE_GOAL]
    assert kind_of(rollout) == verifier.GOAL_MISSED


def test_a_goal_out_of_nothing_has_no_other_cause():
    rollout = rollout_of({**FAILED, ((), 1): f"Moving to Node #0,7\n21,21{GOAL_TEXT}"})
    unknown, false = verifier.verify(rollout, TOKENIZER)
    assert (unknown.kind, unknown.fatal) == (verifier.UNKNOWN_NODE, False)
    assert false.message == "nothing leads to it" and explained(rollout) == false


def cut(rollout, thread, stop, ids):
    """The rollout had `stop` ended the last call of a thread after so many ids; what came after it is gone."""
    last = call_of(rollout, thread, -1)
    last.sampled, last.stop = last.sampled[:ids], stop
    if not thread:
        rollout.grade = TASK.grade(rollout.problem, rollout.root)
    return rollout


@pytest.mark.parametrize("stop", TRUNCATED)
def test_a_thread_that_a_bound_cut_names_the_bound(stop):
    rollout = cut(rollout_of(SOLVED), (), stop, 12)
    rollout.root.calls, rollout.root.spawns = rollout.root.calls[:1], []
    cut(rollout, (), stop, 12)  # in the middle of the second line
    (fault,) = verifier.verify(rollout, TOKENIZER)
    assert (fault.kind, fault.thread, fault.call, fault.line) == (verifier.TRUNCATED, (), 0, 3)
    assert fault.message == f"stopped by {stop}" and explained(rollout) == fault


@pytest.mark.parametrize("inherit", [False, True])
def test_a_bound_on_a_hopeless_branch_did_not_cost_the_answer(inherit):
    for thread, reason in (((0, 0), verifier.EXHAUSTED), ((0, 1), verifier.TRUNCATED)):
        rollout = cut(rollout_of(FAILED, task=Countdown(TOKENIZER, "apr", inherit_context=inherit)), thread, CONTEXT, 3)
        assert kind_of(rollout) == reason
        fault = faults_of(rollout)[0]
        given = TOKENIZER.decode(call_of(rollout, thread, 0).injected).count("\n")
        assert (fault.kind, fault.thread, fault.call, fault.line) == (verifier.TRUNCATED, thread, 0, given)


def test_a_root_that_was_cut_and_made_to_answer_failed_by_the_cut():
    """Not by what it was made to write; an answer that is right all the same has no such fault to explain."""
    for answer, reason in ((HOPELESS, verifier.TRUNCATED), (f"{ROOT}{SECOND}{CHILDREN[1]}{LAST}", "")):
        ids, sampled = TOKENIZER.encode(ROOT), TOKENIZER.encode(FIRST)
        claim = Call(len(ids) + len(sampled), TOKENIZER.encode(f"21,21{GOAL_TEXT}"), [*TOKENIZER.encode(answer), END_ID], [])
        root = Thread((), [Call(0, ids, sampled, [], THREAD_TOKENS), claim])
        rollout = Rollout(PROBLEM, root, TASK.grade(PROBLEM, root))
        assert kind_of(rollout) == reason
        first = verifier.verify(rollout, TOKENIZER)[0]
        assert (first.kind, first.call, first.message) == (verifier.TRUNCATED, 0, "stopped by thread_tokens")


def test_a_thread_is_judged_by_the_state_it_was_given_not_by_its_last():
    rollout = cut(rollout_of({**FAILED, ((), 1): CHILDREN[0] + NOTHING}), (), CONTEXT, -2)
    assert kind_of(rollout) == verifier.TRUNCATED


def test_a_malformed_spawn_says_what_is_wrong_with_it():
    root = rollout_of(SOLVED).root
    root.calls, root.spawns, root.detail = root.calls[:1], [], "node #0,7 was never generated"
    root.calls[0].stop = MALFORMED
    rollout = Rollout(PROBLEM, root, TASK.grade(PROBLEM, root))
    (fault,) = verifier.verify(rollout, TOKENIZER)
    assert (fault.kind, fault.thread, fault.call, fault.line) == (verifier.MALFORMED_SPAWN, (), 0, 10)
    assert fault.message == root.detail and explained(rollout) == fault


def test_a_solution_that_the_parent_drops_is_lost_at_the_join():
    rollout = rollout_of({**SOLVED, ((), 1): NOTHING})
    (fault,) = verifier.verify(rollout, TOKENIZER)
    assert (fault.kind, fault.thread, fault.call) == (verifier.LOST_AT_JOIN, (), 1)
    assert fault.line == line_of(rollout, (), 1, "21,21") == 7
    # what went wrong before did not matter, what the parent wrote is the loss itself; but a bound is what cut it
    before = rollout_of({**inject(SOLVED, (), 0, FIRST, LISTED.format("12/4=2", "[18, 2]")), ((), 1): NOTHING})
    first = verifier.verify(before, TOKENIZER)[0]
    assert first.kind == verifier.WRONG_ARITHMETIC and first.fatal and kind_of(before) == verifier.LOST_AT_JOIN
    assert kind_of(cut(three_children(MISSED, NOTHING), (0, 2), CONTEXT, 5)) == verifier.LOST_AT_JOIN
    assert kind_of(rollout_of(inject(SOLVED, (), 1, "18+3=21", "18*3=21"))) == verifier.LOST_AT_JOIN
    assert kind_of(cut(rollout_of(SOLVED), (), CONTEXT, 30)) == verifier.TRUNCATED


def test_a_solution_that_a_child_does_not_restate_is_unreported():
    lost = {**SOLVED, ((0, 1), 0): MISSED + LAST, ((), 1): NOTHING}
    rollout = rollout_of(lost)
    fault = explained(rollout)
    assert (fault.kind, fault.thread, fault.call) == (verifier.UNREPORTED, (), 1)
    assert fault.line == line_of(rollout, (), 1, "<No Solution in Sub Search 1")
    wrong = rollout_of({**lost, ((0, 1), 0): MISSED + LAST + CHILDREN[1] + LAST.replace("+", "-")})
    assert explained(wrong).thread == (0, 1)  # a fault of what it restated comes first
    assert kind_of(wrong) == verifier.WRONG_ARITHMETIC


def test_an_answer_that_does_not_come_last_is_unreported():
    rollout = rollout_of({**FAILED, ((), 1): f"{ROOT}{SECOND}{CHILDREN[1]}{LAST}{NOTHING}"})
    fault = explained(rollout)
    assert (fault.kind, fault.thread, fault.call) == (verifier.UNREPORTED, (), 1)
    assert fault.line == line_of(rollout, (), 1, NOTHING.strip())
    spoilt = rollout_of({**FAILED, ((), 1): f"{ROOT}{SECOND}{CHILDREN[1]}{LAST}Moving to Node #0,7\n"})
    assert kind_of(spoilt) == verifier.UNKNOWN_NODE


def test_a_false_goal_is_explained_by_what_made_it_false():
    """The first step is wrong; nothing is lost with it (8 leads nowhere), but the child believes it, and so on."""
    listed = FIRST.replace("12-4=8", "12-4=3").replace("[18, 8]", "[18, 3]")
    child = Trace(CHILDREN[0].replace("12-4=8", "12-4=3").replace("[18, 8]", "[18, 3]"), [""], [])
    child.calls = [LAST + child.prompt + LAST]
    calls = [listed + spawn_block(["0,0"], 1), f"21,21{GOAL_TEXT}{ROOT}{listed}{child.prompt}{LAST}"]
    rollout = record(PROBLEM, Trace(ROOT, calls, [[child]]), TASK)
    assert rollout.grade.reason == "wrong arithmetic: 12-4=3"
    faults = verifier.verify(rollout, TOKENIZER)
    assert [(fault.kind, fault.fatal) for fault in faults[:2]] == [("wrong_arithmetic", False), ("false_goal", True)]
    assert explained(rollout) == faults[0]
    assert (faults[1].thread, faults[1].line, faults[1].message) == ((0, 0), 4, rollout.grade.reason)


def test_a_problem_without_a_solution_is_unsolvable():
    rollout = cut(rollout_of(FAILED, Problem((4, 12, 18), 23)), (), CONTEXT, 2)
    assert kind_of(rollout) == verifier.UNSOLVABLE


def test_a_solution_is_lost_where_it_was_dropped_not_below():
    """A child hands on what its own child found; the root does not."""
    problem = Problem((1, 4, 12, 18), 22)
    root = "Moving to Node #0\nCurrent State: 22:[1, 4, 12, 18], Operations: []\n"
    one = "Exploring Operation: 12/4=3, Resulting Numbers: [1, 18, 3]\nGenerated Node #0,0: 22:[1, 18, 3] Operation: 12/4=3\n"
    child = "Moving to Node #0,0\nCurrent State: 22:[1, 18, 3], Operations: ['12/4=3']\n"
    two = "Exploring Operation: 18+3=21, Resulting Numbers: [1, 21]\nGenerated Node #0,0,0: 22:[1, 21] Operation: 18+3=21\n"
    grandchild = "Moving to Node #0,0,0\nCurrent State: 22:[1, 21], Operations: ['12/4=3', '18+3=21']\n"
    last = f"Exploring Operation: 1+21=22, Resulting Numbers: [22]\n22,22{GOAL_TEXT}"
    lowest = Trace(grandchild, [last + grandchild + last], [])
    middle = Trace(child, [two + spawn_block(["0,0,0"], 2), f"22,22{GOAL_TEXT}{child}{two}{grandchild}{last}"], [[lowest]])
    calls = [one + spawn_block(["0,0"], 1), f"22,22{GOAL_TEXT}{root}{one}{child}{two}{grandchild}{last}"]
    solved = record(problem, Trace(root, calls, [[middle]]), TASK)
    assert solved.grade.correct and verifier.verify(solved, TOKENIZER) == []
    lost = record(problem, Trace(root, [calls[0], NOTHING], [[middle]]), TASK)
    assert [(fault.kind, fault.thread) for fault in verifier.verify(lost, TOKENIZER)] == [(verifier.LOST_AT_JOIN, ())]
    middle.calls[1] = NOTHING
    lost = record(problem, Trace(root, [calls[0], NOTHING], [[middle]]), TASK)
    assert [(fault.kind, fault.thread) for fault in verifier.verify(lost, TOKENIZER)] == [(verifier.LOST_AT_JOIN, (0, 0))]


# ------------------------------------------------------------------- whatever a model writes


@pytest.mark.parametrize("sign", "+-*/")
def test_what_an_operation_results_in_is_what_the_grader_says(sign):
    for a in range(1, 13):
        for b in range(1, 13):
            right = [v for v in range(150) if grade_steps(Problem((a, b), max(v, 1)), [f"{a}{sign}{b}={v}"]).correct]
            value = verifier._value(a, sign, b)
            assert right == ([] if not value else [value])


@functools.cache
def bases():
    """Demonstrations to mutate."""
    made = [demonstration(FAMILIES[3], c, Countdown(TOKENIZER, c.method), "train", 1, i) for c in CONFIGS.values() for i in range(30)]
    return [*made, rollout_of(SOLVED), rollout_of(FAILED)]


def check(rollout):
    """What holds for any rollout."""
    faults, reason = verifier.verify(rollout, TOKENIZER), verifier.explain(rollout, TOKENIZER)
    threads = {thread.path: thread for thread in rollout.threads()}
    for fault in faults:
        call = threads[fault.thread].calls[fault.call]
        assert 0 <= fault.line <= TOKENIZER.decode([*call.injected, *call.sampled]).count("\n") + 1
        assert len(fault.message) < 300
    assert (reason is None) == rollout.grade.correct
    assert reason is None or reason in faults
    if rollout.grade.answer and not rollout.grade.correct:
        assert kind_of(rollout) not in (verifier.EXHAUSTED, verifier.UNSOLVABLE)  # a wrong answer has a reason


any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=25)
TEXTS = [TOKENIZER.decode(call.injected + call.sampled) for t in rollout_of(SOLVED).threads() for call in t.calls]
TEXTS += [TOKENIZER.decode(rollout_of(FAILED).root.calls[1].injected)]
LINES = [line for text in TEXTS for line in text.replace("<|end|>", "").splitlines(keepends=True)]
any_lines = st.lists(st.sampled_from(LINES), max_size=8).map("".join).map(TOKENIZER.encode)


@st.composite
def threads(draw, path=()):
    """A thread of arbitrary ids, or of lines that make no sense together."""
    thread = Thread(path)
    for _ in range(draw(st.integers(1, 3))):
        stop = draw(st.sampled_from(STOPS))
        thread.calls.append(Call(0, draw(any_ids | any_lines), draw(any_ids | any_lines), stop=stop))
        if stop == SPAWN and len(path) < 4:
            children = range(draw(st.integers(1, 2)))
            thread.spawns.append([draw(threads((*path, len(thread.spawns), child))) for child in children])
    return thread


@settings(max_examples=300, deadline=None)
@given(threads(), st.sampled_from([PROBLEM, Problem((1, 1), 50), Problem((2, 2, 2, 2), 16)]))
def test_arbitrary_ids_are_explained_without_a_crash(root, problem):
    check(Rollout(problem, root, Grade(False, "no answer")))
    check(Rollout(problem, root, Grade(True, "")))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_demonstrations_are_explained_without_a_crash(data):
    """Some ids of a demonstration are replaced by others of it, doubled or lost."""
    rollout = copy.deepcopy(data.draw(st.sampled_from(bases())))
    for _ in range(data.draw(st.integers(1, 3))):
        call = data.draw(st.sampled_from([call for thread in rollout.threads() for call in thread.calls if call.sampled]))
        where = data.draw(st.integers(0, len(call.sampled) - 1))
        change = data.draw(st.sampled_from([[], [call.sampled[where]] * 2, [data.draw(st.sampled_from(call.sampled))]]))
        call.sampled[where : where + 1] = change
    rollout.grade = TASK.grade(rollout.problem, rollout.root)
    check(rollout)


def test_long_states_are_not_searched(monkeypatch):
    """More or larger numbers than the problem can have: an exact search for the target would take for ever."""
    searched = []
    monkeypatch.setattr(verifier, "solvable", lambda numbers, target: searched.append(numbers))
    for numbers in ([*range(1, 60)], [18, 10**900]):
        state = f"Current State: 21:{numbers}, Operations: []\nExploring Operation: 18*2=1, Resulting Numbers: [1]\n"
        check(rollout_of({**FAILED, ((), 1): state + NOTHING}))
    assert searched and all(len(numbers) <= 3 and max(numbers, default=0) < 10**4 for numbers in searched)


def test_huge_numbers_do_no_harm():
    for digits in (30, 999, 1500):
        huge = "9" * digits
        for sign in "+-*/":
            operation = f"{huge}{sign}{huge}={huge}"
            lines = f"Exploring Operation: {operation}, Resulting Numbers: [18, {huge}]\n"
            lines += f"Generated Node #0,1: 21:[18, {huge}] Operation: {operation}\n{huge},{huge}{GOAL_TEXT}"
            check(rollout_of({**FAILED, ((), 0): lines + FAILED[(), 0], ((), 1): lines}))


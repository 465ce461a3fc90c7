"""Problems, grader, demonstrators and the task, against the released codes' traces and hand-worked cases."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
from fractions import Fraction

import pytest

import solver
from countdown import search
from countdown.grader import Problem, grade_path, grade_steps
from countdown.language import GOAL_TEXT, Tokenizer, parse, render
from countdown.task import Countdown
from protocols import MalformedSpawn
from records import CONTEXT, END, SPAWN, Call, Thread
from solver import DemonstratorConfig, ProblemRange, demonstrate, problem
from tests.conftest import Ended

ROOT = pathlib.Path(__file__).parent.parent
PAPER = ProblemRange(4, 1, 99, 10, 100)
LAPTOP = ProblemRange(3, 1, 20, 10, 50)
APR = DemonstratorConfig("apr", 1, 10, 15, 0.9, budget_fraction=0, token_bin=512)
SOSP = DemonstratorConfig("sosp", 1, 5, 0, 0.5, budget_fraction=0, token_bin=512)
SOS = DemonstratorConfig("sos", 1, 5, 0, 0.0, budget_fraction=0, token_bin=512)
CONFIGS = {"apr": APR, "sosp": SOSP, "sos": SOS}
TOKENIZER = Tokenizer(100)


@functools.cache
def demonstrations(method, n=40):
    """Problems, their traces and records."""
    made = []
    for i in range(n):
        drawn = problem(PAPER, "train", 7, i)
        trace = demonstrate(drawn, CONFIGS[method], random.Random(i))
        made.append((drawn, trace, solver.record(drawn, trace, Countdown(TOKENIZER, method))))
    return made


# ---------------------------------------------------------------- the released codes' traces


class Scripted(random.Random):
    """Random choices read off a reference trace: the order of each listing, and the coin after it."""

    def __init__(self, expansions):
        super().__init__(0)
        self.expansions = iter(expansions)

    def shuffle(self, options):
        listed, self.coin, cut_short = next(self.expansions)
        kept = list(options)
        for i, operation in enumerate(listed):
            options[i] = kept.pop([option[1] for option in kept].index(operation))
        assert cut_short or not kept, "the reference kept fewer children"
        options[len(listed) :] = kept

    def random(self):
        return 0.0 if self.coin else 1.0


def expansions_of(text):
    """(operations listed, handed out, ended by the goal) of each expanded state of a text, up to its first goal."""
    found = []
    for line in parse(text.partition(GOAL_TEXT)[0] + GOAL_TEXT * (GOAL_TEXT in text)):
        if line.kind == "state" and len(line.numbers) > 1:
            found.append([[], False, False])
        elif line.kind == "explore":
            found[-1][0].append(line.operation)
        elif line.kind in ("enter", "call"):
            found[-1][1] = True
        elif line.kind == "goal" and found:
            found[-1][2] = True
    return found


def written_of(reference):
    """What each call of a reference thread wrote: its context from the last join on."""
    return [text.rpartition("<End Sub Searches>\n")[2] for text in reference["main_calls"]]


def script_of(reference):
    children = [*reference["sub_calls"], []]
    for text, spawned in zip(written_of(reference), children, strict=True):
        yield from expansions_of(text)
        for child in spawned:
            yield from script_of(child)


def assert_same(reference, trace, prompt):
    missing = 0
    for i, (theirs, ours) in enumerate(zip(written_of(reference), trace.calls, strict=True)):
        ours = ours if i else prompt + ours
        if i and theirs.startswith("Current State"):  # the defect of the released generator
            move, _, ours = ours.partition("\n")
            assert move.startswith("Moving to Node #0,")
            missing += 1
        assert ours == theirs
    for theirs, ours in zip(reference["sub_calls"], trace.spawns, strict=True):
        for child, trace_of_child in zip(theirs, ours, strict=True):
            missing += assert_same(child, trace_of_child, trace_of_child.prompt)
    return missing


def replayed(method, case):
    """The search that a reference trace records, with its random choices scripted, and the reference as a tree."""
    reference = case["trace"] if method == "apr" else {"main_calls": [case["trace"]], "sub_calls": []}
    rng = Scripted(script_of(reference))
    node = search.Node("0", case["nums"], "", 0, "", None)
    if method == "apr":
        return search.Parallel(node, case["target"], case["beam"], rng, 0.5, case["sub_beam"]), reference
    if method == "sosp":
        return search.Hybrid(node, case["target"], case["beam"], rng, 0.5), reference
    strategy = {"dfs": search.DepthFirst, "bfs": search.BreadthFirst}[case["search"]]
    heuristic = {"mult_heuristic": "multiply", "sum_heuristic": "sum"}[case["heuristic"]]
    return strategy(node, case["target"], case.get("beam", 0), rng, heuristic), reference


@pytest.mark.parametrize(("method", "missing_moves"), [("sos", 0), ("sosp", 0), ("apr", 5)])
def test_reference_traces_are_reproduced_to_the_byte(method, missing_moves):
    cases = json.loads((ROOT / f"tests/reference_traces/{method}.json").read_text())
    missing = 0
    for case in cases:
        run, reference = replayed(method, case)
        run.run()
        drawn = Problem(tuple(case["nums"]), case["target"])
        missing += assert_same(reference, run.trace, solver.root_prompt(drawn, method))
    assert len(cases) == 30
    assert missing == missing_moves


def heuristic_by_definition(name, numbers, target):
    if name == "sum":
        return sum(abs(Fraction(x) - target) for x in numbers) / len(numbers)
    factors = [f for f in range(2, target + 1) if target % f == 0]
    return sum(min(abs(x - f) for f in factors) for x in numbers)


@pytest.mark.parametrize("name", ["sum", "multiply"])
def test_expand_makes_every_legal_child_in_order_and_best_first_sorts_them(name):
    rng = random.Random(3)
    for _ in range(60):
        numbers, target = [rng.randint(0, 60) for _ in range(rng.randint(2, 4))], rng.randint(2, 100)
        legal = []
        for i, j in itertools.combinations(range(len(numbers)), 2):
            a, b = numbers[i], numbers[j]
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            results = [(a + b, "+"), (a * b, "*"), (abs(a - b), "-")]  # in this order
            big, small = (a, b) if a > b else (b, a)
            results += [(big // small, "/")] if small and big % small == 0 else []
            legal += [([*rest, result], sign) for result, sign in results]
        children = search.expand(numbers, target, name)
        ranked = search.best_first(children)
        assert ranked == sorted(children, key=lambda child: (child[0], children.index(child)))
        costs = [cost for cost, _, _ in children]
        assert costs == pytest.approx([float(heuristic_by_definition(name, left, target)) for _, _, left in children])
        signs = [next(sign for sign in "+*-/" if sign in operation) for _, operation, _ in children]
        assert [*zip([left for *_, left in children], signs, strict=True)] == legal


def test_a_fixed_order_lists_the_same_children_in_order_of_generation_and_spawns_them_so():
    """The beam of 5 keeps the same five children whatever the order; only their order, and so their ids, differ."""
    fixed = dataclasses.replace(APR, beam_low=5, beam_high=5, spawn_probability=1.0, order="fixed")
    moved = 0
    for i in range(100):
        drawn = problem(LAPTOP, "train", 3, i)
        every = [operation for _, operation, _ in search.expand(list(drawn.numbers), drawn.target)]
        lists = []
        for config in (fixed, dataclasses.replace(fixed, order="random")):
            trace = demonstrate(drawn, config, random.Random(i))
            lists.append([line.operation for line in parse(trace.calls[0]) if line.kind == "generate"])
        assert sorted(lists[0]) == sorted(lists[1])
        assert [every.index(operation) for operation in lists[0]] == sorted(map(every.index, lists[0]))
        moved += lists[0] != lists[1]
        nodes = [line.node for line in parse(demonstrate(drawn, fixed, random.Random(i)).calls[0]) if line.kind == "start"]
        assert nodes == [f"0,{child}" for child in range(len(nodes))]
    assert moved > 90


@pytest.mark.parametrize("method", ["apr", "sosp"])
def test_pruning_lists_the_cheapest_distinct_states_that_cost_at_most_the_target(method):
    config = dataclasses.replace(CONFIGS[method], beam_low=5, beam_high=5, prune=True)
    repeated = expensive = 0
    for i in range(200):
        drawn = problem(LAPTOP, "train", 3, i)
        lines = parse(demonstrate(drawn, config, random.Random(i)).calls[0])
        lines = list(itertools.takewhile(lambda line: line.kind != "goal", lines))  # after it the path is told again
        first = [line for line in lines if line.kind == "generate" and line.node.count(",") == 1]
        listed = [tuple(sorted(line.numbers)) for line in first]
        children = search.expand(list(drawn.numbers), drawn.target)
        costs = {tuple(sorted(left)): cost for cost, _, left in children}
        assert len(set(listed)) == len(listed)
        assert sorted(costs[state] for state in listed) == sorted(cost for cost in costs.values() if cost <= drawn.target)[:5]
        repeated += len(costs) < len(children)
        expensive += max(costs.values()) > drawn.target
    assert repeated > 20 and expensive > 20


def test_depth_first_pruning_leaves_out_repeated_states_too():
    """4, 4 and 3: three of the pairs are alike, so that half of the children repeat a state."""
    root = search.Node("0", [4, 4, 3], "", 0, "", None)
    for prunes in (False, True):
        walk = search.DepthFirst(root, 21, 5, random.Random(0))
        walk.prunes = prunes
        walk.run()
        first = [line for line in parse("".join(walk.trace.calls)) if line.kind == "generate" and line.node.count(",") == 1]
        states = [tuple(sorted(line.numbers)) for line in first]
        assert (len(set(states)) == len(states)) == prunes


# ---------------------------------------------------------------- what demonstrations look like


def threads_of(trace):
    yield trace
    for child in itertools.chain.from_iterable(trace.spawns):
        yield from threads_of(child)


def test_every_state_but_the_first_is_announced_by_its_move():
    for i in range(1000):
        drawn = problem(LAPTOP if i % 4 else PAPER, "train", 1, i)
        trace = demonstrate(drawn, list(CONFIGS.values())[0 if i % 2 else i // 2 % 3], random.Random(i))
        for thread in threads_of(trace):
            lines = parse(thread.prompt + thread.calls[0])
            for call in thread.calls[1:]:
                lines += parse(call)
            for before, line in itertools.pairwise(lines):
                assert line.kind != "state" or before.kind in ("move", "enter"), (i, line)


def test_demonstrators_solve_as_often_as_the_released_ones():
    """Measured on the released code: APR 0.73, SoS+ 0.52-0.57; wide margins, 300 problems."""
    for method, low, high in (("apr", 0.63, 0.82), ("sosp", 0.42, 0.62), ("sos", 0.42, 0.68)):
        solved = 0
        for i in range(300):
            drawn = problem(PAPER, "train", 2, i)
            trace = demonstrate(drawn, CONFIGS[method], random.Random(i))
            solved += GOAL_TEXT in trace.calls[-1]
        assert low < solved / 300 < high, method


def test_demonstrations_are_graded_by_what_they_found():
    verdicts = set()
    for method in CONFIGS:
        for drawn, trace, rollout in demonstrations(method):
            found = GOAL_TEXT in trace.calls[-1]
            verdicts.add((method, found))
            assert rollout.grade.correct == found
            assert rollout.grade == Countdown(TOKENIZER, method).grade(drawn, rollout.root)
            if found:
                assert grade_steps(drawn, rollout.grade.answer).correct
            else:
                assert rollout.grade.reason == "no answer"
    assert len(verdicts) == 6


def test_only_the_root_spawns_and_never_one_child():
    widths = []
    for _, trace, _ in demonstrations("apr"):
        assert all(len(children) > 1 for children in trace.spawns)
        assert all(not child.spawns and len(child.calls) == 1 for children in trace.spawns for child in children)
        widths.append(trace.width())
    assert max(widths) > 10 and 0 in widths


def test_depth_first_trace_may_be_its_prompt_alone():
    """From the references: with target 11 every child of 15, 6, 18, 24 is pruned."""
    drawn = Problem((15, 6, 18, 24), 11)
    node = search.Node("0", list(drawn.numbers), "", 0, "", None)
    run = search.DepthFirst(node, 11, 1, random.Random(0), "multiply")
    assert run.run() is None
    run.trace.prompt = solver.root_prompt(drawn, "sos")
    rollout = solver.record(drawn, run.trace, Countdown(TOKENIZER, "sos"))
    assert rollout.root.calls == [Call(0, TOKENIZER.encode("Current State: 11:[15, 6, 18, 24], Operations: []\n"), [1])]
    assert rollout.grade.reason == "no answer"


# ---------------------------------------------------------------- records and the task


def test_record_is_what_the_runtime_would_record():
    """Task.spawn and Task.join, run on the sampled ids alone, give the prompts, rewind points and join blocks."""
    joins = successes = 0
    for drawn, trace, rollout in demonstrations("apr"):
        task = Countdown(TOKENIZER, "apr")
        root = rollout.root
        context = task.prompt(drawn)
        assert root.calls[0].keep == 0 and root.calls[0].injected == context
        for i, call in enumerate(root.calls):
            context = context + call.sampled
            assert TOKENIZER.decode(call.sampled) == trace.calls[i] + "<|end|>" * (i == len(trace.spawns))
            if i == len(trace.spawns):
                assert call.stop == END and call.sampled[-1] == task.end_id
                continue
            assert call.stop == SPAWN and call.sampled[-1] == task.spawn_id
            spawn = task.spawn(context)
            assert [child.calls[0].injected for child in root.spawns[i]] == spawn.prompts
            assert [child.path for child in root.spawns[i]] == [(i, j) for j in range(len(spawn.prompts))]
            assert TOKENIZER.decode(context[spawn.start :]).startswith("<Calling Sub Searches>\n")
            after = root.calls[i + 1]
            assert after.keep == spawn.start and after.injected == task.join(root.spawns[i])
            context = context[: after.keep] + after.injected
            joins += 1
            successes += "<Goal Reached in" in TOKENIZER.decode(after.injected)
        assert context == root.ids()
    assert joins > 20 and 5 < successes < joins


def test_joined_context_is_the_released_format():
    """The parent's whole context after its join, for the first reference with a success in a child."""
    case = json.loads((ROOT / "tests/reference_traces/apr.json").read_text())[15]
    run, reference = replayed("apr", case)
    run.run()
    rollout = solver.record(Problem(tuple(case["nums"]), case["target"]), run.trace, Countdown(TOKENIZER, "apr"))
    assert "<Goal Reached in Sub Search 3 at level 1 at Node #0,1>" in reference["main_calls"][-1]
    assert TOKENIZER.decode(rollout.root.ids()[:-1]) == reference["main_calls"][-1]
    assert rollout.grade.answer == ("12/6=2", "8*2=16", "53+16=69")


PARENT = (
    "Moving to Node #0\nCurrent State: 24:[6, 2, 2], Operations: []\n"
    "Exploring Operation: 6*2=12, Resulting Numbers: [2, 12]\nGenerated Node #0,0: 24:[2, 12] Operation: 6*2=12\n"
    "Exploring Operation: 6+2=8, Resulting Numbers: [2, 8]\nGenerated Node #0,1: 24:[2, 8] Operation: 6+2=8\n"
)
CHILD = "Moving to Node #0,0\nCurrent State: 24:[2, 12], Operations: ['6*2=12']\n"
CHILD_PATH = f"{CHILD}Exploring Operation: 2*12=24, Resulting Numbers: [24]\n24,24 equal: Goal Reached\n"


def block(*starts):
    inside = "".join(f"<Start Sub Search {start}\n" for start in starts)
    return f"<Calling Sub Searches>\n{inside}<End Calling Sub Searches>\n"


def test_spawn_builds_prompts_from_the_parents_own_lines():
    ids = TOKENIZER.encode(PARENT + block("0 at level 1> Moving to Node #0,1", "1 at level 1> Moving to Node #0,0"))
    spawn = Countdown(TOKENIZER, "apr").spawn(ids)
    assert TOKENIZER.decode(ids[: spawn.start]) == PARENT
    again = TOKENIZER.encode("<Calling Sub Searches>\n") + ids  # the last block counts
    assert Countdown(TOKENIZER, "apr").spawn(again).start == spawn.start + 1
    other = "Moving to Node #0,1\nCurrent State: 24:[2, 8], Operations: ['6+2=8']\n"
    assert [TOKENIZER.decode(prompt) for prompt in spawn.prompts] == [other, CHILD]


def test_spawn_below_the_root_knows_the_operations_so_far():
    text = (
        f"{PARENT}Moving to Node #0,1\nCurrent State: 24:[2, 8], Operations: ['6+2=8']\n"
        "Generated Node #0,1,0: 24:[16] Operation: 2*8=16\n" + block("0 at level 1> Moving to Node #0,1,0")
    )
    (prompt,) = Countdown(TOKENIZER, "apr").spawn(TOKENIZER.encode(text)).prompts
    assert TOKENIZER.decode(prompt) == (
        "Moving to Node #0,1,0\nCurrent State: 24:[16], Operations: ['6+2=8', '2*8=16']\n"
    )


def test_children_spawn_at_deeper_levels():
    text = f"{CHILD}Generated Node #0,0,0: 24:[24] Operation: 2*12=24\n"
    task = Countdown(TOKENIZER, "apr")
    spawn = task.spawn(TOKENIZER.encode(text + block("0 at level 2> Moving to Node #0,0,0")))
    assert len(spawn.prompts) == 1
    with pytest.raises(MalformedSpawn, match="at level 2.*at level 1.*is due"):
        task.spawn(TOKENIZER.encode(PARENT + block("0 at level 2> Moving to Node #0,1")))
    grandchild = Thread((0, 1, 2, 3), [Call(0, spawn.prompts[0], [task.end_id])])
    assert "in Sub Search 0 at level 2 at Node #0,0,0>" in TOKENIZER.decode(task.join([grandchild]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PARENT + block(), "names no node"),
        (PARENT + block("0 at level 1> Moving to Node #0,7"), "node #0,7 was never generated"),
        (PARENT + block(*(f"{i} at level 1> Moving to Node #0,1" for i in (0, 1))), "node #0,1 is named twice"),
        (PARENT + block("1 at level 1> Moving to Node #0,1"), "Search 1 at level 1.*Search 0 at level 1.*is due"),
        (PARENT + block("0 at level 0> Moving to Node #0,1"), "at level 0.*at level 1.*is due"),
        (PARENT + block("0 at level 3> Moving to Node #0,1"), "at level 3.*at level 1.*is due"),
        (PARENT + block("0 at level 1> Moving to Node #0,1").replace("#0,1\n<End", "#0,1\n7\n<End"), "'7' where"),
        (PARENT[:-1] + block("0 at level 1> Moving to Node #0,1"), "does not start a line"),
        (PARENT + "<End Calling Sub Searches>\n", "no <Calling Sub Searches>"),
        (PARENT + block(f"0 at level 1> Moving to Node #0,{'9' * 5000}"), "names no node|never generated"),
    ],
)
def test_malformed_spawns_are_refused_with_the_value(text, reason):
    with pytest.raises(MalformedSpawn, match=reason) as error:
        Countdown(TOKENIZER, "apr").spawn(TOKENIZER.encode(text))
    assert len(str(error.value)) < 400


def test_a_child_that_inherits_sees_its_parents_context_before_the_spawn():
    ids = TOKENIZER.encode(PARENT + block("0 at level 1> Moving to Node #0,0"))
    task = Countdown(TOKENIZER, "apr", inherit_context=True)
    (prompt,) = task.spawn(ids).prompts
    assert TOKENIZER.decode(prompt) == PARENT + CHILD
    child = Thread((0, 0), [Call(0, prompt, [*TOKENIZER.encode(f"24,24{GOAL_TEXT}{CHILD_PATH}"), 1])])
    assert TOKENIZER.decode(task.join([child])) == (
        f"<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1 at Node #0,0>\n{CHILD_PATH}<End Sub Searches>\n"
    )


def test_a_join_of_texts_hands_over_all_that_children_wrote():
    task = Countdown(TOKENIZER, "apr", child_returns="text")
    won, lost = child_thread(f"24,24{GOAL_TEXT}{CHILD_PATH}"), child_thread("14,24 unequal: No Solution\nNo solution found.")
    assert TOKENIZER.decode(task.join([won, lost])) == (
        f"<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1 at Node #0,0>\n24,24{GOAL_TEXT}{CHILD_PATH}"
        "<No Solution in Sub Search 1 at level 1 at Node #0,0>\n14,24 unequal: No Solution\nNo solution found.\n"
        "<End Sub Searches>\n"
    )
    assert TOKENIZER.decode(Countdown(TOKENIZER, "apr").join([lost])) == (
        "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,0>\n<End Sub Searches>\n"
    )
    drawn = [*TOKENIZER.encode("14,24"), *TOKENIZER.encode(","), *TOKENIZER.encode(GOAL_TEXT)]  # decodes, but not back
    with pytest.raises(ValueError, match="not in the trace language"):
        TOKENIZER.encode(TOKENIZER.decode(drawn))
    strange = child_thread("14,24 unequal: No Solution\n")
    strange.calls[-1].sampled = [*drawn, 1]
    assert TOKENIZER.decode(task.join([strange])).splitlines()[2] == "14,24, equal: Goal Reached"
    with pytest.raises(ValueError, match="threads.child_returns='all' must be one of path, text"):
        Countdown(TOKENIZER, "apr", child_returns="all")


@pytest.mark.parametrize(("join", "inherit"), [("path", True), ("text", False), ("text", True)])
def test_variants_are_recorded_as_the_runtime_would_run_them(join, inherit):
    """Prompts and joins of a recorded demonstration are those its own ids lead to, and the verdict is the same."""
    task = Countdown(TOKENIZER, "apr", join, inherit)
    spawns = 0
    for drawn, trace, plain in demonstrations("apr"):
        root = solver.record(drawn, trace, task).root
        assert task.grade(drawn, root) == plain.grade
        ids = []
        for number, call in enumerate(root.calls):
            ids = ids[: call.keep] + call.injected + call.sampled
            if call.stop == SPAWN:
                spawn, children = task.spawn(ids), root.spawns[number]
                assert spawn.prompts == [child.calls[0].injected for child in children]
                after = root.calls[number + 1]
                assert (spawn.start, task.join(children)) == (after.keep, after.injected)
                spawns += 1
    assert spawns > 20


def test_a_cut_root_is_made_to_claim_the_goal_after_its_last_whole_line():
    task = Countdown(TOKENIZER, "sosp")
    drawn = Problem((6, 2, 2), 24)
    cut = TOKENIZER.encode(PARENT + "Exploring Operation: 6/2")
    keep, claim = task.force_answer(drawn, cut)
    assert (TOKENIZER.decode(cut[:keep]), TOKENIZER.decode(claim)) == (PARENT, f"24,24{GOAL_TEXT}")
    claimed = TOKENIZER.encode(f"{PARENT}24,24{GOAL_TEXT}Moving to Node #0\nCurrent State: ")
    keep, claim = task.force_answer(drawn, claimed)
    assert TOKENIZER.decode(claimed[:keep]) + TOKENIZER.decode(claim) == f"{PARENT}24,24{GOAL_TEXT}"


def test_a_root_that_gave_up_is_sent_to_the_first_node_it_never_moved_to():
    task = Countdown(TOKENIZER, "sosp")
    for given_up in ("", "No solution found.\n"):
        ids = TOKENIZER.encode(f"{PARENT}{CHILD}{given_up}")
        forced = task.force_continue([*ids, 1])
        assert forced is not None
        keep, more = forced
        assert TOKENIZER.decode(ids[:keep] + more) == f"{PARENT}{CHILD}Moving to Node #0,1\n"
    joined = "<Sub Searches>\n<No Solution in Sub Search 0 at level 1 at Node #0,1>\n<End Sub Searches>\n"
    for text in (f"{PARENT}{joined}{CHILD}", f"{PARENT}24,24{GOAL_TEXT}", f"{PARENT}Moving to Node #0,1"):
        assert task.force_continue([*TOKENIZER.encode(text), 1]) is None  # nothing left, an answer, no whole line


def child_thread(written, stop=END):
    return Thread((0, 0), [Call(0, TOKENIZER.encode(CHILD), [*TOKENIZER.encode(written), 1], stop=stop)])


@pytest.mark.parametrize(
    ("written", "stop", "success"),
    [
        ("24,24 equal: Goal Reached\n" + CHILD_PATH, END, True),
        ("24,24 equal: Goal Reached\n" + CHILD_PATH, CONTEXT, False),
        ("24,24 equal: Goal Reached\n", END, False),
        (CHILD_PATH, END, False),
        ("24,24 equal: Goal Reached\n" + CHILD_PATH + "No solution found.\n", END, False),
        ("24,24 equal: Goal Reached\n" + CHILD_PATH.replace("#0,0", "#0,1"), END, False),
        ("24,24 equal: Goal Reached\n" + CHILD_PATH.replace("[24]", "[24"), END, False),
        ("24,24 equal: Goal Reached\n" + CHILD_PATH.replace("24,24", "<Sub Searches>\n24,24"), END, False),
        ("No solution found.\n", END, False),
        ("", END, False),
    ],
)
def test_join_passes_on_a_restated_path_and_nothing_else(written, stop, success):
    joined = TOKENIZER.decode(Countdown(TOKENIZER, "apr").join([child_thread(written, stop)]))
    where = "in Sub Search 0 at level 1 at Node #0,0>\n"
    result = f"<Goal Reached {where}{CHILD_PATH}" if success else f"<No Solution {where}"
    assert joined == f"<Sub Searches>\n{result}<End Sub Searches>\n"


def grade_text(text, method="apr", stop=END, numbers=(6, 2, 2), target=24):
    root = Thread((), [Call(0, [], [*TOKENIZER.encode(text), 1], stop=stop)])
    return Countdown(TOKENIZER, method).grade(Problem(numbers, target), root)


def test_grade_reads_the_last_path():
    right = PARENT + "24,24 equal: Goal Reached\n" + CHILD_PATH
    assert grade_text(right).answer == ("6*2=12", "2*12=24") and grade_text(right).correct
    assert grade_text(right + "Exit Sub Search at level 2\nExit Sub Search at level 1\n").correct
    assert grade_text(right, stop=CONTEXT).reason == "no answer: stopped by context"
    assert grade_text(right + "No solution found.\n").reason == "no answer"
    assert grade_text("").reason == grade_text("No solution found.\n").reason == "no answer"
    assert grade_text("24,24 equal: Goal Reached\n").reason == "no answer: no operation reaches the goal from a state"
    nowhere = "no answer: no operation reaches the goal from a state"
    assert grade_text(CHILD_PATH.replace("Exploring", "No solution found.\nExploring")).reason == nowhere
    assert grade_text(CHILD_PATH.replace("24,24 eq", "24,24 unequal: No Solution\n24,24 eq")).reason == nowhere
    joined = f"<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1 at Node #0,0>\n{CHILD_PATH}<End Sub Searches>\n"
    assert grade_text(PARENT + joined).reason == "no answer"
    assert grade_text(PARENT + joined + "24,24 equal: Goal Reached\n").reason.startswith("no answer")
    # what the state line claims is judged, not believed
    assert grade_text(CHILD_PATH.replace("6*2=12", "6+6=12")).reason == "6 is not available"
    assert grade_text(CHILD_PATH.replace("2*12=24", "2+12=24")).reason == "wrong arithmetic: 2+12=24"
    assert "line 2 is not in the trace language" in grade_text(CHILD_PATH.replace("2*12=24", "2**12=24")).reason
    assert grade_text(CHILD_PATH.replace("[2, 12]", "[99]")).correct


def test_huge_numbers_in_model_output_do_no_harm():
    for n in (50, 999, 5000, 50_000):
        wrong = CHILD_PATH.replace("2*12=24", f"{'9' * n}*{'9' * n}={'8' * n}")
        assert not grade_text(wrong).correct and len(grade_text(wrong).reason) < 300
    assert grade_steps(Problem((3, 5), 8), [f"{'9' * 5000}+1=2"]).reason.startswith("malformed step: 999")


def test_budgets_are_prefixes():
    drawn = Problem((7, 2, 19), 31)
    apr = Countdown(TOKENIZER, "apr", children_budget=10)
    assert TOKENIZER.decode(apr.prompt(drawn)) == (
        "Sub Call Budget: 10 Moving to Node #0\nCurrent State: 31:[7, 2, 19], Operations: []\n"
    )
    ids = apr.tokenizer.encode("Sub Call Budget: 10 " + PARENT + block("0 at level 1> Moving to Node #0,0"))
    assert TOKENIZER.decode(apr.spawn(ids).prompts[0]) == CHILD
    budget = Countdown(TOKENIZER, "sosp", token_budget=1024)
    assert TOKENIZER.decode(budget.prompt(drawn)) == (
        "Token Budget: 1024 Current State: 31:[7, 2, 19], Operations: []\n"
    )
    assert TOKENIZER.decode(budget.spawn(ids).prompts[0]) == "Token Budget: 1024 " + CHILD
    written = TOKENIZER.encode(f"24,24{GOAL_TEXT}{CHILD_PATH}")
    child = Thread((0, 0), [Call(0, budget.spawn(ids).prompts[0], [*written, 1])])
    assert CHILD_PATH in TOKENIZER.decode(budget.join([child]))
    with pytest.raises(ValueError, match="children_budget must not be negative, it is -1"):
        Countdown(TOKENIZER, "apr", children_budget=-1)
    with pytest.raises(ValueError, match="method='bfs' must be one of sos, sosp, apr"):
        Countdown(TOKENIZER, "bfs")


@pytest.mark.parametrize("method", ["apr", "sosp"])
def test_conditioned_demonstrations_carry_what_they_used(method):
    plain = CONFIGS[method]
    config = dataclasses.replace(plain, budget_fraction=0.5)
    prefixed = 0
    for index in range(30):
        rollout = solver.demonstration(PAPER, config, Countdown(TOKENIZER, method), "train", 0, index)
        prompt = TOKENIZER.decode(rollout.root.calls[0].injected)
        bare = prompt[prompt.index("Moving" if method == "apr" else "Current") :]
        prefixed += prompt != bare
        children = len(rollout.threads()) - 1
        tokens = len(rollout.root.ids()) - len(TOKENIZER.encode(prompt.removesuffix(bare)))
        used = f"Sub Call Budget: {children} " if method == "apr" else f"Token Budget: {-(-tokens // 512) * 512} "
        assert prompt in (bare, used + bare)
    assert 5 < prefixed < 25


# ---------------------------------------------------------------- grader and exact search


@pytest.mark.parametrize(
    ("numbers", "target", "path", "reason"),
    [
        ((22, 26, 31, 53), 27, "53-31=22, 22/22=1, 1+26=27", ""),
        ((5, 5), 1, "5/5=1", ""),
        ((5, 5, 7), 7, "5-5=0, 0+7=7", ""),
        ((5, 5, 7), 7, "5-5=0,0*7=0", "ends at 0, not 7"),
        ((2, 3), 8, "2**3=8", "malformed step: 2**3=8"),
        ((7, 2), 3, "7//2=3", "malformed step: 7//2=3"),
        ((3, 2, 4), 6, "3/2=1.5, 1.5*4=6", "malformed step: 3/2=1.5"),
        ((3, 2, 4), 6, "1.5*4=6", "malformed step: 1.5*4=6"),
        ((7, 2), 3, "7/2=3", "division not exact: 7/2=3"),
        ((4, 5), 8, "4+4=8", "4 is not available"),
        ((4, 5), 9, "4+5=9, 9+4=13", "4 is not available"),
        ((4, 5, 3), 9, "4+5=9", "unused number 3"),
        ((3, 4), 8, "3+4=8", "wrong arithmetic: 3+4=8"),
        ((3, 4), 1, "3-4=1", "wrong arithmetic: 3-4=1"),
        ((3, 4), 1, "3-4=-1", "malformed step: 3-4=-1"),
        ((3, 3, 4), 4, "3-3=0, 4/0=4", "division by zero: 4/0=4"),
        ((20, 4), 25, "20+4=24", "ends at 24, not 25"),
        ((20, 4), 24, "", "no answer"),
        ((20, 4), 24, "20+4=24,", "malformed step: "),
        ((20, 4), 24, "(20+4)=24", "malformed step: (20+4)=24"),
        ((20, 4), 24, "020+4=24", "malformed step: 020+4=24"),
        ((20, 4), 24, "20+4", "malformed step: 20+4"),
        ((20, 4), 24, "__import__('os')", "malformed step: __import__('os')"),
        ((7, 8), 15, "7+٨=15", "malformed step: 7+٨=15"),
    ],
)
def test_grader(numbers, target, path, reason):
    grade = grade_path(Problem(numbers, target), path)
    assert grade.reason == reason
    assert grade.correct == (reason == "")


def every_value(numbers):
    """All values that use each number once, by trying every tree: slow and independent."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for result in (a + b, a * b, *([a - b] if a >= b else []), *([a // b] if b and a % b == 0 else [])):
            found |= every_value([*rest, result])
    return found


def test_exact_search_agrees_with_trying_everything():
    rng = random.Random(11)
    for i in range(60):
        numbers = [rng.randint(1, 12) for _ in range(2 + i % 3)]
        values = every_value(numbers)
        for target in range(1, 60):
            assert solver.solvable(numbers, target) == (target in values), (numbers, target)


# ---------------------------------------------------------------- problems


def key(drawn):
    return tuple(sorted(drawn.numbers)), drawn.target


@pytest.mark.parametrize("family", [PAPER, LAPTOP])
def test_problems_are_solvable_and_splits_never_meet(family):
    train = [problem(family, "train", seed, i) for seed in range(3) for i in range(150)]
    held_out, validation = (
        [problem(family, split, seed, i) for seed in range(3) for i in range(60)] for split in ("heldout", "validation")
    )
    for one, other in itertools.combinations((train, held_out, validation), 2):
        assert not {*map(key, one)} & {*map(key, other)}
    for drawn in (*train, *held_out, *validation):
        assert solver.solvable(drawn.numbers, drawn.target)
        assert len(drawn.numbers) == family.count
        assert all(family.low <= x <= family.high for x in drawn.numbers)
        assert family.target_low <= drawn.target <= family.target_high
    assert len({*map(key, train)}) > 250
    assert any(list(drawn.numbers) != sorted(drawn.numbers) for drawn in train)


def test_laptop_family_has_8728_problems_two_in_ten_not_trained_on():
    listings = [solver._listing(LAPTOP, split) or () for split in ("train", "validation", "heldout")]
    assert [len(listing) for listing in listings] == [6958, 905, 865] and 6958 + 905 + 865 == 8728
    assert len({key(drawn) for listing in listings for drawn in listing}) == 8728


@pytest.mark.parametrize("family", [PAPER, LAPTOP])
def test_held_out_set_is_distinct_and_reproducible(family):
    chosen = solver.problems_of(family, "heldout", 100)
    assert len({*map(key, chosen)}) == 100
    assert all(solver.split_of(drawn.numbers, drawn.target) == "heldout" for drawn in chosen)
    assert chosen == solver.problems_of(family, "heldout", 100) == solver.problems_of(family, "heldout", 120)[:100]


def test_held_out_set_says_how_many_there_are():
    small = ProblemRange(3, 1, 12, 10, 24)
    exist = len(solver._listing(small, "heldout"))
    assert len(solver.problems_of(small, "heldout", exist)) == exist
    with pytest.raises(ValueError, match=f"only {exist} problems for the heldout split, {exist + 1} were asked for"):
        solver.problems_of(small, "heldout", exist + 1)


@pytest.mark.parametrize(
    "family",
    [ProblemRange(2, 7, 7, 20, 30), ProblemRange(3, 1, 2, 100, 200), ProblemRange(3, 50, 90, 10**6, 10**7)],
)
def test_impossible_families_are_refused(family):
    for split in ("train", "heldout"):
        with pytest.raises(ValueError, match="no solvable problem"):
            problem(family, split, 0, 0)
    with pytest.raises(ValueError):
        solver.problems_of(family, "heldout", 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem((0, 3), 3), "not 0"),
        (lambda: Problem((3, -4), 3), "not -4"),
        (lambda: Problem((3, 4), 0), "not 0"),
        (lambda: Problem((3, 4.0), 7), "not 4.0"),
        (lambda: Problem((3, True), 7), "not True"),
        (lambda: Problem((3, "4"), 7), "not '4'"),
        (lambda: Problem((3,), 3), "from 2 to 6 numbers, not 1"),
        (lambda: Problem((1,) * 7, 3), "from 2 to 6 numbers, not 7"),
        (lambda: Problem((3, 10**10), 7), "not 10000000000"),
        (lambda: ProblemRange(1, 1, 9, 1, 9), "problems.count=1 must be from 2 to 6"),
        (lambda: ProblemRange(3, 9, 1, 1, 9), "numbers .*not 9..1"),
        (lambda: ProblemRange(3, 1, 9, 0, 9), "targets .*not 0..9"),
        (lambda: dataclasses.replace(APR, method="dfs"), "demonstrator.method='dfs' must be one of sos, sosp, apr"),
        (lambda: dataclasses.replace(APR, beam_low=3, beam_high=2), "beam"),
        (lambda: dataclasses.replace(APR, sub_beam_high=9), "sub_beam_high must be at least the beam, 10, not 9"),
        (lambda: dataclasses.replace(APR, spawn_probability=1.5), "spawn_probability=1.5 must be from 0 to 1"),
        (lambda: dataclasses.replace(APR, budget_fraction=-0.1), "budget_fraction=-0.1 must be from 0 to 1"),
        (lambda: dataclasses.replace(SOS, budget_fraction=0.5), "SoS has no budget"),
        (lambda: dataclasses.replace(SOSP, token_bin=0), "token_bin=0 must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DIGEST = """
import dataclasses, hashlib, json, solver
from countdown.task import Countdown
from tests.solver_test import CONFIGS, LAPTOP, PAPER, TOKENIZER
made = [
    dataclasses.asdict(solver.demonstration(family, config, Countdown(TOKENIZER, config.method), "train", 3, index))
    for family in (LAPTOP, PAPER) for config in CONFIGS.values() for index in (0, 5)
]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_seed_and_index_fix_everything_in_any_process():
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1
    first, second = (solver.demonstration(PAPER, APR, Countdown(TOKENIZER, "apr"), "train", 3, index) for index in (0, 1))
    assert first.problem != second.problem


# ---------------------------------------------------------------- command line

QUESTION = ("--numbers=22,26,31,53", "--target=27")


def test_command_line_prints_threads(command):
    ended = command(solver, *QUESTION, "--method=apr", "--seed=0")
    assert ended.status == 0
    headings = [line for line in ended.out.splitlines() if line.startswith("[")]
    assert headings[0].startswith("[parent, call 0] ") and ended.out.splitlines()[-1].startswith("answer: ")
    assert any(heading.startswith("[child 0.0, call 0] ") for heading in headings)
    assert ended == command(solver, *QUESTION, "--method=apr", "--seed=0")
    assert ended.out != command(solver, *QUESTION, "--method=apr", "--seed=1").out


def test_command_line_prints_the_record(command):
    ended = command(solver, *QUESTION, "--method=sosp", "--json")
    fields = json.loads(ended.out)
    assert ended.status == 0 and fields["task"] == "countdown" and fields["facts"] == {"method": "sosp", "number_limit": 10}
    assert fields["rollout"]["problem"] == {"numbers": [22, 26, 31, 53], "target": 27}
    (call,) = fields["rollout"]["root"]["calls"]
    assert Tokenizer(10).decode(call["injected"]) == solver.root_prompt(Problem((22, 26, 31, 53), 27), "sosp")


def test_command_line_grades(command):
    assert command(solver, *QUESTION, "--grade=53-31=22, 22/22=1, 1+26=27") == Ended(0, "correct\n", "")
    assert command(solver, *QUESTION, "--grade=53-31=22") == Ended(1, "unused number 22\n", "")
    assert command(solver, *QUESTION, "--grade=").status == 1


def test_command_line_says_what_it_does_and_which_flags_it_has():
    run = subprocess.run([sys.executable, "solver.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "python solver.py --numbers=22,26,31,53" in run.stdout and "--grade" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--numbers=1,2",),
        ("--numbers=1,x", "--target=3"),
        ("--numbers=1,-2", "--target=3"),
        ("--numbers=0,2", "--target=3"),
        ("--numbers=1,2", "--target=three"),
        ("--numbers=1,2", "--target=0"),
        (*QUESTION, "--method=bfs"),
        (*QUESTION, "--sed=0"),
        (*QUESTION, "extra"),
    ],
)
def test_command_line_refuses_bad_input_in_one_sentence(command, arguments):
    ended = command(solver, *arguments)
    assert ended.status == 2 and ended.out == ""
    assert ended.err.startswith("error: ") and len(ended.err.strip().splitlines()) == 1


def test_rendering_is_the_inverse_of_parsing_for_demonstrations():
    for method in CONFIGS:
        for _, trace, _ in demonstrations(method):
            for thread in threads_of(trace):
                for text in (thread.prompt, *thread.calls):
                    assert render(parse(text)) == text

"""Searches and their demonstrations, against the released codes' traces and by definition."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import random
from fractions import Fraction

import pytest

import solver
from countdown import search
from countdown.grader import Problem, grade_steps
from countdown.language import GOAL_TEXT, Tokenizer, parse
from countdown.states import nearness
from countdown.task import Countdown
from records import Call
from solver import DemonstratorConfig, ProblemRange, demonstrate, problem
from tests.countdown.language_test import render

ROOT = pathlib.Path(__file__).parents[2]
PAPER = ProblemRange(4, 1, 99, 10, 100)
LAPTOP = ProblemRange(3, 1, 20, 10, 50)
APR = DemonstratorConfig("apr", 1, 10, 15, 0.9, budget_fraction=0, token_bin=512)
SOSP = DemonstratorConfig("sosp", 1, 5, 0, 0.5, budget_fraction=0, token_bin=512)
SOS = DemonstratorConfig("sos", 1, 5, 0, 0.0, budget_fraction=0, token_bin=512)
DIRECT = DemonstratorConfig("direct", 1, 1, 1, 0.0, budget_fraction=0, token_bin=512)
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
    if method == "sos":
        kind = {"dfs": search.DepthFirst, "bfs": search.BreadthFirst}[case["search"]]
        rules = search.Rules(heuristic={"mult_heuristic": "multiply", "sum_heuristic": "sum"}[case["heuristic"]])
    else:
        kind = {"apr": search.Parallel, "sosp": search.Hybrid}[method]
        rules = search.Rules(spawn_probability=0.5, sub_beam=case.get("sub_beam", 0))
    return kind(node, case["target"], case.get("beam", 0), rng, rules), reference


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
    if name == "total":
        return abs(sum(numbers) - target)
    if name == "near":
        *rest, largest = sorted(numbers)
        product = Fraction(1, 2) * abs(largest * math.prod(rest) - target)
        return min(abs(largest + sum(rest) - target), abs(largest - sum(rest) - target), product)
    if name == "sum":
        return sum(abs(Fraction(x) - target) for x in numbers) / len(numbers)
    factors = [f for f in range(2, target + 1) if target % f == 0]
    return sum(min(abs(x - f) for f in factors) for x in numbers)


@pytest.mark.parametrize("name", ["sum", "multiply", "total", "near"])
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
        assert ranked == [child for _, child in sorted(enumerate(children), key=lambda at: (at[1][0], at[0]))]
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
        left = iter(every)
        assert all(operation in left for operation in lists[0])  # in this order
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


def test_nearness_by_hand():
    assert nearness([6, 4], 24) == 0  # 6 * 4
    assert nearness([7, 5], 24) == 5.5  # half of 35 - 24, and 12 is farther
    assert nearness([17, 5], 24) == 2  # 17 + 5
    assert nearness([30, 5], 24) == 1  # 30 - 5
    assert nearness([12], 24) == 6  # its product; as a sum it costs 12
    assert nearness([40, 9, 5], 24) == 2  # 40 - 9 - 5
    assert nearness([2, 3, 5], 24) == 3  # half of 30 - 24


@pytest.mark.parametrize("method", ["sos", "direct"])
def test_a_method_that_explores_the_best_alone_takes_no_cost_limit(method):
    with pytest.raises(ValueError, match=f"{method} explores the best children: cost_limit must be -1, not 6"):
        dataclasses.replace(CONFIGS.get(method, DIRECT), cost_limit=6)


@pytest.mark.parametrize(("method", "beam"), [("apr", 9), ("sosp", 9), ("apr", 2)])
def test_with_a_cost_limit_all_is_explored_in_order_and_what_is_near_generated(method, beam):
    """Of every node with three or more numbers, until there are as many new states as the beam."""
    changes = dict(beam_low=beam, beam_high=beam, sub_beam_high=9, prune=True, order="fixed", heuristic="near", cost_limit=6)
    config = dataclasses.replace(CONFIGS[method], **changes)
    widths = []
    for i in range(100):
        drawn = problem(LAPTOP, "train", 3, i)
        lines = parse(demonstrate(drawn, config, random.Random(i)).calls[0])
        explored, generated, due = [], [], []
        for line in itertools.takewhile(lambda line: line.kind in ("explore", "generate"), lines):
            (explored if line.kind == "explore" else generated).append((line.operation, list(line.numbers)))
        every = [(operation, left) for _, operation, left in search.expand(list(drawn.numbers), drawn.target)]
        for number, (operation, left) in enumerate(every):
            new = sorted(left) not in [sorted(other) for _, other in every[:number]]
            due += [(operation, left)] if new and nearness(left, drawn.target) <= 6 else []
        assert generated == due[:beam]
        assert explored == (every if len(due) < beam else every[: every.index(due[beam - 1]) + 1])
        widths.append(len(generated))
    assert min(widths) <= 2 and (beam == 2 or max(widths) > 5)


@pytest.mark.parametrize("heuristic", ["total", "near"])
@pytest.mark.parametrize("method", ["apr", "sosp", "sos"])
def test_by_total_or_near_every_thread_lists_the_children_that_cost_least(method, heuristic):
    """Of every state that lists children; a goal ends its list early."""
    config = dataclasses.replace(CONFIGS[method], beam_low=3, beam_high=3, sub_beam_high=3, order="fixed", heuristic=heuristic)
    lists = {0: 0, 1: 0}  # of roots and of children
    for i in range(60):
        drawn = problem(PAPER, "train", 3, i)
        for number, thread in enumerate(threads_of(demonstrate(drawn, config, random.Random(i)))):
            lines = parse(thread.prompt + "".join(thread.calls))
            for at, line in enumerate(lines):
                following = [other.kind for other in lines[at + 1 :]]
                if line.kind != "state" or following[:2] != ["explore", "generate"] or "goal" in following:
                    continue
                own = itertools.takewhile(lambda other: other.kind in ("explore", "generate"), lines[at + 1 :])
                children = search.best_first(search.expand(list(line.numbers), drawn.target, heuristic))
                listed = [other.operation for other in own if other.kind == "explore"]
                if len(listed) == 3:  # depth first announces each child before its sibling
                    assert sorted(listed) == sorted(operation for _, operation, _ in children[:3])
                    lists[min(number, 1)] += 1
    assert method == "sos" or lists[0] > 20
    assert method != "apr" or lists[1] > 20


def test_depth_first_pruning_leaves_out_repeated_states_too():
    """4, 4 and 3: three of the pairs are alike, so that half of the children repeat a state."""
    root = search.Node("0", [4, 4, 3], "", 0, "", None)
    for prunes in (False, True):
        walk = search.DepthFirst(root, 21, 5, random.Random(0), search.Rules(prunes=prunes))
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


def ways(numbers, target, states=()):
    """Every sequence of states (sorted numbers) from these numbers to the target, by fractions and brute force."""
    if len(numbers) == 1:
        yield from [states] if numbers[0] == target else []
        return
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for result in (a + b, a * b, a - b, Fraction(a, b) if b else -1):
            if result >= 0 and result == int(result):
                state = tuple(sorted([*rest, int(result)]))
                yield from ways([*state], target, (*states, state))


def test_solutions_are_right_and_every_way_through_the_states_is_there_once():
    for index in range(150):
        drawn = problem(LAPTOP, "train", 3, index)
        found = [*search.solutions(list(drawn.numbers), drawn.target, "near")]
        assert all(grade_steps(drawn, [operation for operation, _ in path]).correct for path in found)
        states = [tuple(tuple(sorted(left)) for _, left in path) for path in found]
        assert sorted(states) == sorted({*ways([*drawn.numbers], drawn.target)})


@pytest.mark.parametrize("order", solver.ORDERS)
def test_a_direct_demonstration_is_a_solution_and_nothing_else(order):
    config, task = dataclasses.replace(DIRECT, order=order), Countdown(TOKENIZER, "direct")
    lotteries = 0
    for index in range(100):
        drawn = problem(PAPER, "train", 3, index)
        paths = [*search.solutions(list(drawn.numbers), drawn.target)]
        traces = [demonstrate(drawn, config, random.Random(draw)) for draw in range(4)]
        for trace in traces:
            kinds = [line.kind for line in parse(trace.prompt + trace.calls[0])]
            assert kinds == ["state", "explore", "explore", "explore", "goal"] and not trace.spawns
            grade = solver.record(drawn, trace, task).grade
            assert grade.correct and [*grade.answer] in [[operation for operation, _ in path] for path in paths]
            assert order == "random" or [*grade.answer] == [operation for operation, _ in paths[0]]
        lotteries += len({trace.calls[0] for trace in traces}) > 1
    assert lotteries > 30 if order == "random" else lotteries == 0


def test_a_direct_answer_is_judged_by_all_its_operations():
    """25-22=3, then 9*3=27: right with both, and not with the last alone or with a wrong first one."""
    drawn, task = Problem((9, 22, 25), 27), Countdown(TOKENIZER, "direct")
    prompt = solver.root_prompt(drawn, "direct")
    last = f"Exploring Operation: 9*3=27, Resulting Numbers: [27]\n27,27{GOAL_TEXT}"
    first = "Exploring Operation: 25-22=3, Resulting Numbers: [9, 3]\n"
    for text, right in ((first + last, True), (last, False), (first.replace("=3", "=4") + last, False)):
        assert solver.record(drawn, search.Trace(prompt, [text], []), task).grade.correct is right


def test_a_direct_demonstration_of_what_cannot_be_solved_says_so():
    trace = demonstrate(Problem((1, 1, 1), 50), DIRECT, random.Random(0))
    assert trace.calls == ["No solution found.\n"]


def test_only_the_root_spawns_and_never_one_child():
    widths = []
    for _, trace, _ in demonstrations("apr"):
        assert all(len(children) > 1 for children in trace.spawns)
        assert all(not child.spawns and len(child.calls) == 1 for children in trace.spawns for child in children)
        widths.append(trace.child_threads())
    assert max(widths) > 10 and 0 in widths


def test_depth_first_trace_may_be_its_prompt_alone():
    """From the references: with target 11 every child of 15, 6, 18, 24 is pruned."""
    drawn = Problem((15, 6, 18, 24), 11)
    node = search.Node("0", list(drawn.numbers), "", 0, "", None)
    run = search.DepthFirst(node, 11, 1, random.Random(0), search.Rules())
    assert run.run() is None
    run.trace.prompt = solver.root_prompt(drawn, "sos")
    rollout = solver.record(drawn, run.trace, Countdown(TOKENIZER, "sos"))
    assert rollout.root.calls == [Call(0, TOKENIZER.encode("Current State: 11:[15, 6, 18, 24], Operations: []\n"), [1])]
    assert rollout.grade.reason == "no answer"


def test_rendering_is_the_inverse_of_parsing_for_demonstrations():
    for method in CONFIGS:
        for _, trace, _ in demonstrations(method):
            for thread in threads_of(trace):
                for text in (thread.prompt, *thread.calls):
                    assert render(parse(text)) == text


# ---------------------------------------------------------------- deeper threads, and when to spawn

FIVE = ProblemRange(5, 1, 9, 10, 50)
DEEP = DemonstratorConfig(
    "apr", 3, 3, 3, 0.9, budget_fraction=0, token_bin=128, order="fixed", beam_low_without_budget=3, prune=True, heuristic="near"
)


def five_numbers(n):
    """Solvable problems of five numbers, without listing the family."""
    rng = random.Random(5)
    while n:
        numbers, target = tuple(rng.randint(1, 9) for _ in range(5)), rng.randint(10, 50)
        if solver.solvable(numbers, target):
            n -= 1
            yield Problem(numbers, target)


def test_the_seed_text_of_the_defaults_is_that_of_before():
    assert "depth" not in APR.seed_text() and "spawn_when" not in APR.seed_text()
    texts = {dataclasses.replace(APR, **new).seed_text() for new in ({}, {"depth": 2}, {"depth": 3}, {"spawn_when": "large"})}
    assert len(texts) == 4


def test_depth_is_for_threads_and_bounded_by_the_runtime():
    with pytest.raises(ValueError, match="sosp has no threads to nest: depth must be 1, not 2"):
        dataclasses.replace(SOSP, depth=2)


@pytest.mark.parametrize("spawn_when", ["coin", "large"])
def test_threads_of_depth_two_answer_as_often_as_their_search_succeeds(spawn_when, monkeypatch):
    """The runtime reads every spawn block, each join holds what the child found, and the exact grader judges."""
    goals = []
    run = search.Search.run

    def noted(self):
        goals.append((self.level, run(self)))
        return goals[-1][1]

    monkeypatch.setattr(search.Search, "run", noted)
    config = dataclasses.replace(DEEP, depth=2, spawn_when=spawn_when)
    task = Countdown(Tokenizer(500), "apr")
    deepest = found = inner = 0
    for i, drawn in enumerate(five_numbers(12)):
        goals.clear()
        rollout = solver.record(drawn, demonstrate(drawn, config, random.Random(i)), task)
        assert rollout.grade.correct == (goals[-1][1] is not None), drawn
        assert goals[-1][0] == 0 and {level for level, _ in goals} <= {0, 1, 2}
        found += rollout.grade.correct
        for thread in rollout.threads():
            deepest = max(deepest, len(thread.path) // 2)
            ids = []
            for call, children in zip(thread.calls, thread.spawns, strict=False):
                ids = ids[: call.keep] + call.injected + call.sampled
                assert task.spawn(ids).prompts == [child.calls[0].injected for child in children]
            won = [bool(task._final_path(child, task.tokenizer.decode(child.calls[0].injected).partition("\n")[0] + "\n"))
                   for children in thread.spawns for child in children]
            inner += bool(thread.path) and any(won)
    assert deepest == 2 and found >= 3 and inner >= 1


def test_large_spawns_where_three_numbers_are_left_and_never_by_lot():
    """Five numbers: the root spawns (four left), and so does a child (three left), but not a grandchild's search."""
    config = dataclasses.replace(DEEP, depth=9, spawn_when="large", spawn_probability=0.0)
    sizes = set()
    for i, drawn in enumerate(five_numbers(6)):
        for thread in threads_of(demonstrate(drawn, config, random.Random(i))):
            for child in itertools.chain.from_iterable(thread.spawns):
                sizes.add(len(parse(child.prompt)[1].numbers))
    assert sizes == {3, 4}
    three = Problem((3, 7, 11), 40)  # its children have two numbers: nothing is spawned
    assert demonstrate(three, config, random.Random(0)).spawns == []

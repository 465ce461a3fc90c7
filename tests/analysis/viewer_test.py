"""The viewer: the clock and the tree against hand-worked rollouts, trace files there and back, escaping."""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable

import pytest

import evaluate
import solver
from analysis import figures, timeline, tree, viewer
from countdown.domain import CountdownDomain
from countdown.grader import Problem
from countdown.language import Tokenizer
from countdown.search import Trace, spawn_block
from countdown.task import Countdown, record
from examples import products
from harness import tasks
from harness.cli import UsageError
from harness.show import show_call
from records import (
    END,
    FORK,
    JOIN,
    MALFORMED,
    SPAWN,
    STOPS,
    Call,
    Grade,
    Rollout,
    Thread,
    sequential_tokens,
    stored,
    total_tokens,
)
from solver import DemonstratorConfig

TOKENIZER = Tokenizer(10)
APR = DemonstratorConfig("apr", 1, 10, 15, 0.9, budget_fraction=0, token_bin=512)
GOES_ON = dataclasses.replace(APR, unjoined=1)
SOSP = DemonstratorConfig("sosp", 1, 5, 0, 0.5, budget_fraction=0, token_bin=512)
SOS = DemonstratorConfig("sos", 1, 5, 0, 0.0, budget_fraction=0, token_bin=512)


@functools.cache
def demonstrations():
    """(method, record) of 20 problems with four numbers per method, and where APR's parents go on."""
    made = []
    for config in (APR, GOES_ON, SOSP, SOS):
        for index in range(20):
            numbers = (22, 26, 31, 53 + index)
            trace = solver.demonstrate(Problem(numbers, 27), config, random.Random(index))
            rollout = record(Problem(numbers, 27), trace, Countdown(TOKENIZER, config.method, asynchronous=config.unjoined >= 0))
            made.append((config.method, rollout))
    return made


# ---------------------------------------------------------------- the clock


def thread(*parts, path=()):
    """A thread from the lengths of its calls and, between them, the children of its spawns."""
    result = Thread(path)
    for part in parts:
        if isinstance(part, list):
            result.calls[-1].stop = SPAWN
            result.spawns.append(part)
        else:
            result.calls.append(Call(0, [5], [7] * part))
    return result


def test_two_spawns_on_the_clock_by_hand():
    """Children of 5 and 8 tokens from 10 to 18; then 4 tokens; then two of 7 from 22 to 29; then 3 to the end at 32."""
    root = thread(10, [thread(5), thread(8)], 4, [thread(7), thread(7)], 3)
    lanes = timeline.timeline(root)
    assert [lane.starts for lane in lanes] == [[0, 18, 29], [10], [10], [22], [22]]
    assert [all(lane.critical) for lane in lanes] == [True, False, True, True, False]  # the first of the slowest
    assert [lane.joins for lane in lanes] == [[18, 29], [], [], [], []]
    assert [lane.thread for lane in lanes] == list(root.walk())


def test_the_clock_of_children_of_children_by_hand():
    """The child spawns at 3 + 2 = 5, waits for 6 tokens to 11 and ends at 12; its sibling is over at 3 + 8 = 11."""
    child = thread(2, [thread(6), thread(1)], 1)
    lanes = timeline.timeline(thread(3, [child, thread(8)], 4))
    assert [lane.starts for lane in lanes] == [[0, 12], [3, 11], [5], [5], [3]]
    assert [all(lane.critical) for lane in lanes] == [True, True, True, False, False]
    assert [lane.joins for lane in lanes] == [[12], [11], [], [], []]


def test_what_a_slow_child_waited_for_is_critical_but_not_what_a_fast_one_did():
    lanes = timeline.timeline(thread(1, [thread(2, [thread(3)], 1), thread(8)], 1))
    assert [(lane.starts, lane.critical) for lane in lanes[1:]] == [([1, 6], [False] * 2), ([3], [False]), ([1], [True])]


def test_the_clock_of_a_parent_that_goes_on_by_hand():
    """Children of 9 and 2 tokens from 3 and 5. The parent waits from 6 to 12 for the one, not at all for the other.

    It ends at 14, before the third, which nobody joins.
    """
    root = Thread((), [Call(0, [5], [7] * n, stop=s) for n, s in ((3, FORK), (2, FORK), (1, JOIN), (1, JOIN), (1, FORK), (0, END))])
    root.spawns = [[thread(9)], [thread(2)], [thread(50)]]
    lanes = timeline.timeline(root)
    assert [lane.starts for lane in lanes] == [[0, 3, 5, 12, 13, 14], [3], [5], [14]]
    assert lanes[0].critical == [True, False, False, True, True, True]
    assert [lane.critical for lane in lanes[1:]] == [[True], [False], [False]]
    assert lanes[0].joins == [12, 13]


def test_the_critical_path_is_as_long_as_the_sequential_tokens():
    spawned = 0
    for _, rollout in demonstrations():
        lanes = timeline.timeline(rollout.root)
        lengths = [[len(call.sampled) for call in lane.thread.calls] for lane in lanes]
        critical = [
            (start, start + tokens)
            for lane, calls in zip(lanes, lengths, strict=True)
            for start, tokens, waited_for in zip(lane.starts, calls, lane.critical, strict=True)
            if waited_for
        ]
        end = 0
        for start, stop in sorted(critical):  # without a gap, and nothing at the same time
            assert start == end
            end = stop
        assert end == sequential_tokens(rollout.root)
        spawned += bool(rollout.root.spawns)
    assert spawned > 10


# ---------------------------------------------------------------- the tree


def move(node, state):
    return f"Moving to Node #{node}\nCurrent State: 8:{state}\n"


def explore(operation, numbers):
    return f"Exploring Operation: {operation}, Resulting Numbers: {numbers}\n"


def listed(node, operation, numbers):
    return f"{explore(operation, numbers)}Generated Node #{node}: 8:{numbers} Operation: {operation}\n"


def missed(operation, result):
    return f"{explore(operation, [result])}{result},8 unequal: No Solution\n"


ROOT = move("0", "[4, 2, 2], Operations: []")
LISTED = listed("0,0", "4-2=2", [2, 2]) + listed("0,1", "4/2=2", [2, 2]) + listed("0,2", "4+2=6", [2, 6])
BLOCK = spawn_block(["0,0", "0,2"], 1)
FIRST, SECOND = move("0,0", "[2, 2], Operations: ['4-2=2']"), move("0,2", "[2, 6], Operations: ['4+2=6']")
GOAL = explore("2+6=8", [8]) + "8,8 equal: Goal Reached\n"
FOUND = SECOND + GOAL
PATH = "8,8 equal: Goal Reached\n" + ROOT + listed("0,2", "4+2=6", [2, 6]) + FOUND


def hand_built():
    """Reach 8 from 4, 2, 2: two of the three states listed are searched by children, the second finds 2+6=8."""
    children = [
        Trace(FIRST, [missed("2+2=4", 4) + missed("2*2=4", 4) + "No solution found.\n"], []),
        Trace(SECOND, [missed("2*6=12", 12) + GOAL + FOUND], []),
    ]
    trace = Trace(ROOT, [LISTED + BLOCK, PATH], [children])
    return record(Problem((4, 2, 2), 8), trace, Countdown(TOKENIZER, "apr"))


def tree_of(rollout):
    return tree.search_tree(rollout, timeline.timeline(rollout.root), TOKENIZER)


def test_the_search_tree_by_hand():
    rollout = hand_built()
    assert rollout.grade == Grade(True, "", ("4+2=6", "2+6=8"))
    states = tree_of(rollout)
    assert [(state.operation, state.numbers, state.node) for state in states] == [
        ("", [4, 2, 2], "0"),
        ("4-2=2", [2, 2], "0,0"),
        ("4/2=2", [2, 2], "0,1"),
        ("4+2=6", [2, 6], "0,2"),
        ("2+2=4", [4], ""),
        ("2*2=4", [4], ""),
        ("2*6=12", [12], ""),
        ("2+6=8", [8], ""),
    ]
    assert [state.parent for state in states] == [-1, 0, 0, 0, 1, 1, 3, 3]
    assert [state.writer for state in states] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [state.thread for state in states] == [0, 1, 0, 2, 1, 1, 2, 2]
    assert [i for i, state in enumerate(states) if state.visited] == [0, 1, 3]
    assert [i for i, state in enumerate(states) if state.dead] == [1, 4, 5, 6]
    assert [i for i, state in enumerate(states) if state.answer] == [0, 3, 7]
    assert [state.twin for state in states] == [-1, -1, 1, -1, -1, -1, -1, -1]
    assert not any(state.fault for state in states)
    assert [state.column for state in states] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert [state.row for state in states] == [1, 0, 1, 2, 0, 0, 2, 2]
    assert [state.cell for state in states] == [-1, -1, -1, -1, 0, 1, 0, 1]


def with_sampled(text, injected=ROOT):
    """A rollout whose root sampled this and was cut."""
    root = Thread((), [Call(0, TOKENIZER.encode(injected), TOKENIZER.encode(text), stop=MALFORMED)], detail="no block")
    return Rollout(Problem((4, 2, 2), 8), root, Grade(False, "no answer: stopped by malformed"))


def test_lines_that_do_not_parse_are_left_out_of_the_tree():
    cut = explore("2*8=16", [2])[:-2]
    text = f"8,8\n\n{LISTED}, Moving to Node #0\n{cut}"
    assert [state.numbers for state in tree_of(with_sampled(text))] == [[4, 2, 2], [2, 2], [2, 2], [2, 6]]


def test_a_prompt_that_is_no_state_still_has_a_root():
    assert [state.numbers for state in tree_of(with_sampled("+++", injected="*"))] == [[4, 2, 2]]


def test_operations_that_are_wrong_carry_the_graders_words():
    text = listed("0,0", "4-2=3", [2, 3]) + listed("0,1", "4+5=9", [2, 9]) + listed("0,2", "4+2=6", [2, 6])
    faults = [state.fault for state in tree_of(with_sampled(text))]
    assert faults == ["", "wrong arithmetic: 4-2=3", "5 is not available", ""]


def test_twins_have_the_same_numbers_in_any_order():
    states = tree_of(with_sampled(listed("0,0", "4+2=6", [2, 6]) + listed("0,1", "2+4=6", [6, 2])))
    assert [state.twin for state in states] == [-1, -1, 1]


def test_a_state_from_nowhere_hangs_on_the_last_known_one():
    text = listed("0,0", "4-2=2", [2, 2]) + move("0,0,7,1", "[9], Operations: ['4-2=2', '2*2=4', '4+5=9']")
    _, known, state = tree_of(with_sampled(text))
    assert (known.operation, state.operation, state.parent) == ("4-2=2", "2*2=4, 4+5=9", 1)
    assert state.fault == "5 is not available" and (known.column, state.column) == (1, 2)


def test_trees_of_demonstrations_hold_together():
    for _, rollout in demonstrations():
        states = tree_of(rollout)
        places = [(state.row, state.column, state.cell) for state in states]
        assert len({*places}) == len(places)
        assert [state.parent < i for i, state in enumerate(states)] == [True] * len(states)
        assert not any(state.fault for state in states)
        answer = [state.operation for state in states if state.answer]
        assert answer == (["", *rollout.grade.answer] if rollout.grade.correct else [])
        assert not any(state.dead and state.answer for state in states)


# ---------------------------------------------------------------- the text


def test_what_the_rewind_removed_is_the_spawn_block():
    root = hand_built().root
    shown = [
        [(kind, removed, TOKENIZER.decode(ids)) for kind, removed, ids in viewer.pieces(root, number)]
        for number in range(2)
    ]
    joined = TOKENIZER.decode(root.calls[1].injected)
    assert shown == [
        [("given", False, ROOT), ("sampled", False, LISTED), ("sampled", True, BLOCK)],
        [("given", False, joined), ("sampled", False, PATH + "<|end|>")],
    ]


def test_a_rewind_may_reach_back_to_given_text_or_further():
    calls = [Call(0, [5, 6, 7], [8, 9], stop=SPAWN), Call(4, [3], [8], stop=SPAWN), Call(2, [4], [9])]
    for keep, expected in (
        (5, [("given", False, [5, 6, 7]), ("sampled", False, [8, 9])]),
        (1, [("given", False, [5]), ("given", True, [6, 7]), ("sampled", True, [8, 9])]),
    ):
        calls[1].keep = keep
        assert viewer.pieces(Thread((), calls), 0) == expected
    calls[1].keep = 4
    assert viewer.pieces(Thread((), calls), 1) == [("given", True, [3]), ("sampled", True, [8])]


# ---------------------------------------------------------------- the page


def data_in(html):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_the_costs_and_the_threads_by_hand():
    rollout = hand_built()
    data = data_in(viewer.page(viewer.page_data(viewer.Trace(rollout, "apr", "countdown", TOKENIZER))))
    total, sequential = total_tokens(rollout.root), sequential_tokens(rollout.root)
    assert data["problem"] == {"numbers": [4, 2, 2], "target": 8}
    assert data["costs"]["total_tokens"] == total and data["costs"]["sequential_tokens"] == sequential
    assert data["costs"]["speedup"] == pytest.approx(total / sequential)
    assert [thread["name"] for thread in data["threads"]] == ["parent", "child 0.0", "child 0.1"]
    assert [thread["spawns"] for thread in data["threads"]] == [[[1, 2]], [], []]
    last = data["threads"][0]["calls"][-1]
    assert last["start"] + last["tokens"] == sequential
    assert last["why"] == "ended by itself"


def test_a_spawn_belongs_to_the_call_that_asked_for_it():
    """A root that was forced to go on: its first call ended, the second spawned, the third read the join."""
    rollout = hand_built()
    rollout.root.calls.insert(0, Call(0, [5, 6], [7, 8], stop=END))
    data = viewer.page_data(viewer.Trace(rollout, "apr", "countdown", TOKENIZER))
    assert [thread["spawned"] for thread in data["threads"]] == [[1], [], []]


def test_text_in_the_data_cannot_leave_its_element():
    attack = "</script><script>alert(1)</script><!-- & \" ' \u2028"
    rollout = with_sampled(BLOCK)
    rollout.root.detail = attack
    rollout.grade = Grade(False, attack, (attack,))
    html = viewer.page(viewer.page_data(viewer.Trace(rollout, attack, "countdown", TOKENIZER)))
    empty = viewer.TEMPLATE.read_text()
    for mark in ("<script", "</script", "<!--"):
        assert html.count(mark) == empty.count(mark)
    data = data_in(html)
    assert data["grade"] == {"correct": False, "reason": attack, "answer": [attack]}
    assert data["threads"][0]["detail"] == data["method"] == attack
    assert data["threads"][0]["calls"][0]["text"][1]["text"] == BLOCK


def test_the_template_has_one_place_for_the_data_and_fetches_nothing():
    template = viewer.TEMPLATE.read_text()
    assert template.count(viewer.PLACEHOLDER) == 1
    assert set(re.findall(r"https?://[^\"']*", template)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\bsrc=|<link|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write", template)


def test_every_stop_has_words():
    assert set(viewer.STOPPED) == set(STOPS)


# ---------------------------------------------------------------- trace files


def write(path, rollout, method="apr"):
    facts = {"method": method, "number_limit": 10}
    path.write_text(json.dumps(stored("countdown", facts, rollout, CountdownDomain.to_json(rollout.problem))))
    return str(path)


def test_a_record_of_another_task_is_drawn_too(tmp_path):
    domain = tasks.part("products", "domain")(products.get_config())
    rollout = domain.demonstration("train", 0, 0)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(stored("products", domain.facts(), rollout, domain.to_json(rollout.problem))))
    trace = viewer.read_trace(str(path))
    assert trace.rollout == rollout
    data = viewer.page_data(trace)
    assert data["problem"] == domain.to_json(rollout.problem) and data["task"] == "Products"
    assert len(data["threads"]) == 1 + len(rollout.root.spawns[0]) and data["states"] == []


def test_a_record_is_read_back_as_it_was(tmp_path):
    for method, rollout in demonstrations():
        trace = viewer.read_trace(write(tmp_path / "trace.json", rollout, method))
        assert trace.rollout == rollout and trace.method == method and trace.language.vocab_size == TOKENIZER.vocab_size


def test_numbers_of_a_sampled_record_are_read_back_to_the_bit(tmp_path):
    rollout = with_sampled(BLOCK)
    rollout.index, rollout.milliseconds = 3, 0.1 + 0.2
    rollout.root.calls[0].logprobs = [-1e-7 / 3] * len(rollout.root.calls[0].sampled)
    assert viewer.read_trace(write(tmp_path / "trace.json", rollout)).rollout == rollout


IS = "it must be an object with task, facts, rollout"
BAD = {  # where a trace file is changed, to what, and what is said
    "task": ("task", None, IS),
    "other task": ("task", "chess", "task='chess' must be one of countdown, products"),
    "method": ("facts method", None, "facts must be an object with method"),
    "rollout": ("rollout", [], IS),
    "limit": ("facts number_limit", 3, "number_limit must be from 10"),
    "root": ("rollout root", [], "rollout must be an object with problem, root"),
    "target": ("rollout problem target", "8", "integers from 1"),
    "numbers": ("rollout problem numbers", [0, 1], "integers from 1"),
    "grade": ("rollout grade correct", 1, "grade must be an object with correct"),
    "no calls": ("rollout root spawns 0 1 calls", [], "a thread goes on only after a spawn"),
    "no children": ("rollout root spawns", [[]], "has children for each of its spawns"),
    "a spawn lost": ("rollout root spawns", [], "has children for each of its spawns"),
    "child": ("rollout root spawns 0 1", "child", "a thread must be an object with path"),
    "call": ("rollout root calls 0 keep", "0", "a call must be an object with keep"),
    "more": ("rollout root calls 0 kept", 1, "kept"),
    "id": ("rollout root calls 0 sampled", [500], "the ids of a call must be integers from 0 to"),
    "negative id": ("rollout root calls 0 injected", [-1], "the ids of a call must be integers from 0 to"),
    "first keep": ("rollout root calls 0 keep", 1, "a call cannot keep 1 of 0 ids"),
    "rewind": ("rollout root calls 1 keep", 10**6, "a call cannot keep 1000000 of"),
    "negative rewind": ("rollout root calls 1 keep", -1, "a call cannot keep -1 of"),
    "stop": ("rollout root calls 1 stop", "bored", "stop by 'bored'"),
}


@pytest.mark.parametrize(("where", "value", "words"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_trace_is_refused_in_one_sentence(where, value, words, tmp_path):
    write(tmp_path / "trace.json", hand_built())
    value_of = json.loads((tmp_path / "trace.json").read_text())
    *outer, last = [int(key) if key.isdigit() else key for key in where.split()]
    inner = functools.reduce(lambda part, key: part[key], outer, value_of)
    inner[last] = value
    (tmp_path / "trace.json").write_text(json.dumps(value_of))
    with pytest.raises(UsageError) as caught:
        viewer.read_trace(str(tmp_path / "trace.json"))
    message = str(caught.value)
    assert words in message and "trace.json is no trace file" in message and "\n" not in message


def test_a_thread_that_goes_on_after_its_end_is_refused(tmp_path):
    root = thread(3, [thread(1, path=(0, 0))], 2)
    root.calls.reverse()
    with pytest.raises(UsageError, match="goes on only after a spawn"):
        viewer.read_trace(write(tmp_path / "trace.json", Rollout(Problem((4, 2, 2), 8), root, Grade(False, ""))))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"problem", b"[]", b"7"])
def test_a_file_that_is_no_json_object_is_refused(content, tmp_path):
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(UsageError):
        viewer.read_trace(str(tmp_path / "trace.json"))


# ---------------------------------------------------------------- the commands


def test_the_command_draws_a_demonstration(command: Callable, tmp_path):
    (tmp_path / "trace.json").write_text(command(solver, "--numbers=22,26,31,53", "--target=27", "--json").out)
    ended = command(figures, f"--trace={tmp_path / 'trace.json'}")
    assert ended.status == 0 and ended.out == f"wrote {tmp_path / 'trace.html'}\n"
    data = data_in((tmp_path / "trace.html").read_text())
    assert data["method"] == "apr" and data["problem"]["numbers"] == [22, 26, 31, 53]
    assert command(figures, f"--trace={tmp_path / 'trace.json'}", f"--output={tmp_path / 'page.html'}").status == 0
    assert (tmp_path / "page.html").read_text() == (tmp_path / "trace.html").read_text()


def test_the_command_draws_a_rollout_of_a_model(smoke_run, command: Callable, tmp_path):
    path = tmp_path / "trace.json"
    small = ("--config.mesh.data=1", "--config.sampler.rows=4", "--config.sampler.length_bucket=512")
    problem = ("--numbers=7,2,9", "--target=18", f"--record={path}")
    ended = command(evaluate, f"--workdir={smoke_run.path}", *problem, *small)
    assert ended.status == 0, ended.err
    trace = viewer.read_trace(str(path))
    rollout = trace.rollout
    assert show_call(rollout.root, 0, trace.language) in ended.out
    assert trace.method == "apr" and len(rollout.root.calls[0].logprobs) == len(rollout.root.calls[0].sampled)
    assert command(figures, f"--trace={path}").status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--trace=FILE"),
        (["--trace=nothing.json"], "nothing.json"),
        (["--trace={trace}", "--output={place}/nowhere/page.html"], "nowhere"),
    ],
)
def test_a_bad_command_is_one_sentence(command: Callable, tmp_path, arguments, words):
    trace = write(tmp_path / "trace.json", hand_built())
    ended = command(figures, *(argument.format(trace=trace, place=tmp_path) for argument in arguments))
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert words in ended.err

"""Countdown as a task of the runtime: spawn, join and grade by hand, and records as the runtime would make them."""

import dataclasses
import json

import pytest

import solver
from countdown.grader import Problem, grade_steps
from countdown.language import GOAL_TEXT
from countdown.task import Countdown
from protocols import MalformedSpawn
from records import CONTEXT, END, SPAWN, Call, Thread
from tests.countdown.search_test import CONFIGS, PAPER, ROOT, TOKENIZER, demonstrations, replayed


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
    with pytest.raises(ValueError, match="children_budget=-2 must be at least -1"):
        Countdown(TOKENIZER, "apr", children_budget=-2)
    with pytest.raises(ValueError, match="method='bfs' must be one of direct, sos, sosp, apr"):
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

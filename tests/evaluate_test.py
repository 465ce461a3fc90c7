"""Evaluation: intervals, summaries, the held-out sets, problems files, and the command on one problem."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import evaluate
import parallel_runtime
import records
import solver
from analysis import sweep
from configs import apr
from countdown.domain import CountdownDomain
from countdown.grader import Problem
from countdown.task import record
from harness import evaluation, problems, stats, workers
from harness.build import build
from harness.cli import Stopped, UsageError
from harness.rollouts import RolloutPool
from harness.show import show
from harness.workdir import read_config
from parallel_runtime import Runtime
from protocols import Completion, PrefillRequest
from records import Rollout
from tests.harness.stats_test import rollout_of

ROOT = pathlib.Path(__file__).resolve().parents[1]

SMALL = ("--config.mesh.data=1", "--config.sampler.rows=4", "--config.sampler.length_bucket=512")  # few compilations


def one_device(preset: str) -> ConfigDict:
    """A preset of APR, its rows on one of the eight devices."""
    config = apr.get_config(preset)
    config.mesh.data = 1
    return config


# ------------------------------------------------------------------- numbers


def test_the_table_names_every_figure():
    rollouts = [rollout_of(True, [20], [], records.END, 40.0)]
    windows = stats.windows(rollouts, 64, 1)
    failures = {"exhausted": 0.5, "duplicate": 0.25, "truncated": 0.0625, "false_goal": 0.03, "wrong_state": 0.01}
    held = stats.adherence([3, 2], 3, 3)
    parts = build(one_device("smoke"))
    summary = dataclasses.replace(evaluation.evaluate(parts, {"w": np.zeros(2)}, rollouts, 1.0, "APR", 7), demonstrator=0.75)
    summary = dataclasses.replace(summary, windows=windows, failures=failures, budget="3 children requested", adherence=held)
    text = evaluation.table(summary)
    for figure in ("1.000", "1/1", "0.750", "20", "40", "1000.0", "16: 0.000", "32: 1.000", "64: 1.000", "3 children requested: 0.500, mean 2.5"):
        assert figure in text
    assert "exhausted: 0.500  duplicate: 0.250  truncated: 0.062  false_goal: 0.030\n" in text  # the first four
    assert re.search("^  failures +none$", evaluation.table(dataclasses.replace(summary, failures={})), re.MULTILINE)


# ------------------------------------------------------------------- held-out problems


@pytest.mark.parametrize("preset", ["smoke", "laptop"])
def test_test_validation_and_training_problems_are_disjoint(preset):
    experiment = build(one_device(preset))
    test, validation = (
        {(tuple(sorted(problem.numbers)), problem.target) for problem in problems}
        for problems in (experiment.test_set(), experiment.validation_set())
    )
    assert len(test) == experiment.config.evaluation.problems
    assert len(validation) == experiment.config.train.eval_problems
    trained = {
        (tuple(sorted(problem.numbers)), problem.target)
        for seed in (0, 1)
        for problem in (experiment.domain.demonstration("train", seed, index).problem for index in range(200))
    }
    assert not test & validation and not test & trained and not validation & trained


def test_evaluation_during_training_does_not_change_the_test_set():
    """However many problems choose the checkpoint, the final ones are the same."""
    small, large = one_device("laptop"), one_device("laptop")
    large.train.eval_problems = 10
    assert build(small).test_set() == build(large).test_set()


# ------------------------------------------------------------------- evaluation with a scripted model


class Replay:
    """An engine that knows demonstrations by heart: what was sampled after each context."""

    rows, devices, context = 4, 1, 512

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.script: dict[tuple[int, ...], list[int]] = {}
        for thread in (thread for rollout in rollouts for thread in rollout.threads()):
            ids: list[int] = []
            for call in thread.calls:
                context = ids[: call.keep] + call.injected
                self.script[tuple(context)] = call.sampled
                ids = context + call.sampled
        self.reset()

    def reset(self) -> None:
        self.ids: dict[int, list[int]] = {row: [] for row in range(self.rows)}
        self.active: list[int] = []

    def prefill(self, fills: list[PrefillRequest]) -> None:
        for fill in fills:
            self.ids[fill.row] = self.ids[fill.row][: fill.keep] + fill.ids
            self.active.append(fill.row)

    def decode(self) -> list[Completion]:
        row = self.active.pop()  # the last first: nothing may depend on who ends when
        sampled = self.script[tuple(self.ids[row])]
        self.ids[row] = self.ids[row] + sampled
        return [Completion(row, sampled, [0.0] * len(sampled))]


class Scripted(RolloutPool):
    """A pool whose model repeats one demonstration of each held-out problem."""

    def __init__(self) -> None:
        super().__init__(build(one_device("smoke")))
        self.domain, self.test_set = self.parts.domain, self.parts.test_set
        self.recorded = [self.demonstrate(problem, index) for index, problem in enumerate(self.test_set())]

    def demonstrate(self, problem: Problem, index: int) -> Rollout:
        trace = solver.demonstrate(problem, self.domain.demonstrator, random.Random(index))
        return record(problem, trace, self.domain.task)

    def runtimes(self, params, temperature, on_call=None) -> list[Runtime]:
        return [Runtime(Replay(self.recorded), self.domain.task, self.parts.limits, on_call)]


@pytest.fixture(scope="module")
def scripted() -> Scripted:
    """Sixteen problems, some solved, some with children."""
    experiment = Scripted()
    solved = [rollout.grade.correct for rollout in experiment.recorded]
    assert 0 < sum(solved) < len(solved)
    assert any(rollout.root.spawns and rollout.grade.correct for rollout in experiment.recorded)
    return experiment


def test_a_report_of_a_known_model(scripted, tmp_path, capsys):
    evaluation.report(scripted, None, scripted.test_set(), tmp_path / "new" / "place", 7)
    (entry,) = json.loads((tmp_path / "new" / "place" / "eval.json").read_text())
    results = entry.pop("results")
    del entry["checksum"]
    rollouts = scripted.recorded
    assert entry["correct"] == sum(rollout.grade.correct for rollout in rollouts)
    assert entry["accuracy"] == entry["correct"] / 16
    assert entry["failures"] == {"exhausted": 1 - entry["accuracy"]}
    assert entry["children"] == sum(len(rollout.threads()) - 1 for rollout in rollouts) / 16
    assert (entry["checkpoint"], entry["seed"], entry["method"]) == (7, 0, "apr")
    for result, rollout in zip(results, rollouts, strict=True):
        assert result["problem"] == {"numbers": list(rollout.problem.numbers), "target": rollout.problem.target}
        assert (result["correct"], result["reason"]) == (rollout.grade.correct, rollout.grade.reason)
        assert result["answer"] == list(rollout.grade.answer)
        assert result["failure"] == ("" if rollout.grade.correct else "exhausted")  # as right demonstrations fail
        assert result["total_tokens"] == records.total_tokens(rollout.root)
        assert result["sequential_tokens"] == records.sequential_tokens(rollout.root)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == entry
    assert "One solved problem, thread by thread" in out and "[child 0.0, call 0]" in out


def test_interrupted_problems_count_if_all_their_samples_are_done(scripted):
    first, second, third = scripted.recorded[:3]
    done = [first, second, second, third, first, second]
    assert evaluation.complete(done, 2) == [first, first, second, second]
    assert evaluation.complete(done, 1) == [first, first, second, second, second, third]
    assert evaluation.complete(done[:1], 2) == []


def test_an_interrupted_report_is_of_what_is_done_and_overwrites_no_other(scripted, tmp_path, capsys, monkeypatch):
    (tmp_path / "eval.json").write_text("[]")
    whole, runs = parallel_runtime.Runtime.stream, []

    def cut(runtime, requests, seed):
        runs.append(1)
        for number, item in enumerate(whole(runtime, requests, seed)):
            if len(runs) == 2 and number == 5:  # the first run is the one that compiles
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(parallel_runtime.Runtime, "stream", cut)
    with pytest.raises(workers.Interrupted):
        evaluation.report(scripted, None, scripted.test_set(), tmp_path, 7)
    (entry,) = json.loads((tmp_path / "interrupted.json").read_text())
    assert entry["n"] == len(entry["results"]) == 5
    expected = {(rollout.problem.numbers, rollout.problem.target): rollout.grade.correct for rollout in scripted.recorded}
    for result in entry["results"]:
        assert result["correct"] == expected[tuple(result["problem"]["numbers"]), result["problem"]["target"]]
    assert (tmp_path / "eval.json").read_text() == "[]"
    assert "interrupted: 5 rollouts are done" in capsys.readouterr().err


def test_rollouts_that_are_done_survive_a_signal_after_the_last_of_them(scripted, tmp_path, monkeypatch):
    """The first time it comes while the demonstrator searches, the second time nothing comes."""
    whole, calls = evaluation.failures, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise Stopped(15)
        return whole(*arguments)

    monkeypatch.setattr(evaluation, "failures", cut)
    with pytest.raises(workers.Interrupted):
        evaluation.report(scripted, None, scripted.test_set(), tmp_path, 7)
    (entry,) = json.loads((tmp_path / "interrupted.json").read_text())
    assert entry["n"] == 16 and not (tmp_path / "eval.json").exists()


def test_rollouts_that_are_done_survive_a_signal_between_batches(scripted, monkeypatch):
    whole, calls = scripted.runtimes, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped(15)
        return whole(*arguments)

    monkeypatch.setattr(scripted, "runtimes", cut)
    with pytest.raises(workers.Interrupted) as caught:
        scripted.solve(None, scripted.test_set(), concurrent=2)
    assert [rollout.problem for rollout in caught.value.rollouts] == list(scripted.test_set()[:4])


def test_a_demonstrator_does_not_search_problems_larger_than_its_familys(scripted):
    """One problem of six numbers may take it minutes."""
    assert scripted.domain.demonstrators([Problem((3, 7, 25, 50, 75, 100), 952)], 512) == []
    assert evaluation.at_equal_compute([], {"children": 1.0}) is None


def test_costs_are_of_a_rollout_where_a_problem_has_several(scripted):
    whole, _ = evaluation.measure(scripted, None, scripted.test_set(), "APR", 7)
    assert "total tokens per problem" in evaluation.table(whole)
    several = dataclasses.replace(whole, samples=2, pass_at={"2": (0.5, 0, 1)}, cons_at={"2": (0.5, 0, 1)})
    assert "total tokens per rollout" in evaluation.table(several) and "per problem" not in evaluation.table(several)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_bar_counts_rollouts_and_is_ended_even_by_an_interruption(scripted, monkeypatch, stopped):
    seen: list[Any] = []

    class Bar:
        def __init__(self, total, start, unit):
            seen.append((total, start))

        def update(self, step):
            seen.append(step)
            if stopped and step == 5:
                raise KeyboardInterrupt

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(evaluation, "Progress", Bar)
    ended = False
    with contextlib.suppress(workers.Interrupted):
        evaluation.measure(scripted, None, scripted.test_set(), "APR", 7)
        ended = True
    assert ended != stopped
    counts = seen[1:-1]
    assert seen[0] == (16, 0) and seen[-1] == "closed"
    assert 5 in counts if stopped else sorted(counts) == [*range(1, 17)]


def test_problems_in_another_order_give_the_results_in_that_order(scripted, tmp_path):
    problems = scripted.test_set()[::-1]
    evaluation.report(scripted, None, problems, tmp_path, 7)
    (entry,) = json.loads((tmp_path / "eval.json").read_text())
    assert [tuple(result["problem"]["numbers"]) for result in entry["results"]] == [problem.numbers for problem in problems]
    assert [result["correct"] for result in entry["results"]] == [r.grade.correct for r in scripted.recorded[::-1]]


def test_the_demonstrators_share_is_its_own(scripted):
    """Measured on fresh demonstrations, beam by beam: close to that of others of the beam, and the same each time."""
    problems = scripted.test_set() * 25
    beams = scripted.domain.demonstrators(problems, 512)
    assert beams == scripted.domain.demonstrators(problems, 512)
    low, high = scripted.domain.demonstrator.beam_low, scripted.domain.demonstrator.beam_high
    assert [entry["beam"] for entry in beams] == [*range(low, high + 1)]
    assert all(entry["accuracy"] == entry["solved"] for entry in beams)  # all of them fit the context
    assert [entry["children"] for entry in beams] == sorted(entry["children"] for entry in beams)
    for entry in beams:
        beam = entry["beam"]
        config = dataclasses.replace(scripted.domain.demonstrator, beam_low=beam, beam_high=beam, beam_low_without_budget=beam)
        traces = [solver.demonstrate(problem, config, random.Random(1000 + i)) for i, problem in enumerate(problems)]
        other = [record(problem, trace, scripted.domain.task) for problem, trace in zip(problems, traces, strict=True)]
        share = sum(rollout.grade.correct for rollout in other) / len(other)
        assert entry["solved"] == pytest.approx(share, abs=0.12)  # four standard errors of the difference
        assert entry["children"] == pytest.approx(sum(len(r.threads()) - 1 for r in other) / len(other), rel=0.2)


def test_a_demonstration_that_overruns_the_context_counts_as_wrong(scripted):
    entries = scripted.domain.demonstrators(scripted.test_set(), 150)
    assert entries[-1]["accuracy"] < entries[-1]["solved"]


def test_the_demonstrator_at_equal_compute_is_interpolated_by_hand():
    """Between 2 children (0.4) and 4 (0.8), 3 make 0.6; beyond the ends it is theirs; SoS has no children, so tokens."""
    beams = [{"children": c, "accuracy": a, "total_tokens": 10 * c} for c, a in ((4.0, 0.8), (2.0, 0.4))]
    assert evaluation.at_equal_compute(beams, {"children": 3.0, "total_tokens": 0}) == pytest.approx(0.6)
    assert evaluation.at_equal_compute(beams, {"children": 9.0}) == 0.8
    alone = [dict(entry, children=0) for entry in beams]
    assert evaluation.at_equal_compute(alone, {"children": 3.0, "total_tokens": 30.0}) == pytest.approx(0.6)
    assert evaluation.at_equal_compute([], {}) is None


def test_show_has_every_thread_where_it_ran(scripted):
    rollout = next(rollout for rollout in scripted.recorded if rollout.root.spawns)
    text = show(rollout, scripted.domain.language)
    heads = [line.split("]")[0] for line in text.splitlines() if line.startswith("[")]
    children = [f"[child 0.{i}, call 0" for i in range(len(rollout.root.spawns[0]))]
    assert heads[: len(children) + 2] == ["[parent, call 0", *children, "[parent, call 1"]
    for call in (call for thread in rollout.threads() for call in thread.calls):
        for line in scripted.domain.language.decode(call.sampled).splitlines():
            assert f"    {line}\n" in text
        for line in scripted.domain.language.decode(call.injected).splitlines():
            assert f"  | {line}\n" in text


def test_one_problem_is_shown_as_it_runs_then_the_verdict(scripted, capsys):
    rollout = next(r for r in scripted.recorded if r.root.spawns and r.grade.correct)
    evaluate.solve_one(scripted, None, rollout.problem)
    out = capsys.readouterr().out
    heads = [line.split("]")[0] for line in out.splitlines() if line.startswith("[")]
    assert heads[0] == "[parent, call 0" and heads[-1] == f"[parent, call {len(rollout.root.calls) - 1}"
    assert sorted(heads) == sorted(
        f"[{'child ' + '.'.join(map(str, t.path)) if t.path else 'parent'}, call {n}"
        for t in rollout.threads()
        for n in range(len(t.calls))
    )
    assert "stopped by spawn" in out
    *_, verdict, last = out.splitlines()
    assert verdict == f"answer: {', '.join(rollout.grade.answer)} (right)"
    assert json.loads(last)["correct"] is True


def test_one_problem_that_is_not_solved_says_why(scripted, capsys):
    rollout = next(rollout for rollout in scripted.recorded if not rollout.grade.correct)
    evaluate.solve_one(scripted, None, rollout.problem)
    *_, verdict, last = capsys.readouterr().out.splitlines()
    assert verdict.startswith("answer: none (wrong: ") and rollout.grade.reason in verdict
    assert json.loads(last)["correct"] is False


# ------------------------------------------------------------------- problems files


def problems_file(path: pathlib.Path, text: str) -> str:
    (path / "problems.json").write_text(text)
    return str(path / "problems.json")


BAD_ENTRIES = {
    "wrong keys": '{"nums": [1, 2], "target": 3}',
    "a key too many": '{"numbers": [1, 2], "target": 3, "answer": "1+2"}',
    "a key missing": '{"numbers": [1, 2]}',
    "no object": "[1, 2, 3]",
    "zero": '{"numbers": [0, 2], "target": 3}',
    "negative": '{"numbers": [-1, 2], "target": 3}',
    "target zero": '{"numbers": [1, 2], "target": 0}',
    "target negative": '{"numbers": [1, 2], "target": -3}',
    "float": '{"numbers": [1.0, 2], "target": 3}',
    "float target": '{"numbers": [1, 2], "target": 3.0}',
    "bool": '{"numbers": [true, 2], "target": 3}',
    "bool target": '{"numbers": [1, 2], "target": true}',
    "string": '{"numbers": ["1", 2], "target": 3}',
    "null": '{"numbers": [1, 2], "target": null}',
    "nested": '{"numbers": [[1], 2], "target": 3}',
    "numbers as text": '{"numbers": "12", "target": 3}',
    "not a number": '{"numbers": [NaN, 2], "target": 3}',
    "infinite": '{"numbers": [Infinity, 2], "target": 3}',
    "one number": '{"numbers": [3], "target": 3}',
    "no number": '{"numbers": [], "target": 3}',
}


@pytest.mark.parametrize("entry", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_named(tmp_path, entry):
    path = problems_file(tmp_path, f'[{{"numbers": [1, 2], "target": 3}}, {entry}]')
    with pytest.raises(UsageError, match="entry 1") as caught:
        problems.read_problems(path, CountdownDomain)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", "3", "null", '{"numbers": [1, 2], "target": 3}'])
def test_a_file_that_is_no_list_of_problems_says_what_it_must_hold(tmp_path, text):
    with pytest.raises(UsageError, match=r'must hold a list of \{"numbers"'):
        problems.read_problems(problems_file(tmp_path, text), CountdownDomain)


@pytest.mark.parametrize("text", ["", "[", "[{'numbers': [1, 2], 'target': 3}]", "\x00"])
def test_a_file_that_is_not_json_says_so(tmp_path, text):
    with pytest.raises(UsageError, match=r"problems.json is not JSON"):
        problems.read_problems(problems_file(tmp_path, text), CountdownDomain)


def test_a_file_that_is_not_text_says_so(tmp_path):
    (tmp_path / "problems.json").write_bytes(b"\xff\xfe[\xff]")
    with pytest.raises(UsageError, match=r"problems.json"):
        problems.read_problems(str(tmp_path / "problems.json"), CountdownDomain)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"nothing.json"):
        problems.read_problems(str(tmp_path / "nothing.json"), CountdownDomain)


def test_a_problem_that_is_there_twice_is_named(tmp_path):
    path = problems_file(tmp_path, '[{"numbers": [1, 2], "target": 3}, {"numbers": [2, 1], "target": 3}, {"numbers": [1, 2], "target": 3}]')
    with pytest.raises(UsageError, match="entry 2 is entry 0 again: leave one of them out"):
        problems.read_problems(path, CountdownDomain)


def test_good_problems_are_read_in_order(tmp_path, capsys):
    path = problems_file(tmp_path, '[{"numbers": [7, 2, 19], "target": 31}, {"target": 3, "numbers": [2, 1]}]')
    assert problems.read_problems(path, CountdownDomain) == [Problem((7, 2, 19), 31), Problem((2, 1), 3)]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.evaluation.samples=8", "--config.sampler.temperature=1"], "--numbers is one rollout, not evaluation.samples=8"),
        (["--config.model.context=16"], "model.context=16 is too small for a prompt of 35 ids: raise it"),
        (["--record=no/such/folder/trace.json"], "--record=no/such/folder/trace.json is in no folder: make it first"),
    ],
)
def test_what_does_not_go_with_one_problem_is_one_sentence(arguments, words, command: Callable):
    ended = command(evaluate, "--numbers=" + ",".join(["123456789"] * 6), "--target=3", *arguments, *SMALL[:2])
    assert ended.status == 2 and words in ended.err and ended.err.count("error") == 1 and not ended.out


def test_the_config_is_that_of_the_workdir_wherever_it_is_named(tmp_path):
    (tmp_path / "flags").write_text(f"--workdir={ROOT / 'pretrained/sosp'}\n")
    words = [[f"--flagfile={tmp_path / 'flags'}"], [f"--workdir={ROOT / 'pretrained/sosp'}"], ["--numbers=1,2"]]
    assert [evaluate.stored_config(["evaluate.py", *some]).name for some in words] == ["sosp", "sosp", "apr"]


def test_the_command_evaluates_a_problems_file(smoke_run, command: Callable, tmp_path):
    """The second problem has no solution: it is run and counted wrong, and stderr says so."""
    path = problems_file(tmp_path, '[{"numbers": [7, 2, 9], "target": 18}, {"numbers": [1, 1, 1], "target": 20}]')
    before = (smoke_run.path / "eval.json").read_text()
    output = tmp_path / "output"
    arguments = (f"--workdir={smoke_run.path}", f"--problems={path}", f"--output={output}", *SMALL)
    ended = command(evaluate, *arguments)
    assert ended.status == 0, ended.err
    assert "entry 1: 20 cannot be reached" in ended.err and "entry 0" not in ended.err
    (entry,) = json.loads((output / "eval.json").read_text())
    assert [r["problem"] for r in entry["results"]] == [{"numbers": [7, 2, 9], "target": 18}, {"numbers": [1, 1, 1], "target": 20}]
    assert entry["n"] == 2 and entry["results"][1]["correct"] is False
    assert (smoke_run.path / "eval.json").read_text() == before


def test_the_command_solves_one_problem(smoke_run, command: Callable):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.path.rglob("*")}
    ended = command(evaluate, f"--workdir={smoke_run.path}", "--numbers=7,2,9", "--target=18", *SMALL)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("[parent, call 0] 501 tokens, stopped by context")
    assert lines[1:3] == ["  | Moving to Node #0", "  | Current State: 18:[7, 2, 9], Operations: []"]
    assert lines[-2].startswith("answer: none (wrong: ")
    assert json.loads(lines[-1])["correct"] is False
    assert {path: path.stat().st_mtime_ns for path in smoke_run.path.rglob("*")} == before


BAD_COMMANDS = {
    "numbers alone": (["--numbers=1,2"], "--numbers and --target go together"),
    "target alone": (["--target=3"], "--numbers and --target go together"),
    "words": (["--numbers=1,two", "--target=3"], "--numbers must be whole numbers"),
    "fraction": (["--numbers=1,2.5", "--target=3"], "--numbers must be whole numbers"),
    "superscript": (["--numbers=1,²", "--target=3"], "--numbers must be whole numbers"),
    "empty": (["--numbers=", "--target=3"], "number"),
    "zero": (["--numbers=0,2", "--target=3"], "from 1 to"),
    "negative": (["--numbers=1,-2", "--target=3"], "from 1 to"),
    "target": (["--numbers=1,2", "--target=three"], "--target"),
    "model": (["--config.model.width=48"], "does not fit the model"),
    "layers": (["--config.model.layers=3"], "does not fit the model"),
    "field": (["--config.model.widht=48"], "widht"),
    "type": (["--config.sampler.temperature=warm"], "temperature"),
    "temperature": (["--config.sampler.temperature=-1"], "temperature"),
    "context": (["--config.model.context=8"], "context"),
    "file": (["--problems=nothing.json"], "nothing.json"),
    "record": (["--record=trace.json"], "--record goes with --numbers"),
    "too many": (["--numbers=1,2,3,4,5,6,7", "--target=3"], "from 2 to 6 numbers"),
    "two kinds": (["--numbers=1,2", "--target=3", "--problems=x.json"], "--numbers does not go with --problems"),
    "no output": (["--numbers=1,2", "--target=3", "--output=x"], "--numbers does not go with --output"),
    "sweep": ([f"--sweep={ROOT}/configs/sweep.py"], "--sweep does not go with --workdir"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_sentence(smoke_run, command: Callable, arguments, words):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.path.rglob("*")}
    ended = command(evaluate, f"--workdir={smoke_run.path}", *SMALL, *arguments)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert words in ended.err
    assert {path: path.stat().st_mtime_ns for path in smoke_run.path.rglob("*")} == before


def test_the_config_is_that_of_the_workdir_however_it_is_written(smoke_run):
    """absl reads the next argument as the value where there is no "="."""
    for arguments in ([f"--workdir={smoke_run.path}"], ["--workdir", str(smoke_run.path)], ["-workdir", smoke_run.path]):
        config = evaluate.stored_config(["evaluate.py", *map(str, arguments), "--problems=x.json"])
        assert config.to_dict() == read_config(smoke_run.path)
    assert evaluate.stored_config(["evaluate.py", "--problems=--workdir=x"]).name == "apr"


def test_a_workdir_without_a_run_says_how_to_get_one(command: Callable, tmp_path):
    ended = command(evaluate, f"--workdir={tmp_path / 'nothing'}")
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and "python sft.py" in ended.err and ended.err.count("\n") == 1


def test_a_workdir_without_a_checkpoint_says_so(smoke_run, command: Callable, tmp_path):
    (tmp_path / "config.json").write_text((smoke_run.path / "config.json").read_text())
    ended = command(evaluate, f"--workdir={tmp_path}", *SMALL)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and "no checkpoint" in ended.err and ended.err.count("\n") == 1


def test_another_evaluation_does_not_replace_the_runs_own(smoke_run, command, tmp_path, monkeypatch):
    """With another temperature it goes elsewhere; no budget in the prompt else, it is the run's own once more."""
    before = (smoke_run.path / "eval.json").read_text()
    monkeypatch.chdir(tmp_path)
    ended = command(evaluate, f"--workdir={smoke_run.path}", "--config.mesh.data=1", "--config.sampler.temperature=1")
    assert ended.status == 0, ended.err
    assert (smoke_run.path / "eval.json").read_text() == before
    (elsewhere,) = (tmp_path / "runs").glob("evaluation-*/eval.json")
    assert json.loads(elsewhere.read_text())[0]["temperature"] == 1


def test_an_output_that_cannot_be_written_is_refused_before_the_evaluation(
    smoke_run, command: Callable, tmp_path, monkeypatch
):
    monkeypatch.setattr(RolloutPool, "solve", lambda *_: pytest.fail("evaluated first"))
    (tmp_path / "file").write_text("")
    ended = command(evaluate, f"--workdir={smoke_run.path}", f"--output={tmp_path / 'file' / 'below'}", *SMALL)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


# ------------------------------------------------------------------- methods and budgets


def test_what_a_config_asks_for_is_named():
    config = one_device("laptop")
    assert evaluation.budget(build(config)) == "no budget" and evaluation.adherence(build(config), []) is None
    config.limits.update(thread_tokens=128, forced_answer_tokens=32, min_budget_rounds=2)
    config.budget.children = 3
    assert evaluation.budget(build(config)) == "3 children requested, answer forced after 128 tokens, forced to continue 2 times"


def test_budgets_kept_are_counted_by_hand():
    """Two children were started; 27 ids sampled by the parent; its longest context 60."""
    rollout = rollout_of(True, [20, 7], [[30, 50]], records.END, 0.0)
    alone = rollout_of(True, [100], [], records.END, 0.0)
    for field, value, used, within in (
        ("budget.children", 2, 1, 0.5),
        ("budget.tokens", 107, 82, 0.5),  # 107 itself, in a bin of 50: the line that asks has three ids
        ("budget.tokens", 157, 82, 0.0),
        ("limits.forced_answer_tokens", 1, 63.5, 0.5),
    ):
        config = one_device("laptop")
        config.limits.thread_tokens = 50
        config.demonstrator.token_bin = 50
        config.demonstrator.method = "sosp" if field == "budget.tokens" else "apr"
        config.update_from_flattened_dict({field: value})
        held = evaluation.adherence(build(config), [rollout, alone])
        assert held and (held["used"], held["within"]) == (used, within), field


def test_a_fingerprint_differs_where_a_parameter_does():
    params = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(2)}
    assert evaluation.fingerprint(params) == evaluation.fingerprint({"a": params["a"].copy(), "b": params["b"]})
    assert evaluation.fingerprint(params) != evaluation.fingerprint({"a": params["a"], "b": np.array([0.0, 1e-9])})
    problems = [Problem((1, 2), 3), Problem((2, 3), 5)]
    assert evaluation.problem_set(problems) != evaluation.problem_set(problems[::-1])


def test_samples_are_different_draws_in_order_of_the_problems(smoke_run, command: Callable, tmp_path):
    arguments = ("--config.sampler.temperature=1.0", "--config.evaluation.samples=2", "--config.evaluation.problems=3")
    ended = command(evaluate, f"--workdir={smoke_run.path}", f"--output={tmp_path}", *arguments, *SMALL)
    assert ended.status == 0, ended.err
    (entry,) = json.loads((tmp_path / "eval.json").read_text())
    assert (entry["n"], entry["samples"], len(entry["results"])) == (3, 2, 6)
    problems = [(tuple(result["problem"]["numbers"]), result["problem"]["target"]) for result in entry["results"]]
    assert problems[::2] == problems[1::2] and len(set(problems)) == 3
    assert [result["sample"] for result in entry["results"]] == [0, 1] * 3
    assert "pass@2" in ended.out


def test_rollouts_in_flight_change_no_result(scripted):
    """One problem at a time, five, all."""
    calls = []
    for concurrent in (1, 5, 0):
        told: list[bool] = []
        rollouts = scripted.solve(None, scripted.test_set(), 1, concurrent, lambda told=told: told.append(True))
        assert len(told) == 16
        calls.append([(r.problem, [call.sampled for t in r.threads() for call in t.calls]) for r in rollouts])
    assert calls[0] == calls[1] == calls[2] and len(calls[0]) == 16


SWEEP = """
from ml_collections import ConfigDict

def get_config():
    small = {{"mesh.data": (1,), "sampler.rows": (4,), "sampler.length_bucket": (512,), "evaluation.problems": (3,)}}
    entries = tuple({{"label": "APR", "workdir": {workdir!r}, "grid": {{**small, **grid}} if type(grid) is dict else grid}} for grid in {grids})
    return ConfigDict({{"name": "sweep", "entries": entries}})
"""


def sweep_file(path: pathlib.Path, workdir: object, *grids: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "plan.py").write_text(SWEEP.format(workdir=str(workdir), grids=list(grids)))
    return f"--sweep={path / 'plan.py'}"


def test_a_sweep_goes_on_where_it_stopped_and_mixes_nothing(smoke_run, command: Callable, tmp_path, monkeypatch):
    plan = sweep_file(tmp_path / "a", smoke_run.path, {"sampler.temperature": (0.0, 1.0)}, {"limits.spawns": (0,)})
    output = f"--output={tmp_path / 'out'}"
    measure, measured = evaluation.measure, []

    def counted(*arguments):
        if len(measured) == 2:
            raise RuntimeError("killed")
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(sweep, "measure", counted)
    with pytest.raises(RuntimeError, match="killed"):
        command(evaluate, plan, output)
    assert len(list(tmp_path.glob("out/*/eval.json"))) == 2
    monkeypatch.setattr(sweep, "measure", measure)
    ended = command(evaluate, plan, output)
    assert ended.status == 0, ended.err
    summaries = [json.loads(path.read_text())[0] for path in tmp_path.glob("out/*/eval.json")]
    assert sorted((s["temperature"], s["limits"]["spawns"]) for s in summaries) == [(0, 0), (0, 16), (1, 16)]
    assert json.loads(ended.out.splitlines()[-1])["points"] == 3
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured again"))
    assert command(evaluate, plan, output).status == 0
    monkeypatch.setattr(sweep, "measure", measure)
    other = sweep_file(tmp_path / "b", smoke_run.path, {"sampler.temperature": (0.0,), "evaluation.seed": (1,)})
    assert command(evaluate, other, output, "--config.limits.depth=0").status == 0
    summaries = [json.loads(path.read_text())[0] for path in tmp_path.glob("out/*/eval.json")]
    assert len(summaries) == 4  # other draws are another point
    assert len({s["problem_set"] for s in summaries}) == 1  # ... on the same problems
    assert sorted((s["seed"], s["limits"]["depth"]) for s in summaries) == [(0, 1)] * 3 + [(1, 0)]  # a field of them all


def test_a_second_sweep_into_one_folder_is_refused_while_the_first_one_runs(smoke_run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "out").mkdir()
    plan = sweep_file(tmp_path, smoke_run.path, {"sampler.top_k": (0,)})
    with open(tmp_path / "out" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = command(evaluate, plan, f"--output={tmp_path / 'out'}")
    assert ended.status == 2 and "is in use by another run" in ended.err, ended


def test_a_sweep_warms_up_once_for_points_that_share_compiled_functions(smoke_run, command, tmp_path, monkeypatch):
    warmed, warm_up = [], evaluation.warm_up

    def counted(pool, *given):
        warmed.append(pool.parts.evaluation.concurrent)
        warm_up(pool, *given)

    monkeypatch.setattr(sweep, "warm_up", counted)
    grids = {"limits.spawns": (0, 1)}, {"limits.spawns": (2,), "evaluation.concurrent": (2,)}
    plan = sweep_file(tmp_path, smoke_run.path, *grids)
    assert command(evaluate, plan, f"--output={tmp_path / 'out'}").status == 0
    assert warmed == [0, 2]


def test_more_problems_than_there_are_held_out_are_refused(smoke_run, command: Callable, tmp_path):
    output = f"--output={tmp_path / 'out'}"
    ended = command(evaluate, f"--workdir={smoke_run.path}", output, "--config.evaluation.problems=100000", *SMALL)
    assert ended.status == 2 and "heldout split, 100000 were asked for" in ended.err, ended
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"evaluation.problems": (61,)}, "only 60 problems for the heldout split, 61 were asked for"),
        ({"sampler.tempreature": (0.0,)}, "tempreature"),
        ({"sampler.temperature": ("warm",)}, "temperature"),
        ({"sampler.temperature": (-1.0,)}, "temperature"),
        ({"evaluation.samples": (2,)}, "evaluation.samples=2"),
        (5, "must be a dict of lists of values, not 5"),
        ({"seed": 5}, "must be a dict of lists of values, not {'mesh.data'"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_measured(smoke_run, command, tmp_path, monkeypatch, grid, words):
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured"))
    plan = sweep_file(tmp_path, smoke_run.path, {"sampler.top_k": (0,)}, grid)
    ended = command(evaluate, plan, f"--output={tmp_path / 'out'}")
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and words in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_no_sweep(command: Callable):
    ended = command(evaluate, f"--sweep={ROOT}/configs/apr.py")
    assert (ended.status, ended.err) == (2, "error: --sweep takes a file like configs/sweep.py, with a name and entries\n")


def test_a_sweep_leaves_out_runs_that_are_not_there_and_says_so(command: Callable, tmp_path):
    ended = command(evaluate, sweep_file(tmp_path, tmp_path / "nothing", {"sampler.top_k": (0,)}))
    assert ended.status == 2
    left_out, error = ended.err.splitlines()
    assert left_out.startswith("left out: APR: ") and "nothing holds no trained run" in left_out
    assert error.startswith("error: ") and "train one" in error

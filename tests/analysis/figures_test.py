"""Figures and tables: what is read and refused, the points of each figure and the numbers of each table by hand."""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from analysis import charts, choose, figures, labels, tables
from analysis.charts import ARROW, CURVE, PAPER, RAW, SMOOTH, Line
from analysis.choose import Log
from configs import apr, sweep
from harness import evaluation, migrate, results, stats
from harness.build import build
from harness.cli import UsageError
from harness.results import Evaluation, Result, signed
from harness.workdir import PRETRAINED

LAPTOP = {"count": 3, "low": 1, "high": 20, "target_low": 10, "target_high": 50}
LIMITS = {"children": 16, "spawns": 16, "depth": 1, "thread_tokens": 4096}
LIMITS |= {"rollout_tokens": 65536, "forced_answer_tokens": 0, "min_budget_rounds": 0}


def result(correct, tokens=100, sequential=50, children=3, milliseconds=10.0):
    """What eval.json keeps of one rollout."""
    costs = {"total_tokens": tokens, "sequential_tokens": sequential, "longest_context": sequential, "children": children}
    costs |= {"width": 3, "depth": 1, "truncated": 0.0, "malformed": 0.0, "milliseconds": milliseconds}
    problem = {"numbers": [1, 2, 3], "target": 6}
    return Result(problem=problem, sample=0, correct=correct, reason="", answer=[], failure="", **costs)


def entry(label="APR", correct=(True, True, True, False), results=None, costs=None, requested=None, limits=None, threads=None, **fields):
    """An entry of eval.json: of four problems, three solved, if nothing else is said."""
    results = results or [result(bool(right), **(costs or {})) for right in correct]
    samples = fields.get("samples", 1)
    value, low, high = stats.mean_with_interval([float(r.correct) for r in results])
    means = {name: sum(getattr(r, name) for r in results) / len(results) for name in stats.MEANS}
    values = {
        "label": label,
        "task": "countdown",
        "method": "apr",
        "budget": "no budget",
        "requested": {"children": -1, "tokens": -1} | (requested or {}),
        "limits": LIMITS | (limits or {}),
        "threads": choose.THREADS | (threads or {}),
        "temperature": 0.0,
        "sampling": dict(choose.SAMPLING),
        "context": 512,
        "concurrent": 0,
        "n": len(results) // samples,
        "samples": samples,
        "correct": sum(r.correct for r in results),
        "accuracy": value,
        "interval": [low, high],
        **means,
        "throughput_ms": 2.5,
        "pass_at": {"1": [value, low, high]},
        "cons_at": {"1": [value, low, high]},
        "adherence": None,
        "failures": {},
        "windows": {"128": [0.1, 0.0, 0.2], "512": [0.5, 0.4, 0.6]},
        "demonstrator": 0.66,
        "demonstrator_beams": [],
        "family": LAPTOP,
        "training_seed": 0,
        "seed": 0,
        "checkpoint": 4000,
        "parameters": f"parameters of {label}",
        "problem_set": "0123abcd",
        "results": results,
    }
    return Evaluation(**{**values, **fields})


def as_json(value):
    """An entry as eval.json holds it; anything else as it is."""
    return value.to_json() if isinstance(value, Evaluation) else value


def children_requested(count, label="APR", **fields):
    adherence = {"asked": [count, count], "used": count - 0.5, "within": 0.75}
    return entry(label, budget=f"{count} children requested", requested={"children": count}, adherence=adherence, **fields)


def cut(tokens, label="APR", within=0.9, **fields):
    limits = {"thread_tokens": tokens, "forced_answer_tokens": 96}
    adherence = {"asked": [0, tokens + 96], "used": tokens, "within": within}
    return entry(label, budget=f"answer forced after {tokens} tokens", limits=limits, adherence=adherence, **fields)


def sent_on(times, **fields):
    return entry(budget=f"forced to continue {times} times", limits={"min_budget_rounds": times}, **fields)


def at(tokens, value=0.75):
    """A point that `entry(total_tokens=tokens)` makes, without its interval."""
    return tokens, value


def bare(lines):
    """Lines without their intervals."""
    return [(line.label, line.kind, [point[:2] for point in line.points]) for line in lines]


def write(folder: pathlib.Path, *entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps([as_json(value) for value in entries]))
    return str(folder)


def write_log(folder: pathlib.Path, *lines, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    return str(folder)


# ---------------------------------------------------------------- reading evaluations


def test_entries_are_what_evaluate_writes(tmp_path):
    """The entries of these tests, and what figures.py asks of one, against a summary of real rollouts."""
    config = apr.get_config("smoke")
    config.mesh.data = 1
    experiment = build(config)
    rollouts = [experiment.domain.demonstration("train", 0, index) for index in range(4)]
    config.evaluation.samples, config.sampler.temperature = 2, 1.0
    summary = evaluation.evaluate(build(config), {"w": np.zeros(2)}, rollouts, 1.0, "APR", 7)
    (read,) = choose.read_results([write(tmp_path, summary)])
    ours = entry()
    assert vars(read).keys() == vars(ours).keys() and vars(read.results[0]).keys() == vars(ours.results[0]).keys()
    assert read.requested.keys() == ours.requested.keys() and read.limits.keys() == ours.limits.keys() and read.threads == choose.THREADS
    assert read.family.keys() == labels.PAPER_FAMILY.keys()
    charts.compute([read])  # a sample of two


def test_folders_are_searched_and_sorted_by_label(tmp_path):
    write(tmp_path / "a" / "deep", entry("Zeta"), entry("APR RL"), entry("Alpha"))
    write(tmp_path / "b", entry("APR"), entry("SoS"))
    found = choose.read_results([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [e.label for e in found] == ["SoS", "APR", "APR RL", "Alpha", "Zeta"]


def test_runs_are_known_by_their_names(tmp_path):
    write(tmp_path, entry("grpo-apr-desktop"), entry("sosp"), entry("mine"))
    assert [e.label for e in choose.read_results([str(tmp_path)])] == ["SoS+", "APR RL", "mine"]


def test_a_point_that_is_found_twice_counts_once(tmp_path):
    write(tmp_path / "a", entry(accuracy=0.5))
    write(tmp_path / "b", entry(accuracy=0.25))
    assert [e.accuracy for e in choose.read_results([str(tmp_path)])] == [0.5]
    assert len(choose.read_results([str(tmp_path), str(tmp_path / "b")])) == 1
    seed = {"training_seed": 1, "parameters": "others"}
    others = [{"temperature": 1.0}, {"samples": 2}, {"concurrent": 1}, {"context": 256}, {"label": "SoS"}, {"seed": 1}, seed]
    changed = [entry(threads={"child_returns": "text"}), entry(limits={"forced_answer_tokens": 64}), entry(sampling={"top_k": 0, "top_p": 0.9})]
    write(tmp_path / "c", *(entry(**other) for other in others), *changed)
    found = choose.read_results([str(tmp_path)])
    assert len(found) == 11 and {e.label for e in found} == {"APR", "SoS", "APR, top_p 0.9"}


def test_checkpoints_of_one_label_are_never_mixed(tmp_path):
    write(tmp_path / "a", entry())
    write(tmp_path / "b", entry(temperature=1.0, parameters="others"))
    with pytest.raises(UsageError, match="a/eval.json and .*b/eval.json hold APR of training seed 0 with different"):
        choose.read_results([str(tmp_path)])


@pytest.mark.parametrize("data", [b"", b"[]", b"[1", b'["\xb8"]', b"5"])
def test_a_file_without_evaluations_is_named(tmp_path, data):
    write(tmp_path / "a", entry())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "eval.json").write_bytes(data)
    with pytest.raises(UsageError, match="b/eval.json"):
        choose.read_results([str(tmp_path)])


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="typo holds no metrics.jsonl: name the workdir"):
        choose.read_logs([str(tmp_path / "typo")])


@pytest.mark.parametrize("changed", [{"problem_set": "other"}, {"family": LAPTOP | {"high": 21}}])
def test_results_on_different_problems_are_never_mixed(changed, tmp_path):
    write(tmp_path / "a", entry())
    write(tmp_path / "b", entry("SoS", **changed))
    with pytest.raises(UsageError) as caught:
        choose.read_results([str(tmp_path)])
    for words in ("a/eval.json", "b/eval.json", "different problems", "--results"):
        assert words in str(caught.value)
    assert len(choose.read_results([str(tmp_path / "b")])) == 1


FIELDS = [field.name for field in dataclasses.fields(Evaluation) if field.name not in ("results", "split")]
FIELDS += [f"results.{field.name}" for field in dataclasses.fields(Result)]


def test_a_summary_without_single_rollouts_is_left_out(tmp_path):
    write(tmp_path / "a", entry())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "eval.json").write_text(json.dumps([signed(entry("SoS").headline())]))
    (kept,) = choose.read_results([str(tmp_path)])
    assert kept.label == "APR" and choose.read_results([str(PRETRAINED.parent / "sosp"), str(PRETRAINED)])


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named_with_its_file(field, tmp_path):
    stored = json.loads(json.dumps(as_json(entry())))
    *outer, last = field.split(".")
    inner = stored["results"][2] if outer else stored
    del inner[last]
    (tmp_path / "eval.json").write_text(json.dumps([signed(stored)]))
    with pytest.raises(UsageError) as caught:
        choose.read_results([str(tmp_path)])
    assert "eval.json lacks a field" in str(caught.value) and f"'{field.removeprefix('results.')}'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is damaged"),
        ("[]", "holds no evaluation"),
        ("7", "is damaged"),
        ("[7]", "is damaged"),
        (json.dumps([as_json(entry()) | {"accuracy": 1.0}]), "does not match its checksum"),
        (json.dumps([as_json(entry(n=5))]), "has 4 results, not n * samples"),
        (json.dumps([signed(as_json(entry()) | {"results": [], "n": 0})]), "has 0 results"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused(content, words, tmp_path):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        choose.read_results([str(tmp_path)])
    assert words in str(caught.value) and "eval.json" in str(caught.value)


# ---------------------------------------------------------------- reading runs


def test_logs_are_labelled_as_in_the_sweep(tmp_path):
    folders = [tmp_path / name for name in ("grpo-apr", "grpo-sosp-desktop", "mine", "again/grpo-apr")]
    logs = choose.read_logs([write_log(folder, {"step": 1}) for folder in folders])
    assert [log.label for log in logs] == ["APR RL", "SoS+ RL", str(folders[2]), str(folders[3])]


def test_evidence_of_a_run_is_read_like_its_folder(tmp_path):
    whole = tmp_path / "whole" / "grpo-apr"
    write(whole, entry())
    write_log(whole, {"step": 1})
    packed = tmp_path / "packed" / "grpo-apr"
    packed.parent.mkdir()
    evidence = packed.with_name("evidence.zip")
    results.add_evidence(whole, evidence)
    expected = choose.read_results([str(whole)])
    assert len(expected) == 1 and choose.read_results([str(packed)]) == choose.read_results([str(packed.parent)]) == expected
    assert choose.read_logs([str(packed)]) == choose.read_logs([str(whole)])


def test_evidence_is_added_to_replaced_and_the_same_bytes_each_time(tmp_path):
    first, second = (tmp_path / name for name in ("apr", "sosp"))
    write(first, entry(total_tokens=1)), write(second, entry("SoS+"))
    evidence = tmp_path / "packed" / "evidence.zip"
    evidence.parent.mkdir()
    assert results.add_evidence(first, evidence) == ["apr/eval.json"]
    results.add_evidence(second, evidence)
    before = evidence.read_bytes()
    write(first, entry(total_tokens=2))
    results.add_evidence(first, evidence)
    assert [e.total_tokens for e in choose.read_results([str(evidence.parent)])] == [100, 2]
    write(first, entry(total_tokens=1))
    results.add_evidence(first, evidence)
    assert evidence.read_bytes() == before


def test_evidence_that_cannot_be_added_leaves_the_file_as_it_was(tmp_path):
    evidence = tmp_path / "evidence.zip"
    with pytest.raises(UsageError, match=r"apr has no eval\.json: evaluate it first"):
        results.add_evidence(tmp_path / "apr", evidence)
    assert not evidence.exists()
    evidence.write_bytes(b"PK")
    write(tmp_path / "apr", entry())
    with pytest.raises(UsageError, match=r"evidence\.zip is damaged"):
        results.add_evidence(tmp_path / "apr", evidence)
    assert evidence.read_bytes() == b"PK"


def test_a_bit_that_flipped_in_evidence_is_never_read(tmp_path):
    write(tmp_path / "apr", entry())
    evidence = tmp_path / "packed" / "evidence.zip"
    evidence.parent.mkdir()
    results.add_evidence(tmp_path / "apr", evidence)
    whole, expected = evidence.read_bytes(), choose.read_results([str(evidence.parent)])
    named = 0
    for place in [*range(0, len(whole) - 400, 3), *range(len(whole) - 400, len(whole))]:  # the directory is at the end
        evidence.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = choose.read_results([str(evidence.parent)])
        except UsageError as error:
            assert "evidence.zip" in str(error)
            named += 1
        else:
            assert found == expected  # a date, say
    assert named > 100


def test_a_number_that_changed_in_an_evaluation_is_never_read(tmp_path):
    path = tmp_path / "eval.json"
    write(tmp_path, entry())
    value = json.loads(path.read_text())
    value[0]["accuracy"] += 0.001
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"eval\.json does not match its checksum: restore the file, measure it again"):
        choose.read_results([str(tmp_path)])
    assert migrate.main([str(tmp_path)]) == 0  # which gives a checksum to what has none
    with pytest.raises(UsageError, match="does not match its checksum"):
        choose.read_results([str(tmp_path)])


def test_a_damaged_zip_file_is_named_and_one_of_something_else_left_alone(tmp_path):
    write(tmp_path / "a", entry())
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("notes.txt", "")
    assert len(choose.read_results([str(tmp_path)])) == 1
    (tmp_path / "evidence.zip").write_bytes(b"PK")
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UsageError, match=r"evidence\.zip is damaged \(.*\): restore it, name another folder, or remove it"):
            choose.read_results([str(folder)])


def test_the_line_that_a_run_is_writing_does_not_count(tmp_path):
    (log,) = choose.read_logs([write_log(tmp_path, {"step": 1}, {"step": 2}, end="")])
    assert log.lines == [{"step": 1}]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "metrics.jsonl"), ('{"step": 1}\n{"st\n{"step": 3}\n', "line 2, is damaged"), ('{"loss": 1}\n', "line 1, is damaged")],
)
def test_a_log_that_is_none_is_refused(content, words, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=words):
        choose.read_logs([str(tmp_path)])


# ---------------------------------------------------------------- points by hand


def test_compute_by_hand():
    """Two samples of 200 tokens each cost 400 tokens together."""
    pairs = {"pass_at": {"1": [0.5, 0.4, 0.6], "2": [0.7, 0.6, 0.8]}, "cons_at": {"2": [0.55, 0.5, 0.6], "1": [0.5, 0.4, 0.6]}}
    sampled = entry("SoS+", temperature=1.0, samples=2, total_tokens=200, **pairs)
    asked = [children_requested(count, total_tokens=tokens) for count, tokens in ((2, 150), (0, 90), (4, 120))]
    excluded = [entry(concurrent=1), entry(threads={"child_returns": "text"}), entry(temperature=0.5)]
    chart = charts.compute([sampled, *asked, entry(total_tokens=300), *excluded])
    assert bare(chart.panels[""]) == [
        ("SoS+", "majority of k", [(200, 0.5), (400, 0.55)]),
        ("SoS+", "any of k", [(200, 0.5), (400, 0.7)]),
        ("APR", "budget requested", [at(90), at(120), at(150)]),
        ("APR", "greedy", [at(300)]),
    ]
    assert chart.panels[""][1].points[1] == pytest.approx((400, 0.7, 0.6, 0.8))
    assert chart.log and chart.kinds["any of k"] == {"linestyle": "--"}


def test_compute_is_left_out_if_there_is_only_one_way_to_spend():
    assert charts.compute([entry(), entry(temperature=1.0)]).panels == {"": []}


def test_budgets_at_two_temperatures_are_two_lines():
    entries = [children_requested(2, temperature=t, total_tokens=100 + t) for t in (0.0, 1.0)]
    assert [line.points[0][0] for line in charts.compute(entries).panels[""]] == [100, 101]


def test_context_windows_by_hand():
    entries = [entry(), entry("SoS", temperature=1.0), children_requested(10), children_requested(2), children_requested(2, "APR RL fixed")]
    chart = charts.context(entries)
    points = [(128, 0.1, 0.0, 0.2), (512, 0.5, 0.4, 0.6)]
    assert chart.panels == {
        "no budget in the prompt": [Line("APR", "", points)],
        "children requested": [Line("APR", "2 children requested", points), Line("APR", "10 children requested", points)],
    }
    assert chart.kinds["2 children requested"]["alpha"] < chart.kinds["10 children requested"]["alpha"] == 1


def test_rl_pairs_the_same_temperature_and_budget():
    entries = [entry(total_tokens=100), entry(temperature=1.0), entry("APR RL", total_tokens=150), entry("SoS+ RL")]
    entries += [children_requested(2), children_requested(3, "APR RL fixed")]
    assert choose.rl_pairs(entries) == [(entries[0], entries[2])]
    fixed = children_requested(2, "APR RL fixed")
    assert choose.rl_pairs([*entries, fixed])[1:] == [(entries[4], fixed)]
    chart = charts.rl(entries)
    assert bare(chart.panels["temperature 0"]) == [
        ("APR", ARROW, [at(100), at(150)]),
        ("APR", "", [at(100)]),
        ("APR RL", "", [at(150)]),
    ]
    assert [*chart.panels] == ["temperature 0"]
    warm = [entry(label, temperature=1.0) for label in ("APR", "APR RL")]
    assert choose.rl_pairs([entries[0], *warm]) == [(warm[0], warm[1])]
    assert [*charts.rl([*entries, warm[1]]).panels] == ["temperature 0", "temperature 1"]


def test_rl_is_paired_with_no_run_that_it_may_not_have_started_from():
    before = [entry(training_seed=seed, parameters=str(seed)) for seed in (0, 1)]
    after = [entry("APR RL", training_seed=seed, parameters=f"{seed} RL") for seed in (1, 2)]
    assert choose.rl_pairs(before + after) == []
    assert choose.rl_pairs(before[:1] + after) == [(before[0], after[0]), (before[0], after[1])]
    assert [row["training seed"] for row in rows_of(tables.rl_table(before[:1] + after))] == [1, 2]


def test_rl_is_paired_with_the_same_sampling():
    plain, nucleus = entry(), entry("APR, top_p 0.9")
    after = [entry("APR RL"), entry("APR RL, top_p 0.9"), entry("APR RL fixed, top_p 0.9")]
    assert choose.rl_pairs([plain, nucleus, *after]) == [(plain, after[0]), (nucleus, after[1]), (nucleus, after[2])]


def test_solved_within_by_hand():
    """Of four problems those of 10 and 30 tokens are solved; another method's slowest takes 90."""
    costs = [(True, 30), (False, 20), (True, 10), (False, 40)]
    first = entry(results=[result(right, sequential=tokens, milliseconds=7 * tokens) for right, tokens in costs])
    second = entry("SoS", results=[result(False, sequential=90, milliseconds=5)])
    (one, two) = charts.sequential([first, second]).panels[""]
    assert bare([one, two]) == [("APR", CURVE, [(0, 0.0), (10, 0.25), (30, 0.5), (90, 0.5)]), ("SoS", CURVE, [(0, 0.0), (90, 0.0)])]
    assert one.points[1][2:] == stats.wilson(1, 4)
    assert charts.latency([first, second]).panels == {"": []}
    (line,) = charts.latency([dataclasses.replace(first, concurrent=1), second]).panels[""]
    assert bare([line]) == [("APR", CURVE, [(0, 0.0), (70, 0.25), (210, 0.5), (280, 0.5)])]


def test_forcing_goes_through_the_free_point():
    entries = [cut(192, total_tokens=80), cut(128, total_tokens=60), entry(total_tokens=100), sent_on(1, total_tokens=120)]
    entries += [entry(temperature=1.0), entry("SoS+"), cut(128, label="SoS", total_tokens=40)]
    groups = [[(e.label, e.total_tokens) for e in group] for group in choose.forced(entries)]
    assert groups == [[("APR", 60), ("APR", 80), ("APR", 100)], [("SoS", 40)], [("APR", 100), ("APR", 120)]]


def test_the_papers_values_are_drawn_only_on_its_own_problems():
    for family, drawn in ((LAPTOP, []), (labels.PAPER_FAMILY, [("APR", [(5000, 0.752)])])):
        lines = bare(charts.latency([entry(family=family, concurrent=1)]).panels[""])
        assert [(label, points) for label, kind, points in lines if kind == PAPER] == drawn
    pair = [entry(family=labels.PAPER_FAMILY), entry("APR RL", family=labels.PAPER_FAMILY)]
    assert bare(charts.rl(pair).panels["temperature 0"])[-1] == ("APR", PAPER, [(10964, 0.755), (16720, 0.834)])


def test_the_papers_numbers_are_those_of_its_table():
    assert tables.paper_accuracy(entry("SoS+ RL", temperature=0.5)) == "0.591"
    assert tables.paper_accuracy(children_requested(10, temperature=1.0)) == "0.801"
    assert tables.paper_accuracy(children_requested(4)) == tables.paper_accuracy(entry(temperature=0.3)) == ""


# ---------------------------------------------------------------- points of runs


def test_running_mean_by_hand():
    assert charts.running_mean([0, 3, 6, 3, 0], 1) == [1.5, 3, 4, 3, 1.5]
    assert charts.running_mean([1, 2], 5) == [1.5, 1.5] and charts.running_mean([], 5) == []


def grpo_log(label="APR RL"):
    heldout = [{"step": step, "validation_accuracy": 0.5, "validation_low": 0.4, "validation_high": 0.7} for step in (0, 2)]
    costs = {"total_tokens": 400.0, "tokens_per_thread": 80.0}
    steps = [{"step": step, "sampled_accuracy": step / 4, "children": 3.0 + step, **costs} for step in (1, 2)]
    return Log(label, [heldout[0], *steps, heldout[1]])


def sft_log(label="APR"):
    return Log(label, [{"step": 40, "loss": 2.0, "accuracy": 0.9}, {"step": 40, "validation_accuracy": 0.25}])


def test_training_curves_by_hand():
    logs = [grpo_log(), sft_log()]
    panels = charts.training(logs).panels
    assert bare(panels["sampled problems"]) == [
        ("APR RL", RAW, [(1, 0.25), (2, 0.5)]),
        ("APR RL", SMOOTH, [(1, 0.375), (2, 0.375)]),
    ]
    assert panels["validation problems"] == [Line("APR RL", "", [(0, 0.5, 0.4, 0.7), (2, 0.5, 0.4, 0.7)])]
    counts = charts.threads(logs).panels
    assert [bare(lines)[0][2] for lines in counts.values()] == [[(1, 4), (2, 5)], [(1, 400), (2, 400)], [(1, 80), (2, 80)]]
    assert not any([*charts.training([sft_log()]).panels.values(), *charts.threads([sft_log()]).panels.values()])


# ---------------------------------------------------------------- looks


def test_a_label_looks_the_same_everywhere_and_unlike_others():
    assert len({*figures.LOOKS.values()}) == len({color for color, _ in figures.LOOKS.values()}) == len(figures.LOOKS)
    assert {*figures.LOOKS} == {*sweep.RUNS, *sweep.COMPARED}
    spare = {figures.look(f"method {number}") for number in range(100)}
    assert len(spare) > 30 and not spare & {*figures.LOOKS.values()}
    assert figures.look("mine") == figures.look("mine") and figures.look("APR") == figures.LOOKS["APR"]


def test_curves_carry_the_colour_of_their_label():
    chart = charts.Chart("", "", "", {"": [Line("APR", "", [(1, 0.5, 0.4, 0.6)]), Line("SoS", CURVE, [(0, 0, 0, 0), (1, 1, 1, 1)])]})
    axes = figures.render(chart).axes[0]
    assert {line.get_color() for line in axes.lines} == {figures.LOOKS["APR"][0], figures.LOOKS["SoS"][0]}
    (legend,) = figures.render(chart).legends
    assert [text.get_text() for text in legend.get_texts()] == ["SoS", "APR"]


# ---------------------------------------------------------------- tables by hand


def rows_of(table):
    """Rows as {column: cell}."""
    return [dict(zip(table.head.split(" | "), row, strict=True)) for row in table.rows]


def test_accuracy_table_by_hand():
    (row,) = rows_of(tables.accuracy_table([entry(), entry(concurrent=1), children_requested(3)]))
    low, high = stats.wilson(3, 4)
    assert row == {
        "method": "APR",
        "temperature": "0",
        "accuracy": f"0.750 ({low:.3f}-{high:.3f})",
        "problems": 4,
        "training seed": 0,
        "seed of draws": 0,
        "paper": "0.755",
    }


def test_rl_table_by_hand():
    """Two of four right, then all: differences 0, 1, 0, 1, whose mean is 0.5 +- 1.96 * sqrt(1/3 / 4)."""
    before = entry(correct=(True, False, True, False), costs={"tokens": 100, "sequential": 60, "children": 3})
    after = entry("APR RL", correct=(True,) * 4, costs={"tokens": 160, "sequential": 70, "children": 4})
    (row,) = rows_of(tables.rl_table([before, after]))
    assert row["method"] == "APR RL" and row["accuracy"].startswith("0.500 (") and " → 1.000 (" in row["accuracy"]
    assert row["difference"] == "+0.500 (-0.066 to +1.066)"
    assert row["total tokens"] == "100 ± 0 → 160 ± 0" and row["sequential tokens"] == "60 ± 0 → 70 ± 0"
    assert row["child threads"] == "3.0 ± 0.0 → 4.0 ± 0.0"
    assert row["tokens per thread"] == "25 → 32"  # 100 / 4, 160 / 5
    assert row["paper"].startswith("0.755 → 0.834; total tokens 10,964 → 16,720;")


def test_the_difference_is_between_problems_not_samples():
    samples = [result(right) for right in (True, False, True, True)]  # of two problems: 0.5 and 1
    assert choose.by_problem(entry(results=samples, samples=2), "correct") == [0.5, 1.0]


def test_ablation_table_by_hand():
    entries = [entry(), entry("SoS+"), entry(threads={"child_returns": "text"}), entry(threads={"inherit_context": True}), children_requested(3)]
    rows = rows_of(tables.ablation_table(entries))
    assert [(row["method"], row["requested or changed"]) for row in rows] == [
        ("APR", "no budget"),
        ("APR", "3 children requested"),
        ("APR", "child_returns: text"),
        ("APR", "inherit_context: True"),
    ]
    assert rows[0]["share within the budget"] == "" and rows[1]["share within the budget"] == "0.75"
    assert rows[1]["mean use of it"] == "2.5" and rows[0]["total tokens"] == "100 ± 0"


def test_forcing_table_by_hand():
    """From 100 tokens at 0.25 to 200 at 0.75: 0.5 per 100 tokens; a third point at 300 and 0.75 makes slopes 5, 2.5, 0."""
    entries = [cut(64, correct=(1, 0, 0, 0), total_tokens=100, within=0.5), cut(128, total_tokens=200, within=1.0)]
    rows = rows_of(tables.forcing_table([*entries, entry(total_tokens=300)]))
    assert [row["Control"] for row in rows] == ["0.5", "1", "", "0.75"]
    assert rows[-1]["Scaling"] == "+2.500" and rows[-1]["Performance"] == "0.750" and rows[-1]["budget"] == "these 3"
    assert rows_of(tables.forcing_table([cut(64)]))[-1]["Scaling"] == ""  # no slope of one point
    assert tables.forcing_table([entry()]).rows == []


def two_samples(**fields):
    """Two problems of two samples: 100 and 300 tokens, 40 and 80 in sequence; the first samples are right."""
    results = [result(True, 100, 40), result(False, 300, 80), result(True, 100, 40), result(False, 300, 80)]
    both = {"pass_at": {"1": [0.5, 0.1, 0.9], "2": [1.0, 0.4, 1.0]}, "cons_at": {"1": [0.5, 0.1, 0.9], "2": [0.6, 0.2, 0.9]}}
    return entry("Direct", results=results, samples=2, temperature=1.0, **both, **fields)


def test_rejection_sampling_by_hand():
    rows = rows_of(tables.forcing_table([two_samples(context=512)]))
    assert [row["budget"] for row in rows[:2]] == ["resampled to at most 128 tokens", "resampled to at most 192 tokens"]
    assert rows[0]["accuracy"].startswith("1.000 (") and rows[0]["total tokens"] == "100"
    assert rows[-1]["budget"] == "these 7" and rows[-1]["Performance"] == "1.000" and rows[-1]["Scaling"] == ""


def test_equal_tokens_by_hand():
    """Means: 200 tokens a sample, 60 in sequence; two side by side take 400, and 80 in sequence."""
    rows = rows_of(tables.equal_table([two_samples(), entry(total_tokens=500, sequential_tokens=50)]))
    taken = {(row["tokens"], row["budget"], row["method"]): (row["k"], row["pass@k"][:5], row["tokens used"]) for row in rows}
    assert taken["total", "256", "Direct"] == ("1", "0.500", "200")
    assert taken["total", "512", "Direct"] == ("2", "1.000", "400")
    assert taken["sequential", "64", "Direct"] == ("1", "0.500", "60")
    assert taken["sequential", "128", "Direct"] == ("2", "1.000", "80")
    assert taken["total", "512", "APR"] == ("1", "0.750", "500")
    assert ("total", "256", "APR") not in taken and ("total", "128", "Direct") not in taken


def test_distinct_solutions_by_hand():
    """From 1, 2 and 3 to 6 by way of 3 and 3, 2 and 4, 1 and 5, 2 and 3, or 1 and 6: two of the five are found."""
    answers = [["1+2=3", "3+3=6"], ["2+1=3", "3+3=6"], ["1*2=2", "2*3=6"], ["1+2=3", "3+3=6"]]
    results = [dataclasses.replace(result(True), answer=answer) for answer in answers]
    results[3] = dataclasses.replace(results[3], correct=False)
    (row,) = rows_of(tables.solutions_table([entry(results=results, samples=4, temperature=1.0)]))
    assert (row["found"], row["solutions"]) == ("2.00", "5.00")
    assert row["share found"].startswith("0.400") and row["enough found"].startswith("0.000")


def test_failure_and_cost_tables_by_hand():
    first = entry(correct=(True, False, False, False), failures={"duplicate": 0.25, "wrong_state": 0.5})
    rows = rows_of(tables.failure_table([first, entry("SoS", failures={"duplicate": 0.5})]))
    low, high = stats.wilson(1, 4)
    assert [*rows[0]] == ["method", "training seed", "duplicate", "wrong state"]
    assert rows[0]["duplicate"] == f"0.250 ({low:.3f}-{high:.3f})" and rows[1]["wrong state"].startswith("0.000 (")
    alone = entry(concurrent=1, results=[result(True, milliseconds=t) for t in (20.0, 40.0)])
    (row,) = rows_of(tables.cost_table([entry(), alone]))
    assert row["ms alone"] == "30 ± 20"  # 1.96 * sqrt(200 / 2)
    assert row["ms under load"] == "2.5" and row["sequential tokens"] == "50 ± 0"
    assert rows_of(tables.cost_table([entry()]))[0]["ms alone"] == ""
    in_turn = entry("APR sequential", concurrent=1, results=alone.results)  # measured alone only
    first, second = rows_of(tables.cost_table([in_turn, entry()]))
    assert (first["method"], first["ms alone"], first["ms under load"]) == ("APR", "", "2.5")
    assert (second["method"], second["ms alone"], second["ms under load"]) == ("APR sequential", "30 ± 20", "")


def test_samples_table_by_hand():
    """Two samples of 200 tokens cost 400 together; ten come after two."""
    pairs = {name: {k: [float(k) / 20, 0.0, 1.0] for k in ("1", "10", "2")} for name in ("pass_at", "cons_at")}
    several = entry("SoS+", temperature=1.0, samples=10, correct=(True,) * 40, total_tokens=200, **pairs)
    rows = rows_of(tables.samples_table([entry(), several, dataclasses.replace(several, threads={"child_returns": "text"})]))
    assert [(row["k"], row["total tokens"]) for row in rows] == [("1", "200"), ("2", "400"), ("10", "2,000")]
    assert rows[1]["cons@k"] == rows[1]["pass@k"] == "0.100 (0.000-1.000)" and rows[0]["method"] == "SoS+"


# ---------------------------------------------------------------- the command


def everything(folder: pathlib.Path) -> list[str]:
    """Flags for evaluations and runs that make every figure and table."""
    entries = [entry(label, **more) for label in ("APR", "APR RL") for more in ({}, {"temperature": 1.0}, {"concurrent": 1})]
    entries += [entry(threads={"inherit_context": True}), children_requested(2), children_requested(4), cut(64), sent_on(1)]
    entries += [entry("SoS+", temperature=1.0, samples=2, correct=(True, False) * 4), entry("mine", correct=(False,) * 4, failures={"duplicate": 1.0})]
    write(folder / "sweep" / "all", *entries)
    runs = [write_log(folder / name, *log.lines) for name, log in (("grpo-apr", grpo_log()), ("apr", sft_log()))]
    return [f"--results={folder / 'sweep'}", f"--runs={','.join(runs)}"]


def test_the_command_writes_every_figure_and_the_tables(command: Callable, tmp_path):
    output = tmp_path / "out"
    ended = command(figures, *everything(tmp_path), f"--output={output}")
    assert ended.status == 0, ended.err
    names = [build.__name__ for build in charts.RESULT_CHARTS + charts.RUN_CHARTS]
    assert names[:3] == ["compute", "context", "rl"] and len(names) == 7
    files = [str(output / f"{name}.png") for name in names] + [str(output / "tables.md")]
    lines = ended.out.splitlines()
    assert json.loads(lines[-1]) == {"written": files} and lines[:-1] == [f"wrote {file}" for file in files]
    assert {str(path) for path in output.iterdir()} == {*files}
    for name in names:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = (output / "tables.md").read_text()
    assert [f"**Table {number}." in text for number in range(1, 7)] == [True] * 6
    assert "4 held-out problems (count 3, low 1, high 20" in text and "on their own task" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_what_has_no_points_is_left_out_aloud(command: Callable, tmp_path):
    results, again = write(tmp_path / "a", entry()), tmp_path / "again"
    for output in (tmp_path / "out", again):
        ended = command(figures, f"--results={results}", f"--output={output}")
        assert ended.status == 0, ended.err
    written = json.loads(ended.out.splitlines()[-1])["written"]
    assert [pathlib.Path(path).stem for path in written] == ["context", "sequential", "tables"]
    for words in ("left out compute: it needs several samples", "left out rl:", "left out latency:", "left out of tables.md: Table 2"):
        assert words in ended.out
    assert "training" not in ended.out  # no runs were named
    for path in again.iterdir():  # the same input, the same bytes
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_runs_alone_are_drawn_without_tables(command: Callable, tmp_path):
    names = ["threads.png", "training.png"]
    for log, drawn in ((grpo_log("grpo-apr"), names), (sft_log("apr"), [])):
        run, output = write_log(tmp_path / log.label, *log.lines), tmp_path / f"drawn of {log.label}"
        ended = command(figures, f"--runs={run}", f"--output={output}")
        assert ended.status == 0, ended.err
        assert sorted(path.name for path in output.iterdir()) == drawn
    assert "left out training: it needs runs of grpo.py" in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--trace=FILE, --results=FOLDERS or --runs=FOLDERS"),
        (["--trace=x.json", "--runs=x"], "leave out --results and --runs"),
        (["--results={place}/nowhere"], "nowhere holds no eval.json"),
        (["--runs={place}/nowhere"], "nowhere"),
        (["--results={place}/good,{place}/other"], "different problems"),
        (["--results={place}/good", "--runs={place}/good"], "metrics.jsonl"),
        (["--results={place}/good", "--output={place}/good/eval.json"], "eval.json"),
    ],
)
def test_a_bad_command_is_one_sentence_and_writes_nothing(command: Callable, tmp_path, arguments, words):
    write(tmp_path / "good", entry())
    write(tmp_path / "other", entry(problem_set="other"))
    arguments = [argument.format(place=tmp_path) for argument in arguments]
    if not any(argument.startswith("--output") for argument in arguments):
        arguments.append(f"--output={tmp_path / 'out'}")
    ended = command(figures, *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert words in ended.err and not (tmp_path / "out").exists()

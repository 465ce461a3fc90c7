"""Runs of the older format: named as such, converted to the same meaning, and left alone once they are new."""

import json
import pathlib
import shutil

import pytest

from harness import migrate
from harness.cli import UsageError
from harness.results import read
from harness.workdir import read_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
OLD = {
    "name": "grpo-apr",
    "seed": 0,
    "model": {"width": 8, "temperature": 0.5},
    "train": {"log_every": 40, "eval_every": 1000},
    "prompt": {"sub_calls": 5, "tokens": -1},
    "demonstrator": {"method": "apr", "condition": 0.5, "beam_low": 1},
    "threads": {"join": "path", "inherit": False},
    "limits": {"children": 16, "answer_tokens": 0, "extensions": 2},
    "sampler": {"rows": 8, "lanes": 2, "burst": 32, "bucket": 64, "view": 2048, "temperature": 1.0},
    "grpo": {"temperature": 0.5, "importance_cap": 0.0, "eval_every": 25},
}
NEW = {
    "name": "grpo-apr",
    "seed": 0,
    "model": {"width": 8},
    "train": {"log_every": 1, "eval_every": 25},
    "budget": {"children": 5, "tokens": -1},
    "demonstrator": {"method": "apr", "budget_fraction": 0.5, "beam_low": 1, "beam_low_without_budget": 1},
    "threads": {"child_returns": "path", "inherit_context": False},
    "limits": {"children": 16, "forced_answer_tokens": 0, "min_budget_rounds": 2},
    "sampler": {
        "rows": 8, "workers": 2, "steps_per_call": 32, "length_bucket": 64, "max_gathered_slots": 2048, "temperature": 0.5,
    },
    "grpo": {"temperature": 0.5, "tis_cap": 0.0},
    "task": "countdown",
}
RESULT = {"numbers": [1, 2, 3], "target": 6, "sample": 0, "correct": True, "reason": "", "answer": ["1+2=3"], "failure": ""}
RESULT |= dict.fromkeys(("total_tokens", "sequential_tokens", "longest_context", "children", "width", "depth"), 1)
RESULT |= dict.fromkeys(("truncated", "malformed", "milliseconds"), 0.0)
ENTRY = {
    "label": "apr", "method": "apr", "budget": "5 threads asked, sent on 2 times", "temperature": 0.0,
    "asked": {"sub_calls": 5, "tokens": -1, "children": 16, "answer_tokens": 0, "extensions": 2},
    "threads": {"join": "path", "inherit": False}, "sampling": {"top_k": 0, "top_p": 1.0}, "context": 512,
    "concurrent": 0, "n": 1, "samples": 1, "correct": 1, "accuracy": 1.0, "interval": [0.2, 1.0], "total_tokens": 1.0,
    "sequential_tokens": 1.0, "children": 1.0, "longest_context": 1.0, "milliseconds": 1.0, "truncated": 0.0,
    "malformed": 0.0, "throughput_ms": 1.0, "pass": {"1": [1.0, 0.2, 1.0]}, "cons": {"1": [1.0, 0.2, 1.0]}, "kept": None,
    "failures": {}, "windows": {}, "demonstrator": 0.5, "family": {}, "training_seed": 0, "seed": 0, "checkpoint": 1,
    "parameters": "01", "problem_set": "02", "results": [RESULT],
}


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    (tmp_path / "eval.json").write_text(json.dumps([ENTRY]))
    lines = [{"step": 1, "loss": 2.0, "accuracy": 0.5}, {"step": 1, "heldout_accuracy": 0.25}, {"step": 2, "mismatch_child": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_an_old_run_is_named_as_such_with_the_command_that_converts_it(run):
    with pytest.raises(UsageError, match="older format: convert it with `python -m harness.migrate .*`") as caught:
        read_config(run)
    assert "\n" not in str(caught.value)


def test_a_run_is_converted_once(run, capsys):
    assert migrate.main([str(run)]) == 0
    assert read_config(run) == NEW
    (evaluation,) = read((run / "eval.json").read_bytes(), "eval.json")
    assert evaluation.budget == "5 children requested, forced to continue 2 times"
    assert evaluation.requested == {"children": 5, "tokens": -1}
    assert evaluation.limits == {"children": 16, "forced_answer_tokens": 0, "min_budget_rounds": 2}
    assert evaluation.results[0].problem == {"numbers": [1, 2, 3], "target": 6}
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2.0, "token_accuracy": 0.5},
        {"step": 1, "validation_accuracy": 0.25},
        {"step": 2, "sampler_trainer_gap_child": 0.1},
    ]
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert migrate.main([str(run)]) == 0
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: converted metrics.jsonl, eval.json, config.json",
        f"{run}: nothing to convert",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n'),
        *((name, text) for name in ("config.json", "eval.json") for text in ("5", "[1]", '{"model": 5}', "[" * 9999, "{")),
    ],
)
def test_what_is_damaged_is_refused_and_left_as_it_is(run, capsys, name, text):
    (run / name).write_text(text)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert migrate.main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run}: ") and err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.name != ".lock"} == before


def test_a_last_line_that_a_kill_cut_goes(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "metrics.jsonl" in migrate.migrate(run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_exported_model_stays_as_it_is(tmp_path):
    shutil.copytree(ROOT / "pretrained" / "apr", tmp_path / "apr")
    before = {file.name: file.read_bytes() for file in (tmp_path / "apr").iterdir()}
    assert migrate.migrate(tmp_path / "apr") == []
    assert {file.name: file.read_bytes() for file in (tmp_path / "apr").iterdir()} == before


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, capsys):
    assert migrate.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: ")


@pytest.mark.parametrize("path", sorted(ROOT.glob("pretrained/*/config.json")), ids=lambda path: path.parent.name)
def test_shipped_runs_are_of_the_new_format(path):
    assert read_config(path.parent)["task"] == "countdown"

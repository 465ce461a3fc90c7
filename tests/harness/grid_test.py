"""Grids of trainings: how flags expand, what is run again, what a failure stops, and the table."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from harness import grid, results

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ("--config=configs/apr.py:smoke", "--config.seed=0,1", "--config.model.width=32,64")
NAMES = ["seed=0,model.width=32", "seed=0,model.width=64", "seed=1,model.width=32", "seed=1,model.width=64"]


class Runner:
    """Ends every run with an accuracy of its own, except those that are to fail."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.ran = failing, []

    def __call__(self, command: str, run: grid.Run, output: pathlib.Path) -> str:
        self.ran.append(run.name)
        if run.name in self.failing:
            return "status 2: error: no"
        result = {"accuracy": len(self.ran) / 10, "interval": [0.05, 0.5], "children": 2.0}
        stored = results.signed({"command": command, "flags": list(run.flags), "result": result})
        (output / f"{run.name}.json").write_text(json.dumps(stored))
        return ""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(grid, "draw", lambda *_: b"")


def test_flags_with_commas_are_the_axes():
    runs = grid.expand(FLAGS)
    assert [run.name for run in runs] == NAMES
    assert runs[1].flags == ("--config=configs/apr.py:smoke", "--config.seed=0", "--config.model.width=64")
    assert [run.name for run in grid.expand(FLAGS[:1])] == ["only"]


def test_commas_in_brackets_are_no_axes():
    (one, two) = grid.expand(["--config.x=(1,2),[3,(4,5)]"])
    assert [run.values["config.x"] for run in (one, two)] == ["(1,2)", "[3,(4,5)]"]
    assert two.name == "x=_3,_4,5__"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed"], "--seed: flags are written"),
        (["--a=1", "--a=2"], "each once"),
        (["--a=1,1"], "names a value twice"),
    ],
)
def test_what_is_no_grid_is_refused(flags, words, tmp_path, capsys):
    assert grid.main([f"--output={tmp_path / 'no'}", *flags], Runner()) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_grid_runs_in_order_and_a_failure_stops_nothing(tmp_path, capsys):
    runner = Runner(NAMES[1])
    assert grid.main([f"--output={tmp_path}", *FLAGS], runner) == 1
    assert runner.ran == NAMES
    printed = capsys.readouterr()
    assert f"failed: {NAMES[1]}: status 2: error: no" in printed.err
    assert json.loads(printed.out.splitlines()[-1]) == {
        "runs": 4,
        "ended": 3,
        "failed": [NAMES[1]],
        "output": str(tmp_path),
    }
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| config.seed | config.model.width | accuracy |")
    assert lines[2] == "| 0 | 32 | 0.1 | 2 |  |  | 0.050-0.500 | ended |"
    assert lines[3] == "| 0 | 64 |  |  |  |  |  | failed, status 2: error: no |"


def test_a_grid_goes_on_where_it_stopped(tmp_path):
    grid.main([f"--output={tmp_path}", *FLAGS], Runner(NAMES[2]))
    again = Runner()
    assert grid.main([f"--output={tmp_path}", *FLAGS], again) == 0
    assert again.ran == [NAMES[2]]


def test_an_index_takes_one_run(tmp_path, capsys):
    runner = Runner()
    assert grid.main([f"--output={tmp_path}", "--index=3", *FLAGS], runner) == 0
    assert runner.ran == [NAMES[3]]
    assert (tmp_path / "table.md").read_text().count("not run yet") == 3
    assert grid.main([f"--output={tmp_path}", "--index=4", *FLAGS], runner) == 2
    assert "--index=4 must be from 0 to 3: the grid has 4 runs" in capsys.readouterr().err


def test_results_of_another_grid_are_refused(tmp_path, capsys):
    grid.main([f"--output={tmp_path}", *FLAGS], Runner())
    runner = Runner()
    assert grid.main([f"--output={tmp_path}", *FLAGS, "--config.train.rows=2"], runner) == 2
    assert "is of another grid (--config.train.rows=2): choose another --output" in capsys.readouterr().err
    assert runner.ran == []


SCRIPT = """
import json, pathlib, sys
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
pathlib.Path(flags["workdir"]).mkdir(exist_ok=True)
print("working")
if flags["config.seed"] == "1":
    sys.exit("error: seed 1 is unlucky")
print("no JSON" if flags["config.seed"] == "2" else json.dumps({"accuracy": 0.5}))
"""


def test_runs_are_processes_with_a_workdir_and_a_log(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    output = tmp_path / "out"
    assert grid.main([f"--output={output}", f"--command={script}", "--config.seed=0,1,2"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["seed=1", "seed=2"]
    stored = {"command": str(script), "flags": ["--config.seed=0"], "result": {"accuracy": 0.5}}
    assert json.loads((output / "seed=0.json").read_text()) == results.signed(stored)
    assert (output / "seed=0").is_dir() and (output / "seed=0.log").read_text().startswith("working")
    text = (output / "table.md").read_text()
    assert "status 1: error: seed 1 is unlucky" in text and "its last line is no JSON object: no JSON" in text


def test_runs_of_another_command_are_not_taken_for_these(tmp_path, capsys):
    grid.main([f"--output={tmp_path}", *FLAGS], Runner())
    runner = Runner()
    assert grid.main([f"--output={tmp_path}", "--command=grpo.py", *FLAGS], runner) == 2 and runner.ran == []
    assert "is of another grid (grpo.py, sft.py): choose another --output" in capsys.readouterr().err


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.undo()
    grid.main([f"--output={tmp_path}", *FLAGS], Runner(NAMES[0]))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "[null]", "[" * 20_000, '{"flags": [], "result": {}}'])
def test_a_damaged_file_of_a_run_is_named_with_the_remedy(text, tmp_path, capsys):
    grid.main([f"--output={tmp_path}", *FLAGS], Runner())
    (tmp_path / f"{NAMES[1]}.json").write_text(text)
    runner = Runner()
    assert grid.main([f"--output={tmp_path}", *FLAGS], runner) == 2 and runner.ran == []
    told = capsys.readouterr().err
    assert f"{NAMES[1]}.json" in told and told.endswith("remove it, and its run is evaluated again\n") and told.count("\n") == 1


WAITING = """
import pathlib, sys, time
from harness.cli import signals_noted
folder = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
folder.mkdir()
with signals_noted() as noted:
    (folder / "started").write_text("")
    while not noted:
        time.sleep(0.05)
    time.sleep(0.5)
    (folder / "saved").write_text("state")
sys.exit(128 + noted[0])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [False, True], ids=["alone", "all"])
def test_a_signal_lets_the_run_save_its_state(number, to_all, tmp_path, environment):
    """Whether it reaches the grid alone, or as from a terminal or a scheduler the run as well."""
    (tmp_path / "train.py").write_text(WAITING)
    command = [sys.executable, "-m", "harness.grid", f"--output={tmp_path / 'out'}", f"--command={tmp_path / 'train.py'}"]
    env = environment | {"PYTHONPATH": str(ROOT)}
    how = dict(cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([*command, "--config.seed=0"], **how)
    while not (tmp_path / "out" / "only" / "started").exists():
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "stopped: run the same command again to go on\n"
    assert (tmp_path / "out" / "only" / "saved").exists()

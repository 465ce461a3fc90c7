"""Commands killed at random moments and run again: the same bits as a run that nothing stopped (slow tier).

`KILLS=3 python -m pytest -m slow tests/kill_test.py` kills three times where the default is 20.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import typing

import jax
import numpy as np
import pytest

from harness.checkpoints import Checkpoints
from tests import FAST

ROOT = pathlib.Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("KILLS", "20"))
SMALL = [f"--config.{field}" for field in ("model.layers=1", "sampler.length_bucket=512", "evaluation.problems=4", "train.eval_problems=4")]
SFT = ["sft.py", "--config=configs/apr.py:smoke", *SMALL, "--config.train.eval_every=2"]
TIMES = ("seconds", "per_second", "milliseconds", "throughput_ms", "checksum")  # which is of the times too
SWEEP = """
import ml_collections
def get_config():
    grid = {{"budget.children": (-1, 1, 2, 3), "evaluation.problems": (3,)}}
    return ml_collections.ConfigDict(dict(name="tiny", entries=[dict(label="APR", workdir={workdir!r}, grid=grid)]))
"""


def grpo(start: pathlib.Path) -> list[str]:
    fields = ("grpo.steps=6", "limits.thread_tokens=24", "evaluation.problems=4", "train.eval_problems=4", "grpo.thread_penalty=0.01")
    return ["grpo.py", "--config=configs/grpo.py:smoke", f"--init={start}", *(f"--config.{field}" for field in fields)]


def started(arguments: list[str], environment: dict[str, str], devices: int = 1) -> subprocess.Popen:
    env = environment | {"XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count={devices}"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def finished(arguments: list[str], environment: dict[str, str], devices: int = 1) -> float:
    """Runs a command to its end; returns how long it took."""
    began = time.monotonic()
    process = started(arguments, environment, devices)
    _, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    return time.monotonic() - began


def untimed(value: typing.Any) -> typing.Any:
    """A JSON value without what a clock measured."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if not any(word in name for word in TIMES)}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def left(path: pathlib.Path) -> dict[str, typing.Any]:
    """All that a run or a sweep left, without times: arrays as bytes."""
    found: dict[str, typing.Any] = {}
    for name in ("checkpoints", "best"):
        store = Checkpoints(path / name, *(("state", "extra") if name == "checkpoints" else ("params", "result")))
        for step in store.steps()[-1:]:
            like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), store.shapes(step))
            tree, values = store.load(step, like)
            found[f"{name}/{step}"] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)], values
    for file in sorted((*path.rglob("eval.json"), *path.rglob("metrics.jsonl"))):
        values = [json.loads(line) for line in file.read_text().splitlines()] if file.suffix == ".jsonl" else json.loads(file.read_text())
        found[str(file.relative_to(path))] = untimed(values)
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory, environment) -> pathlib.Path:
    """A short supervised run, with a compilation cache that is warm then."""
    path = tmp_path_factory.mktemp("start") / "run"
    finished([*SFT, f"--workdir={path}", "--config.optimizer.steps=6"], environment)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", ["sft", "grpo", "sweep"])
def test_killed_at_random_moments_is_uninterrupted_bit_for_bit(name, devices, start, tmp_path, environment):
    (tmp_path / "sweep.py").write_text(SWEEP.format(workdir=str(start)))
    command = {"sft": SFT, "grpo": grpo(start), "sweep": ["evaluate.py", f"--sweep={tmp_path / 'sweep.py'}"]}[name]
    place = "output" if name == "sweep" else "workdir"
    finished([*command, f"--{place}={tmp_path / 'warm'}"], environment, devices)  # compiles
    whole = finished([*command, f"--{place}={tmp_path / 'whole'}"], environment, devices)
    expected, rng, runs, kills = left(tmp_path / "whole"), random.Random(f"{name} {devices}"), 0, 0
    while kills < KILLS:
        runs += 1
        arguments = [*command, f"--{place}={tmp_path / f'run{runs}'}"]
        for _ in range(KILLS):
            process = started(arguments, environment, devices)
            try:
                process.communicate(timeout=rng.uniform(0.2, 1) * whole)
                break  # it came to its end
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        finished(arguments, environment, devices)
        assert left(tmp_path / f"run{runs}") == expected


def waits_for(process: subprocess.Popen, word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"it never said {word!r}: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_signals_save_and_say_how_to_go_on_and_a_second_run_is_refused(stage, start, tmp_path, environment):
    """Stopped by SIGTERM on one device and by Ctrl-C on four, then run to the end on one."""
    long = {"sft": [*SFT, "--config.optimizer.steps=100"], "grpo": [*grpo(start), "--config.grpo.steps=100"]}[stage]
    arguments, word = [*long, f"--workdir={tmp_path / 'run'}"], {"sft": "loss", "grpo": "reward"}[stage]
    for number, devices in ((signal.SIGTERM, 1), (signal.SIGINT, 4)):
        process = started(arguments, environment, devices)
        waits_for(process, word)
        if number == signal.SIGTERM:
            second = started(arguments, environment)
            _, err = second.communicate(timeout=600)
            assert second.returncode == 2 and err.count("\n") == 1 and "is in use by another run" in err, err
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 128 + number, err
        assert "Traceback" not in err and "which is saved: run the same command again to go on" in err
    finished(arguments, environment)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if word in line]
    assert steps == [*range(1, 101)]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, environment):
    """On a file system of eight megabytes, which root alone can make."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        arguments = [*SFT, f"--workdir={tmp_path / 'run'}", "--config.optimizer.steps=40"]
        process = started(arguments, environment)
        waits_for(process, "step 3/")
        with (tmp_path / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(512))
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2 and err.count("\n") == 1 and "run the same command again" in err, err
        (tmp_path / "filler").unlink()
        finished(arguments, environment)
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "loss" in line]
        assert steps == [*range(1, 41)]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)

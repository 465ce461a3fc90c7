"""Two processes are one: the same losses, the same best parameters, the same rollouts in problem order."""

import functools
import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from harness.build import build
from harness.workdir import load_best, read_config
from tests import FAST

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = [
    "--config=configs/apr.py:smoke",
    "--config.model.layers=1",
    "--config.sampler.rows=4",
    "--config.sampler.length_bucket=512",
    "--config.optimizer.steps=4",
    "--config.optimizer.warmup_steps=1",
    "--config.train.eval_every=2",
    "--config.evaluation.problems=7",  # an odd number: the shares differ
]


def start(path: pathlib.Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
    """A training of four steps on the host devices that `environment` gives it."""
    command = [sys.executable, "sft.py", *SHORT, f"--workdir={path}", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment) -> list[tuple[pathlib.Path, list[str]]]:
    """(workdir, what each process printed) of one process with two devices, and of two with one each."""
    root = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    two = {**environment, "XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count=2"}
    groups = {
        "one": [start(root / "one", two)],
        "two": [start(root / "two", environment, f"--distributed=localhost:{port},2,{i}") for i in range(2)],
    }
    result = []
    for name, processes in groups.items():
        ended = [process.communicate(timeout=600) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), ended[-1][1]
        result.append((root / name, [out for out, _ in ended]))
    return result


def test_only_the_first_process_prints(runs):
    _, (first, second) = runs[1]
    assert json.loads(first.splitlines()[-1])["n"] == 7
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []


def test_two_processes_train_alike(runs):
    logs = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path, _ in runs]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 2, 3, 4, 4]
    for name in ("loss", "token_accuracy", "grad_norm", "validation_accuracy", "validation_children"):
        one, two = ([line[name] for line in log if name in line] for log in logs)
        np.testing.assert_allclose(one, two, rtol=1e-4)


def test_two_processes_save_the_same_parameters(runs):
    (one, _), (two, _) = [load_best(path, shapes(path)) for path, _ in runs]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), one, two)


def shapes(path: pathlib.Path):
    """Of the parameters of a run."""
    config = ConfigDict(read_config(path))
    config.mesh.data = 1
    return build(config).param_shapes()


def test_rollouts_are_gathered_in_problem_order(runs):
    ((one,), (two,)) = [json.loads((path / "eval.json").read_text()) for path, _ in runs]
    wall_clock = {"milliseconds", "throughput_ms"}
    assert len(one["results"]) == 7
    for left, right in zip(one["results"], two["results"], strict=True):
        for name in left.keys() - wall_clock:
            assert left[name] == right[name]


# ------------------------------------------------------------------- reinforcement learning


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory, environment, smoke_run) -> list[list[dict]]:
    """The logs of two GRPO steps in one process with two devices, and in two processes with one each."""
    root = tmp_path_factory.mktemp("reinforced")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    short = ["--config=configs/grpo.py:smoke", f"--init={smoke_run.path}", "--config.limits.thread_tokens=24"]
    short += ["--config.evaluation.problems=4", "--config.train.eval_problems=4", "--config.grpo.thread_penalty=0.01"]
    short += ["--config.grpo.token_penalty=0.01", "--config.grpo.free_tokens=10.0"]  # else all rewards are alike
    two = {**environment, "XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count=2"}
    started = {
        "one": [(two, [])],
        "two": [(environment, [f"--distributed=localhost:{port},2,{i}"]) for i in range(2)],
    }
    logs = []
    for name, processes in started.items():
        command = [sys.executable, "grpo.py", *short, f"--workdir={root / name}"]
        pipe = subprocess.PIPE
        running = [
            subprocess.Popen([*command, *more], cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)
            for env, more in processes
        ]
        ended = [process.communicate(timeout=900) for process in running]
        assert [process.returncode for process in running] == [0] * len(running), ended[-1][1]
        logs.append([json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()])
    return logs


def test_two_processes_reinforce_alike(reinforced):
    """The same rollouts, rewards and losses: each process runs half of the rollouts, and all train on all of them."""
    one, two = reinforced
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 1, 2, 2]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"milliseconds"}:
            if "seconds" not in name and "gap" not in name:
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name

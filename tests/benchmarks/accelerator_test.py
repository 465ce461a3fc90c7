"""The measuring command: its flags, its limits, what it leaves behind, and its float64 reference."""

import argparse
import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import accelerator, reference, sections
from model import Decoder, ModelConfig


@pytest.fixture
def without_device(monkeypatch):
    monkeypatch.setitem(accelerator.SECTIONS, "device", {})


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--sections=feeding,tarin", "there is no section tarin, choose from feeding,check,train,decode,sft,grpo"),
        ("--minutes=0", "must be above 0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(argument, words, capsys):
    with pytest.raises(SystemExit) as ended:
        accelerator.parse([argument])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_all_sections_are_the_default_and_fit_eight_minutes():
    assert accelerator.parse([]).sections == "feeding,check,train,decode,sft,grpo"
    parts = [part for section in accelerator.SECTIONS.values() for part in section]
    assert all(callable(getattr(sections, part)) for part in parts)
    assert sum(minutes for section in accelerator.SECTIONS.values() for minutes in section.values()) <= 8


def test_feeding_by_the_command(tmp_path, without_device, capsys):
    assert accelerator.main(["--preset=smoke", "--sections=feeding", "--minutes=24", f"--output={tmp_path}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "all.json").read_text())
    assert last["feeding"] == json.loads((tmp_path / "feeding.json").read_text())
    for method in ("apr", "sosp", "sos"):
        figures = last["feeding"][f"smoke {method}"]
        assert figures["workers"] == 1 and figures["tokens_per_s"] > 0 and 0.9 < figures["used"] <= 1


def test_a_section_that_fails_or_is_too_slow_says_so_and_stops_no_other(tmp_path, without_device, monkeypatch, capsys):
    monkeypatch.setitem(accelerator.SECTIONS, "feeding", {"feeding": 30.0})
    monkeypatch.setitem(accelerator.SECTIONS, "train", {"train": 0.001})
    assert accelerator.main(["--preset=none", "--sections=feeding,train", f"--output={tmp_path}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["feeding"]["feeding_failed"] == f"with status 1: see {tmp_path / 'feeding.log'}"
    assert "unknown preset 'none'" in (tmp_path / "feeding.log").read_text()
    assert last["train"]["train_stopped"].startswith("after 0 s, its limit")


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_the_decoder(tied):
    """With a rewind, a second segment and padding; grouped heads."""
    config = ModelConfig(13, 16, 2, 4, 2, 8, 24, 16, 1e4, tied, "float32")
    until = np.array([[9] * 4 + [6] * 2 + [9] * 3 + [14] * 5 + [15, 16]])
    tokens = np.random.default_rng(0).integers(0, 13, until.shape)
    positions = np.array([[*range(4), 4, 5, 4, 5, 6, *range(5), 0, 0]])
    params = jax.jit(Decoder(config).init)(jax.random.key(0), tokens, positions, until)["params"]
    ours = jax.jit(Decoder(config).apply)({"params": params}, tokens, positions, until)[0]
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        exact = reference.logits(reference.double(params), config, tokens, positions, until)
        assert exact.dtype == np.float64
    np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_updates_fill_a_part_of_the_time_by_the_measured_step(tmp_path):
    args = argparse.Namespace(preset="gpu", limit=84.0, output=str(tmp_path))
    assert sections.sft_steps(args) == 300  # nothing measured
    pathlib.Path(tmp_path / "train.json").write_text(
        json.dumps({"gpu blocks": {"step_ms": 168.0}, "train_seconds": 9.0})
    )
    assert sections.sft_steps(args) == 200


@pytest.mark.slow
def test_a_cpu_runs_it_all_at_smoke_size(tmp_path, capsys):
    assert accelerator.main(["--preset=smoke", "--minutes=400", f"--output={tmp_path}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["device", "feeding", "check", "train", "decode", "sft", "grpo"]
    assert not [name for found in last.values() for name in found if name.endswith(("_failed", "_stopped"))]
    check = last["check"]
    assert check["blocks float32"]["logprob_gap"] < 1e-4 and check["pallas float32"]["gradient_gap"] < 1e-4
    assert check["spawn and join float32"]["agree"] == 1.0 and check["spawn and join float32"]["children"] > 0
    assert last["decode"]["compiled"] > 0 and last["decode"]["alone"]["milliseconds"] > 0
    assert last["sft"]["exported"]["files"] > 0 and (tmp_path / "apr-exported").is_dir()
    assert last["grpo"]["start"] == str(tmp_path / "apr-exported") and len(last["grpo"]["steps"]) == 2

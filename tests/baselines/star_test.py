"""STaR: what is kept, in which order it is trained on, what its file holds, and a small run that resumes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import types

import pytest
from ml_collections import ConfigDict

from baselines import star
from configs import apr
from countdown.domain import CountdownDomain
from countdown.grader import Problem
from harness.cli import UsageError
from harness.workdir import PRETRAINED
from records import END, SPAWN, Call, Grade, Rollout, Thread


class Ones:
    """Id 1 is an explored operation, every other id some other line."""

    vocab_size = 8

    @staticmethod
    def decode(ids) -> str:
        return "".join("Exploring Operation: 1+1=2\n" if one == 1 else "Moving to Node #0\n" for one in ids)


def rollout(explored: int, correct: bool = True, inherited: int = 0) -> Rollout:
    """A parent that explores once, and a child that explores the rest. The child was given `inherited` lines."""
    child = Thread((0, 0), [Call(0, [1] * inherited, [1] * (explored - 1) + [2], stop=END)])
    root = Thread((), [Call(0, [2], [1, 3], stop=SPAWN), Call(2, [4], [2], stop=END)], [[child]])
    return Rollout(explored, root, Grade(correct, ""))


def test_the_rating_counts_the_operations_that_all_threads_sampled():
    assert star.rating(rollout(1), Ones) == 1 - 2 / 1152
    assert star.rating(rollout(10, inherited=5), Ones) == 1 - 11 / 1152
    assert star.rating(rollout(1151), Ones) == star.rating(rollout(2000), Ones) == 0
    assert star.rating(rollout(10, correct=False), Ones) == 0
    three = dataclasses.replace(rollout(11), problem=Problem((2, 5, 7), 17))
    assert star.rating(three, Ones) == 1 - 12 / 48


@pytest.mark.parametrize(
    ("quantile", "kept"), [(0.0, [40, 10, 30, 20, 10]), (0.5, [10, 20, 10]), (0.75, [10, 10]), (1.0, [10, 10])]
)
def test_right_rollouts_from_a_quantile_of_their_ratings_on_are_kept(quantile, kept):
    """Of ratings of 40, 30, 20, 10 and 10 operations, in rising order: the first, the third, the fourth, the last."""
    rollouts = [rollout(n, correct) for n, correct in ((40, True), (1, False), (10, True), (30, True), (20, True), (10, True))]
    assert [one.problem for one in star.keep(rollouts, Ones, quantile)] == kept
    assert star.keep(rollouts[1:2], Ones, quantile) == []


def test_a_pass_trains_on_every_kept_rollout_once_and_seed_and_index_fix_the_order():
    rollouts = [rollout(n) for n in range(1, 9)]
    task = object()
    domain = star.Kept(types.SimpleNamespace(task=task), rollouts)
    drawn = [domain.demonstration("train", 3, index).problem for index in range(24)]
    passes = [drawn[:8], drawn[8:16], drawn[16:]]
    assert all(sorted(one) == list(range(1, 9)) for one in passes) and passes[0] != passes[1]
    other = star.Kept(types.SimpleNamespace(), rollouts)
    assert [other.demonstration("train", 3, index).problem for index in reversed(range(24))] == drawn[::-1]
    assert [other.demonstration("train", 4, index).problem for index in range(24)] != drawn
    domain.demonstration("train", 3, 0).root.calls.clear()  # as training may
    assert domain.demonstration("train", 3, 0).root.calls and domain.task is task


def test_the_file_gives_back_what_was_written(tmp_path):
    domain = CountdownDomain(apr.get_config("smoke"))
    rollouts = [domain.demonstration("train", 0, index) for index in range(8)]
    assert any(one.root.spawns for one in rollouts)
    for name in ("once", "twice"):
        star.write(tmp_path / name, rollouts, domain)
    assert star.read(tmp_path / "once", domain) == rollouts
    data = (tmp_path / "once").read_bytes()
    assert data == (tmp_path / "twice").read_bytes()
    flipped = [data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :] for place in range(len(data) // 2, len(data), 97)]
    for damaged in (b"", data[: len(data) // 2], gzip.compress(b""), gzip.compress(b"5\n"), *flipped):
        (tmp_path / "once").write_bytes(damaged)
        with pytest.raises(UsageError, match="cannot be read .*: remove its round"):
            star.read(tmp_path / "once", domain)


def test_a_round_without_a_right_rollout_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    domain = types.SimpleNamespace(language=Ones)
    parts = types.SimpleNamespace(domain=domain, config=types.SimpleNamespace(star=ConfigDict({"quantile": 0.0})))
    monkeypatch.setattr(star, "sample", lambda *_: [rollout(3, correct=False)] * 5)
    with pytest.raises(UsageError, match="round 2 has no right rollout in 5: raise --samples"):
        star.kept_rollouts(parts, tmp_path, None, 2)
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_no_run_is_named(tmp_path, command):
    ended = command(star, f"--start={tmp_path / 'none'}", f"--workdir={tmp_path / 'star'}")
    assert ended.status == 2 and "holds no run" in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "star").exists()


@pytest.mark.slow
def test_two_rounds_from_the_shipped_run_and_the_same_command_again(tmp_path, command, monkeypatch):
    """The second time nothing is sampled or trained: the report is the same."""
    original = star.read_config

    def small(path: str) -> dict:
        config = original(path)
        config["train"]["eval_problems"], config["evaluation"]["problems"] = 16, 16
        config["train"]["rows"] = 8  # a row for each device of the tests
        return config

    monkeypatch.setattr(star, "read_config", small)
    flags = [f"--start={PRETRAINED}", f"--workdir={tmp_path}", "--rounds=2", "--samples=32", "--steps=3"]
    ended = command(star, *flags)
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-1", "round-2"]
    monkeypatch.setattr(star, "sample", lambda *_: pytest.fail("sampled again"))
    again = command(star, *flags)
    first, second = (json.loads(one.out.splitlines()[-1]) for one in (ended, again))
    assert again.status == 0 and first["n"] == 16 and first["accuracy"] == second["accuracy"]
    assert first["parameters"] == second["parameters"] and pathlib.Path(tmp_path / "round-2" / "eval.json").exists()

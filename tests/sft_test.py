"""Supervised training: what is trained on, exact resume, the loss, and the whole command."""

import collections
import itertools
import json
import math
import os
import pathlib
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import packing
import records
import sft
import solver
from configs import apr
from countdown.language import Tokenizer
from harness.build import Parts, build
from harness.cli import Stopped, UsageError
from harness.replay import replay
from harness.rollouts import RolloutPool
from harness.workdir import Workdir, load_best, read_config
from packing import TokenBatch
from records import Call, Rollout
from train_state import TokenStats, TrainState, state_from_key

CONTEXT = 384
WALL_CLOCK = {"tokens_per_second", "validation_seconds"}
HEADLINE = {"method", "n", "correct", "accuracy", "interval", "total_tokens", "sequential_tokens", "children"}
HEADLINE |= {"milliseconds", "seed", "checkpoint", "demonstrator"}


def tiny_config(**changes: int | float | str) -> ConfigDict:
    """Smoke on one device and with four numbers, so that threads join twice and overrun; `model__width=8` sets one."""
    config = apr.get_config("smoke")
    small = {
        "mesh.data": 1,
        "problems.count": 4,
        "demonstrator.prune": False,
        "demonstrator.heuristic": "paper",
        "demonstrator.cost_limit": -1,
        "optimizer.weight_decay": 0.01,
        "model.rope_theta": 10_000.0,
        "model.layers": 1,
        "model.context": CONTEXT,
        "train.rows": 3,
        "train.micro_rows": 1,
        "train.log_every": 3,
        "train.eval_every": 4,
        "train.eval_problems": 4,
        "sampler.rows": 4,
        "sampler.length_bucket": CONTEXT,
        "optimizer.steps": 9,
        "optimizer.warmup_steps": 2,
    }
    config.update_from_flattened_dict({**small, **{key.replace("__", "."): value for key, value in changes.items()}})
    return config


# ------------------------------------------------------------------- the command


def test_the_command_trains_evaluates_and_ends_with_one_json_line(smoke_run):
    assert smoke_run.ended.status == 0, smoke_run.ended.err
    summary = json.loads(smoke_run.ended.out.splitlines()[-1])
    assert summary.keys() >= HEADLINE
    assert (summary["method"], summary["n"], summary["checkpoint"]) == ("apr", 16, 20)
    assert summary["accuracy"] == summary["correct"] / 16
    assert "Traceback" not in smoke_run.ended.err


def test_the_command_shows_progress_in_plain_lines_off_a_terminal(smoke_run):
    lines = [line for line in smoke_run.ended.out.splitlines() if line.startswith("step 20/20")]
    assert len(lines) == 1
    for word in ("loss", "token accuracy", "tokens/s", "left"):
        assert word in lines[0]
    assert "\r" not in smoke_run.ended.out + smoke_run.ended.err


def test_the_command_leaves_a_complete_workdir(smoke_run):
    assert read_config(smoke_run.path) == json.loads(apr.get_config("smoke").to_json())
    assert list(smoke_run.path.glob("events.out.tfevents.*"))
    assert {path.name for path in (smoke_run.path / "checkpoints").iterdir()} == {"10", "20"}
    assert {path.name for path in (smoke_run.path / "best").iterdir()} == {"10", "20"}


def test_the_log_has_every_step_once_and_the_loss_falls(smoke_run):
    lines = [json.loads(line) for line in (smoke_run.path / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    vocabulary = Tokenizer(apr.get_config("smoke").number_limit).vocab_size
    assert [line["step"] for line in training] == list(range(1, 21))
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [10, 20]
    assert training[0]["loss"] == pytest.approx(math.log(vocabulary), abs=1)
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    assert all(line["sampled_tokens"] > 0 and 0 <= line["overlong"] <= 1 for line in training)


def test_eval_json_describes_the_evaluation_and_every_problem_in_order(smoke_run):
    (entry,) = json.loads((smoke_run.path / "eval.json").read_text())
    results = entry.pop("results")
    del entry["checksum"]
    assert entry == json.loads(smoke_run.ended.out.splitlines()[-1])
    config = apr.get_config("smoke")
    config.mesh.data = 1  # the same problems whatever the devices
    expected = build(config).test_set()
    assert [result["problem"] for result in results] == [
        {"numbers": list(problem.numbers), "target": problem.target} for problem in expected
    ]
    assert entry["correct"] == sum(result["correct"] for result in results)
    for name in ("total_tokens", "sequential_tokens", "children", "truncated"):
        assert entry[name] == pytest.approx(sum(result[name] for result in results) / 16)


# ------------------------------------------------------------------- loss


def test_the_loss_is_the_weighted_negative_log_likelihood():
    logp = jnp.asarray([[0.0, -1.0, -2.0, -0.5], [0.0, -4.0, -3.0, -9.0]])
    weight = np.asarray([[0, 0.25, 0.25, 0], [0, 0.5, 0, 0]], np.float32)
    fields = dict.fromkeys(TokenBatch._fields, np.zeros((2, 4), np.float32))
    batch = TokenBatch(**{**fields, "weight": weight})
    loss, extra = sft.sft_loss(TokenStats(logp, logp, logp > 0), batch)
    np.testing.assert_allclose(loss, [[0, 0.25, 0.5, 0], [0, 2.0, 0, 0]])  # sums to 2.75
    assert extra == {}


def test_the_mean_over_a_batch_is_over_sampled_ids_whatever_the_rows():
    """A model that gives every id the log-probability -7 has the loss 7, for 1 row and for 3."""
    for rows in (1, 3):
        batch = sft.DemonstrationStream(build(tiny_config(train__rows=rows))).next()
        logp = jnp.full(batch.tokens.shape, -7.0)
        loss, _ = sft.sft_loss(TokenStats(logp, logp, logp > 0), batch)
        assert float(loss.sum()) == pytest.approx(7.0, rel=1e-5)


# ------------------------------------------------------------------- what is trained on


def trained_runs(batch: TokenBatch) -> list[tuple[int, ...]]:
    """Maximal runs of ids with weight, row by row: prompts and joined messages part the calls of all threads."""
    runs = []
    rows = (field.reshape(-1, field.shape[-1]) for field in (batch.tokens, batch.weight))
    for tokens, weights in zip(*rows, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
        runs += [tuple(tokens[start:end].tolist()) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return runs


def demonstrated(config: ConfigDict, index: int) -> Rollout:
    """Demonstration `index`, made without the stream."""
    experiment = build(config)
    domain = experiment.domain
    return solver.demonstration(domain.family, domain.demonstrator, domain.task, "train", config.seed, index)


def pieces(rollout: Rollout, length: int) -> list[list[Call]]:
    """The calls of each segment: a thread's all in one if they fit a row side by side, else one by one.

    Where the context left no room to sample anything there is no segment.
    """
    result = []
    for thread in rollout.threads():
        fits = sum(len(call.injected) + len(call.sampled) for call in thread.calls) <= length
        result += [thread.calls] if fits else [[call] for call in thread.calls]
    return [calls for calls in result if any(call.sampled for call in calls)]


def calls_until(config: ConfigDict, cursor: dict) -> collections.Counter:
    """What demonstrations sampled before a cursor, each call's ids counted, without those that wait."""
    counted: collections.Counter = collections.Counter()
    for index in range(cursor["drawn"]):
        rollout = demonstrated(config, index)
        if records.longest_context(rollout.root) > config.model.context:
            if config.train.overlong == "drop":
                continue
            for thread in rollout.threads():
                packing.cut(thread, config.model.context)
        for number, calls in enumerate(pieces(rollout, config.model.context)):
            if [index, number] not in cursor["waiting"]:
                counted.update(tuple(call.sampled) for call in calls if call.sampled)
    return counted


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_exactly_the_sampled_ids_are_trained_on_each_once(overlong):
    config = tiny_config(train__overlong=overlong)
    stream = sft.DemonstrationStream(build(config))
    seen: collections.Counter = collections.Counter()
    for _ in range(12):
        seen.update(trained_runs(stream.next()))
    assert stream.drawn > 10 and stream.cursor["waiting"]
    expected = calls_until(config, stream.cursor)
    missing, extra = expected - seen, seen - expected
    assert (missing.total(), extra.total()) == (0, 0)


def test_some_demonstrations_here_spawn_join_and_overrun():
    """What the tests of this file see is worth testing."""
    rollouts = [demonstrated(tiny_config(), index) for index in range(400)]
    fitting = [r for r in rollouts if records.longest_context(r.root) <= CONTEXT]
    assert 0 < len(fitting) < len(rollouts)
    assert any(len(rollout.root.spawns) > 1 for rollout in fitting)
    assert any(len(calls) < len(r.root.calls) for r in fitting for calls in pieces(r, CONTEXT)[:1])


def test_the_weights_of_every_batch_sum_to_one():
    stream = sft.DemonstrationStream(build(tiny_config()))
    for _ in range(5):
        batch = stream.next()
        assert batch.weight.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(batch.weight > 0, batch.sampled)


def test_dropped_and_cut_demonstrations_are_counted():
    for overlong in ("drop", "cut"):
        stream = sft.DemonstrationStream(build(tiny_config(train__overlong=overlong)))
        for _ in range(4):
            stream.next()
        roots = [demonstrated(tiny_config(), index).root for index in range(stream.drawn)]
        assert stream.overlong == sum(records.longest_context(root) > CONTEXT for root in roots) > 0


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_a_cursor_is_all_it_takes_to_go_on(overlong):
    experiment = build(tiny_config(train__overlong=overlong))
    stream = sft.DemonstrationStream(experiment)
    batches, cursors = [], []
    for _ in range(8):
        cursors.append(stream.cursor)
        batches.append(stream.next())
    assert any(piece for _, piece in cursors[3]["waiting"]), "no batch of this stream ends within a demonstration"
    cursors = json.loads(json.dumps(cursors))  # as a checkpoint keeps them
    for start, cursor in enumerate(cursors):
        resumed = sft.DemonstrationStream(experiment, cursor)
        jax.tree.map(np.testing.assert_array_equal, resumed.next(), batches[start])
    again = sft.DemonstrationStream(experiment, cursors[2])
    for batch in batches[2:]:
        jax.tree.map(np.testing.assert_array_equal, again.next(), batch)


def test_other_seeds_give_other_demonstrations():
    first, second = (sft.DemonstrationStream(build(tiny_config(seed=seed))).next() for seed in (0, 1))
    assert (first.tokens != second.tokens).any()


def test_an_unknown_way_with_overlong_demonstrations_is_refused():
    with pytest.raises(ValueError, match=r"train\.overlong='squeeze' must be one of drop, cut"):
        sft.DemonstrationStream(build(tiny_config(train__overlong="squeeze")))


# ------------------------------------------------------------------- resume


class Killed(BaseException):
    """Stands for a signal: no handler of the program's catches it."""


def killed(*_: object) -> None:
    raise Killed


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


KILLS: dict[str, tuple[type, str, int, Callable]] = {  # the method that dies, at which call, and of what
    "step": (sft.DemonstrationStream, "next", 8, killed),  # seven steps done
    "save": (Workdir, "save", 2, killed),  # step 8 is validated, nothing of it is saved
    "best": (Workdir, "save_best", 1, killed),  # the first state is on disk, its parameters are not among the best
    "first": (sft.DemonstrationStream, "next", 4, killed),  # a line in the log, no checkpoint yet
    "signal": (sft.DemonstrationStream, "next", 5, told_to_stop),  # between two lines of the log
}


def train_until(experiment: Parts, workdir: Workdir, owner: type, name: str, call: int, end: Callable) -> BaseException:
    """Trains until call number `call` of a method, which ends the run; returns what it raised."""
    original, calls = getattr(owner, name), itertools.count(1)

    def ends(*given: object) -> object:
        if next(calls) == call:
            end()
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, ends)
        with pytest.raises((Killed, Stopped)) as ended:
            sft.train(RolloutPool(experiment), workdir)
    return ended.value


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, pathlib.Path]:
    """An uninterrupted run of 9 steps, and others killed here and there and resumed; checkpoints at 4, 8 and 9."""
    root, config = tmp_path_factory.mktemp("resume"), tiny_config()
    first, second = build(config), build(config)  # two processes
    sft.train(RolloutPool(first), Workdir(root / "whole", config))
    for name, kill in KILLS.items():
        train_until(first, Workdir(root / name, config), *kill)
        sft.train(RolloutPool(second), Workdir(root / name, config))
    return {path.name: path for path in root.iterdir()}


def final(path: pathlib.Path) -> tuple:
    """The last state of a run and what is saved with it."""
    experiment = build(tiny_config())
    like = state_from_key(experiment.model, experiment.optimizer, experiment.mesh, jax.random.key(1))
    restored = Workdir(path, tiny_config()).restore(like)
    assert restored is not None
    return restored


KILLED = pytest.mark.parametrize("name", KILLS)


@KILLED
def test_a_killed_run_resumes_to_the_same_bits(runs, name):
    (state, extra), (expected, expected_extra) = final(runs[name]), final(runs["whole"])
    assert int(state.step) == 9
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert extra["cursor"] == expected_extra["cursor"]
    assert extra["best"] == expected_extra["best"]


@KILLED
def test_a_killed_run_resumes_to_the_same_log(runs, name):
    def log(path: pathlib.Path) -> list[dict]:
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]

    assert {3, 6, 9} <= {line["step"] for line in log(runs["whole"]) if "loss" in line}
    assert log(runs[name]) == log(runs["whole"])


@KILLED
def test_a_killed_run_keeps_the_same_best_parameters(runs, name):
    shapes = build(tiny_config()).param_shapes()
    (params, result), (expected, expected_result) = load_best(runs[name], shapes), load_best(runs["whole"], shapes)
    assert result == expected_result
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_finished_run_is_not_trained_on(runs, monkeypatch):
    monkeypatch.setattr(sft.DemonstrationStream, "next", killed)
    before = (runs["whole"] / "metrics.jsonl").read_text()
    sft.train(RolloutPool(build(tiny_config())), Workdir(runs["whole"], tiny_config()))
    assert (runs["whole"] / "metrics.jsonl").read_text() == before


def test_a_signal_lets_the_step_end_and_saves_it(tmp_path):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before the runs
    config = tiny_config()
    stopped = train_until(build(config), Workdir(tmp_path, config), sft.DemonstrationStream, "next", 2, told_to_stop)
    assert isinstance(stopped, Stopped) and stopped.number == signal.SIGTERM
    assert str(stopped) == "stopped after step 2, which is saved"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2"}


@pytest.mark.parametrize("log_every", [3, 8])
def test_a_number_that_is_none_stops_the_run_at_its_step_and_the_remedy_works_there(tmp_path, monkeypatch, capsys, log_every):
    """Whether the log is due or not; the checkpoint of step 4 stays, and step 6 can be looked at alone."""
    config = tiny_config(train__log_every=log_every)
    pool, path = RolloutPool(build(config)), tmp_path / "run"
    original, calls = sft.DemonstrationStream.next, itertools.count(1)

    def poisoned(stream: sft.DemonstrationStream) -> TokenBatch:
        batch = original(stream)
        return batch._replace(weight=batch.weight * np.nan) if next(calls) == 6 else batch

    with monkeypatch.context() as patch:
        patch.setattr(sft.DemonstrationStream, "next", poisoned)
        with pytest.raises(UsageError, match=r"not finite at step 6: grad_norm, loss.*--replay.*learning_rate"):
            sft.train(pool, Workdir(path, config))
    assert {file.name for file in (path / "checkpoints").iterdir()} == {file.name for file in (path / "best").iterdir()} == {"4"}
    capsys.readouterr()
    replay(pool.parts, Workdir(path, config), sft.Imitation(pool.parts))
    told = capsys.readouterr().out
    assert "mlp_0/down" in told and "gradient nan" in told and "not finite at step 6" in told
    *_, last = told.splitlines()
    assert math.isnan(json.loads(last)["loss"]) and json.loads(last)["step"] == 6
    mended = tiny_config(train__log_every=log_every, optimizer__learning_rate=1e-4)
    sft.train(RolloutPool(build(mended)), Workdir(path, mended))
    assert {file.name for file in (path / "checkpoints").iterdir()} == {"8", "9"}


def test_parameters_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    """The loss is that of the parameters before the update, so it does not tell."""
    config = tiny_config()
    original = sft.Imitation.step

    def broken(stage: sft.Imitation, state: TrainState, number: int) -> tuple:
        state, measured = original(stage, state, number)
        return (state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params)) if number == 4 else state), measured

    monkeypatch.setattr(sft.Imitation, "step", broken)
    with pytest.raises(UsageError, match="not finite at step 4: parameters"):
        sft.train(RolloutPool(build(config)), Workdir(tmp_path / "run", config))
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "best").exists()


def test_a_run_can_start_from_the_parameters_of_another(smoke_run, tmp_path, command: Callable):
    """A step too small to see away from them; from random ones it would be another model."""
    arguments = [f"--config.{name}" for name in ("optimizer.steps=1", "optimizer.warmup_steps=0", "train.eval_problems=1")]
    arguments += [f"--config.{name}" for name in ("optimizer.learning_rate=1e-9", "evaluation.problems=1", "mesh.data=1")]
    for init, close in ((smoke_run.path, True), ("", False)):
        path = tmp_path / str(close)
        ended = command(sft, "--config=configs/apr.py:smoke", f"--config.init={init}", f"--workdir={path}", *arguments)
        assert ended.status == 0, ended.err
        shapes = build(ConfigDict(read_config(path))).param_shapes()
        pairs = zip(*(jax.tree.leaves(load_best(run, shapes)[0]) for run in (smoke_run.path, path)), strict=True)
        assert all(np.allclose(before, after, atol=1e-6) for before, after in pairs) == close


def test_a_start_that_is_no_run_is_refused_before_anything_is_written(tmp_path, command: Callable):
    arguments = ("--config=configs/apr.py:smoke", "--config.mesh.data=1", f"--config.init={tmp_path}")
    ended = command(sft, *arguments, f"--workdir={tmp_path / 'new'}")
    assert ended.status == 2 and "holds no checkpoint" in ended.err, ended
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["1 / 0", "import nothing_like_this", "def (", "unknown", ""])
def test_a_recipe_that_is_broken_is_one_sentence(command, tmp_path, text):
    (tmp_path / "recipe.py").write_text(text + "\n")
    ended = command(sft, f"--config={tmp_path / 'recipe.py'}")
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended

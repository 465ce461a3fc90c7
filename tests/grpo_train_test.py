"""GRPO's loop: batches whose gradient no layout can change, exact resume, lost threads, and the switches of a step."""

from __future__ import annotations

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import grpo
import objective
import solver
from configs import apr
from configs import grpo as recipe
from countdown.task import Countdown
from harness import loop
from harness.build import Parts, build
from harness.cli import UsageError
from harness.reference import Reference
from harness.results import signed
from harness.rollouts import RolloutPool
from harness.workdir import PRETRAINED, Workdir, load_best, read_config
from objective import GrpoConfig
from packing import Segment, TokenBatch, lay_out, pack, pad_microbatches, places, to_microbatches
from protocols import Request
from records import CONTEXT, END, Call, Grade, Rollout, Thread
from train_state import TrainState, init_params, make_mesh, make_train_step, state_from_key

GROUPS, SIZE = 3, 4


def rl_config(**changes: int | float | str) -> ConfigDict:
    """The smoke preset of supervised run and RL recipe on one device, of one layer; `model__width=8` sets a field."""
    config, rl = apr.get_config("smoke"), recipe.get_config("smoke")
    with config.unlocked():
        config.grpo = rl.grpo
        config.optimizer = ConfigDict(dict(rl.optimizer, steps=rl.grpo.steps * rl.grpo.updates))
        config.train.update(rl.train)
    small = {
        "mesh.data": 1,
        "model.layers": 1,
        "sampler.rows": 8,
        "train.eval_problems": 4,
        "limits.thread_tokens": 24,  # an untrained model never ends by itself
        "grpo.kl_weight": 0.1,
    }
    config.update_from_flattened_dict({**small, **{key.replace("__", "."): value for key, value in changes.items()}})
    return config


def sampled_group(experiment: Parts, seed: int) -> list[Rollout]:
    """Demonstrations of one problem as if a model had sampled them: with log-probs, and half of them wrong."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for index in itertools.count():
        rollout = experiment.domain.demonstration("train", seed, index)
        for call in (call for thread in rollout.threads() for call in thread.calls):
            call.logprobs = rng.uniform(-9, 0, len(call.sampled)).tolist()
        rollout.grade = Grade(len(rollouts) % 2 == 0, "")
        rollouts.append(rollout)
        if len(rollouts) == SIZE:
            return rollouts
    raise AssertionError


def collected(experiment: Parts) -> grpo.Collected:
    groups = [sampled_group(experiment, seed) for seed in range(GROUPS)]
    switches = GrpoConfig(**experiment.config.grpo)
    rewards = np.asarray([[objective.reward(r, switches, 1) for r in group] for group in groups])
    rewards[0, 0] += 0.5  # groups differ
    return grpo.Collected(groups, rewards, objective.ADVANTAGES[switches.advantage](rewards))


def batch_of(collection: grpo.Collected, config: ConfigDict) -> tuple[TokenBatch, list[list[Segment]]]:
    """The micro-batches of a step, and their rows."""
    context, micro_rows = config.model.context, config.train.micro_rows
    rows = pad_microbatches(pack(grpo.make_segments(collection, GrpoConfig(**config.grpo), context), context), micro_rows)
    return to_microbatches(lay_out(rows, context), micro_rows), rows


def gradient(config: ConfigDict, data: int = 1, order: int = 1) -> dict:
    """Minus the change that one plain gradient step makes."""
    experiment = build(config)
    collection = collected(experiment)
    if order < 0:
        collection = grpo.Collected(*(part[::-1] for part in collection))
    batch, _ = batch_of(collection, config)
    batch = batch._replace(ref_logp=batch.old_logp - 0.1)
    mesh = make_mesh(data, 1, 1)
    params = jax.device_get(state_from_key(experiment.model, optax.sgd(1.0), mesh, jax.random.key(0)).params)
    step = make_train_step(experiment.model, optax.sgd(1.0), objective.grpo_loss(GrpoConfig(**config.grpo)), mesh)
    state, *_ = step(TrainState(params, optax.sgd(1.0).init(params), jnp.int32(0)), batch)
    return jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params)


@pytest.fixture(scope="module", params=objective.AGGREGATES)
def reference(request) -> tuple[str, dict]:
    """The gradient of all rows in one micro-batch on one device."""
    return request.param, gradient(rl_config(train__micro_rows=64, train__rows=64, grpo__aggregate=request.param))


@pytest.mark.parametrize(
    "layout",
    [
        dict(micro_rows=2),
        dict(micro_rows=2, context=768),
        dict(micro_rows=8, data=4),
        dict(micro_rows=4, order=-1),
    ],
    ids=str,
)
def test_no_micro_batch_packing_device_or_order_changes_the_gradient(reference, layout):
    """Nor could groups mix: if an advantage leaked into other rows, some layout would show it."""
    aggregate, expected = reference
    micro, context = layout["micro_rows"], layout.get("context", 512)
    changes = dict(train__micro_rows=micro, train__rows=micro, model__context=context, grpo__aggregate=aggregate)
    config = rl_config(**changes)
    found = gradient(config, layout.get("data", 1), layout.get("order", 1))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)), found, expected)


def test_every_sampled_id_has_its_own_rollouts_advantage_and_log_prob():
    config = rl_config()
    experiment = build(config)
    collection = collected(experiment)
    batch, rows = batch_of(collection, config)
    batch = TokenBatch(*(field.reshape(-1, field.shape[-1]) for field in batch))
    owners = {id(t): (p, g) for p, group in enumerate(collection.groups) for g, r in enumerate(group) for t in r.threads()}
    seen = 0
    for row, columns, piece in places(rows):
        sampled = batch.sampled[row, columns]
        expected = collection.advantages[owners[id(piece.thread)]]
        np.testing.assert_allclose(batch.advantage[row, columns][sampled], expected, rtol=1e-6)
        assert not batch.advantage[row, columns][~sampled].any() and not batch.weight[row, columns][~sampled].any()
        logprobs = [x for call in piece.thread.calls for x in call.logprobs]
        np.testing.assert_allclose(batch.old_logp[row, columns][sampled], logprobs, rtol=1e-6)
        seen += sampled.sum()
    assert seen == sum(len(c.sampled) for group in collection.groups for r in group for t in r.threads() for c in t.calls)


# ------------------------------------------------------------------- lost threads


def test_threads_cut_before_they_sampled_anything_are_counted_and_weigh_nothing():
    """A rollout whose joined parent had no room left: its last call is empty."""
    config = rl_config(grpo__kl_weight=0.0)
    experiment = build(config)
    ids = experiment.domain.language.encode("Moving to Node #0\n")
    root = Thread((), [Call(0, ids, [3, 4], [-1.0, -2.0], "spawn"), Call(4, ids, [], [], CONTEXT)])
    root.spawns.append([Thread((0, 0), [Call(0, ids, [5], [-1.0], END)])])
    good = sampled_group(experiment, 0)
    cut = Rollout(good[0].problem, root, Grade(False, "no answer: stopped by context"))
    rewards = np.asarray([[1.0, 0.0]])
    collection = grpo.Collected([[good[0], cut]], rewards, objective.ADVANTAGES["mean"](rewards))
    weights = batch_of(collection, config)[0].weight.sum()
    calls = sum(len(thread.calls) for thread in good[0].threads())
    # Each rollout's calls weigh 1 / (its calls x all calls) each: two rollouts' worth, over all calls with ids.
    assert weights == pytest.approx(2 / (calls + 2), rel=1e-4)
    described = grpo.describe(collection)
    assert (described["truncated"], described["sampled_accuracy"], described["live_groups"]) == (0.5, 0.5, 1.0)
    logprobs = [-1.0, -2.0, -1.0, *(lp for thread in good[0].threads() for call in thread.calls for lp in call.logprobs)]
    assert described["sampled_logprob"] == pytest.approx(sum(logprobs) / len(logprobs))
    root.calls[0].logprobs[1] = math.nan
    assert math.isnan(grpo.describe(collection)["sampled_logprob"])  # so that the loop stops, update or not


# ------------------------------------------------------------------- collecting


class Scripted(RolloutPool):
    """Rollouts that were written before: `right(request)` says whether one is right."""

    def __init__(self, config: ConfigDict, right) -> None:
        super().__init__(build(config))
        self.right, self.asked = right, []

    def run(self, params, temperature, requests, seed, on_rollout=None):
        self.asked.append((temperature, [request.problem for request in requests], tuple(seed)))
        call = lambda: Call(0, [1], [2], [-1.0], END)
        return [
            Rollout(r.problem, Thread((), [call()]), Grade(self.right(r), "")) for r in requests
        ]


def test_groups_are_rollouts_of_one_problem_and_the_cursor_moves_on():
    pool = Scripted(rl_config(grpo__temperature=0.5), lambda request: request.index == 0)
    experiment = pool.parts
    first, cursor = grpo.collect(pool, GrpoConfig(**experiment.config.grpo), None, step=7, cursor=100)
    assert cursor == 104 and first.rewards.tolist() == [[1, 0]] * 4
    assert [{r.problem for r in group} for group in first.groups] == [
        {experiment.domain.problem("train", 0, 100 + i)} for i in range(4)
    ]
    ((temperature, problems, seed),) = pool.asked
    assert temperature == 0.5 and seed == (0, 7)
    assert problems == [experiment.domain.problem("train", 0, 100 + i) for i in range(4) for _ in range(2)]


def collect(config: ConfigDict, right) -> tuple[grpo.Collected, int]:
    """The rollouts of a step that begins at problem 4."""
    found, cursor = grpo.collect(Scripted(config, right), GrpoConfig(**config.grpo), None, 0, 4)
    return found, cursor - 4


def test_groups_without_signal_are_kept_dropped_or_replaced():
    def right(request: Request) -> bool:
        return request.index == 0 or request.problem.target % 2 == 0  # even targets: always right

    even = [solver.problem(build(rl_config()).domain.family, "train", 0, 4 + i).target % 2 == 0 for i in range(16)]
    assert even[:4].count(True) in (1, 2, 3)
    kept, cursor = collect(rl_config(), right)
    assert (len(kept.groups), cursor) == (4, 4)
    assert [not advantage.any() for advantage in kept.advantages] == even[:4]
    live = kept.with_signal()
    assert live.advantages.any(axis=1).all() and len(live.groups) == len(live.rewards) == even[:4].count(False)
    assert live.groups[0] is kept.groups[even.index(False)]
    refilled, cursor = collect(rl_config(grpo__dead_groups="refill"), right)
    assert even[:cursor].count(False) == len(refilled.with_signal().groups) == 4 and cursor == len(refilled.groups) > 4


# ------------------------------------------------------------------- the loop


class Killed(BaseException):
    """Stands for a signal."""


def final(path: pathlib.Path, config: ConfigDict) -> tuple:
    experiment = build(config)
    like = state_from_key(experiment.model, experiment.optimizer, experiment.mesh, jax.random.key(1))
    restored = Workdir(path, config).restore(like)
    assert restored is not None
    return restored


def log(path: pathlib.Path) -> list[dict]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "milliseconds"} for line in lines]


@pytest.mark.parametrize(
    ("fatal", "changes"),
    [(1, {}), (4, {}), (4, dict(train__eval_every=1, grpo__loss="apa", grpo__reference="flat", grpo__kl_weight=0.0))],
    ids=["start", "late", "apa"],
)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(fatal, changes, tmp_path, monkeypatch):
    penalised = dict(grpo__steps=4, train__eval_every=2, grpo__thread_penalty=0.01, grpo__token_penalty=0.01)
    config = rl_config(**{**penalised, **changes})
    config.grpo.free_tokens = 10.0  # penalties: an untrained model's rewards would be all alike
    reference = jax.device_get(
        state_from_key(build(config).model, optax.sgd(1.0), make_mesh(1, 1, 1), jax.random.key(0)).params
    )
    grpo.train(RolloutPool(build(config)), Workdir(tmp_path / "whole", config), reference)
    with monkeypatch.context() as patch:
        original, calls = grpo.Trainer.step, itertools.count(1)

        def dying(self, *given):
            if next(calls) == fatal:
                raise Killed
            return original(self, *given)

        patch.setattr(grpo.Trainer, "step", dying)
        with pytest.raises(Killed):
            grpo.train(RolloutPool(build(config)), Workdir(tmp_path / "killed", config), reference)
    grpo.train(RolloutPool(build(config)), Workdir(tmp_path / "killed", config), reference)
    (state, extra), (expected, expected_extra) = (final(tmp_path / name, config) for name in ("killed", "whole"))
    assert extra == expected_extra and extra["step"] == 4 and extra["cursor"]["problem"] == 16
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), reference, state.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_an_error_in_a_rollout_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    config = rl_config(grpo__steps=2)
    experiment = build(config)
    reference = jax.device_get(
        state_from_key(experiment.model, optax.sgd(1.0), make_mesh(1, 1, 1), jax.random.key(0)).params
    )
    monkeypatch.setattr(loop, "_checkpoint", lambda *_: None)
    monkeypatch.setattr(Countdown, "grade", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.train(RolloutPool(experiment), Workdir(tmp_path / "run", config), reference)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ------------------------------------------------------------------- the shipped model


def test_sampler_and_trainer_agree_on_every_kind_of_thread():
    """The log-probs that rollouts were sampled with, within 1e-4 of the trainer's: parents, children, after joins."""
    config = grpo.combine(PRETRAINED, recipe.get_config("smoke"))
    config.mesh.data, config.sampler.rows, config.sampler.length_bucket, config.sampler.max_gathered_slots = 1, 16, 256, 4096  # few shapes
    config.grpo.problems, config.grpo.temperature = 8, 0.5  # enough for a join
    pool = RolloutPool(build(config))
    params, _ = load_best(PRETRAINED, pool.parts.param_shapes())
    trainer = grpo.Trainer(pool, Reference(params))
    collection, _ = grpo.collect(pool, trainer.config, params, 0, 0)
    batch, rows = batch_of(collection, config)
    found = grpo.sampler_trainer_gap(batch, np.asarray(trainer.score(params, batch)), rows)
    assert found.keys() == {"sampler_trainer_gap_parent", "sampler_trainer_gap_child", "sampler_trainer_gap_joined"}
    unknown = grpo.sampler_trainer_gap(batch, np.full_like(batch.old_logp, np.nan), rows)
    assert np.isnan([*unknown.values()]).all()  # so that the loop stops
    assert all(0 < value < 1e-4 for value in found.values()), found


def test_lanes_draw_the_ids_of_a_single_sampler():
    drawn = []
    for lanes in (1, 2, 4):
        experiment = build(rl_config(sampler__workers=lanes))
        params = init_params(experiment.model, jax.random.key(0))
        requests = [Request(experiment.domain.problem("train", 0, n // 2), n % 2) for n in range(11)]
        pool = RolloutPool(experiment)
        rollouts = pool.run(params, 1.0, requests, (0,))
        assert [(rollout.problem, rollout.index) for rollout in rollouts] == [(r.problem, r.index) for r in requests]
        drawn.append([[call.sampled for t in rollout.threads() for call in t.calls] for rollout in rollouts])
        assert all(value > 0 for value in pool.seconds(1.0).values())
    assert drawn[0] == drawn[1] == drawn[2] and len({str(calls) for calls in drawn[0]}) == 11


def test_policy_and_evaluation_do_not_depend_on_how_the_supervised_run_sampled(tmp_path):
    stored = read_config(PRETRAINED)
    stored["sampler"] |= dict(temperature=0.7, top_k=5, top_p=0.9)
    (tmp_path / "config.json").write_text(json.dumps(signed(stored)))
    sampler = grpo.combine(tmp_path, recipe.get_config("smoke")).sampler
    assert (sampler.temperature, sampler.top_k, sampler.top_p) == (0, 0, 1)


@pytest.mark.parametrize("stored", [{}, {"name": 5}, {"name": "a", "optimizer": 5}, {"name": "a", "train": [1]}])
def test_a_start_whose_configuration_lacks_fields_is_named(tmp_path, stored):
    (tmp_path / "config.json").write_text(json.dumps(signed(stored)))
    with pytest.raises(ValueError, match="a field of the configuration is missing, unknown or of another kind"):
        grpo.prepare(tmp_path, recipe.get_config("smoke"))


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.9)])
def test_a_policy_that_is_not_sampled_whole_is_refused(name, value):
    config = recipe.get_config("smoke")
    config.sampler[name] = value
    with pytest.raises(ValueError, match=f"rollouts need the whole policy: .*{name}={value}"):
        grpo.prepare(PRETRAINED, config)


def test_presets_do_not_share_a_start_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = {preset: recipe.get_config(preset) for preset in ("smoke", "laptop", "desktop", "gpu")}
    starts = {preset: grpo.start_from(None, recipes[preset].suffix) for preset in ("smoke", "laptop", "desktop")}
    shipped = PRETRAINED.parent
    assert starts == {"smoke": shipped / "apr", "laptop": shipped / "apr", "desktop": shipped / "apr-desktop"}
    with pytest.raises(UsageError, match="sft.py --config=configs/apr.py:gpu"):
        grpo.start_from(None, "-gpu")
    names = {preset: grpo.combine(start, recipes[preset]).name for preset, start in starts.items()}
    assert names == {"smoke": "grpo-apr-smoke", "laptop": "grpo-apr", "desktop": "grpo-apr-desktop"}
    (tmp_path / "runs" / "apr-smoke" / "best").mkdir(parents=True)
    assert grpo.start_from(None, "-smoke") == pathlib.Path("runs/apr-smoke")
    assert grpo.start_from("anything", "-smoke") == pathlib.Path("anything")


def test_the_shipped_run_evaluates_and_goes_on_on_any_number_of_devices():
    """Rows per forward pass are those of one device; with eight, the supervised batch of 4 rows is not needed."""
    stored = ConfigDict(read_config(PRETRAINED))
    assert jax.device_count() == 8 and stored.train.rows == 4 and stored.train.micro_rows == 2
    assert build(stored).devices == 8
    assert build(grpo.combine(PRETRAINED, recipe.get_config("laptop"))).devices == 8


def test_rollouts_can_be_told_of_a_budget():
    config = rl_config()
    config.budget.children = 5
    experiment = build(config)
    ids = experiment.domain.task.prompt(experiment.domain.problem("train", 0, 0))
    assert experiment.domain.language.decode(ids).startswith("Sub Call Budget: 5 ")


def test_the_learning_rate_decays_over_the_steps_there_are():
    config = recipe.get_config("smoke")
    config.grpo.update(steps=7, updates=3)
    assert grpo.combine(PRETRAINED, config).optimizer.steps == 21

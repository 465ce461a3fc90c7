"""The branches of one GRPO step, on recorded rollouts and a tiny model: no sampling, numbers by hand or by definition."""

from __future__ import annotations

import dataclasses
import typing

import jax
import numpy as np
import pytest

import grpo
from harness.build import build
from harness.reference import Reference
from harness.rollouts import RolloutPool
from objective import GrpoConfig
from packing import TokenBatch
from records import Grade, Rollout
from tests.grpo_train_test import rl_config
from train_state import TrainState, init_params, state_from_params


class Recorded(RolloutPool):
    """Demonstrations as if the policy had sampled them. `right(problem number, rollout)` says which are right."""

    def __init__(self, right: typing.Callable[[int, int], bool], **changes: typing.Any) -> None:
        super().__init__(build(rl_config(grpo__problems=3, grpo__rollouts=2, **changes)))
        self.right = right

    def run(self, params, temperature, requests, seed, on_rollout=None) -> list[Rollout]:
        rng = np.random.default_rng(0)
        rollouts = []
        for number, request in enumerate(requests):
            rollout = self.parts.domain.demonstration("train", 5, number)
            for call in (call for thread in rollout.threads() for call in thread.calls):
                call.logprobs = rng.uniform(-7, -5, len(call.sampled)).tolist()  # near those of an untrained model
            correct = self.right(number // 2, request.index)
            rollouts.append(dataclasses.replace(rollout, problem=request.problem, grade=Grade(correct, "")))
        return rollouts


def stepped(right: typing.Callable[[int, int], bool], **changes: typing.Any) -> tuple[grpo.Trainer, list, typing.Any]:
    """(trainer, batches that were trained on, result of one step from fresh parameters)."""
    pool = Recorded(right, **changes)
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(pool.parts.model, jax.random.key(0)))
    trainer = grpo.Trainer(pool, Reference(params))
    batches: list[TokenBatch] = []
    train_step = trainer.train_step

    def watched(state: TrainState, batch: TokenBatch) -> typing.Any:
        batches.append(batch)
        return train_step(state, batch)

    trainer.train_step = watched
    return trainer, batches, trainer.step(state_from_params(pool.parts.optimizer, pool.parts.mesh, params), 1)


def first_is_right(_: int, rollout: int) -> bool:
    return rollout == 0


def only_group_one_differs(group: int, rollout: int) -> bool:
    return group != 1 or rollout == 0


def test_a_problem_that_is_drawn_twice_has_two_different_groups():
    pool, asked = Recorded(first_is_right, grpo__dead_groups="refill"), []
    pool.parts.domain.problem = lambda split, seed, index: "bca"[index % 3 if index < 2 else 0]

    def run(params, temperature, requests, seed):
        asked.extend(requests)
        return Recorded.run(pool, params, temperature, requests, seed)

    pool.run = run
    collected, cursor = grpo.collect(pool, GrpoConfig(**pool.parts.config.grpo), None, 1, 0)
    assert len(set(asked)) == len(asked) == 2 * cursor
    assert [(r.problem, r.index) for r in asked[:6]] == [("b", 0), ("b", 1), ("c", 0), ("c", 1), ("b", 2), ("b", 3)]


def test_dropped_groups_leave_the_weights_to_those_with_a_signal():
    """"drop" averages over the one group that has a signal; "keep" over all three, two of which pull nowhere."""
    trained = {}
    for dead_groups in ("keep", "drop"):
        trainer, (batch,), (_, values) = stepped(
            only_group_one_differs, grpo__dead_groups=dead_groups, grpo__aggregate="token"
        )
        assert values["live_groups"] == pytest.approx(1 / 3)
        assert batch.weight.sum() == pytest.approx(1, rel=1e-5)
        pulled = (batch.advantage != 0).sum()
        assert pulled == batch.sampled.sum() if dead_groups == "drop" else 0 < pulled < batch.sampled.sum()
        trained[dead_groups] = batch.weight[batch.advantage != 0].sum()
    assert trained["drop"] == pytest.approx(1, rel=1e-5) and trained["keep"] < 0.9


def test_a_step_without_any_signal_changes_nothing_and_moves_on():
    trainer, batches, (state, values) = stepped(lambda *_: True, grpo__dead_groups="drop")
    assert batches == [] and int(state.step) == 0 and "loss" not in values
    assert trainer.cursor()["problem"] == 3 and "no group with a signal" in trainer.line(values)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), trainer.reference.params)


def test_two_inner_updates_train_twice_on_the_same_batch():
    once, (batch,), (first, _) = stepped(first_is_right)
    twice, batches, (second, values) = stepped(first_is_right, grpo__updates=2)
    assert len(batches) == 2 and batches[0] is batches[1]
    jax.tree.map(np.testing.assert_array_equal, batches[0], batch)
    expected, metrics, _ = once.train_step(first, batch)
    assert int(second.step) == int(expected.step) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), second.params, expected.params)
    assert values["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-4)  # of the second update


def test_with_the_trainers_log_probs_the_first_ratio_is_one():
    """So nothing is clipped and the policy term is - sum w A; the gap to the sampler's is still told."""
    _, (batch,), (_, values) = stepped(first_is_right, grpo__old_logp="trainer", grpo__kl_weight=0.0)
    assert values["clip_share"] == 0
    assert values["loss"] == pytest.approx(-float((batch.weight * batch.advantage).sum(dtype=np.float64)), abs=1e-5)
    assert max(values[f"sampler_trainer_gap_{kind}"] for kind in ("parent", "child")) > 0.1


def test_truncated_importance_weights_correct_the_trainers_log_probs():
    _, (plain,), _ = stepped(first_is_right, grpo__old_logp="trainer")
    _, (sampler,), _ = stepped(first_is_right)
    trainer, (batch,), _ = stepped(first_is_right, grpo__old_logp="trainer", grpo__tis_cap=1.5)
    ratio = np.exp(np.where(batch.sampled, batch.old_logp - sampler.old_logp, 0))
    assert (ratio > 1.5).any() and (ratio < 1.5).any()
    np.testing.assert_allclose(batch.weight, plain.weight * np.minimum(ratio, 1.5), rtol=1e-5)
    np.testing.assert_allclose(batch.kl_weight, plain.kl_weight)


def test_without_a_kl_term_the_reference_is_never_scored(monkeypatch):
    monkeypatch.setattr(grpo, "make_score", lambda *_: lambda *_: pytest.fail("scored"))
    _, (batch,), (_, values) = stepped(first_is_right, grpo__kl_weight=0.0)
    np.testing.assert_array_equal(batch.ref_logp, batch.old_logp)
    assert "kl" not in values and np.isfinite(values["loss"])


def test_the_reference_stays_the_start():
    """In the second step the policy has moved, and the penalty still pulls towards where it came from."""
    trainer, batches, (state, _) = stepped(first_is_right, optimizer__learning_rate=1e-2)
    start, moved = jax.device_get((trainer.reference.params, state.params))  # the state is donated to the step
    trainer.step(state, 2)
    batch = batches[1]
    np.testing.assert_array_equal(batch.ref_logp, trainer.score(start, batch))
    assert np.abs(batch.ref_logp - np.asarray(trainer.score(moved, batch)))[batch.sampled].max() > 1e-3


def test_a_flat_reward_makes_the_policy_the_reference(tmp_path):
    """Two stretches of one step with equal rewards: from the third step on the reference is the policy after two."""
    trainer, batches, (state, _) = stepped(
        first_is_right, grpo__reference="flat", grpo__loss="apa", grpo__kl_weight=0.0, optimizer__learning_rate=1e-2
    )
    trainer.reference = Reference(trainer.reference.params, tmp_path / "reference")
    trainer.reference.note(1, 0.5, state.params, True)
    state, values = trainer.step(state, 2)
    assert values["reference_step"] == 2
    assert trainer.cursor()["reference"] == {"start": "", "step": 2, "before": None, "rewards": []}
    after = jax.device_get(state.params)
    trainer.step(state, 3)
    np.testing.assert_array_equal(batches[2].ref_logp, trainer.score(after, batches[2]))


def test_the_clipped_share_is_of_the_tokens_whose_ratio_leaves_the_range():
    """Rollouts of a policy that gave every id far less: all ratios are above 1.2, which clips the gains alone."""
    trainer, (batch,), (_, values) = stepped(first_is_right, grpo__clip_low=0.2, grpo__clip_high=0.2)
    ratio = np.exp(np.asarray(trainer.score(trainer.reference.params, batch)) - batch.old_logp)
    above, below = (ratio > 1.2) & (batch.advantage > 0), (ratio < 0.8) & (batch.advantage < 0)
    assert values["clip_share"] == pytest.approx((batch.sampled & (above | below)).sum() / batch.sampled.sum(), abs=0.01)
    assert 0.05 < values["clip_share"] < 0.95


def test_the_loss_is_that_of_the_policys_temperature():
    """Log-probs at a temperature of 0.5 are those of doubled logits: further apart than at 1."""
    gaps = []
    for temperature in (1.0, 0.5):
        trainer, (batch,), (_, values) = stepped(first_is_right, grpo__temperature=temperature)
        assert trainer.config == GrpoConfig(**dict(trainer.parts.config.grpo))
        spread = np.asarray(trainer.score(trainer.reference.params, batch))[batch.sampled]
        gaps.append(spread.std())
    assert gaps[1] > 1.5 * gaps[0]


@pytest.fixture(scope="module")
def on_one_device() -> tuple[TrainState, dict[str, float]]:
    return stepped(first_is_right, grpo__updates=2, grpo__old_logp="trainer", train__micro_rows=1)[2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_a_step_is_the_same_on_every_mesh(on_one_device, mesh):
    """Scores under policy and reference, and two updates; the rows of a forward pass are other ones."""
    data, fsdp, tensor = mesh
    axes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "sampler__rows": 16}
    _, _, (state, values) = stepped(first_is_right, grpo__updates=2, grpo__old_logp="trainer", train__micro_rows=1, **axes)
    (expected, known), moved = on_one_device, jax.device_get(state.params)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert values[name] == pytest.approx(known[name], rel=1e-4, abs=1e-5), name
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).mean()), moved, jax.device_get(expected.params))
    assert max(jax.tree.leaves(apart)) < 1e-5  # two updates of Adam move an entry by about 2e-4

"""GRPO: rewards, advantages, weights and loss against numbers worked out by hand, on tiny arrays and records."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo
import objective as grpo_objective
from configs import grpo as recipe
from objective import GrpoConfig
from packing import TokenBatch
from records import END, SPAWN, Call, Grade, Rollout, Thread
from train_state import TokenStats


def config(**changes) -> GrpoConfig:
    """The recipe's switches with some changed."""
    return GrpoConfig(**dict(recipe.get_config().grpo, **changes))


def rollout(correct: bool = True, children: int = 2) -> Rollout:
    """A parent of calls with 4 and 2 sampled ids around one spawn; children of 3, 5, ... ids."""
    calls = [Call(0, [9, 9], [1, 2, 3, 4], [0.0] * 4, SPAWN if children else END), Call(3, [9], [5, 6], [0.0] * 2, END)]
    spawned = [Thread((0, i), [Call(0, [9], [7] * (3 + 2 * i), [0.0] * (3 + 2 * i), END)]) for i in range(children)]
    return Rollout("p", Thread((), calls, [spawned] if children else []), Grade(correct, "" if correct else "wrong"))


def batch(advantage, old_logp, ref_logp=None, sampled=None, weight=None) -> TokenBatch:
    """A batch of one row; everything that the loss does not read is zero."""
    advantage = jnp.asarray([advantage], jnp.float32)
    zeros = jnp.zeros(advantage.shape)
    sampled = jnp.ones(advantage.shape, bool) if sampled is None else jnp.asarray([sampled])
    weight = jnp.ones(advantage.shape) if weight is None else jnp.asarray([weight])
    old = jnp.asarray([old_logp], jnp.float32)
    ref = old if ref_logp is None else jnp.asarray([ref_logp], jnp.float32)
    return TokenBatch(zeros, zeros, zeros, sampled, weight, weight, advantage, old, ref)


def loss(logp, tokens: TokenBatch, **changes) -> jax.Array:
    """Loss per token of the one row."""
    logp = jnp.asarray([logp], jnp.float32) if not isinstance(logp, jax.Array) else logp
    zeros = jnp.zeros(logp.shape)
    return grpo_objective.grpo_loss(config(**changes))(TokenStats(logp, zeros, zeros), tokens)[0][0]


# ---------------------------------------------------------------- reward and advantage


def test_reward_is_correctness_and_shaping_is_gated_by_it():
    assert grpo_objective.reward(rollout(), config(), 1) == 1 and grpo_objective.reward(rollout(False), config(), 1) == 0
    # Total 6 + 3 + 5 = 14 tokens, sequential 6 + 5 = 11: a share of 3/14 is saved, more than the cap of 0.2.
    bonus = config(acceleration=0.5)
    assert grpo_objective.reward(rollout(), bonus, 1) == pytest.approx(1.1)
    assert grpo_objective.reward(rollout(), config(acceleration=0.5, acceleration_cap=1.0), 1) == pytest.approx(1 + 0.5 * 3 / 14)
    assert grpo_objective.reward(rollout(False), bonus, 1) == 0


def test_penalties_count_threads_and_tokens_past_the_budget():
    assert grpo_objective.reward(rollout(), config(thread_penalty=0.1), 1) == pytest.approx(0.8)
    penalty = config(token_penalty=0.01, free_tokens=10.0)
    assert grpo_objective.reward(rollout(), penalty, 1) == pytest.approx(0.96)
    assert grpo_objective.reward(rollout(False), penalty, 1) == pytest.approx(-0.04)
    assert grpo_objective.reward(rollout(), config(token_penalty=0.01, free_tokens=14.0), 1) == 1


def test_concurrency_is_the_mean_number_of_workers_up_to_its_cap():
    # 14 tokens over a critical path of 11; alone 6 over 6. The cap is where the whole bonus is earned.
    assert grpo_objective.reward(rollout(), config(concurrency=0.5), 1) == pytest.approx(1 + 0.5 * 14 / 11 / 2)
    assert grpo_objective.reward(rollout(children=0), config(concurrency=0.5), 1) == pytest.approx(1.25)
    assert grpo_objective.reward(rollout(), config(concurrency=0.5, concurrency_cap=1.2), 1) == pytest.approx(1.5)
    assert grpo_objective.reward(rollout(False), config(concurrency=0.5), 1) == 0


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        ("always", 0.2, [1] * 10),
        ("alternate", 0.2, [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]),
        ("alternate", 0.5, [0, 1] * 5),
        ("alternate", 0.7, [0, 1, 1, 0, 1, 1, 0, 1, 1, 1]),
        ("anneal", 0.4, [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0]),
        ("anneal", 1.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_the_structure_bonus_follows_its_schedule(schedule, share, expected):
    switches = config(steps=10, structure=0.3, structure_schedule=schedule, structure_share=share)
    rewards = [grpo_objective.reward(rollout(False), switches, step) for step in range(1, 11)]
    np.testing.assert_allclose(rewards, 0.3 * np.asarray(expected), atol=1e-12)
    assert grpo_objective.reward(rollout(), switches, 10) == pytest.approx(1 + 0.3 * expected[9])
    assert not any(grpo_objective.reward(rollout(False, children=0), switches, step) for step in range(1, 11))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("std", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_by_hand(kind, expected):
    result = grpo_objective.ADVANTAGES[kind](np.asarray([[1.0, 0, 0, 0], [1, 1, 1, 1]]))
    np.testing.assert_allclose(result[0], expected, rtol=1e-5)
    assert not result[1].any()


@pytest.mark.parametrize("kind", grpo_objective.ADVANTAGES)
def test_a_group_of_equal_rewards_contributes_nothing_even_when_rounding_would(kind):
    assert not grpo_objective.ADVANTAGES[kind](np.full((1, 3), 0.1 + 0.2)).any()


# ---------------------------------------------------------------- weights


def sums(rollouts, aggregate, constant=1.0, credit="all"):
    """Per rollout the weights of its calls' tokens, by number of sampled ids, as they are attached to segments."""
    switches = config(aggregate=aggregate, rollout_constant=constant, credit=credit)
    collected = grpo.Collected([rollouts], np.ones((1, len(rollouts))), np.ones((1, len(rollouts))))
    pieces = grpo.make_segments(collected, switches, 1000)
    result = []
    for one in rollouts:
        calls = set()
        for piece in (piece for piece in pieces if piece.thread in one.threads()):
            for call in piece.calls:
                pair = piece.weights[call]
                calls |= {(piece.thread.path, call, len(piece.thread.calls[call].sampled), *pair)} if call >= 0 else set()
        result.append(sorted(call[2:] for call in calls))
    return result


def test_weights_per_call_then_rollout_are_the_papers():
    # Rollout 1 has calls of 2, 3, 4, 5 ids, rollout 2 of 2 and 4: six calls in the batch.
    first, second = sums([rollout(), rollout(children=0)], "call")
    assert first == [(n, pytest.approx(1 / (n * 4 * 6)), pytest.approx(1 / (n * 6))) for n in (2, 3, 4, 5)]
    assert second == [(n, pytest.approx(1 / (n * 2 * 6)), pytest.approx(1 / (n * 6))) for n in (2, 4)]


def test_weights_per_token_and_per_rollout():
    rollouts = [rollout(), rollout(children=0)]  # 14 + 6 tokens
    for aggregate, constant, expected in (("token", 1.0, 1 / 20), ("rollout", 100.0, 1 / 200)):
        first, second = sums(rollouts, aggregate, constant)
        assert [n for n, _, _ in first + second] == [2, 3, 4, 5, 2, 4]
        assert all(pair == pytest.approx([expected, expected]) for _, *pair in first + second)


def test_weights_per_thread_give_every_thread_of_a_rollout_the_same():
    # Rollout 1 has threads of 6, 3 and 5 ids (the first in calls of 4 and 2), rollout 2 one of 6.
    first, second = sums([rollout(), rollout(children=0)], "thread")
    expected = [(2, 1 / 36), (3, 1 / 18), (4, 1 / 36), (5, 1 / 30)]
    assert first == [(n, pytest.approx(weight), pytest.approx(weight)) for n, weight in expected]
    assert second == [(n, pytest.approx(1 / 12), pytest.approx(1 / 12)) for n in (2, 4)]
    assert sum(n * weight for n, weight, _ in first) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("call", (1 / (2 * 2 * 4), 1 / (4 * 2 * 4))), ("token", (1 / 12, 1 / 12)), ("thread", (1 / 12, 1 / 12))],
)
def test_the_parent_alone_is_weighed_as_if_there_were_no_children(aggregate, expected):
    # Two parents of calls with 4 and 2 ids: four calls, 12 tokens, two threads.
    for calls in sums([rollout(), rollout(children=0)], aggregate, credit="parent"):
        assert [(n, weight) for n, weight, _ in calls] == [(2, pytest.approx(expected[0])), (4, pytest.approx(expected[1]))]


def test_calls_without_ids_weigh_nothing():
    empty = rollout(children=0)
    empty.root.calls[1].sampled = []
    assert sums([empty], "call") == [[(4, pytest.approx(1 / 4), pytest.approx(1 / 4))]]
    unborn = rollout(children=1)
    unborn.root.spawns[0][0].calls[0].sampled = []
    assert sums([unborn], "thread") == [[(n, pytest.approx(1 / 6), pytest.approx(1 / 6)) for n in (2, 4)]]


# ---------------------------------------------------------------- loss


def test_clipped_objective_by_hand():
    ratio = np.log([1.5, 1.5, 0.5, 0.5])
    tokens = batch([1.0, -1, 1, -1], [0.0] * 4)
    np.testing.assert_allclose(loss(ratio, tokens, kl_weight=0.0), [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    higher = loss(ratio, tokens, kl_weight=0.0, clip_high=0.28, clip_low=0.1)
    np.testing.assert_allclose(higher, [-1.28, 1.5, -0.5, 0.9], rtol=1e-6)


def test_apa_by_hand():
    """log pi -2, -1, -3; aims -1.5 + 0.5 * 2, -1.5 - 0.5, -3 + 0: squares of -1.5, 1 and 0."""
    tokens = batch([2.0, -1.0, 0.0], [-7.0] * 3, ref_logp=[-1.5, -1.5, -3.0])
    found = loss([-2.0, -1.0, -3.0], tokens, loss="apa", kl_weight=0.0)
    np.testing.assert_allclose(found, [2.25, 1.0, 0.0], rtol=1e-6)
    wider = loss([-2.0, -1.0, -3.0], tokens, loss="apa", apa_lambda=1.0, kl_weight=0.0)
    np.testing.assert_allclose(wider, [6.25, 2.25, 0.0], rtol=1e-6)
    other = batch([0.0, 1.0], [0.0] * 2, ref_logp=[9.0, 0.0], sampled=[False, True], weight=[0.0, 1.0])
    np.testing.assert_allclose(loss([3.0, 0.5], other, loss="apa", kl_weight=0.0), [0, 0])


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -0.5), ("k2", 0.125), ("k3", np.exp(0.5) - 1.5)])
def test_kl_estimators_by_hand(estimator, expected):
    tokens = batch([0.0], [-2.0], ref_logp=[-1.5])
    np.testing.assert_allclose(loss([-2.0], tokens, kl_weight=2.0, kl_estimator=estimator), [2 * expected], rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_kl_estimators_hold_the_policy_to_the_reference(estimator):
    """Their gradient, in the mean over the policy's own draws, is that of the divergence itself."""
    logits, reference = jnp.asarray([0.3, -0.2, 1.0]), jax.nn.log_softmax(jnp.asarray([0.0, 0.5, 0.2]))

    def estimated(x):
        tokens = batch([0.0] * 3, jax.nn.log_softmax(logits), ref_logp=reference)
        drawn = jax.nn.softmax(logits)  # how often, not to be differentiated
        return (drawn * loss(jax.nn.log_softmax(x)[None], tokens, kl_weight=1.0, kl_estimator=estimator)).sum()

    def divergence(x):
        return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)).sum()

    np.testing.assert_allclose(jax.grad(estimated)(logits), jax.grad(divergence)(logits), atol=1e-6)


def test_at_ratio_one_the_gradient_is_reinforce_and_flips_with_the_reward():
    logp = jnp.asarray([[-1.0, -2.0, -0.5]])

    def gradient(advantage):
        tokens = batch(advantage, logp[0], weight=[0.5, 0.25, 1.0])
        return jax.grad(lambda x: loss(x, tokens, kl_weight=0.0).sum())(logp)

    np.testing.assert_allclose(gradient([1.0, -2.0, 3.0]), [[-0.5, 0.5, -3.0]], rtol=1e-6)
    np.testing.assert_allclose(gradient([-1.0, 2.0, -3.0]), -gradient([1.0, -2.0, 3.0]))


def test_injected_ids_get_no_gradient_and_groups_without_signal_only_the_kl():
    logp = jnp.asarray([[-1.0, -2.0]])
    injected = batch([0.0, 1.0], [-9.0, -2.0], ref_logp=[-3.0, -2.0], sampled=[False, True], weight=[0.0, 1.0])
    gradient = jax.grad(lambda x: loss(x, injected, kl_weight=1.0).sum())(logp)
    assert gradient[0, 0] == 0 and gradient[0, 1] == -1
    dead = batch([0.0, 0.0], logp[0], ref_logp=[-1.5, -2.0])
    gradient = jax.grad(lambda x: loss(x, dead, kl_weight=0.0).sum())(logp)
    assert not gradient.any()


def test_a_two_armed_policy_learns_the_better_arm():
    logits = jnp.zeros(2)
    key = jax.random.key(0)

    def objective(logits, arms, tokens):
        return loss(jax.nn.log_softmax(logits)[arms][None], tokens, kl_weight=0.0).mean()

    for step in range(60):
        arms = jax.random.categorical(jax.random.fold_in(key, step), logits, shape=(16,))
        rewards = np.asarray(arms == 1, float)
        tokens = batch(grpo_objective.ADVANTAGES["std"](rewards[None])[0], jax.nn.log_softmax(logits)[arms])
        logits = logits - 0.3 * jax.grad(objective)(logits, arms, tokens)
    assert jax.nn.softmax(logits)[1] > 0.95


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change",
    [
        {"advantage": "z"},
        {"kl_estimator": "k4"},
        {"aggregate": "mean"},
        {"dead_groups": "skip"},
        {"old_logp": "both"},
        {"rollouts": 1},
        {"problems": 0},
        {"updates": 0},
        {"clip_low": -0.1},
        {"kl_weight": -1.0},
        {"rollout_constant": 0.0},
        {"temperature": 0.0},
        {"tis_cap": -1.0},
        {"tis_cap": 2.0},
        {"loss": "ppo"},
        {"apa_lambda": 0.0},
        {"credit": "children"},
        {"concurrency_cap": 0.5},
        {"structure_schedule": "once"},
        {"structure_share": 0.0},
        {"structure_share": 1.5},
        {"reference": "flat", "kl_weight": 0.0},
    ],
)
def test_a_bad_switch_is_named(change):
    with pytest.raises(ValueError, match=f"grpo.{next(iter(change))}"):
        config(**change)
    config()

"""The objective of GRPO: rewards, advantages, weights and the loss, each variant beside its formula and source.

In formulas, for rollout g of the G of problem p, its call c with n_c sampled ids (C_g calls in the rollout, C in the
batch) and a sampled token t:

    A_pg  = (r_pg - mean_g r) / (std_g r + 1e-6)                        the same for every thread of the rollout
    rho_t = exp(log pi(t) - log pi_old(t))        d_t = log pi_ref(t) - log pi(t)
    loss  = - sum_t w_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + kl_weight sum_t v_t (e^d_t - d_t - 1)
    "call": w_t = 1 / (n_c C_g C), v_t = 1 / (n_c C)   "token": w = v = 1 / tokens
    "rollout": w_t = v_t = 1 / (rollout_constant rollouts)
    "thread": w_t = v_t = 1 / (ids of the thread x threads of the rollout x rollouts)

log pi is the policy's at `grpo.temperature`, at which the rollouts are sampled too.

A variant is a small function in a table, and a switch of `configs/grpo.py` names it. Every variant is tested by
numbers worked out by hand.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import records
from checks import Checked, above, at_least, one_of, require, within
from packing import TokenBatch
from records import Rollout, Thread
from train_state import LossFn, TokenStats

# ------------------------------------------------------------------- advantages of rewards [P, G] within their groups


def centred(rewards_PG: np.ndarray) -> np.ndarray:
    """r - mean_g r (Dr.GRPO, arXiv 2503.20783); zeros for a group of equal rewards, whatever the rounding."""
    difference = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    return np.where(np.ptp(rewards_PG, axis=1, keepdims=True) == 0, 0.0, difference)


def standardised(rewards_PG: np.ndarray) -> np.ndarray:
    """(r - mean_g r) / std_g r (GRPO, arXiv 2402.03300)."""
    return centred(rewards_PG) / (rewards_PG.std(axis=1, keepdims=True) + 1e-6)


def leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    """r - mean of the other rewards of the group (RLOO, arXiv 2402.14740)."""
    return centred(rewards_PG) * rewards_PG.shape[1] / (rewards_PG.shape[1] - 1)


ADVANTAGES = {"std": standardised, "mean": centred, "leave_one_out": leave_one_out}

# ------------------------------------------------------------------- KL towards the reference, of d = log ref - log pi


def k1(d: Array) -> Array:
    """Value -d, gradient of k2: the gradient of -d has mean zero, so it would not pull the policy back."""
    return k2(d) + jax.lax.stop_gradient(-d - k2(d))


def k2(d: Array) -> Array:
    """d^2 / 2: biased, and its gradient in the mean is that of the divergence."""
    return d**2 / 2


def k3(d: Array) -> Array:
    """exp(d) - d - 1: unbiased and never negative (paper; Schulman, 2020)."""
    return jnp.exp(d) - d - 1


ESTIMATORS: dict[str, Callable[[Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}

# ------------------------------------------------------------------- threads of a rollout that are trained on


def everyone(rollout: Rollout) -> list[Thread]:
    """Parent and children (paper)."""
    return rollout.threads()


def parent(rollout: Rollout) -> list[Thread]:
    """The root alone: what children sample has no gradient (PARL, Kimi K2.5). They still share its parameters."""
    return [rollout.root]


CREDITS: dict[str, Callable[[Rollout], list[Thread]]] = {"all": everyone, "parent": parent}

# ------------------------------------------------------------------- weights (policy, KL) of each token of a call


class Sizes(typing.NamedTuple):
    """Sizes that the weight of a call's tokens depends on. Calls and threads count if they hold sampled ids."""

    tokens: int  # of the call
    thread: int  # tokens of its thread
    calls: int  # of its rollout
    threads: int  # of its rollout


class Totals(typing.NamedTuple):
    """What the weights of a batch are divided by."""

    rollouts: int
    calls: int  # with sampled ids
    tokens: int
    constant: float


def per_call(own: Sizes, batch: Totals) -> tuple[float, float]:
    """Mean over the tokens of a call, the calls of its rollout, and all calls; KL without the second (paper)."""
    return 1 / (own.tokens * own.calls * batch.calls), 1 / (own.tokens * batch.calls)


def per_token(own: Sizes, batch: Totals) -> tuple[float, float]:
    """Mean over all tokens (DAPO, arXiv 2503.14476)."""
    return 1 / batch.tokens, 1 / batch.tokens


def per_rollout(own: Sizes, batch: Totals) -> tuple[float, float]:
    """Sum over the tokens of a rollout / a constant, mean over rollouts (Dr.GRPO)."""
    weight = 1 / (batch.constant * batch.rollouts)
    return weight, weight


def per_thread(own: Sizes, batch: Totals) -> tuple[float, float]:
    """Mean over the tokens of a thread, the threads of its rollout, and rollouts (WideSeek-R1, arXiv 2602.04634)."""
    weight = 1 / (own.thread * own.threads * batch.rollouts)
    return weight, weight


AGGREGATES = {"call": per_call, "token": per_token, "rollout": per_rollout, "thread": per_thread}

# ------------------------------------------------------------------- weight of the structure bonus at a step (from 1)


def always(step: int, steps: int, share: float) -> float:
    """1 at every step."""
    return 1.0


def alternate(step: int, steps: int, share: float) -> float:
    """1 in a `share` of the steps, evenly spread, else 0: 0.2 is every fifth (Parallel-R1, arXiv 2509.07980)."""
    so_far, before = (math.floor(n * share + 1e-9) for n in (step, step - 1))  # 100 * 0.29 is 28.999...
    return float(so_far > before)


def anneal(step: int, steps: int, share: float) -> float:
    """From 1 in a straight line to 0 over the first `share` of the steps, then 0 (PARL, Kimi K2.5)."""
    return max(0.0, 1 - (step - 1) / (share * steps))


REWARD = within(0, 1000)  # weights of bonuses and penalties: a reward is finite whatever a rollout did
SCHEDULES = {"always": always, "alternate": alternate, "anneal": anneal}


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Checked):
    """The switches of a step. Raises ValueError on an unknown choice or a number out of bounds."""

    section = "grpo"
    steps: Annotated[int, at_least(1)]
    problems: Annotated[int, at_least(1)]  # per step
    rollouts: Annotated[int, at_least(2)]  # per problem: the group
    updates: Annotated[int, at_least(1)]  # inner updates per step
    temperature: Annotated[float, within(1e-3, 1e9)]  # of the policy, in rollouts and in the loss
    advantage: Annotated[str, one_of(*ADVANTAGES)]
    clip_low: Annotated[float, at_least(0)]
    clip_high: Annotated[float, at_least(0)]
    kl_estimator: Annotated[str, one_of(*ESTIMATORS)]
    kl_weight: Annotated[float, at_least(0)]
    loss: Annotated[str, one_of("clip", "apa")]
    apa_lambda: Annotated[float, above(0)]  # with "apa": how far an advantage of 1 moves a log-prob
    reference: Annotated[str, one_of("start", "flat")]  # "flat": the policy, once the reward no longer rises
    credit: Annotated[str, one_of(*CREDITS)]
    aggregate: Annotated[str, one_of(*AGGREGATES)]
    rollout_constant: Annotated[float, above(0)]  # ids that "rollout" divides by
    old_logp: Annotated[str, one_of("sampler", "trainer")]  # whose log-probs the ratio compares with
    tis_cap: Annotated[float, at_least(0)]  # with "trainer": weights min(trainer / sampler, cap); 0 is off
    dead_groups: Annotated[str, one_of("keep", "drop", "refill")]  # groups of equal rewards
    format_reward: Annotated[float, REWARD]
    acceleration: Annotated[float, REWARD]
    acceleration_cap: Annotated[float, at_least(0)]
    thread_penalty: Annotated[float, REWARD]
    token_penalty: Annotated[float, REWARD]
    free_tokens: Annotated[float, at_least(0)]
    concurrency: Annotated[float, REWARD]
    concurrency_cap: Annotated[float, at_least(1)]  # active workers
    structure: Annotated[float, REWARD]
    structure_schedule: Annotated[str, one_of(*SCHEDULES)]
    structure_share: Annotated[float, above(0), within(0, 1)]  # of the steps

    @property
    def compares(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return self.kl_weight > 0 or self.loss == "apa"

    def check(self) -> None:
        """Checks the importance weights and the reference."""
        ours = not self.tis_cap or self.old_logp == "trainer"
        require(ours, "grpo.tis_cap corrects the trainer's log-probs: set grpo.old_logp='trainer'")
        read = self.reference == "start" or self.compares
        require(read, "grpo.reference='flat' changes nothing where grpo.kl_weight=0: set grpo.loss='apa', or a weight")


# ------------------------------------------------------------------- reward


def acceleration(costs: dict[str, float], config: GrpoConfig) -> float:
    """Bonus of a correct rollout for parallelism (ThreadWeaver, arXiv 2512.07843).

    min(1 - sequential / total tokens, cap).
    """
    saved = 1 - costs["sequential_tokens"] / max(costs["total_tokens"], 1)
    return config.acceleration * min(saved, config.acceleration_cap)


def concurrency(costs: dict[str, float], config: GrpoConfig) -> float:
    """Bonus of a correct rollout for the mean number of active workers over the critical path, up to a cap.

    min(total / sequential tokens, cap) / cap, in (0, 1] (AsyncThink, arXiv 2510.26658: the threshold tau is the cap;
    their pool has a fixed size, ours has none). Children that nobody joined count too.
    """
    workers = costs["total_tokens"] / max(costs["sequential_tokens"], 1)
    return config.concurrency * min(workers / config.concurrency_cap, 1.0)


def structure(costs: dict[str, float], config: GrpoConfig, step: int) -> float:
    """Bonus for having spawned at all, right or wrong, weighted by the schedule (PARL's r_parallel)."""
    weight = SCHEDULES[config.structure_schedule](step, config.steps, config.structure_share)
    return config.structure * weight * (costs["children"] > 0)


def reward(rollout: Rollout, config: GrpoConfig, step: int) -> float:
    """1 and the bonuses of a correct rollout, `format_reward` of a wrong answer; plus structure, minus penalties."""
    costs, grade = records.metrics(rollout), rollout.grade
    penalty = config.thread_penalty * costs["children"]
    penalty += config.token_penalty * max(0.0, costs["total_tokens"] - config.free_tokens)
    right = 1 + acceleration(costs, config) + concurrency(costs, config)
    earned = right if grade.correct else config.format_reward * bool(grade.answer)
    return earned + structure(costs, config, step) - penalty


# ------------------------------------------------------------------- loss


def clip(logp: Array, batch: TokenBatch, config: GrpoConfig) -> tuple[Array, Array]:
    """Minus the clipped objective of the module header, and whether it is clipped, per token [R, T]."""
    ratio = jnp.exp(jnp.where(batch.sampled, logp - batch.old_logp, 0.0))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    policy = -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    return policy, clipped * batch.advantage < ratio * batch.advantage


def apa(logp: Array, batch: TokenBatch, config: GrpoConfig) -> tuple[Array, Array]:
    """(log pi - lambda A - log pi_ref)^2 per token [R, T], never clipped (APA; Stream of Search, arXiv 2404.03683).

    Its advantage comes from a value head, ours from the group. It has no other penalty: kl_weight = 0 is theirs.
    """
    aim = config.apa_lambda * batch.advantage + batch.ref_logp
    return jnp.where(batch.sampled, logp - aim, 0.0) ** 2, jnp.zeros_like(batch.sampled)


LOSSES: dict[str, Callable[[Array, TokenBatch, GrpoConfig], tuple[Array, Array]]] = {"clip": clip, "apa": apa}


def grpo_loss(config: GrpoConfig) -> LossFn:
    """The loss that the config names, with a penalty towards the reference (module header), per token [R, T]."""

    def loss(out: TokenStats, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics of every token, each [R, T]."""
        policy, clipped = LOSSES[config.loss](out.logp, batch, config)
        kl = ESTIMATORS[config.kl_estimator](jnp.where(batch.sampled, batch.ref_logp - out.logp, 0.0))
        metrics = {"clipped": (clipped & batch.sampled).astype(jnp.float32), "kl": kl * batch.sampled}
        return batch.weight * policy + config.kl_weight * batch.kl_weight * kl, metrics

    return loss

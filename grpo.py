"""Stage two: reinforcement learning decides when, how and how widely to spawn (paper, section 3.4).

    python grpo.py                                   # from runs/apr, else from the shipped run
    python grpo.py --init=runs/sosp                  # from any other supervised run
    python grpo.py --config=configs/grpo.py:smoke    # the same path in a minute

One step:
  1. draw P problems and run G rollouts of each through the parallel runtime;
  2. grade them with the one grader and shape the reward (`reward`);
  3. advantage of a rollout = its reward against its group (`advantages`); every
     thread of the rollout, parent and children, gets the same;
  4. pack the sampled ids of every thread, with their log-probs under the sampler
     (or the trainer) and the reference, and per-token weights computed once over the
     whole batch (`weigh`), so that micro-batches cannot mix or rescale groups;
  5. take the inner updates: the same `train_step` as SFT, with `grpo_loss`; the
     first tells how far the trainer's log-probs are from the sampler's (`mismatch`).

The paper's objective (PPO clip, KL towards the starting policy, unit of loss one
call) is the `paper` preset; what users of such code ask for are switches of
`configs/grpo.py`, each tested by hand-worked numbers.

Deviations from the paper: injected ids (prompts, joined messages) carry no
gradient; a parent with joins is encoded once (`packing.py`), not once per call.
"""

from __future__ import annotations

import os
import pathlib
import time
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from ml_collections import ConfigDict, config_flags

import parallel_runtime
from evaluate import PRETRAINED, heldout, report
from experiment import Experiment
from packing import Segment, TokenBatch, pack_all, segments
from parallel_runtime import Request, Rollout
from train_state import LossFn, Outputs, TrainState, make_score, make_train_step, placed_state, stack
from workdir import Progress, UsageError, Workdir, holds_parameters, launch, load_best, read_config, usage_errors

ADVANTAGES = ("std", "mean", "leave_one_out")
ESTIMATORS = ("k1", "k2", "k3")
AGGREGATES = ("call", "token", "rollout")
DEAD_GROUPS = ("keep", "drop", "refill")
REFILL_ROUNDS = 4  # draws of fresh problems before a step goes on with the groups it has


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, on a switch with no such position or a number that cannot work."""
    for name, choices in (
        ("advantage", ADVANTAGES),
        ("kl_estimator", ESTIMATORS),
        ("aggregate", AGGREGATES),
        ("dead_groups", DEAD_GROUPS),
        ("old_logp", ("sampler", "trainer")),
    ):
        if config[name] not in choices:
            raise ValueError(f"grpo.{name} must be one of {', '.join(choices)}, not {config[name]!r}")
    least = dict.fromkeys(("steps", "problems", "updates", "eval_every"), 1) | {"rollouts": 2}  # 2 to compare
    least |= dict.fromkeys(("clip_low", "clip_high", "kl_weight", "importance_cap"), 0)
    for name, bound in least.items():
        if config[name] < bound:
            raise ValueError(f"grpo.{name}={config[name]} must be at least {bound}")
    for name in ("temperature", "rollout_constant"):
        if config[name] <= 0:
            raise ValueError(f"grpo.{name}={config[name]} must be above 0")
    if config.importance_cap and config.old_logp != "trainer":
        raise ValueError("grpo.importance_cap corrects the trainer's log-probs: set grpo.old_logp='trainer'")


# ------------------------------------------------------------------- reward, advantage, weights (NumPy)


def reward(rollout: Rollout, config: ConfigDict) -> float:
    """1 if correct, plus a bonus for parallelism (only if correct), minus penalties for threads and tokens.

    Bonus: acceleration * min(1 - sequential / total tokens, acceleration_cap) (ThreadWeaver). Penalties:
    `thread_penalty` per child, `token_penalty` per token beyond `token_budget`.
    """
    costs = parallel_runtime.metrics(rollout)
    correct = float(rollout.grade.correct)
    saved = 1 - costs["sequential_tokens"] / max(costs["total_tokens"], 1)
    beyond = max(0.0, costs["total_tokens"] - config.token_budget)
    bonus = config.acceleration * min(saved, config.acceleration_cap)
    return correct * (1 + bonus) - config.thread_penalty * costs["children"] - config.token_penalty * beyond


def advantages(rewards_PG: np.ndarray, kind: str) -> np.ndarray:
    """Advantage [P, G] of every rollout within its group.

    "std": (r - mean) / std (GRPO); "mean": r - mean (Dr.GRPO); "leave_one_out": r - mean of the others (RLOO).
    A group of equal rewards gets zeros.
    """
    centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred = np.where(np.ptp(rewards_PG, axis=1, keepdims=True) == 0, 0.0, centred)
    if kind == "std":
        return centred / (rewards_PG.std(axis=1, keepdims=True) + 1e-6)
    if kind == "leave_one_out":
        return centred * rewards_PG.shape[1] / (rewards_PG.shape[1] - 1)
    return centred


def weigh(rollouts: Sequence[Rollout], aggregate: str, constant: float) -> list[dict[tuple[int, int], tuple]]:
    """Per rollout: (id of thread, call) -> (weight, KL weight) of each sampled token of that call.

    "call" (paper): mean over the tokens of a call, divided by the calls of its rollout, mean over all calls
    of the batch; the KL term is not divided by the calls of the rollout. "token": mean over all tokens.
    "rollout": sum over a rollout's tokens / `constant`, mean over rollouts. Calls without ids weigh nothing.
    """
    sizes = [
        {(id(t), n): len(c.sampled) for t in r.threads() for n, c in enumerate(t.calls) if c.sampled} for r in rollouts
    ]
    calls, tokens = sum(map(len, sizes)), sum(sum(size.values()) for size in sizes)
    result = []
    for size in sizes:
        if aggregate == "call":
            result.append({key: (1 / (n * len(size) * calls), 1 / (n * calls)) for key, n in size.items()})
        else:
            weight = 1 / tokens if aggregate == "token" else 1 / (constant * len(rollouts))
            result.append({key: (weight, weight) for key in size})
    return result


# ------------------------------------------------------------------- loss (JAX)


def grpo_loss(config: ConfigDict) -> LossFn:
    """The clipped objective with a penalty towards the reference (PAPER: rho, A, k3), per token [R, T].

    "k1" has the gradient of "k2": its own is zero in the mean, so that it would hold the policy to nothing.
    """

    def loss(out: Outputs, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
        ratio = jnp.exp(jnp.where(batch.sampled, out.logp - batch.old_logp, 0.0))
        clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        policy = -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
        difference = jnp.where(batch.sampled, batch.ref_logp - out.logp, 0.0)
        k2 = difference**2 / 2
        kl = {
            "k1": k2 + jax.lax.stop_gradient(-difference - k2),
            "k2": k2,
            "k3": jnp.exp(difference) - difference - 1,
        }[config.kl_estimator]
        active = (clipped * batch.advantage < ratio * batch.advantage) & batch.sampled
        metrics = {"clipped": active.astype(jnp.float32), "kl": kl * batch.sampled}
        return batch.weight * policy + config.kl_weight * batch.kl_weight * kl, metrics

    return loss


# ------------------------------------------------------------------- one step


class Collected(typing.NamedTuple):
    """The rollouts of a step: groups of G, their rewards and advantages [groups, G]."""

    groups: list[list[Rollout]]
    rewards: np.ndarray
    advantages: np.ndarray

    def live(self) -> Collected:
        """Without the groups of equal rewards."""
        alive = np.flatnonzero(np.ptp(self.rewards, axis=1) > 0)
        return Collected([self.groups[i] for i in alive], self.rewards[alive], self.advantages[alive])


def collect(experiment: Experiment, params: typing.Any, step: int, cursor: int) -> tuple[Collected, int]:
    """Runs and grades the rollouts of a step; returns them and the next problem's number.

    "refill" goes on to fresh problems, for a few rounds, until there are P groups with a signal.
    """
    config = experiment.config.grpo
    groups: list[list[Rollout]] = []
    missing = config.problems
    for _ in range(REFILL_ROUNDS if config.dead_groups == "refill" else 1):
        drawn = [experiment.problem("train", experiment.config.seed, cursor + i) for i in range(missing)]
        cursor += missing
        requests = [Request(problem, index) for problem in drawn for index in range(config.rollouts)]
        rollouts = experiment.rollouts(params, 1.0, requests, (experiment.config.seed, step))
        groups += [rollouts[i : i + config.rollouts] for i in range(0, len(rollouts), config.rollouts)]
        rewards = np.asarray([[reward(rollout, config) for rollout in group] for group in groups], np.float64)
        missing = config.problems - int((np.ptp(rewards, axis=1) > 0).sum())
        if missing <= 0:
            break
    return Collected(groups, rewards, advantages(rewards, config.advantage)), cursor


def make_batches(
    collected: Collected, config: ConfigDict, rows: int
) -> tuple[list[TokenBatch], list[tuple[int, int, slice, Segment]]]:
    """Packs all threads of the step into batches of so many rows, with weights, advantages and sampler's log-probs."""
    rollouts = [rollout for group in collected.groups for rollout in group]
    owner = {id(thread): number for number, rollout in enumerate(rollouts) for thread in rollout.threads()}
    weights = weigh(rollouts, config.grpo.aggregate, config.grpo.rollout_constant)
    pieces = [piece for r in rollouts for thread in r.threads() for piece in segments(thread, config.model.context)]
    batches, where = pack_all(pieces, rows, config.model.context)
    for number, row, columns, piece in where:
        rollout = owner[id(piece.thread)]
        pairs = [weights[rollout].get((id(piece.thread), call), (0.0, 0.0)) for call in piece.calls]
        batch = batches[number]
        batch.weight[row, columns], batch.kl_weight[row, columns] = np.asarray(pairs, np.float32).T
        batch.advantage[row, columns] = collected.advantages.reshape(-1)[rollout] * batch.sampled[row, columns]
    return batches, where


def mismatch(batch: TokenBatch, trainer: np.ndarray, where: list[tuple[int, int, slice, Segment]]) -> dict[str, float]:
    """Largest |sampler - trainer| log-prob over the sampled ids of parents, children, and calls after a join.

    `batch` [M, R, T] holds the sampler's log-probs, `trainer` [M, R, T] the trainer's.
    """
    largest = dict.fromkeys(("parent", "child", "joined"), 0.0)
    gap = np.abs(batch.old_logp - trainer) * batch.sampled
    for number, row, columns, piece in where:
        values = gap[number, row, columns]
        calls = np.asarray(piece.calls)
        kind = "child" if piece.thread.path else "parent"
        largest[kind] = max(largest[kind], values[calls <= 0].max())
        if (calls > 0).any():
            largest["joined"] = max(largest["joined"], values[calls > 0].max())
    return {f"mismatch_{kind}": float(value) for kind, value in largest.items()}


def describe(collected: Collected) -> dict[str, float]:
    """What the policy does: accuracy, costs, rates and reward spread of a step's rollouts."""
    rollouts = [rollout for group in collected.groups for rollout in group]
    costs = [parallel_runtime.metrics(rollout) for rollout in rollouts]
    threads = [thread for rollout in rollouts for thread in rollout.threads()]
    means = {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}
    return {
        **means,
        "sampled_accuracy": float(np.mean([rollout.grade.correct for rollout in rollouts])),
        "tokens_per_thread": sum(cost["total_tokens"] for cost in costs) / len(threads),
        "spawn_rate": float(np.mean([bool(rollout.root.spawns) for rollout in rollouts])),
        "reward": float(collected.rewards.mean()),
        "reward_spread": float(collected.rewards.std(axis=1).mean()),
        "live_groups": float((np.ptp(collected.rewards, axis=1) > 0).mean()),
    }


class Trainer:
    """The compiled functions of a run and the reference policy."""

    def __init__(self, experiment: Experiment, reference: typing.Any) -> None:
        config = experiment.config
        self.experiment, self.reference = experiment, reference
        self.optimizer = experiment.optimizer()
        self.train_step = make_train_step(experiment.model, self.optimizer, grpo_loss(config.grpo), experiment.mesh)
        self.score = make_score(experiment.model, experiment.mesh)

    def step(self, state: TrainState, number: int, cursor: int) -> tuple[TrainState, dict[str, float], int]:
        """Rollouts, then the inner updates; returns the state, the step's metrics and the next problem's number."""
        config = self.experiment.config
        began, spent = time.perf_counter(), self.experiment.sampler_seconds(1.0)
        collected, cursor = collect(self.experiment, state.params, number, cursor)
        rolled = time.perf_counter()
        described = describe(collected)
        sampling = self.experiment.sampler_seconds(1.0)
        described |= {f"rollout_{part}": sampling[part] - spent[part] for part in spent}
        if config.grpo.dead_groups != "keep":
            collected = collected.live()
        if not collected.groups:
            return state, {**described, "rollout_seconds": rolled - began}, cursor
        batches, where = make_batches(collected, config, config.train.micro_rows * self.experiment.devices)
        batch = stack(batches)
        packed = time.perf_counter()
        drawn = batch  # with the sampler's log-probs
        if config.grpo.old_logp == "trainer":
            batch = batch._replace(old_logp=np.asarray(self.score(state.params, batch)))
        if config.grpo.importance_cap:
            ratio = np.exp(np.where(batch.sampled, batch.old_logp - drawn.old_logp, 0))
            batch = batch._replace(weight=batch.weight * np.minimum(ratio, config.grpo.importance_cap))
        reference = np.asarray(self.score(self.reference, batch)) if config.grpo.kl_weight else batch.old_logp
        batch = batch._replace(ref_logp=reference)
        scored = time.perf_counter()
        state, metrics, trainer = self.train_step(state, batch)
        for _ in range(config.grpo.updates - 1):
            state, metrics, _ = self.train_step(state, batch)
        metrics, trainer = jax.device_get((metrics, trainer))
        tokens = max(metrics["tokens"], 1)
        values = {**described, **mismatch(drawn, trainer, where)}
        values |= {name: float(metrics[name]) for name in ("loss", "grad_norm", "entropy")}
        values["clip_share"] = float(metrics["clipped"] / tokens)
        if config.grpo.kl_weight:  # else nothing knows the reference's log-probs
            values["kl"] = float(metrics["kl"] / tokens)
        values |= {
            "rollout_seconds": rolled - began,
            "pack_seconds": packed - rolled,
            "score_seconds": scored - packed,
            "update_seconds": time.perf_counter() - scored,
        }
        return state, values, cursor


def train(experiment: Experiment, workdir: Workdir, reference: typing.Any) -> None:
    """Runs or resumes the loop; leaves checkpoints and the best parameters in `workdir`."""
    config = experiment.config
    optimizer = experiment.optimizer()
    state = placed_state(optimizer, experiment.mesh, reference)
    reference = jax.tree.map(jnp.copy, state.params)  # the state's own are donated to the next
    trainer = Trainer(experiment, reference)
    extra: dict[str, typing.Any] = {"step": 0, "cursor": 0, "best": -1.0}
    if (restored := workdir.restore(state)) is not None:
        state, extra = restored
    else:
        _validate(experiment, workdir, state, extra)
        workdir.save(0, state, extra)
    progress = Progress(config.grpo.steps, extra["step"], "step")
    while extra["step"] < config.grpo.steps:
        extra["step"] += 1
        state, values, extra["cursor"] = trainer.step(state, extra["step"], extra["cursor"])
        if not np.isfinite(values.get("loss", 0.0)):
            raise UsageError(f"the loss is {values['loss']} at step {extra['step']}: lower optimizer.learning_rate")
        workdir.log(extra["step"], values)
        progress.update(extra["step"], _line(values))
        if extra["step"] % config.grpo.eval_every == 0 or extra["step"] == config.grpo.steps:
            _validate(experiment, workdir, state, extra)
            workdir.save(extra["step"], state, extra)
    progress.close()


def _line(values: dict[str, float]) -> str:
    if "loss" not in values:
        return f"reward {values['reward']:.3f}  no group with a signal"
    worst = max(values[f"mismatch_{kind}"] for kind in ("parent", "child", "joined"))
    drift = f"KL {values['kl']:.4f}  " if "kl" in values else ""
    return (
        f"reward {values['reward']:.3f}  accuracy {values['sampled_accuracy']:.3f}  threads {values['children']:.1f}  "
        f"tokens {values['total_tokens']:.0f}  {drift}clipped {values['clip_share']:.3f}  mismatch {worst:.0e}"
    )


def _validate(experiment: Experiment, workdir: Workdir, state: TrainState, extra: dict) -> None:
    """Solves the validation problems; keeps the parameters if they are the best so far."""
    found = heldout(experiment, state.params)
    accuracy = found["accuracy"]
    workdir.log(extra["step"], {f"heldout_{name}": value for name, value in found.items()})
    text = f"held-out accuracy {accuracy:.3f} ({found['low']:.3f}-{found['high']:.3f})"
    text += f" with {found['children']:.1f} children"
    print(f"step {extra['step']}: {text}", flush=True)
    if accuracy >= extra["best"]:  # of equals the one trained longest
        extra["best"] = accuracy
        workdir.save_best(extra["step"], state.params, {"validation_accuracy": accuracy})


# ------------------------------------------------------------------- command line


def start_from(named: str | None, suffix: str) -> pathlib.Path:
    """The run to start from: the one named, else APR's of the preset, one's own or the shipped one.

    Raises UsageError if none is there.
    """
    if named is not None:
        return pathlib.Path(named)
    for folder in (pathlib.Path("runs"), PRETRAINED.parent):
        if holds_parameters(folder / f"apr{suffix}"):
            return folder / f"apr{suffix}"
    if suffix == "-smoke":  # any small model will do
        return PRETRAINED
    preset = suffix.replace("-", ":")
    raise UsageError(
        f"there is no supervised run to start from: name one with --init, "
        f"or run `python sft.py --config=configs/apr.py{preset}` first"
    )


def combine(start: pathlib.Path, config: ConfigDict) -> ConfigDict:
    """The supervised run's config with the fields of an RL recipe laid over it."""
    combined = ConfigDict(read_config(start))
    combined.name = f"{config.name}-{combined.name.removesuffix(config.suffix)}{config.suffix}"
    with combined.unlocked():
        for field in ("seed", "grpo", "prompt", "evaluation", "limits", "mesh"):
            combined[field] = config[field]
        combined.optimizer = ConfigDict(dict(config.optimizer, steps=config.grpo.steps * config.grpo.updates))
        combined.train.eval_problems = config.eval_problems
        combined.model.temperature = config.grpo.temperature
        # Not as the supervised run was evaluated: rollouts must come from the policy itself.
        combined.sampler.update(rows=config.rows, temperature=config.eval_temperature, top_k=0, top_p=1.0)
        combined.init = os.path.relpath(start)
    return combined


def main(_: list[str]) -> None:
    """Trains from the start the flags name, then evaluates the best parameters and prints the report."""
    start = start_from(flags.FLAGS.init, flags.FLAGS.config.suffix)
    with usage_errors():
        config = combine(start, flags.FLAGS.config)
        check(config.grpo)
        experiment = Experiment(config)
        experiment.validation_set()
    params, result = load_best(start, experiment.param_shapes())
    workdir = Workdir(flags.FLAGS.workdir or f"runs/{config.name}", config)
    origin = f"{start} (step {result['step']})"
    print(f"{config.name}: from {origin}, {config.grpo.steps} steps, in {workdir.path}", flush=True)
    train(experiment, workdir, params)
    best, result = load_best(workdir.path, experiment.param_shapes())
    report(experiment, best, experiment.test_set(), workdir.path, result["step"])


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", "configs/grpo.py", "Recipe, with an optional :preset.")
    flags.DEFINE_string("init", None, "Supervised run to start from (default: APR's of the preset, own or shipped).")
    flags.DEFINE_string("workdir", None, "Where the run lives (default: runs/<config name>).")


if __name__ == "__main__":
    launch(define_flags, main)

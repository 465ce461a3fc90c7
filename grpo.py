"""Stage two: reinforcement learning decides when, how and how widely to spawn (paper, section 3.4).

    python grpo.py                                   # from runs/apr, else from the shipped run
    python grpo.py --init=runs/sosp                  # from any other supervised run
    python grpo.py --config=configs/grpo.py:smoke    # the same path in a minute

One step:
  1. draw P problems and run G rollouts of each through the parallel runtime;
  2. grade them with the one grader and shape the reward (`objective.reward`);
  3. advantage of a rollout = its reward against its group (`objective.ADVANTAGES`). Every thread of the rollout,
     parent and children, gets the same;
  4. attach to the segments of every thread its advantage and the weights of its tokens, computed once over the whole
     batch (`objective.AGGREGATES`), so that micro-batches cannot mix or rescale groups; then pack them;
  5. take the inner updates: the same `train_step` as SFT, with `grpo_loss`. The first one tells how far the
     trainer's log-probs are from the sampler's (`sampler_trainer_gap`).

`objective.py` has the formulas. The presets smoke, gpu and paper have the paper's objective.

Deviations from the paper: injected ids (prompts, join blocks) carry no gradient; a parent with joins is encoded
once (`packing.py`), not once per call.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import records
from checks import require
from harness import command, loop
from harness.build import Parts, build, field_errors
from harness.cli import UsageError, usage_errors
from harness.evaluation import fingerprint
from harness.plan import plan
from harness.processes import launch
from harness.reference import Reference
from harness.rollouts import RolloutPool
from harness.workdir import PRETRAINED, Workdir, holds_parameters, load_best, read_config
from objective import ADVANTAGES, AGGREGATES, CREDITS, GrpoConfig, Sizes, Totals, grpo_loss, reward
from packing import Segment, TokenBatch, lay_out, pack, pad_microbatches, places, segments, to_microbatches
from protocols import Request
from records import Rollout
from train_state import TrainState, make_score, make_train_step, state_from_params

REFILL_ROUNDS = 4  # draws of problems, the first included, before a step goes on with the groups it has

# ------------------------------------------------------------------- rollouts of a step


class Collected(typing.NamedTuple):
    """The rollouts of a step: groups of G, their rewards and advantages [groups, G]."""

    groups: list[list[Rollout]]
    rewards: np.ndarray
    advantages: np.ndarray

    def with_signal(self) -> Collected:
        """Without the groups of equal rewards."""
        alive = np.flatnonzero(np.ptp(self.rewards, axis=1) > 0)
        return Collected([self.groups[i] for i in alive], self.rewards[alive], self.advantages[alive])


def collect(pool: RolloutPool, config: GrpoConfig, params: typing.Any, step: int, cursor: int) -> tuple[Collected, int]:
    """Runs and grades the rollouts of a step; returns them and the number of the next problem.

    "refill" goes on to fresh problems, for a few rounds, until there are P groups with a signal.
    """
    seed = pool.parts.config.seed
    groups: list[list[Rollout]] = []
    drawn: list[typing.Any] = []
    missing = config.problems
    for _ in range(REFILL_ROUNDS if config.dead_groups == "refill" else 1):
        requests = []
        for number in range(cursor, cursor + missing):
            problem = pool.parts.domain.problem("train", seed, number)
            first = config.rollouts * drawn.count(problem)  # a problem that is drawn twice has two different groups
            requests += [Request(problem, first + index) for index in range(config.rollouts)]
            drawn.append(problem)
        cursor += missing
        rollouts = pool.run(params, config.temperature, requests, (seed, step))
        groups += [rollouts[i : i + config.rollouts] for i in range(0, len(rollouts), config.rollouts)]
        rewards = np.asarray([[reward(rollout, config, step) for rollout in group] for group in groups], np.float64)
        missing = config.problems - int((np.ptp(rewards, axis=1) > 0).sum())
        if missing <= 0:
            break
    return Collected(groups, rewards, ADVANTAGES[config.advantage](rewards)), cursor


def make_segments(collected: Collected, config: GrpoConfig, length: int) -> list[Segment]:
    """Segments of the threads that are trained on, of at most `length` tokens, with weights and advantages attached.

    docs/how_it_works.md, section 5, works the weights by hand.
    """
    trained = [CREDITS[config.credit](rollout) for group in collected.groups for rollout in group]
    # sizes[rollout][thread][call]: ids sampled
    sizes = [[[len(call.sampled) for call in thread.calls] for thread in threads] for threads in trained]
    calls = [sum(n > 0 for counts in threads for n in counts) for threads in sizes]
    tokens = sum(sum(map(sum, threads)) for threads in sizes)
    totals = Totals(len(trained), sum(calls), tokens, config.rollout_constant)
    weigh = AGGREGATES[config.aggregate]
    pieces = []
    for threads, counts, num_calls, advantage in zip(trained, sizes, calls, collected.advantages.flat, strict=True):
        active = sum(map(any, counts))
        for thread, ids in zip(threads, counts, strict=True):
            weights = [weigh(Sizes(n, sum(ids), num_calls, active), totals) if n else (0.0, 0.0) for n in ids]
            for piece in segments(thread, length):
                piece.weights, piece.advantage = weights, advantage
                pieces.append(piece)
    return pieces


def sampler_trainer_gap(batch: TokenBatch, trainer: np.ndarray, rows: Sequence[Sequence[Segment]]) -> dict[str, float]:
    """Largest |sampler - trainer| log-prob over the sampled ids of parents, children, and calls after a join.

    `batch` [M, R, T] of the `rows` holds the sampler's log-probs, `trainer` [M, R, T] the trainer's.
    """
    largest = dict.fromkeys(("parent", "child", "joined"), 0.0)
    gap_RT = (np.abs(batch.old_logp - trainer) * batch.sampled).reshape(-1, trainer.shape[-1])
    for row, columns, piece in places(rows):
        values, calls = gap_RT[row, columns], np.asarray(piece.calls)
        kind = "child" if piece.thread.path else "parent"
        largest[kind] = np.maximum(largest[kind], values[calls <= 0].max())  # NaN stays NaN
        if (calls > 0).any():
            largest["joined"] = np.maximum(largest["joined"], values[calls > 0].max())
    return {f"sampler_trainer_gap_{kind}": float(value) for kind, value in largest.items()}


def describe(collected: Collected) -> dict[str, float]:
    """What the policy does: accuracy, costs, rates and reward spread of a step's rollouts."""
    rollouts = [rollout for group in collected.groups for rollout in group]
    costs = [records.metrics(rollout) for rollout in rollouts]
    threads = [thread for rollout in rollouts for thread in rollout.threads()]
    logprobs = [logprob for thread in threads for call in thread.calls for logprob in call.logprobs]
    means = {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}
    return {
        **means,
        "sampled_accuracy": float(np.mean([rollout.grade.correct for rollout in rollouts])),
        "sampled_logprob": float(np.mean(logprobs)),
        "tokens_per_thread": sum(cost["total_tokens"] for cost in costs) / len(threads),
        "spawn_rate": float(np.mean([bool(rollout.root.spawns) for rollout in rollouts])),
        "reward": float(collected.rewards.mean()),
        "reward_spread": float(collected.rewards.std(axis=1).mean()),
        "live_groups": float((np.ptp(collected.rewards, axis=1) > 0).mean()),
    }


# ------------------------------------------------------------------- one step


class Trainer:
    """The `loop.Stage` of reinforcement learning: its compiled functions, reference policy and data cursor."""

    validates_start = True
    batch: TokenBatch | None = None

    def __init__(self, pool: RolloutPool, reference: Reference) -> None:
        self.pool, self.parts, self.reference = pool, pool.parts, reference
        self.config = config = GrpoConfig(**self.parts.config.grpo)
        self.steps, self.log_every, self.eval_every = config.steps, 1, self.parts.train.eval_every
        self.next_problem = 0
        self.loss, self.temperature = grpo_loss(config), config.temperature
        model, mesh = self.parts.model, self.parts.mesh
        self.train_step = make_train_step(model, self.parts.optimizer, self.loss, mesh, config.temperature)
        self.score = make_score(model, mesh, config.temperature)

    def resume(self, cursor: dict[str, typing.Any] | None) -> None:
        """Goes on with the problems, and the reference policy, at a cursor."""
        if cursor:
            self.next_problem = cursor["problem"]
            self.reference.resume(cursor["reference"])

    def cursor(self) -> dict[str, typing.Any]:
        """The number of the next problem, and where the reference policy stands."""
        return {"problem": self.next_problem, "reference": self.reference.cursor}

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
        """Rollouts, then the inner updates; returns the state and the metrics of the step."""
        config, temperature = self.config, self.config.temperature
        began, spent = time.perf_counter(), self.pool.seconds(temperature)
        collected, self.next_problem = collect(self.pool, config, state.params, number, self.next_problem)
        rolled, sampling = time.perf_counter(), self.pool.seconds(temperature)
        values = describe(collected) | {f"rollout_{part}": sampling[part] - spent[part] for part in spent}
        values["rollout_seconds"] = rolled - began
        self.batch = None
        if config.dead_groups != "keep":
            collected = collected.with_signal()
        if collected.groups:
            state, values = self._update(state, collected, values)
        if config.reference == "flat":
            self.reference.note(number, values["reward"], state.params, number % self.eval_every == 0)
            values["reference_step"] = self.reference.step
        return state, values

    def _update(
        self, state: TrainState, collected: Collected, values: dict[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """The inner updates on the groups of a step, and its metrics added to `values`."""
        config, context = self.config, self.parts.model.config.context
        began = time.perf_counter()
        rows_per_pass = self.parts.config.train.micro_rows * self.parts.devices
        rows = pad_microbatches(pack(make_segments(collected, config, context), context), rows_per_pass)
        drawn = to_microbatches(lay_out(rows, context), rows_per_pass)  # with the sampler's log-probs
        packed = time.perf_counter()
        self.batch = batch = self._scored(state, drawn)
        scored = time.perf_counter()
        state, metrics, trainer = self.train_step(state, batch)
        for _ in range(config.updates - 1):
            state, metrics, _ = self.train_step(state, batch)
        metrics, trainer = jax.device_get((metrics, trainer))
        tokens = max(metrics["tokens"], 1)
        values |= sampler_trainer_gap(drawn, trainer, rows)
        values |= {name: float(metrics[name]) for name in ("loss", "grad_norm", "entropy")}
        values["clip_share"] = float(metrics["clipped"] / tokens)
        if config.compares:  # else nothing knows the reference's log-probs
            values["kl"] = float(metrics["kl"] / tokens)
        values["pack_seconds"], values["score_seconds"] = packed - began, scored - packed
        values["update_seconds"] = time.perf_counter() - scored
        return state, values

    def _scored(self, state: TrainState, batch: TokenBatch) -> TokenBatch:
        """The batch with the reference's log-probs. With old_logp="trainer" the trainer's replace the sampler's."""
        config, sampler = self.config, batch.old_logp
        if config.old_logp == "trainer":
            batch = batch._replace(old_logp=np.asarray(self.score(state.params, batch)))
        if config.tis_cap:
            ratio = np.exp(np.where(batch.sampled, batch.old_logp - sampler, 0))
            batch = batch._replace(weight=batch.weight * np.minimum(ratio, config.tis_cap))
        reference = np.asarray(self.score(self.reference.params, batch)) if config.compares else batch.old_logp
        return batch._replace(ref_logp=reference)

    def summary(self, pending: list[dict[str, float]], seconds: float) -> loop.Values:
        """The metrics of the one step."""
        (values,) = pending
        return values

    def line(self, values: loop.Values) -> str:
        """Reward, accuracy, costs and drift."""
        if "loss" not in values:
            return f"reward {values['reward']:.3f}  no group with a signal"
        worst = max(values[f"sampler_trainer_gap_{kind}"] for kind in ("parent", "child", "joined"))
        drift = f"KL {values['kl']:.4f}  " if "kl" in values else ""
        return (
            f"reward {values['reward']:.3f}  accuracy {values['sampled_accuracy']:.3f}  "
            f"threads {values['children']:.1f}  tokens {values['total_tokens']:.0f}  {drift}"
            f"clipped {values['clip_share']:.3f}  sampler_trainer_gap {worst:.0e}"
        )


def train(pool: RolloutPool, workdir: Workdir, reference: typing.Any) -> None:
    """Runs or resumes reinforcement learning from the parameters `reference`."""
    state = state_from_params(pool.parts.optimizer, pool.parts.mesh, reference)
    copy = jax.tree.map(jnp.copy, state.params)  # the state's own are donated to the next
    read = GrpoConfig(**pool.parts.config.grpo).compares
    kept = Reference(copy, workdir.path / "reference", fingerprint(reference) if read else "")
    loop.train(pool, workdir, Trainer(pool, kept), state)


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


def combine(start: pathlib.Path, recipe: ConfigDict) -> ConfigDict:
    """The config of the supervised run with the sections of an RL recipe laid over it, field by field."""
    combined = ConfigDict(read_config(start))
    supervised = combined.name.removesuffix(recipe.suffix)
    with combined.unlocked():
        combined.seed, combined.grpo = recipe.seed, recipe.grpo
        for section in ("optimizer", "train", "sampler", "budget", "limits", "evaluation", "mesh"):
            if section in recipe and section in combined:
                combined[section].update(recipe[section])
        combined.name = f"{recipe.name}-{supervised}{recipe.suffix}"
        combined.optimizer.steps = recipe.grpo.steps * recipe.grpo.updates
        combined.init = os.path.relpath(start)
    return combined


@field_errors()
def prepare(start: pathlib.Path, recipe: ConfigDict) -> Parts:
    """The objects of an RL run. Raises ValueError on values that cannot work."""
    parts = build(combine(start, recipe))
    GrpoConfig(**parts.config.grpo)
    top_k, top_p = parts.sampler.top_k, parts.sampler.top_p
    require(top_k == 0 and top_p == 1, f"rollouts need the whole policy: not top_k={top_k} and top_p={top_p}")
    require(parts.train.log_every == 1, f"every step is logged: train.log_every must be 1, not {parts.train.log_every}")
    return parts


def main(_: list[str]) -> None:
    """Trains from the start the flags name, then evaluates the best parameters and prints the report."""
    start = start_from(flags.FLAGS.init, flags.FLAGS.config.suffix)
    with usage_errors():
        parts = prepare(start, flags.FLAGS.config)
    if flags.FLAGS.dry_run:
        print(json.dumps(plan(parts)))
        return
    params, result = load_best(start, parts.param_shapes())
    told = f"from {start} (step {result['step']}), {parts.config.grpo.steps} steps"
    stage = lambda pool: Trainer(pool, Reference(params))  # noqa: E731
    command.run(parts, told, stage, lambda pool, workdir: train(pool, workdir, params))


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", "configs/grpo.py", "Recipe, with an optional :preset.")
    flags.DEFINE_string("init", None, "Supervised run to start from (default: APR's of the preset, own or shipped).")
    command.define_flags()


if __name__ == "__main__":
    launch(define_flags, main)

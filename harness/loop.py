"""The training loop that SFT and GRPO share.

  1. Resume from the latest checkpoint, if there is one.
  2. Take steps. A `Stage` says what a step is: where its batch comes from and which loss it trains.
  3. Stop at the first step that measures a number which is not finite, and keep its batch for `harness.replay`.
  4. Log the steps since the last line.
  5. Every so often solve the validation problems, keep the best parameters, and save the state with its cursor.

Nothing is saved that was not looked at, and a killed run resumes to the same bits. Ctrl-C and SIGTERM let the step
end and save the state.
"""

from __future__ import annotations

import math
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from harness.cli import Progress, Stopped, UsageError, signals_noted
from harness.evaluation import validate
from harness.rollouts import RolloutPool
from harness.workdir import Workdir
from packing import TokenBatch
from train_state import LossFn, TrainState

Values = dict[str, float]


class Stage(typing.Protocol):
    """What differs between SFT and GRPO."""

    steps: int
    log_every: int
    eval_every: int
    validates_start: bool  # also before the first step
    loss: LossFn
    temperature: float  # of the policy in the loss
    batch: TokenBatch | None  # of the last step; None if it trained on nothing

    def resume(self, cursor: typing.Any) -> None:
        """Goes on with the data at a cursor, or starts if it is None."""

    def cursor(self) -> typing.Any:
        """Where the data stands, as JSON: all that `resume` needs."""

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, typing.Any]]:
        """Takes step `number` (from 1), and returns the new state and the numbers that it measured."""

    def summary(self, pending: list, seconds: float) -> Values:
        """What the log says of the steps since its last line, which took so many seconds. `pending` is on the host."""

    def line(self, values: Values) -> str:
        """The summary in words, for the terminal."""


class _Taken(typing.NamedTuple):
    """A step whose numbers were not looked at yet."""

    step: int
    params: typing.Any  # before it
    batch: TokenBatch | None
    measured: dict[str, typing.Any]


def train(pool: RolloutPool, workdir: Workdir, stage: Stage, state: TrainState) -> None:
    """Runs or resumes a stage from `state`. Leaves checkpoints and the best parameters in `workdir`.

    Raises UsageError at the first step with a number that is not finite, and Stopped after a signal.
    """
    extra: dict[str, typing.Any] = {"step": 0, "cursor": None, "best": -1.0, "best_step": -1, "pending": []}
    extra["seconds"] = 0.0  # that the pending steps took
    if (restored := workdir.restore(state)) is not None:
        state, extra = restored[0], extra | restored[1]
        _keep_best(workdir, state, extra)
    stage.resume(extra["cursor"])
    with signals_noted() as signals:
        if restored is None and stage.validates_start:
            _checkpoint(pool, workdir, stage, state, extra)
        progress = Progress(stage.steps, extra["step"], "step")
        clock, pending, waiting = time.monotonic() - extra.pop("seconds"), extra.pop("pending"), list[_Taken]()
        for step in range(extra["step"] + 1, stage.steps + 1):
            before = _copy(state.params)  # the state itself is donated to the step
            state, measured = stage.step(state, step)
            measured["parameters"] = _zero_if_finite(state)
            waiting.append(_Taken(step, before, stage.batch, measured))
            extra["step"] = step
            progress.update(step)
            checkpoint = step % stage.eval_every == 0 or step == stage.steps
            stop = _stops(signals, checkpoint)
            log = step % stage.log_every == 0 or checkpoint
            # While the device is at a step, the one before is looked at.
            late = not (log or stop) and any(isinstance(value, jax.Array) for value in measured.values())
            pending += [_looked_at(workdir, taken) for taken in waiting[: len(waiting) - late]]
            del waiting[: len(waiting) - late]
            if log:
                values = stage.summary(pending, time.monotonic() - clock)
                workdir.log(step, values)
                progress.update(step, stage.line(values))
                clock, pending = time.monotonic(), []
            if checkpoint:
                _checkpoint(pool, workdir, stage, state, extra)
                clock = time.monotonic()
            elif stop:
                unlogged = {"pending": pending, "seconds": time.monotonic() - clock}
                workdir.save(step, state, {**extra, "cursor": stage.cursor(), **unlogged})
            if stop:
                raise Stopped(stop, f"stopped after step {step}, which is saved")
        progress.close()


def _stops(signals: list[int], checkpoint: bool) -> int:
    """The signal to stop at, 0 for none. Several processes agree on it, at checkpoints."""
    if jax.process_count() == 1:
        return signals[0] if signals else 0
    noted = np.int32(signals[0] if signals else 0)
    return int(multihost_utils.process_allgather(noted).max()) if checkpoint else 0


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


@jax.jit
def _zero_if_finite(tree: typing.Any) -> jax.Array:
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
    return jnp.where(finite, 0.0, jnp.nan)


def _looked_at(workdir: Workdir, taken: _Taken) -> Values:
    """The numbers of a step. Raises UsageError if one is not finite, after its batch is kept."""
    values = {name: float(value) for name, value in jax.device_get(taken.measured).items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        reason = f"not finite at step {taken.step}: {', '.join(bad)}"
        batch = {} if taken.batch is None else {"batch": taken.batch._asdict()}
        workdir.save_failed(taken.step, {"params": taken.params, **batch}, reason)
        raise UsageError(
            f"{reason}, and nothing of it is saved: look at the step with --replay, or run the same command with a "
            "lower --config.optimizer.learning_rate, which goes on from the last checkpoint"
        )
    return {name: value for name, value in values.items() if name != "parameters"}


def _keep_best(workdir: Workdir, state: TrainState, extra: dict[str, typing.Any]) -> None:
    """Saves the best parameters if they are those of the state: after it, so that a kill in between loses nothing."""
    if extra["best_step"] == extra["step"]:
        workdir.save_best(extra["step"], state.params, {"validation_accuracy": extra["best"]})


def _checkpoint(
    pool: RolloutPool, workdir: Workdir, stage: Stage, state: TrainState, extra: dict[str, typing.Any]
) -> None:
    """Solves the validation problems, and saves the state and, if they are the best so far, its parameters."""
    started = time.monotonic()
    found = validate(pool, state.params)
    accuracy, seconds, step = found["accuracy"], time.monotonic() - started, extra["step"]
    workdir.log(step, {f"validation_{name}": value for name, value in found.items()} | {"validation_seconds": seconds})
    text = f"validation accuracy {accuracy:.3f} ({found['low']:.3f}-{found['high']:.3f})"
    print(f"step {step}: {text} with {found['children']:.1f} children ({seconds:.0f} s)", flush=True)
    if accuracy >= extra["best"]:  # of two equal ones the one that trained longer
        extra |= {"best": accuracy, "best_step": step}
    workdir.save(step, state, {**extra, "cursor": stage.cursor()})
    _keep_best(workdir, state, extra)

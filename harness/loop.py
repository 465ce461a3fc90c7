"""The training loop that SFT and GRPO share.

  1. Resume from the latest checkpoint, if there is one.
  2. Take steps. A `Stage` says what a step is: where its batch comes from and which loss it trains.
  3. Log the steps since the last line, and stop at the first loss that is not finite.
  4. Every so often solve the validation problems, keep the best parameters, and save the state with its cursor.

Nothing is saved whose loss was not looked at, and a killed run resumes to the same bits.
"""

from __future__ import annotations

import time
import typing

import jax

from harness.cli import Progress, UsageError
from harness.evaluation import validate
from harness.rollouts import RolloutPool
from harness.workdir import Workdir
from train_state import TrainState

Values = dict[str, float]


class Stage(typing.Protocol):
    """What differs between SFT and GRPO."""

    steps: int
    log_every: int
    eval_every: int
    validates_start: bool  # also before the first step

    def resume(self, cursor: typing.Any) -> None:
        """Goes on with the data at a cursor, or starts if it is None."""

    def cursor(self) -> typing.Any:
        """Where the data stands, as JSON: all that `resume` needs."""

    def step(self, state: TrainState, number: int) -> tuple[TrainState, typing.Any]:
        """Takes step `number` (from 1), and returns the new state and what `summary` needs of it."""

    def summary(self, pending: list, seconds: float) -> Values:
        """What the log says of the steps since its last line, which took so many seconds. `pending` is on the host."""

    def line(self, values: Values) -> str:
        """The summary in words, for the terminal."""


def train(pool: RolloutPool, workdir: Workdir, stage: Stage, state: TrainState) -> None:
    """Runs or resumes a stage from `state`. Leaves checkpoints and the best parameters in `workdir`.

    Raises UsageError at the first loss that is not finite.
    """
    extra: dict[str, typing.Any] = {"step": 0, "cursor": None, "best": -1.0}
    if (restored := workdir.restore(state)) is not None:
        state, extra = restored
    stage.resume(extra["cursor"])
    if restored is None and stage.validates_start:
        _checkpoint(pool, workdir, stage, state, extra)
    progress = Progress(stage.steps, extra["step"], "step")
    clock, pending = time.monotonic(), []
    for step in range(extra["step"] + 1, stage.steps + 1):
        state, measured = stage.step(state, step)
        pending.append(measured)
        extra["step"] = step
        progress.update(step)
        checkpoint = step % stage.eval_every == 0 or step == stage.steps
        if step % stage.log_every == 0 or checkpoint:
            pending = jax.device_get(pending)  # waits for the device
            values = stage.summary(pending, time.monotonic() - clock)
            _check_finite(values, step)
            workdir.log(step, values)
            progress.update(step, stage.line(values))
            clock, pending = time.monotonic(), []
        if checkpoint:
            _checkpoint(pool, workdir, stage, state, extra)
            clock = time.monotonic()
    progress.close()


def _check_finite(values: Values, step: int) -> None:
    if not abs(values.get("loss", 0.0)) < float("inf"):
        raise UsageError(f"the loss is {values['loss']} at step {step}: lower optimizer.learning_rate")


def _checkpoint(
    pool: RolloutPool, workdir: Workdir, stage: Stage, state: TrainState, extra: dict[str, typing.Any]
) -> None:
    """Solves the validation problems, keeps the parameters if they are the best so far, and saves the state."""
    started = time.monotonic()
    found = validate(pool, state.params)
    accuracy, seconds, step = found["accuracy"], time.monotonic() - started, extra["step"]
    workdir.log(step, {f"validation_{name}": value for name, value in found.items()} | {"validation_seconds": seconds})
    text = f"validation accuracy {accuracy:.3f} ({found['low']:.3f}-{found['high']:.3f})"
    print(f"step {step}: {text} with {found['children']:.1f} children ({seconds:.0f} s)", flush=True)
    if accuracy >= extra["best"]:  # of two equal ones the one that trained longer
        extra["best"] = accuracy
        workdir.save_best(step, state.params, {"validation_accuracy": accuracy})
    workdir.save(step, state, {**extra, "cursor": stage.cursor()})

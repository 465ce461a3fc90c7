"""Stage one: imitate the symbolic solver (paper, sections 3.3 and 4).

    python sft.py --config=configs/apr.py                 # trains, evaluates, shows a solved problem
    python sft.py --config=configs/apr.py:smoke           # the same path in under a minute
    python sft.py --config=configs/sosp.py --config.optimizer.steps=1000 --workdir=runs/short
    python sft.py --config.init=pretrained/apr --config.threads.join=text --workdir=runs/text    # from another run

  1. Draw demonstrations on the fly: number i of a run is fixed by (seed, i).
  2. Pack their threads into rows; drop (or cut) what does not fit the context.
  3. `train_step` with `sft_loss`: the mean negative log-likelihood of exactly the
     ids the demonstrator "sampled". Prompts and joined messages are context.
  4. Now and then solve held-out problems with real parent and child threads,
     keep the best parameters, and checkpoint the state with its data cursor.
  5. At the end evaluate the best parameters on held-out problems that chose nothing.

Deviations from the paper: its code trains on all tokens of a call, prompts and
joined text included, and cuts over-long calls; see `packing.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import typing

import jax
from absl import flags
from jax import Array
from ml_collections import config_flags

import packing
from evaluate import heldout, report
from experiment import Experiment
from packing import Segment, TokenBatch, lay_out, take_row
from parallel_runtime import longest_context
from train_state import Outputs, TrainState, init_state, make_train_step, placed_state, split
from workdir import Progress, UsageError, Workdir, launch, load_best, usage_errors


def sft_loss(out: Outputs, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
    """Negative log-likelihood of the sampled ids, [R, T]; `batch.weight` is 1 / (sampled ids of the whole batch)."""
    return -batch.weight * out.logp, {}


MOST_LOST = 1000  # demonstrations in a row that may be too long before the config is called hopeless
LOOK_AHEAD = 256  # segments that wait to be packed: enough to leave next to no token of a row unused


@dataclasses.dataclass
class Waiting:
    """A segment that waits for room, and where it comes from: piece number `piece` of demonstration `index`."""

    index: int
    piece: int
    segment: Segment

    def __len__(self) -> int:
        return len(self.segment)


class DemonstrationStream:
    """Packed demonstrations without end; `cursor` says where it stands and is all it takes to resume.

    Demonstrations are made in the order of their index. Their segments wait in a pool of `LOOK_AHEAD` until they
    are packed (`packing.take_row`), so that the order of training changes within the pool alone.
    """

    def __init__(self, experiment: Experiment, cursor: dict[str, typing.Any] | None = None) -> None:
        """Goes on at `cursor`, or starts. Raises ValueError if hardly any demonstration fits the context and rows."""
        config = experiment.config
        if config.train.overlong not in ("drop", "cut"):
            raise ValueError(f"train.overlong must be 'drop' or 'cut', not {config.train.overlong!r}")
        self._micro_rows = min(config.train.rows, config.train.micro_rows * experiment.devices)
        if config.train.rows % self._micro_rows or self._micro_rows % experiment.devices:
            raise ValueError(
                f"train.rows={config.train.rows} must be a multiple of train.micro_rows={config.train.micro_rows} "
                f"x {experiment.devices} devices, or fewer and a multiple of the devices"
            )
        self.experiment = experiment
        self.used = 0.0  # share of the tokens of the last batch that carry a segment
        cursor = cursor or {"drawn": 0, "overlong": 0, "waiting": []}
        self.drawn: int = cursor["drawn"]
        self.overlong: int = cursor["overlong"]
        places = cursor["waiting"]
        pieces = {index: self._draw(index)[0] for index in {index for index, _ in places}}
        self._waiting = [Waiting(index, piece, pieces[index][piece]) for index, piece in places]
        self._refill()

    @property
    def cursor(self) -> dict[str, typing.Any]:
        """Demonstrations drawn, how many of them overran the context, and the (index, piece) of what waits, as JSON."""
        places = [[waiting.index, waiting.piece] for waiting in self._waiting]
        return {"drawn": self.drawn, "overlong": self.overlong, "waiting": places}

    def _draw(self, index: int) -> tuple[list[Segment], bool]:
        """Segments of a demonstration, and whether it overran the context."""
        config = self.experiment.config
        rollout = self.experiment.demonstration("train", config.seed, index)
        if too_long := longest_context(rollout.root) > config.model.context:
            if config.train.overlong == "drop":
                return [], True
            for thread in rollout.threads():
                packing.cut(thread, config.model.context)
        pieces = [piece for thread in rollout.threads() for piece in packing.segments(thread, config.model.context)]
        return pieces, too_long

    def _refill(self) -> None:
        """Draws demonstrations until the pool is full."""
        lost = 0
        while len(self._waiting) < LOOK_AHEAD:
            segments, too_long = self._draw(self.drawn)
            self._waiting += [Waiting(self.drawn, piece, segment) for piece, segment in enumerate(segments)]
            self.drawn, self.overlong = self.drawn + 1, self.overlong + too_long
            lost = 0 if segments else lost + 1
            if lost == MOST_LOST:
                context = self.experiment.config.model.context
                raise ValueError(f"none of {lost} demonstrations in a row fits model.context={context}: raise it")

    def next(self) -> TokenBatch:
        """The next batch, [M, R, T], weighted so that a sum over it is a mean over sampled ids."""
        config = self.experiment.config
        rows = []
        for _ in range(config.train.rows):
            rows.append(take_row(self._waiting, config.model.context))
            self._refill()
        self.used = sum(map(len, itertools.chain(*rows))) / (config.train.rows * config.model.context)
        batch, _ = lay_out([[waiting.segment for waiting in row] for row in rows], config.model.context)
        return split(batch._replace(weight=batch.weight / batch.sampled.sum()), self._micro_rows)


def train(experiment: Experiment, workdir: Workdir, start_params: typing.Any = None) -> None:
    """Runs or resumes the training loop, from random parameters unless others are given.

    Leaves checkpoints and the best parameters in `workdir`.
    """
    config, mesh = experiment.config, experiment.mesh
    optimizer = experiment.optimizer()
    if start_params is None:
        state = init_state(experiment.model, optimizer, mesh, jax.random.key(config.seed))
    else:
        state = placed_state(optimizer, mesh, start_params)
    extra: dict[str, typing.Any] = {"cursor": None, "best": -1.0}
    if (restored := workdir.restore(state)) is not None:
        state, extra = restored
    train_step = make_train_step(experiment.model, optimizer, sft_loss, mesh)
    stream = DemonstrationStream(experiment, extra["cursor"])
    start, total = int(state.step), config.optimizer.steps
    progress = Progress(total, start, "step")
    clock, pending = time.monotonic(), []
    for step in range(start + 1, total + 1):
        state, metrics, _ = train_step(state, stream.next())
        pending.append(metrics)
        progress.update(step)
        checkpoint = step % config.train.eval_every == 0 or step == total
        if step % config.train.log_every == 0 or checkpoint:  # nothing is saved whose loss was not looked at
            values = _log(workdir, step, pending, clock, stream)
            rate = f"{values['tokens_per_second']:,.0f} tokens/s"
            progress.update(step, f"loss {values['loss']:.4f}  token accuracy {values['accuracy']:.4f}  {rate}")
            clock, pending = time.monotonic(), []
        if checkpoint:
            _validate(experiment, workdir, state, step, extra)
            workdir.save(step, state, {**extra, "cursor": stream.cursor})
            clock = time.monotonic()
    progress.close()


def _log(workdir: Workdir, step: int, pending: list[dict], since: float, stream: DemonstrationStream) -> dict:
    """Writes the means of the steps since the time `since`. Raises UsageError at the first non-finite loss."""
    fetched = jax.device_get(pending)  # waits for the device
    seconds = time.monotonic() - since
    names = ("loss", "accuracy", "entropy", "grad_norm")
    values = {name: sum(m[name] for m in fetched) / len(fetched) for name in names}
    if not values["loss"] < float("inf"):
        raise UsageError(f"the loss is {values['loss']} at step {step}: lower optimizer.learning_rate")
    config = stream.experiment.config
    values["tokens_per_second"] = len(pending) * config.train.rows * config.model.context / seconds
    values["sampled_tokens"] = sum(m["tokens"] for m in fetched) / len(fetched)
    values["used"] = stream.used
    values["overlong"] = stream.overlong / stream.drawn
    workdir.log(step, values)
    return values


def _validate(experiment: Experiment, workdir: Workdir, state: TrainState, step: int, extra: dict) -> None:
    """Solves the validation problems; keeps the parameters if they are the best so far."""
    started = time.monotonic()
    found = heldout(experiment, state.params)
    accuracy, seconds = found["accuracy"], time.monotonic() - started
    workdir.log(step, {f"heldout_{name}": value for name, value in found.items()} | {"heldout_seconds": seconds})
    text = f"held-out accuracy {accuracy:.3f} with {found['children']:.1f} children ({seconds:.0f} s)"
    print(f"step {step}: {text}", flush=True)
    if accuracy >= extra["best"]:
        extra["best"] = accuracy
        workdir.save_best(step, state.params, {"validation_accuracy": accuracy})


def main(_: list[str]) -> None:
    """Trains as the config says, then evaluates the best parameters and prints the report."""
    config = flags.FLAGS.config
    with usage_errors():
        experiment = Experiment(config)
        DemonstrationStream(experiment)
    start_params = load_best(config.init, experiment.param_shapes())[0] if config.init else None
    workdir = Workdir(flags.FLAGS.workdir or f"runs/{config.name}", config)
    size = f"{experiment.parameter_count() / 1e6:.2f}M parameters"
    print(f"{config.name}: {size}, {config.optimizer.steps} steps, in {workdir.path}", flush=True)
    train(experiment, workdir, start_params)
    params, result = load_best(workdir.path, experiment.param_shapes())
    report(experiment, params, experiment.test_set(), workdir.path, result["step"])


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", "configs/apr.py", "Recipe, with an optional :preset.")
    flags.DEFINE_string("workdir", None, "Where the run lives (default: runs/<config name>).")


if __name__ == "__main__":
    launch(define_flags, main)

"""Stage one: imitate the symbolic solver (paper, sections 3.3 and 4).

    python sft.py --config=configs/apr.py                 # trains, evaluates, shows a solved problem
    python sft.py --config=configs/apr.py:smoke           # the same path in under a minute
    python sft.py --config=configs/sosp.py --config.optimizer.steps=1000 --workdir=runs/short
    python sft.py --config.init=pretrained/apr --config.threads.child_returns=text --workdir=runs/text
    python sft.py --config=examples/products.py           # another task

  1. Draw demonstrations on the fly: number i of a run is fixed by (seed, i).
  2. Pack their threads into rows. Drop (or cut) demonstrations that do not fit the context.
  3. `train_step` with `sft_loss`: the mean negative log-likelihood of exactly the ids in `Call.sampled`:
     what the demonstrator wrote. Prompts and join blocks are context.
  4. Every so often solve validation problems with real parent and child threads, keep the best parameters, and
     checkpoint the state with its data cursor (`harness.loop`).
  5. At the end evaluate the best parameters on held-out problems, which chose nothing.

Deviations from the paper: its code trains on all tokens of a call, prompts and join blocks included, and cuts
over-long calls; see `packing.py`.
"""

from __future__ import annotations

import itertools
import json
import typing

import jax
from absl import flags
from jax import Array
from ml_collections import config_flags

from harness import command, loop
from harness.build import Parts, build, check_targets
from harness.cli import usage_errors
from harness.feeding import Feeder, make
from harness.plan import plan
from harness.processes import launch
from harness.rollouts import RolloutPool
from harness.workdir import Workdir, load_best, read_config
from packing import TokenBatch, lay_out, take_row, to_microbatches
from train_state import LossFn, TokenStats, TrainState, make_train_step, state_from_key, state_from_params

MAX_CONSECUTIVE_OVERLONG = 1000  # demonstrations in a row that may be too long before the config is called hopeless
LOOK_AHEAD = 256  # segments that wait to be packed: enough to leave almost no token of a row unused


def sft_loss(out: TokenStats, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
    """Negative log-likelihood of the sampled ids, [R, T]; `batch.weight` is 1 / (sampled ids of the whole batch)."""
    return -batch.weight * out.logp, {}


class DemonstrationStream:
    """Packed demonstrations without end. `cursor` says where it stands and is all it takes to resume.

    Demonstrations are made in the order of their index. Their segments wait in a pool of `LOOK_AHEAD` until they
    are packed (`packing.take_row`), so the order of training changes within the pool alone.
    """

    def __init__(self, parts: Parts, cursor: dict[str, typing.Any] | None = None, feeders: int = 0) -> None:
        """Goes on at `cursor`, or starts; `feeders` processes make the demonstrations, with 0 this one.

        Raises ValueError if hardly any demonstration fits the context, and UsageError if a feeder fails.
        """
        self.parts, self.context = parts, parts.model.config.context
        self._micro_rows = parts.train.rows_per_pass(parts.devices)
        self.used = 0.0  # share of the tokens of the last batch that carry a segment
        self.drawn: int = cursor["drawn"] if cursor else 0
        self.overlong: int = cursor["overlong"] if cursor else 0
        places = cursor["waiting"] if cursor else []
        pieces = {index: make(parts.domain, parts.config, index)[0] for index in {index for index, _ in places}}
        self._waiting = [pieces[index][piece] for index, piece in places]
        self._feeder = Feeder(parts.domain, parts.config, self.drawn, feeders)
        self._refill()

    @property
    def cursor(self) -> dict[str, typing.Any]:
        """Demonstrations drawn, how many of them overran the context, and the (index, piece) of what waits, as JSON."""
        places = [[*segment.source] for segment in self._waiting]
        return {"drawn": self.drawn, "overlong": self.overlong, "waiting": places}

    def _refill(self) -> None:
        """Draws demonstrations until the pool is full."""
        lost = 0
        while len(self._waiting) < LOOK_AHEAD:
            segments, too_long = self._feeder.next()
            self._waiting += segments
            self.drawn, self.overlong = self.drawn + 1, self.overlong + too_long
            lost = 0 if segments else lost + 1
            if lost == MAX_CONSECUTIVE_OVERLONG:
                raise ValueError(f"none of {lost} demonstrations in a row fits model.context={self.context}: raise it")

    def next(self) -> TokenBatch:
        """The next batch, [M, R, T], weighted so that a sum over it is a mean over sampled ids."""
        count = self.parts.train.rows
        rows = []
        for _ in range(count):
            rows.append(take_row(self._waiting, self.context))
            self._refill()
        self.used = sum(map(len, itertools.chain(*rows))) / (count * self.context)
        batch = lay_out(rows, self.context)
        return to_microbatches(batch._replace(weight=batch.weight / batch.sampled.sum()), self._micro_rows)


class Imitation:
    """The `loop.Stage` of supervised training."""

    validates_start = False
    temperature = 1.0
    batch: TokenBatch | None = None

    def __init__(self, parts: Parts) -> None:
        self.parts, self.steps = parts, parts.config.optimizer.steps
        self.log_every, self.eval_every = parts.train.log_every, parts.train.eval_every
        self.loss: LossFn = sft_loss
        self.train_step = make_train_step(parts.model, parts.optimizer, self.loss, parts.mesh)
        self.stream: DemonstrationStream

    def resume(self, cursor: dict[str, typing.Any] | None) -> None:
        """Goes on with the demonstrations at a cursor."""
        self.stream = DemonstrationStream(self.parts, cursor, self.parts.train.feeders)

    def cursor(self) -> dict[str, typing.Any]:
        """Where the demonstrations stand."""
        return self.stream.cursor

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, Array]]:
        """One update on the next batch."""
        self.batch = self.stream.next()
        state, metrics, _ = self.train_step(state, self.batch)
        return state, metrics

    def summary(self, pending: list[dict[str, float]], seconds: float) -> loop.Values:
        """Means over the steps, and throughput."""
        names = ("loss", "token_accuracy", "entropy", "grad_norm")
        values = {name: sum(m[name] for m in pending) / len(pending) for name in names}
        tokens = len(pending) * self.parts.train.rows * self.parts.model.config.context
        values["tokens_per_second"] = tokens / seconds
        values["sampled_tokens"] = sum(m["tokens"] for m in pending) / len(pending)
        values["used"] = self.stream.used
        values["overlong"] = self.stream.overlong / self.stream.drawn
        return values

    def line(self, values: loop.Values) -> str:
        """Loss, token accuracy and throughput."""
        rate = f"{values['tokens_per_second']:,.0f} tokens/s"
        return f"loss {values['loss']:.4f}  token accuracy {values['token_accuracy']:.4f}  {rate}"


def train(pool: RolloutPool, workdir: Workdir, start_params: typing.Any = None) -> None:
    """Runs or resumes supervised training, from random parameters unless others are given."""
    parts = pool.parts
    if start_params is None:
        state = state_from_key(parts.model, parts.optimizer, parts.mesh, jax.random.key(parts.config.seed))
    else:
        state = state_from_params(parts.optimizer, parts.mesh, start_params)
    loop.train(pool, workdir, Imitation(parts), state)


def main(_: list[str]) -> None:
    """Trains as the config says, then evaluates the best parameters and prints the report."""
    config = flags.FLAGS.config
    with usage_errors():
        parts = build(config)
        if flags.FLAGS.dry_run:
            print(json.dumps(plan(parts)))
            return
        DemonstrationStream(parts)  # raises where no demonstration fits
        start_params = load_best(config.init, parts.param_shapes())[0] if config.init else None
        check_targets(config, read_config(config.init) if config.init else config)
    told = f"{parts.parameter_count() / 1e6:.2f}M parameters, {config.optimizer.steps} steps"
    command.run(parts, told, lambda _: Imitation(parts), lambda pool, workdir: train(pool, workdir, start_params))


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", "configs/apr.py", "Recipe, with an optional :preset.")
    command.define_flags()


if __name__ == "__main__":
    launch(define_flags, main)

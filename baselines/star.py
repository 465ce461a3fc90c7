"""STaR: a model is trained on its own right answers, round by round (arXiv 2203.14465; Stream of Search, 2404.03683).

    python -m baselines.star --start=pretrained/apr --workdir=runs/star-apr --rounds=3

One round, in WORKDIR/round-K:

  1. Sample rollouts of training problems, drawn anew each round, from the model of the round before (the first round:
     from the start).
  2. Keep those that are right and whose rating is at or above a quantile. Short searches rate high.
  3. Train again from the start, never from the round before, on what was kept: `sft.py`'s own stage, for which a
     kept rollout is a demonstration like any other.

Killed, the command goes on where it stopped: a round that has its rollouts does not sample again, and its training
resumes from its checkpoint. The end is the report of the last round's best parameters.

Deviations: Stream of Search samples 200,000 problems of a 250M model; the defaults are small enough for two CPU cores.
As there, and unlike the first STaR, a problem that was failed gets no second try with the answer as a hint, and every
round trains for as many updates.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import typing
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import sft
from analysis.viewer import rollout_from_json
from harness import files
from harness.build import Parts, build, field_errors
from harness.cli import Progress, UsageError, usage_errors
from harness.evaluation import report
from harness.processes import launch
from harness.rollouts import RolloutPool
from harness.workdir import PRETRAINED, Workdir, load_best, read_config
from protocols import Domain, Language, Request
from records import Rollout, rollout_json

EXPLORED = "Exploring Operation"  # what a line that tries an operation begins with
# Numbers of a problem -> operations of its largest search (Stream of Search, countdown_utils.metric_fn).
MOST = {2: 4, 3: 48, 4: 1152, 5: 46080}  # of any other problem that of four
ROLLOUTS = "rollouts.jsonl.gz"


def rating(rollout: Rollout, language: Language) -> float:
    """max(0, 1 - (explored operations + 1) / MOST) over all threads, 0 if wrong (Stream of Search)."""
    calls = [call for thread in rollout.threads() for call in thread.calls]
    explored = sum(language.decode(call.sampled).count(EXPLORED) for call in calls)
    most = MOST.get(len(getattr(rollout.problem, "numbers", ())), MOST[4])
    return max(0.0, 1 - (explored + 1) / most) * rollout.grade.correct


def keep(rollouts: Sequence[Rollout], language: Language, quantile: float) -> list[Rollout]:
    """The right rollouts whose rating is at or above a quantile of the right ones' ratings."""
    rated = [(rating(rollout, language), rollout) for rollout in rollouts if rollout.grade.correct]
    if not rated:
        return []
    bound = np.quantile([value for value, _ in rated], quantile, method="lower")  # one of the ratings: no rounding
    return [rollout for value, rollout in rated if value >= bound]


class Kept:
    """A domain whose demonstrations are kept rollouts, each once per pass, in an order that the seed fixes."""

    def __init__(self, domain: Domain, rollouts: Sequence[Rollout]) -> None:
        self._domain, self._rollouts = domain, rollouts

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._domain, name)

    def demonstration(self, split: str, seed: int, index: int) -> Rollout:
        """Demonstration number `index`: a copy, which training may cut."""
        number, place = divmod(index, len(self._rollouts))
        order = np.random.default_rng((seed, number)).permutation(len(self._rollouts))
        return copy.deepcopy(self._rollouts[order[place]])


def sample(parts: Parts, params: typing.Any, number: int) -> list[Rollout]:
    """The rollouts of round `number` (from 1)."""
    star, domain, seed = parts.config.star, parts.domain, parts.config.seed
    first = (number - 1) * star.samples
    # A problem may be drawn twice: its number makes the draws of its rollouts differ.
    requests = [Request(domain.problem("train", seed, i), i) for i in range(first, first + star.samples)]
    done, pool = itertools.count(1), RolloutPool(parts)
    with contextlib.closing(Progress(len(requests), 0, "rollout")) as progress:
        return pool.run(params, star.temperature, requests, (seed, number), lambda: progress.update(next(done)))


def write(path: pathlib.Path, rollouts: Sequence[Rollout], domain: Domain) -> None:
    """Writes rollouts, one line of JSON each, whole or not at all."""
    records = [rollout_json(rollout, domain.to_json(rollout.problem)) for rollout in rollouts]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files.replace(path, gzip.compress(lines.encode(), mtime=0))


def read(path: pathlib.Path, domain: Domain) -> list[Rollout]:
    """The inverse of `write`. Raises UsageError if the file is damaged."""
    size = domain.language.vocab_size
    try:
        if not (lines := gzip.decompress(path.read_bytes()).splitlines()):
            raise ValueError("it is empty")
        return [rollout_from_json(json.loads(line), size, domain.from_json) for line in lines]
    except (OSError, EOFError, KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove its round, and the command samples again") from error


def kept_rollouts(parts: Parts, folder: pathlib.Path, params: typing.Any, number: int) -> list[Rollout]:
    """The kept rollouts of a round: those in its folder, else new ones. Raises UsageError if there are none."""
    path = folder / ROLLOUTS
    if path.exists():
        return read(path, parts.domain)
    rollouts = sample(parts, params, number)
    kept = keep(rollouts, parts.domain.language, parts.config.star.quantile)
    if not kept:
        remedy = "raise --samples, or name a better --start"
        raise UsageError(f"round {number} has no right rollout in {len(rollouts)}: {remedy}")
    right = sum(rollout.grade.correct for rollout in rollouts)
    print(f"round {number}: {right} of {len(rollouts)} rollouts are right, {len(kept)} kept", flush=True)
    if jax.process_index() == 0:
        write(path, kept, parts.domain)
    return kept


def recipe(start: str, args: typing.Any) -> ConfigDict:
    """The config of the start, changed for the training of every round."""
    config = ConfigDict(read_config(start))
    with config.unlocked():
        config.name, config.init = f"star-{config.name}", os.path.relpath(start)
        config.star = dict(samples=args.samples, temperature=args.temperature, quantile=args.quantile)
        config.optimizer.update(
            steps=args.steps, learning_rate=args.learning_rate, end_learning_rate=args.learning_rate / 100
        )
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, args.steps // 10)
        config.train.update(feeders=0, eval_every=max(1, args.steps // 3))
    return config


def main(_: list[str]) -> None:
    """Runs or resumes the rounds, and prints the report of the last one."""
    args = flags.FLAGS
    named = args.start or os.path.relpath(PRETRAINED)
    with usage_errors(), field_errors():
        config = recipe(named, args)
        parts = build(config)
    start, result = load_best(named, parts.param_shapes())
    root = pathlib.Path(args.workdir or f"runs/{config.name}")
    print(f"{config.name}: from {named} (step {result['step']}), {args.rounds} rounds, in {root}", flush=True)
    params = start
    for number in range(1, args.rounds + 1):
        workdir = Workdir(root / f"round-{number}", config)
        kept = kept_rollouts(parts, workdir.path, params, number)
        domain = typing.cast(Domain, Kept(parts.domain, kept))
        pool = RolloutPool(dataclasses.replace(parts, domain=domain))
        with usage_errors():
            sft.train(pool, workdir, start)
        params, result = load_best(workdir.path, parts.param_shapes())
    report(pool, params, parts.test_set(), workdir.path, result["step"])


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("start", None, "Supervised run that every round trains from (default: the shipped one).")
    flags.DEFINE_string("workdir", None, "Where the rounds live (default: runs/star-<name of the start>).")
    flags.DEFINE_integer("rounds", 3, "Rounds.", lower_bound=1)
    flags.DEFINE_integer("samples", 4000, "Training problems of a round, one rollout each.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "Of the rollouts.", lower_bound=0.0)
    flags.DEFINE_float("quantile", 0.0, "Right rollouts that rate below this quantile are dropped.", 0.0, 1.0)
    flags.DEFINE_integer("steps", 600, "Updates of a round.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 5e-4, "Of a round.", lower_bound=0.0)


if __name__ == "__main__":
    launch(define_flags, main)

"""What `sft.py` and `grpo.py` share: their flags, and the way from the objects of a configuration to a report."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from harness.build import Parts
from harness.evaluation import report
from harness.loop import Stage
from harness.replay import replay
from harness.rollouts import RolloutPool
from harness.workdir import Workdir, load_best


def define_flags() -> None:
    """The flags of both stages."""
    flags.DEFINE_string("workdir", None, "Where the run lives (default: runs/<config name>).")
    flags.DEFINE_bool("replay", False, "Run the step again at which the run stopped, alone.")
    flags.DEFINE_bool("dry_run", False, "Print what the training takes, and end.")


def run(
    parts: Parts,
    told: str,
    stage: Callable[[RolloutPool], Stage],
    train: Callable[[RolloutPool, Workdir], None],
) -> None:
    """Trains in --workdir, then evaluates the best parameters and prints the report.

    `told` is what the first line says of the run. With --replay it only runs the failed step of `stage` again.
    """
    workdir = Workdir(flags.FLAGS.workdir or f"runs/{parts.config.name}", parts.config)
    print(f"{parts.config.name}: {told}, in {workdir.path}", flush=True)
    pool = RolloutPool(parts)
    if flags.FLAGS.replay:
        return replay(parts, workdir, stage(pool))
    train(pool, workdir)
    params, result = load_best(workdir.path, parts.param_shapes())
    report(pool, params, parts.test_set(), workdir.path, result["step"])
    return None

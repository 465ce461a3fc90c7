"""Measures a trained model: solves problems through spawn and join, grades them, counts what they cost.

    python evaluate.py                                    # the shipped checkpoint on its held-out problems
    python evaluate.py --workdir=runs/apr                 # your own
    python evaluate.py --problems=problems.json           # [{"numbers": [7, 2, 19], "target": 31}, ...]
    python evaluate.py --numbers=7,2,19 --target=31       # one problem, its threads printed as they run
        --record=trace.json                               # ... and its record written, for analysis.figures
    python evaluate.py --config.sampler.temperature=1.0   # any field of the run's own config can be set
        --config.evaluation.samples=8                     # ... eight samples a problem: pass@k and cons@k
        --config.evaluation.concurrent=1                  # ... one at a time: latency
        --config.limits.min_budget_rounds=2                      # ... budget forcing
    python evaluate.py --sweep=configs/sweep.py           # many runs x budgets x temperatures, resumable
        --config.evaluation.problems=100                  # ... any field, of all of them

  1. Read the run's config and its best parameters.
  2. Run every problem through `parallel_runtime` on the run's samplers (`harness.rollouts`).
  3. Grade each rollout with the one exact grader of the task.
  4. Name the fault that each failed rollout failed by.
  5. Print a table, write eval.json (the record of the evaluation, with every rollout's result in order), and print
     the summary as the last line (`harness.evaluation`).

`analysis.sweep` does this for every point of a grid; `analysis.figures` draws what it leaves.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import typing
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

import records
from analysis import sweep
from checks import require
from harness.build import Parts, build, check_parents, check_prompts, check_targets
from harness.cli import UsageError, usage_errors
from harness.evaluation import report
from harness.files import digest
from harness.huggingface import holds_model
from harness.problems import read_problem, read_problems
from harness.processes import launch
from harness.rollouts import RolloutPool
from harness.show import show_call, verdict
from harness.workdir import PRETRAINED, load_best, read_config, write_json
from protocols import Request
from records import Rollout, Thread

EXCLUSIVE = {  # flag -> flags that would change nothing beside it
    "sweep": ("workdir", "problems", "numbers", "target", "record"),
    "numbers": ("problems", "output"),
}
ELSEWHERE = "runs/evaluation-"  # a workdir's own eval.json is of its own config and held-out problems


def solve_one(pool: RolloutPool, params: typing.Any, problem: typing.Any) -> Rollout:
    """Solves one problem and prints every call as it stops, then the verdict."""
    parts = pool.parts

    def on_call(thread: Thread) -> None:
        """Prints the last call of a thread."""
        print(show_call(thread, len(thread.calls) - 1, parts.domain.language), flush=True)

    runtime = pool.runtimes(params, parts.sampler.temperature, on_call)[0]
    rollout = runtime.run([Request(problem)], seed=(parts.evaluation.seed,))[0]
    print(verdict(rollout.grade))
    costs = records.metrics(rollout)
    del costs["milliseconds"]  # most of them went into compiling
    print(json.dumps({"correct": rollout.grade.correct, "answer": list(rollout.grade.answer), **costs}))
    return rollout


# ------------------------------------------------------------------- command line


def stored_config(argv: Sequence[str]) -> ConfigDict:
    """The config of the run named by --workdir on the command line, else of the shipped checkpoint."""
    words = flags.FLAGS.read_flags_from_files(argv)  # of --flagfile. absl takes --workdir=X and --workdir X
    named = re.findall(r"^--?workdir[=\n](.*)", "\n".join(words), re.MULTILINE)
    return ConfigDict(read_config((named and named[-1]) or PRETRAINED))


def define_flags() -> None:
    """The command line; the config is that of the run named by --workdir."""
    flags.DEFINE_string("workdir", None, "The run to evaluate (default: the shipped checkpoint).")
    flags.DEFINE_string(
        "output", None, f"Where to write eval.json (default: a run's workdir if no more is asked, else {ELSEWHERE}...)."
    )
    flags.DEFINE_string("problems", None, "JSON file with a list of problems (default: the held-out set).")
    flags.DEFINE_list("numbers", None, "One problem: its numbers, comma-separated. Needs --target.")
    flags.DEFINE_integer("target", None, "One problem: its target. Needs --numbers.")
    flags.DEFINE_string("record", None, "One problem: file to write its record to. Needs --numbers.")
    config_flags.DEFINE_config_file("sweep", None, "Grid of evaluations to run (configs/sweep.py) into --output.")
    config_flags.DEFINE_config_dict("config", stored_config(sys.argv))


def check_flags(args: flags.FlagValues) -> None:
    """Raises UsageError on flags that do not go together."""
    for flag, others in EXCLUSIVE.items():
        clash = [other for other in others if getattr(args, flag) and getattr(args, other) is not None]
        if clash:
            raise UsageError(f"--{flag} does not go with --{clash[0]}: leave one of them out")
    if (args.numbers is None) != (args.target is None):
        raise UsageError("--numbers and --target go together")
    if args.numbers is not None and not all(re.fullmatch(r"\s*-?[0-9]+\s*", number) for number in args.numbers):
        raise UsageError(f"--numbers must be whole numbers separated by commas, not {','.join(args.numbers)}")
    if args.record and args.numbers is None:
        raise UsageError("--record goes with --numbers and --target: it keeps one problem")
    if args.record and not pathlib.Path(args.record).absolute().parent.is_dir():
        raise UsageError(f"--record={args.record} is in no folder: make it first")


def chosen_problems(args: flags.FlagValues, parts: Parts) -> Sequence[typing.Any]:
    """The problems that the flags name: one, those of a file, or the held-out set."""
    if args.numbers is not None:
        require((n := parts.evaluation.samples) == 1, f"--numbers is one rollout, not evaluation.samples={n}")
        entry = {"numbers": [int(number) for number in args.numbers], "target": args.target}
        return [read_problem(entry, "the problem", parts.domain)]
    return read_problems(args.problems, parts.domain) if args.problems else parts.test_set()


def main(_: list[str]) -> None:
    """Evaluates as the flags say."""
    args = flags.FLAGS
    check_flags(args)
    if args.sweep:
        if not {"name", "entries"} <= {*args.sweep}:
            raise UsageError("--sweep takes a file like configs/sweep.py, with a name and entries")
        plan = sweep.points(args.sweep.entries, config_flags.get_override_values(args["config"]))
        return sweep.run(plan, pathlib.Path(args.output or f"runs/{args.sweep.name}"))
    source = pathlib.Path(args.workdir or PRETRAINED)
    if args.numbers is not None:  # of one problem compiling takes the most time: few functions, whatever they compute
        args.config.sampler.update(buckets="coarse", length_bucket=args.config.model.context)
    with usage_errors():
        parts = build(args.config)
        kept = read_config(source)
        check_targets(args.config, kept)
        check_parents(args.config, kept)
        problems = chosen_problems(args, parts)
        check_prompts(parts, problems)
    params, result = load_best(source, parts.param_shapes())
    pool = RolloutPool(parts)
    if args.numbers is None:
        # What was exported stays as it is, and so does a run that other problems or fields are asked of.
        own = args.workdir and not (args.problems or holds_model(source)) and json.loads(args.config.to_json()) == kept
        asked = digest(f"{source} {args.problems} {args.config}".encode())
        output = pathlib.Path(args.output or (source if own else ELSEWHERE + asked))
        report(pool, params, problems, output, result["step"])
        return None
    rollout = solve_one(pool, params, problems[0])
    if args.record:
        domain = parts.domain
        trace = records.stored(args.config.task, domain.facts(), rollout, domain.to_json(rollout.problem))
        with usage_errors():
            write_json(pathlib.Path(args.record), trace)
    return None


if __name__ == "__main__":
    launch(define_flags, main)

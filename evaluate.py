"""Measures a trained model: solves problems through spawn and join, grades them, counts what they cost.

    python evaluate.py                                    # the shipped checkpoint on its held-out problems
    python evaluate.py --workdir=runs/apr                 # your own
    python evaluate.py --problems=problems.json           # [{"numbers": [7, 2, 19], "target": 31}, ...]
    python evaluate.py --numbers=7,2,19 --target=31       # one problem, its threads printed as they run
        --record=trace.json                               # ... and its record written, for figures.py
    python evaluate.py --config.sampler.temperature=1.0   # any field of the run's own config can be set

  1. Read the run's config and its best parameters.
  2. Run every problem through `parallel_runtime` on one `sampler.Sampler`.
  3. Grade each rollout with the one exact grader (`solver.Countdown.grade`).
  4. Name the fault that each failed rollout failed by (`verifier.explain`).
  5. Print a table, write eval.json (a summary per method and budget, with every
     problem's result in order), and print the summary as the last line.

Intervals are Wilson's 95 % score intervals of a share.

Deviations from the paper: none in what is counted (total tokens: all threads;
sequential tokens: the longest dependent chain).
"""

from __future__ import annotations

import json
import math
import pathlib
import random
import re
import sys
import time
import typing
from collections import Counter
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

import parallel_runtime
import solver
import verifier
from experiment import Experiment
from parallel_runtime import Interrupted, Request, Rollout, Thread
from solver import Problem
from tokenizer import Tokenizer
from workdir import UsageError, launch, load_best, read_config, usage_errors, write_json

PRETRAINED = pathlib.Path(__file__).parent / "pretrained" / "apr"
ELSEWHERE = "runs/evaluation"  # a workdir's own eval.json is of its own config and held-out problems
RESULTS = ("total_tokens", "sequential_tokens", "children", "longest_context", "milliseconds", "truncated", "malformed")


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927)."""
    z = 1.959964
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(rollouts: Sequence[Rollout], seconds: float) -> dict[str, typing.Any]:
    """Accuracy with its interval, mean costs, and wall clock per problem under load ("throughput_ms")."""
    n, correct = len(rollouts), sum(rollout.grade.correct for rollout in rollouts)
    costs = [parallel_runtime.metrics(rollout) for rollout in rollouts]
    means = {name: sum(cost[name] for cost in costs) / n for name in RESULTS}
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": wilson(correct, n),
        **means,
        "throughput_ms": 1e3 * seconds / n,
    }


def windows(rollouts: Sequence[Rollout], context: int) -> dict[str, list[float]]:
    """Context window -> accuracy and its interval if only rollouts count whose every context fits (paper, section 5).

    Windows are the eighths of `context` from a quarter up.
    """
    result = {}
    for window in (context * eighth // 8 for eighth in (2, 3, 4, 6, 8)):
        fits = [r.grade.correct and parallel_runtime.longest_context(r.root) <= window for r in rollouts]
        result[str(window)] = [sum(fits) / len(fits), *wilson(sum(fits), len(fits))]
    return result


def demonstrators_accuracy(experiment: Experiment, problems: Sequence[Problem]) -> float:
    """Share of these problems that one demonstration each solves."""
    seed = experiment.config.evaluation.seed
    solved = 0
    for index, problem in enumerate(problems):
        rng = random.Random(f"demonstrator {seed} {index}")
        trace = solver.demonstrate(problem, experiment.demonstrator, rng)
        solved += solver.record(problem, trace, experiment.task).grade.correct
    return solved / len(problems)


def report(
    experiment: Experiment, params: typing.Any, problems: Sequence[Problem], output: pathlib.Path, step: int
) -> dict:
    """Evaluates, prints the table and one solved problem, writes eval.json, prints the summary as the last line.

    Ctrl-C ends it early: the same of the problems that are done, written to interrupted.json.
    """
    with usage_errors():
        output.mkdir(parents=True, exist_ok=True)
        (output / "eval.json").touch()
    config = experiment.config
    experiment.solve(params, problems[: config.sampler.rows])  # compiles; not timed
    started = time.monotonic()
    name = "eval.json"
    try:
        rollouts = experiment.solve(params, problems)
    except Interrupted as interrupt:
        rollouts, name = interrupt.rollouts, "interrupted.json"
        if not rollouts:
            raise
        print(f"interrupted: {len(rollouts)} of {len(problems)} problems are done, the quick ones", file=sys.stderr)
    summary = summarize(rollouts, time.monotonic() - started)
    failures = [fault.kind if (fault := verifier.explain(r, experiment.tokenizer)) else "" for r in rollouts]
    summary = {
        "method": config.demonstrator.method,
        "budget": "free",
        "temperature": config.sampler.temperature,
        "context": config.model.context,
        **summary,
        "failures": {kind: count / len(failures) for kind, count in Counter(filter(None, failures)).most_common()},
        "windows": windows(rollouts, config.model.context),
        "demonstrator": demonstrators_accuracy(experiment, [rollout.problem for rollout in rollouts]),
        "seed": config.evaluation.seed,
        "checkpoint": step,
    }
    print(table(summary))
    if (solved := next((rollout for rollout in rollouts if rollout.grade.correct and rollout.root.spawns), None)) or (
        solved := next((rollout for rollout in rollouts if rollout.grade.correct), None)
    ):
        print(f"\nOne solved problem, thread by thread:\n\n{show(solved, experiment.tokenizer)}")
    results = [
        {
            "numbers": list(rollout.problem.numbers),
            "target": rollout.problem.target,
            "correct": rollout.grade.correct,
            "reason": rollout.grade.reason,
            "answer": list(rollout.grade.answer),
            "failure": failure,
            **parallel_runtime.metrics(rollout),
        }
        for rollout, failure in zip(rollouts, failures, strict=True)
    ]
    write_json(output / name, [{**summary, "results": results}])
    print(json.dumps(summary))
    return summary


def table(summary: dict) -> str:
    """The summary for people."""
    low, high = summary["interval"]
    rows = [
        ("accuracy", f"{summary['accuracy']:.3f}  (95 % {low:.3f}-{high:.3f}, {summary['correct']}/{summary['n']})"),
        ("demonstrator, same problems", f"{summary['demonstrator']:.3f}"),
        ("failures", "  ".join(f"{kind}: {n:.3f}" for kind, n in [*summary["failures"].items()][:4]) or "none"),
        ("child threads per problem", f"{summary['children']:.2f}"),
        ("total tokens per problem", f"{summary['total_tokens']:.0f}"),
        ("sequential tokens per problem", f"{summary['sequential_tokens']:.0f}"),
        ("longest context, mean", f"{summary['longest_context']:.0f}"),
        ("truncated, malformed", f"{summary['truncated']:.3f}, {summary['malformed']:.3f}"),
        ("accuracy within a context of", "  ".join(f"{w}: {a[0]:.3f}" for w, a in summary["windows"].items())),
        ("ms per problem: under load", f"{summary['throughput_ms']:.1f}"),
        ("ms per problem: from start to end", f"{summary['milliseconds']:.0f}"),
    ]
    return "\n".join(f"  {name:<34} {value}" for name, value in rows)


def show_call(thread: Thread, number: int, tokenizer: Tokenizer) -> str:
    """One call of a thread: what it was given (after "|") and what it wrote."""
    call = thread.calls[number]
    name = "parent" if not thread.path else "child " + ".".join(map(str, thread.path))
    given = "".join(f"  | {line}\n" for line in tokenizer.decode(call.injected).splitlines())
    wrote = "".join(f"    {line}\n" for line in tokenizer.decode(call.sampled).splitlines() if line)
    detail = f": {thread.detail}" if thread.detail and number == len(thread.calls) - 1 else ""
    return f"[{name}, call {number}] {len(call.sampled)} tokens, stopped by {call.stop}{detail}\n{given}{wrote}"


def show(rollout: Rollout, tokenizer: Tokenizer) -> str:
    """All threads of a rollout, call by call in the order they ran: children stand where they were spawned."""
    parts = []

    def visit(thread: Thread) -> None:
        spawns = iter(thread.spawns)
        for number, call in enumerate(thread.calls):
            parts.append(show_call(thread, number, tokenizer))
            if call.stop == parallel_runtime.SPAWN:
                for child in next(spawns):
                    visit(child)

    visit(rollout.root)
    return "".join(parts)


def read_problems(path: str) -> list[Problem]:
    """Problems of a JSON file. Raises UsageError naming the entry that is wrong."""
    with usage_errors():
        try:
            entries = json.loads(pathlib.Path(path).read_text())
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list) or not entries:
            raise UsageError(f'{path} must hold a list of {{"numbers": [...], "target": n}}')
        return [_problem(entry, f"{path}, entry {index}") for index, entry in enumerate(entries)]


def _problem(entry: typing.Any, where: str) -> Problem:
    """A checked problem; one without a solution is accepted and said to be so."""
    if not isinstance(entry, dict) or set(entry) != {"numbers", "target"} or not isinstance(entry["numbers"], list):
        raise UsageError(f'{where} must be {{"numbers": [...], "target": n}}, not {json.dumps(entry)[:80]}')
    try:
        problem = Problem(tuple(entry["numbers"]), entry["target"])
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if not solver.solvable(problem.numbers, problem.target):
        print(f"note: {where}: {problem.target} cannot be reached; it will count as wrong", file=sys.stderr)
    return problem


def solve_one(experiment: Experiment, params: typing.Any, problem: Problem) -> Rollout:
    """Solves one problem and prints every call as it stops, then the verdict."""

    def watch(thread: Thread) -> None:
        print(show_call(thread, len(thread.calls) - 1, experiment.tokenizer), flush=True)

    runtime = experiment.runtime(params, experiment.config.sampler.temperature, watch)
    rollout = runtime.run([Request(problem)], seed=(experiment.config.evaluation.seed,))[0]
    verdict = "right" if rollout.grade.correct else f"wrong: {rollout.grade.reason}"
    print(f"answer: {', '.join(rollout.grade.answer) or 'none'} ({verdict})")
    costs = parallel_runtime.metrics(rollout)
    print(json.dumps({"correct": rollout.grade.correct, "answer": list(rollout.grade.answer), **costs}))
    return rollout


def stored_config(argv: Sequence[str]) -> ConfigDict:
    """The config of the run named by --workdir on the command line, else of the shipped checkpoint."""
    named = [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--workdir=", "-workdir="))]
    return ConfigDict(read_config(named[-1] if named else PRETRAINED))


def define_flags() -> None:
    """The command line; the config is that of the run named by --workdir."""
    flags.DEFINE_string("workdir", None, "The run to evaluate (default: the shipped checkpoint).")
    flags.DEFINE_string(
        "output", None, f"Where to write eval.json (default: --workdir if nothing else is asked for, else {ELSEWHERE})."
    )
    flags.DEFINE_string("problems", None, "JSON file with a list of problems (default: the held-out set).")
    flags.DEFINE_list("numbers", None, "One problem: its numbers, comma-separated. Needs --target.")
    flags.DEFINE_integer("target", None, "One problem: its target. Needs --numbers.")
    flags.DEFINE_string("record", None, "One problem: file to write its record to, for figures.py. Needs --numbers.")
    config_flags.DEFINE_config_dict("config", stored_config(sys.argv))


def main(_: list[str]) -> None:
    """Evaluates as the flags say."""
    args = flags.FLAGS
    source = pathlib.Path(args.workdir or PRETRAINED)
    with usage_errors():
        experiment = Experiment(args.config)
        if (args.numbers is None) != (args.target is None):
            raise UsageError("--numbers and --target go together")
        one = args.numbers is not None
        if one and not all(re.fullmatch(r"\s*-?[0-9]+\s*", number) for number in args.numbers):
            raise UsageError(f"--numbers must be whole numbers separated by commas, not {','.join(args.numbers)}")
        if args.record and not one:
            raise UsageError("--record goes with --numbers and --target: it keeps one problem")
        if one:
            entry = {"numbers": [int(number) for number in args.numbers], "target": args.target}
            problems = [_problem(entry, "the problem")]
        else:
            problems = read_problems(args.problems) if args.problems else experiment.test_set()
    params, result = load_best(source, experiment.param_shapes())
    if one:
        rollout = solve_one(experiment, params, problems[0])
        if args.record:
            trace = solver.stored(rollout, experiment.config.demonstrator.method, experiment.config.number_limit)
            with usage_errors():
                write_json(pathlib.Path(args.record), trace)
        return
    own = args.workdir and not args.problems and json.loads(args.config.to_json()) == read_config(source)
    output = pathlib.Path(args.output or (source if own else ELSEWHERE))
    report(experiment, params, problems, output, result["step"])


if __name__ == "__main__":
    launch(define_flags, main)

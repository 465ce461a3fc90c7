"""Measures a trained model: solves problems through spawn and join, grades them, counts what they cost.

    python evaluate.py                                    # the shipped checkpoint on its held-out problems
    python evaluate.py --workdir=runs/apr                 # your own
    python evaluate.py --problems=problems.json           # [{"numbers": [7, 2, 19], "target": 31}, ...]
    python evaluate.py --numbers=7,2,19 --target=31       # one problem, its threads printed as they run
        --record=trace.json                               # ... and its record written, for figures.py
    python evaluate.py --config.sampler.temperature=1.0   # any field of the run's own config can be set
        --config.evaluation.samples=8                     # ... eight samples a problem: pass@k and cons@k
        --config.evaluation.concurrent=1                  # ... one at a time: latency
        --config.limits.extensions=2                      # ... budget forcing
    python evaluate.py --sweep=configs/sweep.py           # many runs x budgets x temperatures, resumable
        --config.evaluation.problems=100                  # ... any field, of all of them

  1. Read the run's config and its best parameters.
  2. Run every problem through `parallel_runtime` on one `sampler.Sampler`.
  3. Grade each rollout with the one exact grader (`solver.Countdown.grade`).
  4. Name the fault that each failed rollout failed by (`verifier.explain`).
  5. Print a table, write eval.json (a summary per method and budget, with every
     rollout's result in order), and print the summary as the last line.

A sweep does this for every point of its grids, each in a folder named by what
was measured: the run, and a hash of its parameters, problems and config. So a
sweep that is run again goes on where it stopped, and results of different
checkpoints or problems are never mixed. `figures.py` draws what it leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import random
import re
import sys
import time
import typing
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import measures
import parallel_runtime
import solver
import verifier
from experiment import Experiment
from parallel_runtime import Interrupted, Request, Rollout, Thread
from solver import Problem
from tokenizer import Tokenizer
from workdir import Progress, UsageError, holds_parameters, launch, load_best, read_config, usage_errors, write_json

PRETRAINED = pathlib.Path(__file__).parent / "pretrained" / "apr"
EXCLUSIVE = {  # flag -> flags that would change nothing beside it
    "sweep": ("workdir", "problems", "numbers", "target", "record"),
    "numbers": ("problems", "output"),
}
ELSEWHERE = "runs/evaluation"  # a workdir's own eval.json is of its own config and held-out problems


def demonstrators(experiment: Experiment, problems: Sequence[Problem]) -> list[dict[str, float]]:
    """What one demonstration of each problem does, beam by beam.

    An entry holds `beam`, `accuracy` (the share solved within the model's context), `solved` (in any context), and
    the means `children` and `total_tokens`.
    """
    entries = []
    for beam in range(experiment.demonstrator.beam[0], experiment.demonstrator.beam[1] + 1):
        config = dataclasses.replace(experiment.demonstrator, beam=(beam, beam))
        rollouts = []
        for index, problem in enumerate(problems):
            trace = solver.demonstrate(problem, config, random.Random(f"demonstrator {beam} {index}"))
            rollouts.append(solver.record(problem, trace, experiment.task))
        costs = [parallel_runtime.metrics(rollout) for rollout in rollouts]
        fits = [cost["longest_context"] <= experiment.config.model.context for cost in costs]
        solved = [rollout.grade.correct for rollout in rollouts]
        means = {name: float(np.mean([cost[name] for cost in costs])) for name in ("children", "total_tokens")}
        both = float(np.mean(np.logical_and(fits, solved)))
        entries.append({"beam": beam, "accuracy": both, "solved": float(np.mean(solved)), **means})
    return entries


def at_equal_compute(entries: Sequence[dict[str, float]], spent: dict[str, typing.Any]) -> float:
    """Accuracy of the demonstrator where it spends what the model spends: children (of SoS and SoS+ tokens).

    Between two beams it is interpolated; below the smallest and above the largest it is theirs.
    """
    name = "children" if any(entry["children"] for entry in entries) else "total_tokens"
    points = sorted((entry[name], entry["accuracy"]) for entry in entries)
    costs, accuracies = zip(*points, strict=True)
    return float(np.interp(spent[name], costs, accuracies))


def budget(config: ConfigDict) -> str:
    """What a config asks of its rollouts, for tables."""
    asked, limits = config.prompt, config.limits
    parts = [
        f"{asked.sub_calls} threads asked" * (asked.sub_calls >= 0),
        f"{asked.tokens} tokens asked" * (asked.tokens >= 0),
        f"answer after {limits.thread_tokens} tokens" * (limits.answer_tokens > 0),
        f"sent on {limits.extensions} times" * (limits.extensions > 0),
    ]
    return ", ".join(filter(None, parts)) or "free"


def kept(experiment: Experiment, rollouts: Sequence[Rollout]) -> dict[str, typing.Any] | None:
    """How the rollouts kept to the budget they were given; None if they were given none."""
    config, roots = experiment.config, [rollout.root for rollout in rollouts]
    if (asked := config.prompt.sub_calls) >= 0:
        return measures.adherence([len(r.threads()) - 1 for r in rollouts], asked, asked)
    if (asked := config.prompt.tokens) >= 0:
        low = asked - config.demonstrator.token_bin + 1
        # The line that states the budget does not count, here as in demonstrations.
        line = len(experiment.tokenizer.encode(experiment.task.root_prefix))
        return measures.adherence([parallel_runtime.longest_context(root) - line for root in roots], low, asked)
    if config.limits.answer_tokens:
        used = [sum(len(call.sampled) for call in root.calls) for root in roots]
        return measures.adherence(used, 0, config.limits.thread_tokens + config.limits.answer_tokens)
    return None


def fingerprint(params: typing.Any) -> str:
    """Eight hexadecimal digits that differ where any parameter does."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return hashlib.blake2b(b"".join(leaf.tobytes() for leaf in leaves), digest_size=4).hexdigest()


def problem_set(problems: Sequence[Problem]) -> str:
    """The same of problems and their order."""
    text = repr([(problem.numbers, problem.target) for problem in problems])
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def failures(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> tuple[list[str], dict[str, float]]:
    """By what fault each rollout failed ("" if it did not), and the share of each kind, the most frequent first."""
    kinds = [fault.kind if (fault := verifier.explain(rollout, tokenizer)) else "" for rollout in rollouts]
    return kinds, {kind: count / len(kinds) for kind, count in Counter(filter(None, kinds)).most_common()}


def warm_up(experiment: Experiment, params: typing.Any, problems: Sequence[Problem]) -> None:
    """Solves a sampler full of the problems, so that nothing is left to compile when the clock runs."""
    experiment.solve(params, problems[: experiment.config.sampler.rows], 1, experiment.config.evaluation.concurrent)


def measure(
    experiment: Experiment, params: typing.Any, problems: Sequence[Problem], label: str, step: int
) -> tuple[dict[str, typing.Any], list[Rollout]]:
    """The summary of an evaluation, with every rollout's result, and the rollouts.

    Raises Interrupted, with what is done, on Ctrl-C: `summary_of` summarizes that.
    """
    config = experiment.config.evaluation
    started = time.monotonic()
    done = itertools.count(1)
    with contextlib.closing(Progress(len(problems) * config.samples, 0, "rollout")) as progress:
        rollouts = experiment.solve(
            params, problems, config.samples, config.concurrent, lambda: progress.update(next(done))
        )
    seconds = time.monotonic() - started
    return summary_of(experiment, params, rollouts, config.samples, seconds, label, step), rollouts


def summary_of(
    experiment: Experiment,
    params: typing.Any,
    rollouts: Sequence[Rollout],
    samples: int,
    seconds: float,
    label: str,
    step: int,
) -> dict[str, typing.Any]:
    """What eval.json says of rollouts, `samples` of each problem one after another."""
    config = experiment.config
    problems = [group[0].problem for group in measures.grouped(rollouts, samples)]
    measured = measures.summarize(rollouts, samples, seconds)
    beams = demonstrators(experiment, problems)
    kinds, shares = failures(rollouts, experiment.tokenizer)
    return {
        "label": label,
        "method": config.demonstrator.method,
        "budget": budget(config),
        "asked": {**config.prompt, **config.limits},
        "threads": dict(config.threads),
        "temperature": config.sampler.temperature * config.model.temperature,
        "sampling": {"top_k": config.sampler.top_k, "top_p": config.sampler.top_p},
        "context": config.model.context,
        "concurrent": config.evaluation.concurrent,
        **measured,
        "kept": kept(experiment, rollouts),
        "failures": shares,
        "windows": measures.windows(rollouts, config.model.context, samples),
        "demonstrator": at_equal_compute(beams, measured),
        "demonstrator_beams": beams,
        "family": dict(config.problems),
        "training_seed": config.seed,
        "seed": config.evaluation.seed,
        "checkpoint": step,
        "parameters": fingerprint(params),
        "problem_set": problem_set(problems),
        "results": [
            {
                "numbers": list(rollout.problem.numbers),
                "target": rollout.problem.target,
                "sample": rollout.index,
                "correct": rollout.grade.correct,
                "reason": rollout.grade.reason,
                "answer": list(rollout.grade.answer),
                "failure": failure,
                **parallel_runtime.metrics(rollout),
            }
            for rollout, failure in zip(rollouts, kinds, strict=True)
        ],
    }


def complete(rollouts: Sequence[Rollout], samples: int) -> list[Rollout]:
    """Those of the problems all of whose samples are there, one problem after another."""
    groups: dict[Problem, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.problem, []).append(rollout)
    return [rollout for group in groups.values() for rollout in group[: len(group) // samples * samples]]


def headline(summary: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The summary without every rollout's result."""
    return {name: value for name, value in summary.items() if name != "results"}


def report(
    experiment: Experiment, params: typing.Any, problems: Sequence[Problem], output: pathlib.Path, step: int
) -> dict:
    """Evaluates, prints the table and one solved problem, writes eval.json, prints the summary as the last line.

    Ctrl-C ends it early: the same of the problems that are done, written to interrupted.json.
    """
    with usage_errors():
        output.mkdir(parents=True, exist_ok=True)
        (output / "eval.json").touch()
    warm_up(experiment, params, problems)
    label, name, started = experiment.config.name, "eval.json", time.monotonic()
    try:
        summary, rollouts = measure(experiment, params, problems, label, step)
    except Interrupted as interrupt:
        samples, name = experiment.config.evaluation.samples, "interrupted.json"
        rollouts = complete(interrupt.rollouts, samples)
        if not rollouts:
            raise
        print(f"interrupted: {len(rollouts)} rollouts are done, the quick ones", file=sys.stderr)
        summary = summary_of(experiment, params, rollouts, samples, time.monotonic() - started, label, step)
    print(table(summary))
    if (solved := next((rollout for rollout in rollouts if rollout.grade.correct and rollout.root.spawns), None)) or (
        solved := next((rollout for rollout in rollouts if rollout.grade.correct), None)
    ):
        print(f"\nOne solved problem, thread by thread:\n\n{show(solved, experiment.tokenizer)}")
    write_json(output / name, [summary])
    print(json.dumps(headline(summary)))
    return summary


def table(summary: dict) -> str:
    """The summary for people."""
    low, high = summary["interval"]
    k = str(summary["samples"])
    together = [f"{name}@{k}: {summary[name][k][0]:.3f}" for name in ("pass", "cons") if k != "1"]
    rollouts = summary["n"] * summary["samples"]
    rows = [
        ("accuracy", f"{summary['accuracy']:.3f}  (95 % {low:.3f}-{high:.3f}, {summary['correct']}/{rollouts})"),
        ("samples of a problem together", "  ".join(together)),
        ("demonstrator at equal compute", f"{summary['demonstrator']:.3f}"),
        ("failures", "  ".join(f"{kind}: {n:.3f}" for kind, n in [*summary["failures"].items()][:4]) or "none"),
        ("child threads per problem", f"{summary['children']:.2f}"),
        ("total tokens per problem", f"{summary['total_tokens']:.0f}"),
        ("sequential tokens per problem", f"{summary['sequential_tokens']:.0f}"),
        ("longest context, mean", f"{summary['longest_context']:.0f}"),
        ("budget, and share within it", budget_line(summary) if summary["budget"] != "free" else ""),
        ("truncated, malformed", f"{summary['truncated']:.3f}, {summary['malformed']:.3f}"),
        ("accuracy within a context of", "  ".join(f"{w}: {a[0]:.3f}" for w, a in summary["windows"].items())),
        ("ms per problem: under load", f"{summary['throughput_ms']:.1f}"),
        ("ms per problem: from start to end", f"{summary['milliseconds']:.0f}"),
    ]
    return "\n".join(f"  {name:<34} {value}" for name, value in rows if value)


def budget_line(summary: dict) -> str:
    """Budget and adherence, for people."""
    held = summary["kept"]
    return f"{summary['budget']}: {held['within']:.3f}, mean {held['used']:.1f}" if held else summary["budget"]


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

    runtime = experiment.runtimes(params, experiment.config.sampler.temperature, watch)[0]
    rollout = runtime.run([Request(problem)], seed=(experiment.config.evaluation.seed,))[0]
    verdict = "right" if rollout.grade.correct else f"wrong: {rollout.grade.reason}"
    print(f"answer: {', '.join(rollout.grade.answer) or 'none'} ({verdict})")
    costs = parallel_runtime.metrics(rollout)
    del costs["milliseconds"]  # most of them went into compiling
    print(json.dumps({"correct": rollout.grade.correct, "answer": list(rollout.grade.answer), **costs}))
    return rollout


def heldout(experiment: Experiment, params: typing.Any) -> dict[str, float]:
    """What the problems that choose the best parameters say.

    Accuracy with its interval, children per problem, and the share of the problems that failed by each kind of fault.
    """
    rollouts = experiment.solve(params, experiment.validation_set())
    accuracy, low, high = measures.mean([float(rollout.grade.correct) for rollout in rollouts])
    children = sum(len(rollout.threads()) - 1 for rollout in rollouts) / len(rollouts)
    shares = {f"failed_{kind}": share for kind, share in failures(rollouts, experiment.tokenizer)[1].items()}
    return {"accuracy": accuracy, "low": low, "high": high, "children": children, **shares}


# ------------------------------------------------------------------- sweeps


class Point(typing.NamedTuple):
    """One evaluation of a sweep: a run under a label, with some fields of its config changed."""

    label: str
    workdir: pathlib.Path
    config: ConfigDict


def points(entries: Sequence[dict[str, typing.Any]], changes: dict[str, typing.Any]) -> list[Point]:
    """Every point of a sweep, checked before any is measured; entries whose run is not there are left out aloud.

    `changes` are fields of the config to set in all of them, unless their grid does. Points of a run stand together.
    Raises UsageError naming the entry that is wrong, or if there is no run at all.
    """
    found = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"label", "workdir", "grid"}:
            raise UsageError(f"entry {number} of the sweep must be a dict of label, workdir and grid, not {entry!r}")
        if not holds_parameters(entry["workdir"]):
            print(f"left out: {entry['label']}: {entry['workdir']} holds no trained run", file=sys.stderr)
            continue
        stored = read_config(entry["workdir"])
        for values in itertools.product(*entry["grid"].values()):
            config = ConfigDict(stored)
            try:
                config.update_from_flattened_dict({**changes, **dict(zip(entry["grid"], values, strict=True))})
                Experiment(config)  # raises where the values cannot work
                found.append(Point(entry["label"], pathlib.Path(entry["workdir"]), config))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"sweep, {entry['label']} with {[*entry['grid']]} = {values}: {error}") from error
    if not found:
        raise UsageError("the sweep has no entry whose run is there: train one, or name its workdir")
    return sorted(found, key=lambda point: point.workdir)


def sweep(plan: Sequence[Point], output: pathlib.Path) -> None:
    """Measures the points that `output` does not hold yet, a folder with an eval.json each; prints a line of each."""
    loaded, warm = None, set()
    for number, point in enumerate(plan, 1):
        experiment = Experiment(point.config)  # of one point at a time: its samplers hold much memory
        if loaded != point.workdir:
            params, result = load_best(point.workdir, experiment.param_shapes())
            parameters, loaded = fingerprint(params), point.workdir
        problems = experiment.test_set()
        key = f"{parameters} {problem_set(problems)} {point.config.to_json(sort_keys=True)}"
        folder = output / f"{point.label}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}".replace(" ", "-")
        if (folder / "eval.json").exists():
            (summary,) = json.loads((folder / "eval.json").read_text())
        else:
            concurrent, method = point.config.evaluation.concurrent, experiment.variant.method
            shapes = (experiment.model_config, experiment.sampler_config, concurrent, method)
            if shapes not in warm:  # points that differ in limits or prompts alone share compiled functions
                warm_up(experiment, params, problems)
                warm.add(shapes)
            summary, _ = measure(experiment, params, problems, point.label, result["step"])
            with usage_errors():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "eval.json", [summary])
        print(f"{number}/{len(plan)} {line(summary)}", flush=True)
    print(json.dumps({"points": len(plan), "output": str(output)}))


def line(summary: dict[str, typing.Any]) -> str:
    """A point of a sweep for people."""
    low, high = summary["interval"]
    variant = ", ".join(f"{name}={value}" for name, value in summary["threads"].items())
    return (
        f"{summary['label']}, {budget_line(summary)}, {variant}, T={summary['temperature']}: "
        f"{summary['accuracy']:.3f} ({low:.3f}-{high:.3f}), {summary['total_tokens']:.0f} tokens, "
        f"{summary['sequential_tokens']:.0f} in sequence, {summary['children']:.1f} children"
    )


# ------------------------------------------------------------------- command line


def stored_config(argv: Sequence[str]) -> ConfigDict:
    """The config of the run named by --workdir on the command line, else of the shipped checkpoint."""
    named = re.findall(r"^--?workdir[=\n](.*)", "\n".join(argv), re.MULTILINE)  # absl takes --workdir=X and --workdir X
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
    config_flags.DEFINE_config_file("sweep", None, "Grid of evaluations to run (configs/sweep.py) into --output.")
    config_flags.DEFINE_config_dict("config", stored_config(sys.argv))


def main(_: list[str]) -> None:
    """Evaluates as the flags say."""
    args = flags.FLAGS
    for flag, others in EXCLUSIVE.items():
        clash = [other for other in others if getattr(args, flag) and getattr(args, other) is not None]
        if clash:
            raise UsageError(f"--{flag} does not go with --{clash[0]}: leave one of them out")
    if args.sweep:
        plan = points(args.sweep.entries, config_flags.get_override_values(args["config"]))
        return sweep(plan, pathlib.Path(args.output or f"runs/{args.sweep.name}"))
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
            problems: Sequence[Problem] = [_problem(entry, "the problem")]
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

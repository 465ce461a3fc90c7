"""Measures parameters: rollouts of problems, what they achieve and cost, and the report of a run.

1. `measure` runs every problem through spawn and join and grades it (`evaluate` summarises what is there).
2. Every failed rollout gets the kind of fault it failed by, from the task's verifier.
3. `report` prints a table and one solved problem, writes eval.json, and prints the summary as the last line.
4. `validate` is the short form that training uses to choose its best parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

import records
from harness import files, stats
from harness.build import Parts
from harness.cli import Progress, usage_errors
from harness.results import Evaluation, Result
from harness.rollouts import RolloutPool
from harness.show import show
from harness.tasks import part
from harness.workdir import write_json
from harness.workers import Interrupted
from records import Rollout


def at_equal_compute(entries: Sequence[dict[str, float]], spent: dict[str, typing.Any]) -> float | None:
    """Accuracy of the demonstrator where it spends what the model spends: children, without any of them tokens.

    Interpolated between two settings of the demonstrator; below the cheapest and above the dearest it is theirs.
    None without a demonstrator.
    """
    if not entries:
        return None
    name = "children" if any(entry["children"] for entry in entries) else "total_tokens"
    points = sorted((entry[name], entry["accuracy"]) for entry in entries)
    costs, accuracies = zip(*points, strict=True)
    return float(np.interp(spent[name], costs, accuracies))


def budget(parts: Parts) -> str:
    """The budget that a configuration gives its rollouts, in words."""
    limits = parts.limits
    words = [parts.domain.requested()]
    if limits.forced_answer_tokens:
        words.append(f"answer forced after {limits.thread_tokens} tokens")
    if limits.min_budget_rounds:
        words.append(f"forced to continue {limits.min_budget_rounds} times")
    return ", ".join(filter(None, words)) or "no budget"


def adherence(parts: Parts, rollouts: Sequence[Rollout]) -> dict[str, typing.Any] | None:
    """How the rollouts adhere to their budget; None if they had none."""
    limits, stated = parts.limits, parts.domain.usage(rollouts)
    if stated:
        return stats.adherence(*stated)
    if not limits.forced_answer_tokens:
        return None
    used = [sum(len(call.sampled) for call in rollout.root.calls) for rollout in rollouts]
    return stats.adherence(used, 0, limits.thread_tokens + limits.forced_answer_tokens)


def fingerprint(params: typing.Any) -> str:
    """Eight hexadecimal digits that differ where any parameter does."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return files.digest(b"".join(leaf.tobytes() for leaf in leaves))


def problem_set(problems: Sequence[typing.Any]) -> str:
    """Eight hexadecimal digits that differ where the problems (tuples or dataclasses) or their order do."""
    text = repr([problem if isinstance(problem, tuple) else tuple(vars(problem).values()) for problem in problems])
    return files.digest(text.encode())


def failures(parts: Parts, rollouts: Sequence[Rollout]) -> tuple[list[str], dict[str, float]]:
    """The kind of fault each rollout failed by ("" if it did not), and the share of each kind, most frequent first."""
    explain = part(parts.config.task, "explain")
    kinds = [explain(rollout, parts.domain.language) for rollout in rollouts]
    return kinds, {kind: count / len(kinds) for kind, count in Counter(filter(None, kinds)).most_common()}


def validate(pool: RolloutPool, params: typing.Any) -> dict[str, float]:
    """Solves the validation problems: accuracy with its interval, children, share of each kind of fault, habits."""
    rollouts = pool.solve(params, pool.parts.validation_set())
    accuracy, low, high = stats.mean_with_interval([float(rollout.grade.correct) for rollout in rollouts])
    children = sum(len(rollout.threads()) - 1 for rollout in rollouts) / len(rollouts)
    shares = {f"failed_{kind}": share for kind, share in failures(pool.parts, rollouts)[1].items()}
    count = part(pool.parts.config.task, "habits")
    counts = [count(rollout, pool.parts.domain.language) for rollout in rollouts]
    means = {f"habit_{name}": sum(each[name] for each in counts) / len(counts) for name in counts[0]}
    return {"accuracy": accuracy, "low": low, "high": high, "children": children, **shares, **means}


def warm_up(pool: RolloutPool, params: typing.Any, problems: Sequence[typing.Any]) -> None:
    """Solves a sampler full of the problems, so that nothing is left to compile when the clock runs."""
    rows, samples = pool.parts.config.sampler.rows, pool.parts.evaluation.samples
    pool.solve(params, problems[: -(-rows // samples)], samples, pool.parts.evaluation.concurrent)


def measure(
    pool: RolloutPool, params: typing.Any, problems: Sequence[typing.Any], label: str, step: int
) -> tuple[Evaluation, list[Rollout]]:
    """The evaluation of parameters on problems, and its rollouts.

    Raises Interrupted, with the rollouts that are done, on Ctrl-C.
    """
    config = pool.parts.evaluation
    started = time.monotonic()
    done = itertools.count(1)
    with contextlib.closing(Progress(len(problems) * config.samples, 0, "rollout")) as progress:
        rollouts = pool.solve(params, problems, config.samples, config.concurrent, lambda: progress.update(next(done)))
    try:
        return evaluate(pool.parts, params, rollouts, time.monotonic() - started, label, step), rollouts
    except KeyboardInterrupt as stop:
        raise Interrupted(rollouts) from stop


def evaluate(
    parts: Parts, params: typing.Any, rollouts: Sequence[Rollout], seconds: float, label: str, step: int
) -> Evaluation:
    """The record of rollouts, all samples of a problem one after another."""
    config, samples, domain = parts.config, parts.evaluation.samples, parts.domain
    problems = [group[0].problem for group in stats.grouped(rollouts, samples)]
    measured = stats.summarize(rollouts, samples, seconds)
    demonstrators = domain.demonstrators(problems, config.model.context)
    kinds, shares = failures(parts, rollouts)
    facts = domain.facts()
    return Evaluation(
        label=label,
        task=config.task,
        **{name: facts[name] for name in ("method", "family", "threads")},
        budget=budget(parts),
        requested=dict(config.get("budget", {})),
        limits=dict(config.limits),
        temperature=parts.sampler.temperature,
        sampling={"top_k": parts.sampler.top_k, "top_p": parts.sampler.top_p},
        context=config.model.context,
        concurrent=parts.evaluation.concurrent,
        **measured,
        adherence=adherence(parts, rollouts),
        failures=shares,
        windows=stats.windows(rollouts, config.model.context, samples),
        demonstrator=at_equal_compute(demonstrators, measured),
        demonstrator_beams=demonstrators,
        training_seed=config.seed,
        seed=parts.evaluation.seed,
        checkpoint=step,
        parameters=fingerprint(params),
        problem_set=problem_set(problems),
        split=parts.evaluation.split,
        results=[_result(parts, *each) for each in zip(rollouts, kinds, strict=True)],
    )


def _result(parts: Parts, rollout: Rollout, failure: str) -> Result:
    grade, problem = rollout.grade, parts.domain.to_json(rollout.problem)
    answer = list(grade.answer)
    return Result(problem, rollout.index, grade.correct, grade.reason, answer, failure, **records.metrics(rollout))


def complete(rollouts: Sequence[Rollout], samples: int) -> list[Rollout]:
    """Those of the problems all of whose samples are there, one problem after another."""
    groups: dict[typing.Any, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.problem, []).append(rollout)
    return [rollout for group in groups.values() for rollout in group[: len(group) // samples * samples]]


def report(
    pool: RolloutPool, params: typing.Any, problems: Sequence[typing.Any], output: pathlib.Path, step: int
) -> Evaluation:
    """Evaluates, prints the table and one solved problem, writes eval.json, prints the summary as the last line.

    Ctrl-C ends it early: the report is then of the problems that are done, and written to interrupted.json, and
    Interrupted raised. Raises UsageError before it evaluates if no megabyte can be written to `output`.
    """
    with usage_errors():
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(bytes(1 << 20))
    warm_up(pool, params, problems)
    label, name, started = pool.parts.config.name, "eval.json", time.monotonic()
    interrupted: Interrupted | None = None
    try:
        evaluation, rollouts = measure(pool, params, problems, label, step)
    except Interrupted as interrupt:
        interrupted = interrupt
        rollouts, name = complete(interrupt.rollouts, pool.parts.evaluation.samples), "interrupted.json"
        if not rollouts:
            raise
        print(f"interrupted: {len(rollouts)} rollouts are done, the quick ones", file=sys.stderr)
        evaluation = evaluate(pool.parts, params, rollouts, time.monotonic() - started, label, step)
    print(table(evaluation))
    solved = [rollout for rollout in rollouts if rollout.grade.correct]
    solved.sort(key=lambda rollout: not rollout.root.spawns)  # one with children, if there is one
    if solved:
        print(f"\nOne solved problem, thread by thread:\n\n{show(solved[0], pool.parts.domain.language)}")
    write_json(output / name, [evaluation.to_json()])
    print(json.dumps(evaluation.headline()))
    if interrupted:
        raise interrupted
    return evaluation


# ------------------------------------------------------------------- for people


def table(evaluation: Evaluation) -> str:
    """The evaluation as a table."""
    e = evaluation
    low, high = e.interval
    k = str(e.samples)
    together = f"pass@{k}: {e.pass_at[k][0]:.3f}  cons@{k}: {e.cons_at[k][0]:.3f}" if e.samples > 1 else ""
    unit = "rollout" if e.samples > 1 else "problem"
    rows = [
        ("accuracy", f"{e.accuracy:.3f}  (95 % {low:.3f}-{high:.3f}, {e.correct}/{e.n * e.samples})"),
        ("samples of a problem together", together),
        ("demonstrator, at equal cost or less", "" if e.demonstrator is None else f"{e.demonstrator:.3f}"),
        ("failures", "  ".join(f"{kind}: {n:.3f}" for kind, n in [*e.failures.items()][:4]) or "none"),
        (f"child threads per {unit}", f"{e.children:.2f}"),
        (f"total tokens per {unit}", f"{e.total_tokens:.0f}"),
        (f"sequential tokens per {unit}", f"{e.sequential_tokens:.0f}"),
        ("longest context, mean", f"{e.longest_context:.0f}"),
        ("budget, and share within it", "" if e.budget == "no budget" else budget_line(e)),
        ("truncated, malformed", f"{e.truncated:.3f}, {e.malformed:.3f}"),
        ("accuracy within a context of", "  ".join(f"{w}: {a[0]:.3f}" for w, a in e.windows.items())),
        (f"ms per {unit}: under load", f"{e.throughput_ms:.1f}"),
        (f"ms per {unit}: from start to end", f"{e.milliseconds:.0f}"),
    ]
    return "\n".join(f"  {name:<34} {value}" for name, value in rows if value)


def budget_line(evaluation: Evaluation) -> str:
    """Budget and adherence to it."""
    held = evaluation.adherence
    return f"{evaluation.budget}: {held['within']:.3f}, mean {held['used']:.1f}" if held else evaluation.budget

"""Charts as data: which points of which lines each figure of the paper has.

A function per figure turns evaluations or logs (`analysis.choose`) into a `Chart`; `analysis.figures` draws it.
Intervals are of 95 %. The paper's values are among the points only where the problems are of the paper's family.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence

from analysis.choose import Entry, Log, free, policy, requested, rl_pairs, sampled
from analysis.labels import PAPER_ACCURACY, PAPER_COMPUTE, PAPER_FAMILY, PAPER_LATENCY, PAPER_TOKENS
from harness import stats

Style = dict[str, typing.Any]  # of a matplotlib line
Point = tuple[float, float, float, float]  # x, value, and the ends of its interval
Pairs = Mapping[str, Sequence[tuple[float, float]]]  # label -> (x, accuracy) of the paper

NEIGHBOURS = 5  # on either side in a running mean over steps
ARROW, CURVE, PAPER = "arrow", "curve", "the paper's"  # kinds of lines drawn in a way of their own
ALONE: Style = {"marker": "o", "markersize": 9, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}
FAINT: Style = {"marker": "", "alpha": 0.3, "linewidth": 0.7}


class Line(typing.NamedTuple):
    """Points of one label; `kind` tells its lines apart, and is the text of the legend unless empty."""

    label: str
    kind: str
    points: list[Point]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure as data."""

    title: str
    x: str
    needs: str  # the points without which it is left out
    panels: dict[str, list[Line]]  # title -> lines, side by side
    kinds: dict[str, Style] = dataclasses.field(default_factory=dict)  # how a kind of line differs from a plain one
    y: str = "accuracy"  # shared by the panels, a share; "": each panel has its own, which its title says
    log: bool = False  # whether x is on a log scale


# ---------------------------------------------------------------- charts of evaluations


def point(entry: Entry) -> Point:
    """Accuracy at total tokens."""
    low, high = entry.interval
    return entry.total_tokens, entry.accuracy, low, high


def through(entries: Iterable[Entry], kind: str) -> list[Line]:
    """A line per policy, its points in order of total tokens."""
    lines: dict[tuple, Line] = {}
    for entry in entries:
        lines.setdefault(policy(entry), Line(entry.label, kind, [])).points.append(point(entry))
    return [line._replace(points=sorted(line.points)) for line in lines.values()]


def papers(entries: Sequence[Entry], drawn: list[Line], values: Pairs) -> list[Line]:
    """The paper's (x, accuracy) of the labels drawn, if the entries are on problems of its family."""
    labels = {line.label for line in drawn if entries[0].family == PAPER_FAMILY}
    return [Line(label, PAPER, [(x, y, y, y) for x, y in values[label]]) for label in values if label in labels]


def compute(entries: Sequence[Entry]) -> Chart:
    """Accuracy against total tokens: more samples, budgets requested, one greedy rollout (paper, figure 4a)."""
    lines = []
    for entry in sampled(entries):
        for estimates, kind in ((entry.cons_at, "majority of k"), (entry.pass_at, "any of k")):
            points = [(int(k) * entry.total_tokens, *values) for k, values in estimates.items()]
            lines.append(Line(entry.label, kind, sorted(points)))
    for name in ("children", "tokens"):
        lines += through(requested(entries, name, 0), "budget requested")
    if lines:
        lines += through(free(entries, 0.0), "greedy")
        lines += papers(entries, lines, PAPER_COMPUTE)
    looks = {"majority of k": {}, "any of k": {"linestyle": "--"}, "budget requested": {"linestyle": ":"}}
    looks["greedy"] = ALONE
    needs = "several samples of each problem, or budgets requested"
    x = "total tokens per problem (log scale)"
    return Chart("Accuracy against total tokens", x, needs, {"": lines}, looks, log=True)


def context(entries: Sequence[Entry]) -> Chart:
    """Accuracy if only rollouts counted that fit a context window (paper, figure 4b)."""
    panels: dict[str, list[Line]] = {}
    threads = [e for e in requested(entries, "children", 0) if e.label == "APR" and e.temperature == 0]
    for title, chosen in (("no budget in the prompt", free(entries, 0.0)), ("children requested", threads)):
        for e in chosen:
            kind = e.budget if chosen is threads else ""
            points = [(int(window), *values) for window, values in e.windows.items()]
            panels.setdefault(title, []).append(Line(e.label, kind, sorted(points)))
    shades: dict[str, Style] = {e.budget: {"alpha": i / len(threads)} for i, e in enumerate(threads, 1)}
    return Chart("What fits a context window", "context window (tokens)", "greedy evaluations", panels, shades)


def rl(entries: Sequence[Entry]) -> Chart:
    """What reinforcement learning does to accuracy and total tokens (paper, figure 5)."""
    panels: dict[str, list[Line]] = {}
    for before, after in sorted(rl_pairs(entries), key=lambda pair: pair[0].temperature):
        if before.temperature in (0, 1):
            lines = panels.setdefault(f"temperature {before.temperature:g}", [])
            lines.append(Line(before.label, ARROW, [point(before), point(after)]))
            lines += [Line(entry.label, "", [point(entry)]) for entry in (before, after)]
    if "temperature 0" in panels:
        moves = {
            name: [*zip(tokens, (PAPER_ACCURACY[label, "no budget"][0] for label in (name, f"{name} RL")), strict=True)]
            for name, tokens in PAPER_TOKENS.items()
        }
        panels["temperature 0"] += papers(entries, panels["temperature 0"], moves)
    needs = 'labels "X" and "X RL" at the same budget and temperature, 0 or 1'
    return Chart("Before and after reinforcement learning", "total tokens per problem", needs, panels)


def within(entries: Sequence[Entry], cost: str) -> list[Line]:
    """Accuracy if only rollouts of cost t or less counted: a step wherever a correct one ends, up to the largest t."""
    lines = []
    largest = max((getattr(result, cost) for entry in entries for result in entry.results), default=0)
    for entry in entries:
        correct, costs = ([getattr(result, name) for result in entry.results] for name in ("correct", cost))
        bounds = sorted({0, largest, *(t for right, t in zip(correct, costs, strict=True) if right)})
        points = [(t, *stats.reached_within(correct, costs, t, entry.samples)) for t in bounds]
        lines.append(Line(entry.label, CURVE, points))
    return lines


def sequential(entries: Sequence[Entry]) -> Chart:
    """Accuracy against sequential tokens (paper, figure 6a)."""
    lines = within(free(entries, 0.0), "sequential_tokens")
    return Chart("Solved within so many sequential tokens", "sequential tokens", "greedy evaluations", {"": lines})


def latency(entries: Sequence[Entry]) -> Chart:
    """Accuracy against wall clock, one problem at a time (paper, figure 6b)."""
    lines = within(free(entries, 0.0, alone=True), "milliseconds")
    lines += papers(entries, lines, PAPER_LATENCY)
    needs = "greedy evaluations with --config.evaluation.concurrent=1"
    x = "time from start to end (ms, log scale)"  # a hiccup of the machine is a hundred times a problem's time
    return Chart("Solved within so much time, one at a time", x, needs, {"": lines}, log=True)


# ---------------------------------------------------------------- charts of runs


RAW, SMOOTH = "each step", f"mean of {2 * NEIGHBOURS + 1} steps"
SMOOTHED: dict[str, Style] = {RAW: FAINT, SMOOTH: {"marker": ""}}


def running_mean(values: Sequence[float], neighbours: int) -> list[float]:
    """Mean of each value and up to so many on either side."""
    around = [values[max(0, i - neighbours) : i + neighbours + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def over_steps(logs: Iterable[Log], name: str) -> list[Line]:
    """A number over the steps of each run, raw and smoothed."""
    lines = []
    for log in logs:
        steps = [line["step"] for line in log.lines if name in line]
        values = [line[name] for line in log.lines if name in line]
        for kind, shown in ((RAW, values), (SMOOTH, running_mean(values, NEIGHBOURS))):
            lines.append(Line(log.label, kind, [(x, y, y, y) for x, y in zip(steps, shown, strict=True)]))
    return [line for line in lines if line.points]


def validated(logs: Iterable[Log]) -> list[Line]:
    """Validation accuracy over the steps of each run, with its interval where one was logged."""
    lines = []
    for log in logs:
        lines_seen = [line for line in log.lines if "validation_accuracy" in line]
        seen = [(line["step"], line["validation_accuracy"], line) for line in lines_seen]
        points = [(x, y, line.get("validation_low", y), line.get("validation_high", y)) for x, y, line in seen]
        lines.append(Line(log.label, "", points))
    return [line for line in lines if line.points]


def training(logs: Sequence[Log]) -> Chart:
    """Accuracy over the steps of GRPO (paper, figure 7)."""
    runs = [log for log in logs if any("sampled_accuracy" in line for line in log.lines)]
    panels = {"sampled problems": over_steps(runs, "sampled_accuracy"), "validation problems": validated(runs)}
    return Chart("Accuracy during reinforcement learning", "step", "runs of grpo.py", panels, SMOOTHED)


def threads(logs: Sequence[Log]) -> Chart:
    """How the use of threads and tokens changes over the steps of GRPO (paper, figure 8)."""
    names = {"child threads per problem": "children", "total tokens per problem": "total_tokens"}
    names |= {"tokens per thread": "tokens_per_thread"}
    panels = {title: over_steps(logs, name) for title, name in names.items()}
    return Chart("Threads and tokens during reinforcement learning", "step", "runs of grpo.py", panels, SMOOTHED, y="")


RESULT_CHARTS = (compute, context, rl, sequential, latency)  # files are named by the functions
RUN_CHARTS = (training, threads)

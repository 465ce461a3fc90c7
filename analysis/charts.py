"""Evaluations and logs of runs -> charts, as data: which points of which lines each figure of the paper has.

  1. Read every eval.json below some folders and the metrics.jsonl of runs, and check them: results on different
     problems are never put side by side.
  2. Choose: entries asked for nothing, by budget, before and after reinforcement learning.
  3. A function per figure turns entries or logs into a `Chart`; `figures.py` draws it.

Intervals are of 95 %. The paper's values are among the points only where the problems are of the paper's family.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence

from configs.sweep import COMPARED, RUNS
from harness import stats
from harness.cli import UsageError, usage_errors

LABELS = tuple(RUNS)
# Of a run's folder, without its preset. RUNS come last, so that "apr" is "APR", not "APR in turn".
RUN_LABELS = {run: label for label, run in (COMPARED | RUNS).items()}
THREADS = {"join": "path", "inherit": False}  # what is no ablation
SAMPLING = {"top_k": 0, "top_p": 1.0}  # and no method of its own
NEIGHBOURS = 5  # on either side in a running mean over steps
ARROW, CURVE, TRACE, PAPER = "arrow", "curve", "trace", "the paper's"  # kinds of lines drawn in a way of their own
ALONE: Style = {"marker": "o", "markersize": 9, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}
SHADE = "shade"  # in a style: the label's colour from light (0) to dark (1)
FAINT: Style = {"marker": "", "alpha": 0.3, "linewidth": 0.7}

# The paper (arXiv 2504.15466): accuracy at its temperatures, what RL changed, points of its figures 4a and 6b.
PAPER_FAMILY = {"count": 4, "low": 1, "high": 99, "target_low": 10, "target_high": 100}
PAPER_TEMPERATURES = (0.0, 0.1, 0.5, 1.0)
PAPER_ACCURACY = {
    ("SoS", "free"): (0.495, 0.496, 0.471, 0.379),
    ("SoS+", "free"): (0.573, 0.571, 0.520, 0.481),
    ("SoS+ RL", "free"): (0.600, 0.593, 0.591, 0.581),
    ("APR", "free"): (0.755, 0.759, 0.749, 0.678),
    ("APR RL", "free"): (0.834, 0.829, 0.813, 0.764),
    ("APR asked", "10 threads asked"): (0.832, 0.833, 0.838, 0.801),
    ("APR asked RL", "10 threads asked"): (0.833, 0.833, 0.838, 0.819),
}
PAPER_TOKENS = {"SoS+": (2201, 2660), "APR": (10964, 16720)}  # before and after RL
PAPER_RL = {label: f"; total tokens {before:,} → {after:,}" for label, (before, after) in PAPER_TOKENS.items()}
PAPER_RL["APR"] += "; tokens per thread 1,471 → 1,796; child threads 6.1 → 8.2"
PAPERS_OWN = "Column paper: Pan et al. (2025), on their own task, four numbers to 99, with 228M parameters."
PAPER_COMPUTE = {"SoS+": [(20000, 0.666)], "APR asked": [(20000, 0.801)]}  # majority of seven samples; ten threads
PAPER_LATENCY = {"SoS+": [(5000, 0.573)], "APR": [(5000, 0.752)]}

Entry = dict[str, typing.Any]  # of eval.json
Style = dict[str, typing.Any]  # of a matplotlib line
Point = tuple[float, float, float, float]  # x, value, and the ends of its interval
Pairs = Mapping[str, Sequence[tuple[float, float]]]  # label -> (x, accuracy) of the paper
Row = list[typing.Any]  # cells of a table


class Line(typing.NamedTuple):
    """Points of one label; `kind` tells its lines apart, and is the text of the legend unless empty."""

    label: str
    kind: str
    points: list[Point]


class Log(typing.NamedTuple):
    """The metrics.jsonl of a run."""

    label: str
    lines: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure as data."""

    title: str
    x: str
    needs: str  # the points without which it is left out
    panels: dict[str, list[Line]]  # title -> lines, side by side
    kinds: dict[str, Style] = dataclasses.field(default_factory=dict)  # how a kind of line differs from a plain one
    y: str = "accuracy"  # shared by the panels, a share; "": each panel has its own, which its title says
    log: str = ""  # "x", or the title of the panel whose y is on a log scale


# ---------------------------------------------------------------- reading

NUMBER = (int, float)
SCHEMA: dict[str, typing.Any] = {  # what is read of an entry (`evaluate.summary_of`)
    **dict.fromkeys(("label", "budget", "parameters", "problem_set"), str),
    **dict.fromkeys(("concurrent", "n", "samples", "training_seed", "seed"), int),
    **dict.fromkeys(("asked.sub_calls", "asked.tokens", "asked.answer_tokens", "asked.extensions"), int),
    **dict.fromkeys(("temperature", "accuracy", "total_tokens", "children", "throughput_ms"), NUMBER),
    **dict.fromkeys(("interval", "results"), list),
    **dict.fromkeys(("pass", "cons", "windows", "failures", "family", "threads"), dict),
    **{f"sampling.{name}": NUMBER for name in SAMPLING},
    "kept": (dict, type(None)),
}
RESULT_SCHEMA = {
    "correct": bool,
    **dict.fromkeys(("total_tokens", "sequential_tokens", "children", "milliseconds"), NUMBER),
}


def check(value: typing.Any, schema: dict[str, typing.Any], where: str) -> None:
    """Raises UsageError naming the first field (a.b: b of the object a) that is missing or of the wrong kind."""
    for name, kind in schema.items():
        inner = value
        for key in name.split("."):
            if not isinstance(inner, dict) or key not in inner:
                raise UsageError(f"{where} lacks the field {name}: measure it again with evaluate.py")
            inner = inner[key]
        if not isinstance(inner, kind):
            raise UsageError(f"{where} has {json.dumps(inner)[:60]} in the field {name}: measure it again")


def _json(text: str, where: str) -> typing.Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error


def read_entries(path: pathlib.Path) -> list[Entry]:
    """The checked entries of an eval.json; none of an empty one, whose evaluation is under way."""
    with usage_errors():
        text = path.read_text(encoding="utf-8")
    if not text:
        print(f"note: {path} is empty (its evaluation is under way) and left out", file=sys.stderr)
        return []
    entries = _json(text, str(path))
    if not isinstance(entries, list):
        raise UsageError(f"{path} must hold a list of evaluations")
    for entry in entries:
        check(entry, SCHEMA, str(path))
        sampling = entry["sampling"]
        unlike = [f"{name} {sampling[name]:g}" for name, usual in SAMPLING.items() if sampling[name] != usual]
        entry["label"] = ", ".join([label_of(entry["label"], entry["label"]), *unlike])
        for number, result in enumerate(entry["results"]):
            check(result, RESULT_SCHEMA, f"{path}, result {number},")
        if not len(entry["results"]) == entry["n"] * entry["samples"] > 0:
            raise UsageError(f"{path} has {len(entry['results'])} results, not n * samples: measure it again")
    return entries


def read_results(folders: Sequence[str]) -> list[Entry]:
    """All entries below the folders, every point once, sorted by label.

    Raises UsageError if problems differ, or the parameters behind a label and training seed.
    """
    found: dict[str, Entry] = {}
    first: dict[str, pathlib.Path] = {}  # set of problems -> a file of results on it
    runs: dict[tuple[str, int], tuple[str, pathlib.Path]] = {}  # label and training seed -> parameters, and a file
    for folder in folders:
        paths = sorted(pathlib.Path(folder).rglob("eval.json"))
        if not paths:
            raise UsageError(f"{folder} holds no eval.json: run `python evaluate.py --sweep=configs/sweep.py` first")
        for path in paths:
            for entry in read_entries(path):
                first.setdefault(json.dumps([entry["problem_set"], entry["family"]], sort_keys=True), path)
                run = entry["label"], entry["training_seed"]
                parameters, file = runs.setdefault(run, (entry["parameters"], path))
                if parameters != entry["parameters"]:
                    raise UsageError(
                        f"{file} and {path} hold {run[0]} of training seed {run[1]} with different parameters: "
                        "choose one of them with --results, or give a run another name"
                    )
                same = ("label", "training_seed", "seed", "asked", "temperature", "samples", "concurrent", "threads")
                found.setdefault(json.dumps([entry[name] for name in (*same, "context")], sort_keys=True), entry)
    if len(first) > 1:
        files = " and ".join(map(str, first.values()))
        raise UsageError(f"{files} hold results on different problems: choose one of them with --results")
    if folders and not found:
        raise UsageError(f"no evaluation below {', '.join(folders)} has ended yet")
    return sorted(found.values(), key=lambda e: (*rank(e["label"]), e["training_seed"], e["temperature"], order(e)))


def order(entry: Entry) -> list[int]:
    """Sorts entries of a label by what they were asked for."""
    return [entry["asked"][name] for name in ("sub_calls", "tokens", "extensions")]


def read_logs(folders: Sequence[str]) -> list[Log]:
    """The logs of runs. A last line that is cut (the run goes on, or was killed) does not count."""
    logs: list[Log] = []
    for folder in folders:
        path = pathlib.Path(folder) / "metrics.jsonl"
        with usage_errors():
            texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole_lines = texts[: -1 if texts and not texts[-1].endswith("\n") else None]
        lines = [_json(text, f"{path}, line {number},") for number, text in enumerate(whole_lines, 1)]
        for number, line in enumerate(lines, 1):
            check(line, {"step": NUMBER}, f"{path}, line {number},")
        label = label_of(pathlib.Path(folder).resolve().name, folder)
        logs.append(Log(folder if label in [log.label for log in logs] else label, lines))
    return logs


def label_of(name: str, other: str) -> str:
    """The label of a run by its name, without its preset; `other` if it is not ours."""
    return RUN_LABELS.get(re.sub("-(smoke|desktop|gpu|paper)$", "", name), other)


def rank(label: str) -> tuple[int, str]:
    """Sorts labels: ours in the order of LABELS, then others by name."""
    return (LABELS.index(label) if label in LABELS else len(LABELS), label)


# ---------------------------------------------------------------- choosing


def whole(entries: Iterable[Entry], alone: bool = False) -> list[Entry]:
    """Entries of one sample a problem and unchanged threads; solved side by side, or one at a time (`alone`)."""
    return [e for e in entries if (e["samples"], e["threads"], e["concurrent"] == 1) == (1, THREADS, alone)]


def free(entries: Iterable[Entry], temperature: float | None = None, alone: bool = False) -> list[Entry]:
    """Those of `whole` that were asked for nothing, at one temperature or (None) at any."""
    return [e for e in whole(entries, alone) if e["budget"] == "free" and temperature in (None, e["temperature"])]


def asked(entries: Iterable[Entry], name: str, least: int) -> list[Entry]:
    """Those of `whole` with at least so much in a field of "asked", in its order."""
    return sorted((e for e in whole(entries) if e["asked"][name] >= least), key=lambda e: e["asked"][name])


def sampled(entries: Iterable[Entry]) -> list[Entry]:
    """Entries of several samples of each problem and unchanged threads."""
    return [e for e in entries if e["samples"] > 1 and e["threads"] == THREADS]


def policy(entry: Entry) -> tuple[str, str, float]:
    """What was measured, whatever was asked of it."""
    return entry["label"], entry["parameters"], entry["temperature"]


def rl_pairs(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Entries of "X" and "X RL" at the same temperature and budget; of several X, that of the same seeds if any."""
    pairs = []
    for after in (e for e in whole(entries) if e["label"].endswith(" RL")):
        wanted = (after["label"].removesuffix(" RL"), after["temperature"], after["budget"])
        before = [e for e in whole(entries) if (e["label"], e["temperature"], e["budget"]) == wanted]
        if before:
            seeds = ("training_seed", "seed")
            pairs.append((min(before, key=lambda e: [e[seed] != after[seed] for seed in seeds]), after))
    return pairs


def forced(entries: Sequence[Entry]) -> tuple[list[list[Entry]], list[list[Entry]], list[Entry]]:
    """Caps and floors of each policy, its free entry among both, in order of tokens; and these free entries."""
    kinds = []
    for name in ("answer_tokens", "extensions"):
        groups: dict[tuple, list[Entry]] = {}
        for entry in asked(entries, name, 1):
            groups.setdefault(policy(entry), []).append(entry)
        for entry in free(entries):
            groups.get(policy(entry), []).append(entry)
        kinds.append([sorted(group, key=lambda e: e["total_tokens"]) for group in groups.values()])
    started = {policy(entry) for kind in kinds for group in kind for entry in group}
    return kinds[0], kinds[1], [entry for entry in free(entries) if policy(entry) in started]


def by_problem(entry: Entry, name: str) -> list[float]:
    """A field of the results, averaged over the samples of each problem."""
    return stats.per_problem([float(result[name]) for result in entry["results"]], entry["samples"])


# ---------------------------------------------------------------- charts of evaluations


def point(entry: Entry, x: str = "total_tokens") -> Point:
    """Accuracy at a field."""
    low, high = entry["interval"]
    return entry[x], entry["accuracy"], low, high


def through(entries: Iterable[Entry], kind: str = "", x: str = "total_tokens") -> list[Line]:
    """A line per policy (at any temperature, if that is x), its points in order of x."""
    lines: dict[tuple, Line] = {}
    for entry in entries:
        key = policy(entry)[: 2 if x == "temperature" else 3]
        lines.setdefault(key, Line(entry["label"], kind, [])).points.append(point(entry, x))
    return [line._replace(points=sorted(line.points)) for line in lines.values()]


def papers(entries: Sequence[Entry], drawn: list[Line], values: Pairs) -> list[Line]:
    """The paper's (x, accuracy) of the labels drawn, if the entries are on problems of its family."""
    labels = {line.label for line in drawn if entries[0]["family"] == PAPER_FAMILY}
    return [Line(label, PAPER, [(x, y, y, y) for x, y in values[label]]) for label in values if label in labels]


def compute(entries: Sequence[Entry]) -> Chart:
    """Accuracy against total tokens: more samples, budgets asked for, one greedy rollout (paper, figure 4a)."""
    lines = []
    for entry in sampled(entries):
        for name, kind in (("cons", "majority of k"), ("pass", "any of k")):
            points = [(int(k) * entry["total_tokens"], *values) for k, values in entry[name].items()]
            lines.append(Line(entry["label"], kind, sorted(points)))
    for name in ("sub_calls", "tokens"):
        lines += through(asked(entries, name, 0), "budget asked")
    if lines:
        lines += through(free(entries, 0.0), "greedy")
        lines += papers(entries, lines, PAPER_COMPUTE)
    looks = {"majority of k": {}, "any of k": {"linestyle": "--"}, "budget asked": {"linestyle": ":"}, "greedy": ALONE}
    needs = "several samples of each problem, or budgets asked for"
    return Chart("What more tokens buy", "total tokens per problem (log scale)", needs, {"": lines}, looks, log="x")


def context(entries: Sequence[Entry]) -> Chart:
    """Accuracy if only rollouts counted that fit a context window (paper, figure 4b)."""
    panels: dict[str, list[Line]] = {}
    threads = [e for e in asked(entries, "sub_calls", 0) if e["label"] == "APR asked" and e["temperature"] == 0]
    for title, chosen in (("asked for nothing", free(entries, 0.0)), ("asked for threads", threads)):
        for e in chosen:
            kind = e["budget"] if chosen is threads else ""
            points = [(int(window), *values) for window, values in e["windows"].items()]
            panels.setdefault(title, []).append(Line(e["label"], kind, sorted(points)))
    shades = {e["budget"]: {SHADE: i / max(1, len(threads) - 1)} for i, e in enumerate(threads)}
    return Chart("What fits a context window", "context window (tokens)", "greedy evaluations", panels, shades)


def rl(entries: Sequence[Entry]) -> Chart:
    """What reinforcement learning does to accuracy and total tokens (paper, figure 5)."""
    panels: dict[str, list[Line]] = {}
    for before, after in sorted(rl_pairs(entries), key=lambda pair: pair[0]["temperature"]):
        if before["temperature"] in (0, 1):
            lines = panels.setdefault(f"temperature {before['temperature']:g}", [])
            lines.append(Line(before["label"], ARROW, [point(before), point(after)]))
            lines += [Line(entry["label"], "", [point(entry)]) for entry in (before, after)]
    if "temperature 0" in panels:
        moves = {
            name: [*zip(tokens, (PAPER_ACCURACY[label, "free"][0] for label in (name, f"{name} RL")), strict=True)]
            for name, tokens in PAPER_TOKENS.items()
        }
        panels["temperature 0"] += papers(entries, panels["temperature 0"], moves)
    needs = 'labels "X" and "X RL" at the same budget and temperature, 0 or 1'
    return Chart("Before and after reinforcement learning", "total tokens per problem", needs, panels)


def within(entries: Sequence[Entry], cost: str) -> list[Line]:
    """Accuracy if only rollouts of cost t or less counted: a step wherever a correct one ends, up to the largest t."""
    lines = []
    largest = max((result[cost] for entry in entries for result in entry["results"]), default=0)
    for entry in entries:
        correct, costs = ([result[name] for result in entry["results"]] for name in ("correct", cost))
        bounds = sorted({0, largest, *(t for right, t in zip(correct, costs, strict=True) if right)})
        points = [(t, *stats.reached_within(correct, costs, t, entry["samples"])) for t in bounds]
        lines.append(Line(entry["label"], CURVE, points))
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
    return Chart("Solved within so much time, one at a time", x, needs, {"": lines}, log="x")


def forcing(entries: Sequence[Entry]) -> Chart:
    """Accuracy against total tokens under budget forcing (s1)."""
    caps, floors, neither = forced(entries)
    lines = [line for group in caps for line in through(group, "answer forced")]
    lines += [line for group in floors for line in through(group, "sent on")]
    lines += through(neither, "as trained")
    looks = {"answer forced": {}, "sent on": {"linestyle": "--"}, "as trained": ALONE}
    needs = "evaluations with limits.answer_tokens or limits.extensions"
    return Chart("Budget forcing", "total tokens per problem", needs, {"": lines}, looks)


def temperature(entries: Sequence[Entry]) -> Chart:
    """Accuracy against the sampler's temperature (paper, table 1)."""
    lines = through(free(entries), x="temperature")
    free_rows = {label: row for (label, budget), row in PAPER_ACCURACY.items() if budget == "free"}
    theirs = {label: [*zip(PAPER_TEMPERATURES, row, strict=True)] for label, row in free_rows.items()}
    lines += papers(entries, lines, theirs)
    return Chart("Accuracy by temperature", "sampler temperature", "free evaluations", {"": lines})


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


def heldout(logs: Iterable[Log]) -> list[Line]:
    """Held-out accuracy over the steps of each run, with its interval where one was logged."""
    lines = []
    for log in logs:
        seen = [(line["step"], line["heldout_accuracy"], line) for line in log.lines if "heldout_accuracy" in line]
        points = [(x, y, line.get("heldout_low", y), line.get("heldout_high", y)) for x, y, line in seen]
        lines.append(Line(log.label, "", points))
    return [line for line in lines if line.points]


def of_kind(logs: Iterable[Log], reinforced: bool) -> list[Log]:
    """The GRPO runs, or the others."""
    return [log for log in logs if any("sampled_accuracy" in line for line in log.lines) == reinforced]


def training(logs: Sequence[Log]) -> Chart:
    """Accuracy over the steps of GRPO (paper, figure 7)."""
    runs = of_kind(logs, True)
    panels = {"sampled problems": over_steps(runs, "sampled_accuracy"), "held-out problems": heldout(runs)}
    return Chart("Accuracy during reinforcement learning", "step", "runs of grpo.py", panels, SMOOTHED)


def threads(logs: Sequence[Log]) -> Chart:
    """How the use of threads and tokens changes over the steps of GRPO (paper, figure 8)."""
    names = {"child threads per problem": "children", "total tokens per problem": "total_tokens"}
    names |= {"tokens per thread": "tokens_per_thread"}
    panels = {title: over_steps(of_kind(logs, True), name) for title, name in names.items()}
    return Chart("Threads and tokens during reinforcement learning", "step", "runs of grpo.py", panels, SMOOTHED, y="")


def supervised(logs: Sequence[Log]) -> Chart:
    """Loss and held-out accuracy over the steps of supervised training."""
    runs = of_kind(logs, False)
    losses = [line._replace(kind=TRACE) for line in over_steps(runs, "loss") if line.kind == RAW]  # logged as a mean
    panels = {"loss (log scale)": losses, "held-out accuracy, greedy": heldout(runs)}
    return Chart("Supervised training", "step", "runs of sft.py", panels, y="", log="loss (log scale)")


RESULT_CHARTS = (compute, context, rl, sequential, latency, forcing, temperature)  # files are named by the functions
RUN_CHARTS = (training, threads, supervised)

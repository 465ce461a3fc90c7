"""Evaluations and logs of runs, read and chosen for charts and tables.

  1. Read every eval.json below some folders and the metrics.jsonl of runs, and check them: results on different
     problems are never put side by side.
  2. Choose: entries without a budget, by budget, before and after reinforcement learning.

An entry is an `Evaluation` whose label is one of `analysis.labels`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing
from collections.abc import Iterable, Sequence

from analysis.labels import label_of, rank
from harness import files, results, stats
from harness.cli import UsageError, usage_errors
from harness.results import AnyPath, Evaluation

THREADS = {"child_returns": "path", "inherit_context": False}  # what is no ablation
SAMPLING = {"top_k": 0, "top_p": 1.0}  # and no method of its own
Entry = Evaluation


class Log(typing.NamedTuple):
    """The metrics.jsonl of a run."""

    label: str
    lines: list[dict[str, float]]


# ---------------------------------------------------------------- reading


def read_entries(path: AnyPath) -> list[Entry]:
    """The checked entries of an eval.json."""
    with usage_errors():
        entries = results.read(path.read_bytes(), str(path))
    for entry in entries:
        unlike = [f"{name} {value:g}" for name, value in entry.sampling.items() if value != SAMPLING.get(name)]
        entry.label = ", ".join([label_of(entry.label, entry.label), *unlike])
    return entries


def read_results(folders: Sequence[str]) -> list[Entry]:
    """All entries below the folders, every point once, sorted by label.

    Raises UsageError if problems differ, or the parameters behind a label and training seed.
    """
    found: dict[str, Entry] = {}
    first: dict[str, AnyPath] = {}  # set of problems -> a file of results on it
    runs: dict[tuple[str, int], tuple[str, AnyPath]] = {}  # label and training seed -> parameters, and a file
    for folder in folders:
        paths = results.evaluations(pathlib.Path(folder))
        if not paths:
            raise UsageError(f"{folder} holds no eval.json: run `python evaluate.py --sweep=configs/sweep.py` first")
        for path in paths:
            for entry in read_entries(path):
                first.setdefault(json.dumps([entry.problem_set, entry.family], sort_keys=True), path)
                run = entry.label, entry.training_seed
                parameters, file = runs.setdefault(run, (entry.parameters, path))
                if parameters != entry.parameters:
                    raise UsageError(
                        f"{file} and {path} hold {run[0]} of training seed {run[1]} with different parameters: "
                        "choose one of them with --results, or give a run another name"
                    )
                same = ("label", "training_seed", "seed", "requested", "limits", "temperature", "samples")
                key = [getattr(entry, name) for name in (*same, "concurrent", "threads", "context")]
                found.setdefault(json.dumps(key, sort_keys=True), entry)
    if len(first) > 1:
        files = " and ".join(map(str, first.values()))
        raise UsageError(f"{files} hold results on different problems: choose one of them with --results")
    return sorted(found.values(), key=lambda e: (*rank(e.label), e.training_seed, e.temperature, order(e)))


def order(entry: Entry) -> list[int]:
    """Sorts entries of a label by what they requested."""
    return [amount(entry, name) for name in ("children", "tokens", "min_budget_rounds")]


def read_logs(folders: Sequence[str]) -> list[Log]:
    """The logs of runs. Raises UsageError on a log that is missing or damaged."""
    logs: list[Log] = []
    for folder in folders:
        log = results.opened(pathlib.Path(folder)) / "metrics.jsonl"
        if not log.exists():
            raise UsageError(f"{folder} holds no metrics.jsonl: name the workdir of a run, or a shipped one")
        with usage_errors():
            if isinstance(log, pathlib.Path) and (log.parent / files.CHECKSUMS).exists():
                files.check(log.parent)
            lines = results.read_log(log)
        label = label_of(pathlib.Path(folder).resolve().name, folder)
        logs.append(Log(folder if label in [log.label for log in logs] else label, lines))
    return logs


# ---------------------------------------------------------------- choosing


def unchanged(entry: Entry) -> bool:
    """Whether threads spawn and join as in the paper; a task without variants says nothing of them."""
    return entry.threads in ({}, THREADS)


def ablated(entries: Iterable[Entry]) -> list[Entry]:
    """Entries whose threads spawn or join in another way, which stands in place of their budget."""
    return [
        dataclasses.replace(
            e, threads=THREADS, budget=", ".join(f"{n}: {v}" for n, v in e.threads.items() if THREADS.get(n) != v)
        )
        for e in entries
        if not unchanged(e)
    ]


def whole(entries: Iterable[Entry], alone: bool = False) -> list[Entry]:
    """Entries of one sample a problem and unchanged threads; solved side by side, or one at a time (`alone`)."""
    return [e for e in entries if unchanged(e) and (e.samples, e.concurrent == 1) == (1, alone)]


def free(entries: Iterable[Entry], temperature: float | None = None, alone: bool = False) -> list[Entry]:
    """Those of `whole` that were no budget in the prompt, at one temperature or (None) at any."""
    return [e for e in whole(entries, alone) if e.budget == "no budget" and temperature in (None, e.temperature)]


def amount(entry: Entry, name: str) -> int:
    """A field of the budget that prompts state, else of the limits; -1 of a task without a budget."""
    return entry.requested.get(name, entry.limits.get(name, -1))


def requested(entries: Iterable[Entry], name: str, least: int) -> list[Entry]:
    """Those of `whole` with at least so much of a budget or limit, in its order."""
    return sorted((e for e in whole(entries) if amount(e, name) >= least), key=lambda e: amount(e, name))


def sampled(entries: Iterable[Entry]) -> list[Entry]:
    """Entries of several samples of each problem and unchanged threads."""
    return [e for e in entries if unchanged(e) and e.samples > 1]


def policy(entry: Entry) -> tuple[str, str, float]:
    """What was measured, whatever was asked of it."""
    return entry.label, entry.parameters, entry.temperature


def rl_pairs(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Entries of "X" and "X RL" at the same temperature, sampling and budget.

    "X RL fixed" is compared with "X" as well. Of several X with different parameters none is: which one RL started
    from is not known.
    """
    pairs = []
    for after in (e for e in whole(entries) if " RL" in e.label):
        wanted = (re.sub(" RL[^,]*", "", after.label), after.temperature, after.budget)
        before = [e for e in whole(entries) if (e.label, e.temperature, e.budget) == wanted]
        if len({e.parameters for e in before}) == 1:
            pairs.append((min(before, key=lambda e: e.seed != after.seed), after))
    return pairs


def forced(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Caps, then floors, of each policy, in order of tokens; its free entry is among both."""
    found = []
    for name in ("forced_answer_tokens", "min_budget_rounds"):
        groups: dict[tuple, list[Entry]] = {}
        for entry in requested(entries, name, 1):
            groups.setdefault(policy(entry), []).append(entry)
        for entry in free(entries):
            groups.get(policy(entry), []).append(entry)
        found += [sorted(group, key=lambda e: e.total_tokens) for group in groups.values()]
    return found


def by_problem(entry: Entry, name: str) -> list[float]:
    """A field of the results, averaged over the samples of each problem."""
    return stats.per_problem([float(getattr(result, name)) for result in entry.results], entry.samples)

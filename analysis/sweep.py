"""A sweep: evaluations of many runs at many budgets and temperatures, resumable.

    python evaluate.py --sweep=configs/sweep.py

Every point of the grids goes into a folder named by what was measured: the label of the run, and a hash of its
parameters, problems and config. So a sweep that is run again goes on where it stopped, and results of different
checkpoints or problems are never mixed.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import typing
from collections.abc import Sequence

from ml_collections import ConfigDict

from harness.build import build, check_targets
from harness.cli import UsageError, usage_errors
from harness.evaluation import budget_line, fingerprint, measure, problem_set, warm_up
from harness.files import digest, lock
from harness.results import Evaluation, read
from harness.rollouts import RolloutPool
from harness.workdir import holds_parameters, load_best, read_config, write_json


class Point(typing.NamedTuple):
    """One evaluation of a sweep: a run under a label, with some fields of its config changed."""

    label: str
    workdir: pathlib.Path
    config: ConfigDict


def points(entries: Sequence[dict[str, typing.Any]], changes: dict[str, typing.Any]) -> list[Point]:
    """Every point of a sweep, checked before any is measured. Points of a run stand together.

    `changes` are fields of the config to set in all of them, unless their grid does. An entry whose run is not there
    is left out with a note. Raises UsageError naming the entry that is wrong, or if there is no run at all.
    """
    found = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {"label", "workdir", "grid"}:
            raise UsageError(f"entry {number} of the sweep must be a dict of label, workdir and grid, not {entry!r}")
        grid = entry["grid"]
        if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) for values in grid.values()):
            raise UsageError(f"the grid of {entry['label']} must be a dict of lists of values, not {grid!r}")
        if not holds_parameters(entry["workdir"]):
            print(f"left out: {entry['label']}: {entry['workdir']} holds no trained run", file=sys.stderr)
            continue
        stored = read_config(entry["workdir"])
        for values in itertools.product(*grid.values()):
            config = ConfigDict(stored)
            try:
                config.update_from_flattened_dict({**changes, **dict(zip(grid, values, strict=True))})
                build(config)  # raises where the values cannot work
                check_targets(config, stored)
                found.append(Point(entry["label"], pathlib.Path(entry["workdir"]), config))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"sweep, {entry['label']} with {[*grid]} = {values}: {error}") from error
    if not found:
        raise UsageError("the sweep has no entry whose run is there: train one, or name its workdir")
    return sorted(found, key=lambda point: point.workdir)


def run(plan: Sequence[Point], output: pathlib.Path) -> None:
    """Measures the points that `output` does not hold yet, a folder with an eval.json each; prints a line of each.

    Raises UsageError if another sweep writes to `output`, or if nothing can be written there.
    """
    with usage_errors():
        output.mkdir(parents=True, exist_ok=True)
        lock(output.absolute())
    loaded, warm = None, set()
    for number, point in enumerate(plan, 1):
        parts = build(point.config)
        pool = RolloutPool(parts)  # of one point at a time: its samplers hold much memory
        if loaded != point.workdir:
            params, result = load_best(point.workdir, parts.param_shapes())
            parameters, loaded = fingerprint(params), point.workdir
        problems = parts.test_set()
        key = f"{parameters} {problem_set(problems)} {point.config.to_json(sort_keys=True)}"
        folder = output / f"{point.label}-{digest(key.encode())}".replace(" ", "-")
        file = folder / "eval.json"
        if file.exists():
            with usage_errors():
                (evaluation,) = read(file.read_bytes(), str(file))
        else:
            shapes = (parts.model.config, parts.sampler, parts.evaluation.concurrent, parts.domain.facts()["method"])
            if shapes not in warm:  # points that differ in limits or prompts alone share compiled functions
                warm_up(pool, params, problems)
                warm.add(shapes)
            evaluation, _ = measure(pool, params, problems, point.label, result["step"])
            with usage_errors():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(file, [evaluation.to_json()])
        print(f"{number}/{len(plan)} {line(evaluation)}", flush=True)
    print(json.dumps({"points": len(plan), "output": str(output)}))


def line(evaluation: Evaluation) -> str:
    """A point of a sweep in words."""
    low, high = evaluation.interval
    variant = ", ".join(f"{name}={value}" for name, value in {**evaluation.threads, "split": evaluation.split}.items())
    return (
        f"{evaluation.label}, {budget_line(evaluation)}, {variant}, T={evaluation.temperature}: "
        f"{evaluation.accuracy:.3f} ({low:.3f}-{high:.3f}), {evaluation.total_tokens:.0f} tokens, "
        f"{evaluation.sequential_tokens:.0f} in sequence, {evaluation.children:.1f} children"
    )

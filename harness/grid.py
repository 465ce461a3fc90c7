"""Trainings over a grid of flags: one after another, or one of them by its index.

    python -m harness.grid --output=runs/grid --config=configs/apr.py --config.seed=0,1,2 --config.model.width=64,128
    python -m harness.grid --output=runs/rl --command=grpo.py --init=runs/a,runs/b --config.grpo.advantage=std,mean
    python -m harness.grid --output=runs/grid --index=$SLURM_ARRAY_TASK_ID ...    # one run of the same grid

  1. Every flag with commas is an axis; the grid is the product of the axes. Commas in brackets do not count.
  2. Each run gets a workdir below OUTPUT that is named by its values, and a log beside it.
  3. A run that has ended is not started again, and one that was killed goes on from its checkpoint. Ctrl-C and
     SIGTERM reach the run, which saves its state.
  4. A run that fails is named, and the others go on.
  5. The runs that have ended make OUTPUT/table.md and OUTPUT/figure.png.

Flags that are not those of this command go to the command that it runs. Status 1: a run failed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pathlib
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence

from harness import files, results
from harness.cli import UsageError, in_order, one_line

COLUMNS = ("accuracy", "children", "total_tokens", "sequential_tokens")  # of the last line of a run
Result = dict[str, typing.Any]


class Run(typing.NamedTuple):
    """A point of the grid: its values by flag, and the command line without the workdir."""

    values: dict[str, str]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The values as the name of a folder."""
        parts = (f"{flag.removeprefix('config.')}={value}" for flag, value in self.values.items())
        return re.sub(r"[^\w.=,+-]", "_", ",".join(parts)) or "only"


def expand(flags: Sequence[str]) -> list[Run]:
    """The grid of a command line. Raises ValueError on a flag that is not --name=value, or that comes twice."""
    names, axes = [], []
    for flag in flags:
        form = re.fullmatch(r"--([^=]+)=(.*)", flag, re.DOTALL)
        if not form or form[1] in names:
            raise ValueError(f"{flag}: flags are written --name=value, each once, and several values as a,b,c")
        names.append(form[1])
        axes.append(_split(form[2]))
    varied = [name for name, axis in zip(names, axes, strict=True) if len(axis) > 1]
    runs = []
    for values in itertools.product(*axes):
        chosen = dict(zip(names, values, strict=True))
        words = tuple(f"--{name}={value}" for name, value in chosen.items())
        runs.append(Run({name: chosen[name] for name in varied}, words))
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two runs of the grid would share a folder: an axis names a value twice")
    return runs


def _split(text: str) -> list[str]:
    """The values between commas that stand in no brackets."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def ended(command: str, run: Run, output: pathlib.Path) -> Result | None:
    """The last line of a run that has ended; None of one that has not.

    Raises UsageError if the file that says so is damaged, or if the run had another command or other flags.
    """
    file = output / f"{run.name}.json"
    if not file.exists():
        return None
    remedy = "remove it, and its run is evaluated again"
    try:
        stored = json.loads(file.read_text())
        results.match(stored, str(file), remedy)
    except (AttributeError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged ({one_line(error)}): {remedy}") from error
    if changed := {stored.get("command"), *stored["flags"]} ^ {command, *run.flags}:
        raise UsageError(f"{file} is of another grid ({', '.join(sorted(map(str, changed)))}): choose another --output")
    return stored["result"]


def start(command: str, run: Run, output: pathlib.Path) -> str:
    """Runs one point in a process of its own. Returns "", or why it failed."""
    words = [sys.executable, command, *run.flags, f"--workdir={output / run.name}"]
    log = output / f"{run.name}.log"
    with open(log, "a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        stopped: KeyboardInterrupt | None = None
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt as stop:  # the run saves its state; after a second one it ends at once
                stopped = stop
                process.terminate()
        if stopped:
            raise stopped
    lines = log.read_text(errors="replace").splitlines() or [""]
    if process.returncode:
        return f"status {process.returncode}: {lines[-1][:200]}"
    try:
        result = dict(json.loads(lines[-1]))
    except (TypeError, ValueError):
        return f"its last line is no JSON object: {lines[-1][:200]}"
    stored = results.signed({"command": command, "flags": list(run.flags), "result": result})
    files.replace(output / f"{run.name}.json", (json.dumps(stored) + "\n").encode())
    return ""


def table(runs: Sequence[Run], found: dict[str, Result], failed: dict[str, str]) -> str:
    """All runs in GitHub's markdown: their values, and what they achieved (`found` by name) or why they did not."""
    axes = list(runs[0].values)
    rows = [[*axes, *COLUMNS, "95 % interval", "state"]]
    rows.append(["---"] * len(rows[0]))
    for run in runs:
        result = found.get(run.name, {})
        state = "ended" if result else failed.get(run.name, "not run yet").replace("|", "/")
        numbers = [f"{result[name]:.4g}" if isinstance(result.get(name), int | float) else "" for name in COLUMNS]
        interval = "{:.3f}-{:.3f}".format(*result["interval"]) if "interval" in result else ""
        rows.append([*run.values.values(), *numbers, interval, state])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(runs: Sequence[Run], found: dict[str, Result]) -> bytes:
    """Accuracy of the runs that have ended, with its interval, over the first axis; a colour per rest of the values."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = [(run, found[run.name]) for run in runs if "accuracy" in found.get(run.name, {})]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    first, *rest = [*runs[0].values, "run"]
    lines: dict[str, list] = {}
    for run, result in drawn:
        label = ", ".join(f"{name}={run.values[name]}" for name in rest if name in run.values)
        lines.setdefault(label, []).append((run.values.get(first, "only"), result))
    for label, points in lines.items():
        x, y = [value for value, _ in points], [result["accuracy"] for _, result in points]
        spans = [result.get("interval", (result["accuracy"],) * 2) for _, result in points]
        below, above = ([abs(at - span[end]) for at, span in zip(y, spans, strict=True)] for end in (0, 1))
        axes.errorbar(x, y, [below, above], marker="o", capsize=3, label=label or None)
    axes.set(xlabel=first, ylabel="accuracy (95 % interval)")
    if len(lines) > 1:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    pyplot.close(figure)
    return buffer.getvalue()


def main(argv: Sequence[str], start: Callable[[str, Run, pathlib.Path], str] = start) -> int:
    """Runs the grid, or one run of it, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default="sft.py", help="the training to run: sft.py or grpo.py")
    parser.add_argument("--output", default="runs/grid", help="folder of the runs, the table and the figure")
    parser.add_argument("--index", type=int, help="the number of the one run to take, from 0 (default: all)")
    args, flags = parser.parse_known_args(argv)
    output, failed = pathlib.Path(args.output), {}
    try:
        runs = expand(flags)
        for run in runs:
            ended(args.command, run, output)
        if args.index is not None and not 0 <= args.index < len(runs):
            raise ValueError(f"--index={args.index} must be from 0 to {len(runs) - 1}: the grid has {len(runs)} runs")
    except (ValueError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        if args.index in (None, number) and ended(args.command, run, output) is None:
            print(f"{number + 1}/{len(runs)} {run.name}", flush=True)
            if reason := start(args.command, run, output):
                failed[run.name] = f"failed, {reason}"
                print(f"failed: {run.name}: {reason}", file=sys.stderr)
    found = {run.name: result for run in runs if (result := ended(args.command, run, output)) is not None}
    text = table(runs, found, failed)
    files.replace(output / "table.md", text.encode())
    files.replace(output / "figure.png", draw(runs, found))
    summary = {"runs": len(runs), "ended": len(found), "failed": sorted(failed), "output": str(output)}
    print(f"{text}\n{json.dumps(summary)}")
    return int(bool(failed))


if __name__ == "__main__":
    with in_order():
        sys.exit(main(sys.argv[1:]))

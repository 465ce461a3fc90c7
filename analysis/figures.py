"""Pictures: the viewer's page of a single rollout, and what evaluations and runs add up to.

    python evaluate.py --numbers=4,12,18 --target=21 --record=trace.json          # a rollout of the model,
    python solver.py --numbers=22,26,31,53 --target=27 --seed=1 --json > trace.json    # or a demonstration
    python -m analysis.figures --trace=trace.json --output=page.html

    python evaluate.py --sweep=configs/sweep.py
    python -m analysis.figures --results=runs/sweep --runs=runs/grpo-apr,runs/grpo-sosp --output=runs/figures

  1. Read every eval.json below --results and the metrics.jsonl of --runs, and check them: results on different
     problems are never put side by side.
  2. Turn them into charts: lines of points, as data.
  3. Draw each chart that has points, as NAME.png.
  4. Write the numbers to tables.md, the paper's own beside them.

Intervals are of 95 %. A label has one colour and one marker everywhere. The paper's values are drawn (grey, hollow)
only where the problems are of the paper's family.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
import zlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import charts, tables
from analysis.charts import ARROW, CURVE, PAPER, Chart, Line, Style
from analysis.choose import Entry, read_logs, read_results
from analysis.labels import rank
from analysis.viewer import page, page_data, read_trace
from harness.cli import UsageError, launch, usage_errors

# Label -> colour (Okabe and Ito's, and their grey) and marker. What a method is compared with has its marker.
LOOKS = {
    "Direct": ("#B22222", "p"),
    "SoS": ("#000000", "v"),
    "SoS RL": ("#999999", "<"),
    "SoS+": ("#E69F00", "s"),
    "SoS+ RL": ("#D55E00", "D"),
    "APR": ("#0072B2", "o"),
    "APR RL": ("#009E73", "^"),
    "APR RL fixed": ("#CC79A7", "X"),
    "APR text": ("#6A3D9A", "o"),
    "APR inherit": ("#1F3A5F", "o"),
    "APR sequential": ("#5F9EA0", "o"),
}
SPARE_MARKERS = ">Hd*8"  # of labels that are not ours
GREY = "#808080"
KINDS: dict[str, Style] = {
    ARROW: {},
    CURVE: {"drawstyle": "steps-post", "markevery": [-1]},
    PAPER: {"color": GREY, "markeredgecolor": GREY, "markeredgewidth": 1.2, "markerfacecolor": "none", "zorder": 4}
    | {"linestyle": "--", "linewidth": 0.8},
}
RC: typing.Any = {  # matplotlib's settings
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.markeredgewidth": 0.5,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
}
METADATA: typing.Any = {"Software": None}  # the same input gives the same bytes, whatever draws it
DPI = 160


# ---------------------------------------------------------------- drawing

EDGE = "#333333"  # of markers: on white, yellow alone is pale
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")


def look(label: str) -> tuple[str, str]:
    """Colour and marker of a label: of one that is not ours by its name alone, so that figures agree."""
    number = zlib.crc32(label.encode())
    spare = ([*LOOKS.values()][number % len(LOOKS)][0], SPARE_MARKERS[number // len(LOOKS) % len(SPARE_MARKERS)])
    return LOOKS.get(label, spare)


def draw(axes: Axes, line: Line, special: Style) -> None:
    """A line with its intervals: bars, or the band of a curve."""
    x, y, low, high = np.asarray(line.points, float).T
    color, marker = look(line.label)
    style: Style = {"color": color, "marker": marker, "markersize": 5, "markeredgecolor": EDGE, "linewidth": 1.4}
    style |= KINDS.get(line.kind, {}) | special
    style["marker"] = style["marker"] and marker
    if line.kind == ARROW:
        arrow: Style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", (x[1], y[1]), (x[0], y[0]), arrowprops=arrow, zorder=1)
    elif line.kind == CURVE:
        axes.plot(x, y, **style)
        axes.fill_between(x, low, high, step="post", color=color, alpha=0.12, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=np.maximum((y - low, high - y), 0), elinewidth=0.8, **style)


def legend(figure: Figure, chart: Chart) -> None:
    """Right of the panels: labels by colour and marker, then, in grey, kinds of lines."""
    lines = [line for panel in chart.panels.values() for line in panel]
    drawn = {line.kind for line in lines}
    handles: list[Line2D] = []
    for label in sorted({line.label for line in lines if line.kind != PAPER}, key=rank):
        color, marker = look(label)
        handles.append(Line2D([], [], color=color, marker=marker, markersize=5, markeredgecolor=EDGE, label=label))
    for kind, style in (chart.kinds | {PAPER: KINDS[PAPER] | {"marker": "o"}}).items():
        if kind in drawn:
            shown: Style = {"color": GREY, "label": kind} | style
            handles.append(Line2D([], [], **shown))
    figure.legend(handles=handles, loc="outside right upper")


def render(chart: Chart) -> Figure:
    """Draws a chart."""
    figure = Figure(figsize=(3.4 * len(chart.panels) + 2.2, 3.6), layout="constrained")
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=11)
    row = figure.subplots(1, len(chart.panels), squeeze=False, sharey=bool(chart.y))[0]
    for axes, (title, lines) in zip(row, chart.panels.items(), strict=True):
        axes.set(title=title, xlabel=chart.x)
        for line in lines:
            draw(axes, line, chart.kinds.get(line.kind, {}))
        axes.locator_params(axis="x", nbins=7)  # more would let long numbers touch
        if chart.log:
            axes.set_xscale("log")
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_major_formatter(PERCENT if chart.y else "{x:,g}")
    row[0].set_ylabel(chart.y)
    legend(figure, chart)
    return figure


# ---------------------------------------------------------------- writing


def write_tables(entries: Sequence[Entry], output: pathlib.Path) -> str:
    """Writes tables.md, prints which tables have no rows, returns the file."""
    family = ", ".join(f"{name} {value}" for name, value in entries[0].family.items())
    text = f"{entries[0].n} held-out problems ({family}). Intervals, in parentheses or after ±, are of 95 %.\n"
    for table in (build(entries) for build in tables.TABLES):
        if table.rows:
            text += tables.markdown(table)
        else:
            print(f"left out of tables.md: {table.title}")
    (output / "tables.md").write_text(text, encoding="utf-8")
    return str(output / "tables.md")


def write_chart(name: str, chart: Chart, output: pathlib.Path) -> list[str]:
    """Writes the figure if there are points for it, prints what is missing if not, returns the file."""
    chart = dataclasses.replace(chart, panels={title: lines for title, lines in chart.panels.items() if lines})
    if not chart.panels:
        print(f"left out {name}: it needs {chart.needs}")
        return []
    with matplotlib.rc_context(RC):
        render(chart).savefig(output / f"{name}.png", dpi=DPI, metadata=METADATA)
    return [str(output / f"{name}.png")]


# ---------------------------------------------------------------- command line


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("trace", None, "Trace file to show (evaluate.py --record, solver.py --json).")
    flags.DEFINE_list("results", [], "Folders to search for eval.json files: figures and tables of evaluations.")
    flags.DEFINE_list("runs", [], "Workdirs of GRPO runs: figures of their training.")
    flags.DEFINE_string(
        "output", None, "The page to write (default: beside the trace file), or the folder (default: runs/figures)."
    )


def main(_: list[str]) -> None:
    """Draws as the flags say."""
    args = flags.FLAGS
    if args.trace is not None and (args.results or args.runs):
        raise UsageError("--trace makes a page of its own: leave out --results and --runs")
    if args.trace is not None:
        output = pathlib.Path(args.output or pathlib.Path(args.trace).with_suffix(".html"))
        html = page(page_data(read_trace(args.trace)))
        with usage_errors():
            output.write_text(html, encoding="utf-8")
        print(f"wrote {output}")
    elif args.results or args.runs:
        entries, logs = read_results(args.results), read_logs(args.runs)
        drawn = {build.__name__: build(entries) for build in charts.RESULT_CHARTS if entries}
        drawn |= {build.__name__: build(logs) for build in charts.RUN_CHARTS if logs}
        output = pathlib.Path(args.output or "runs/figures")
        with usage_errors():
            output.mkdir(parents=True, exist_ok=True)
            written = [file for name, chart in drawn.items() for file in write_chart(name, chart, output)]
            written += [write_tables(entries, output)] if entries else []
        print("\n".join(f"wrote {path}" for path in written))
        print(json.dumps({"written": written}))
    else:
        raise UsageError("nothing to draw: name --trace=FILE, --results=FOLDERS or --runs=FOLDERS")


if __name__ == "__main__":
    launch(define_flags, main)

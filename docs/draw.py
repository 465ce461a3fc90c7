"""The diagrams of README.md and docs/. No JAX.

    python evaluate.py --numbers=10,9,7 --target=27 --record=trace.json
    python -m docs.draw --trace=trace.json --output=docs

  timeline.png   spawn and join of one recorded rollout, on a clock of tokens
  rows.png       the rows of the KV cache before, during and after its first join
  until.png      who sees whom in the packed row of the example in packing.py
  tail.png       history, view and tail of one burst of the sampler
  headline.png   accuracy within a context window, from pretrained/*/eval.json

The first two need --trace. The others do not depend on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import typing

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.viewer import read_trace
from docs.fill import evaluation
from harness.cli import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT, LISTED, SPAWN, JOIN, REST, CHILD = "#BBBBBB", "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00"
GREY = "#666666"
DPI = 160
SETTINGS: typing.Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclasses.dataclass
class Spawned:
    """A rollout with one join, in tokens."""

    prompt: int  # given to the parent
    listed: int  # sampled before the spawn block
    spawn: int  # the spawn block
    children: list[tuple[int, int]]  # tokens given to and sampled by each child
    join: int  # the join block
    rest: int  # sampled after it

    @property
    def start(self) -> int:
        """When the children start."""
        return self.listed + self.spawn

    @property
    def slowest(self) -> int:
        """Tokens of the slowest child."""
        return max(sampled for _, sampled in self.children)


def read(path: str) -> Spawned:
    """The join of a trace file. Raises SystemExit if the rollout has none, or more than one."""
    try:
        rollout = read_trace(path).rollout
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
    root, calls = rollout.root, sum(len(thread.calls) for thread in rollout.threads())
    if len(root.spawns) != 1 or calls != 2 + len(root.spawns[0]):
        raise SystemExit(f"error: the pictures show one spawn and its join, not {path}: record another problem")
    first, second = root.calls
    listed = second.keep - len(first.injected)
    return Spawned(
        prompt=len(first.injected),
        listed=listed,
        spawn=len(first.sampled) - listed,
        children=[(len(child.calls[0].injected), len(child.calls[0].sampled)) for child in root.spawns[0]],
        join=len(second.injected),
        rest=len(second.sampled),
    )


def bar(axes: Axes, x: float, y: float, width: float, color: str, label: str = "", alpha: float = 1) -> None:
    """A bar of `width` tokens, with its label inside."""
    axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, facecolor=color, edgecolor="white", linewidth=1, alpha=alpha))
    if label:
        ink = "white" if alpha > 0.5 else GREY
        axes.text(x + width / 2, y, label, ha="center", va="center", color=ink, fontsize=8)


def blank(axes: Axes) -> None:
    """Leaves the lines and ticks of an axes out."""
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


# ------------------------------------------------------------------- one rollout


def timeline(s: Spawned) -> Figure:
    """Parent and children over the number of tokens sampled one after another."""
    figure = Figure(figsize=(8, 0.42 * len(s.children) + 1.5), layout="constrained")
    axes = figure.subplots()
    end = s.start + s.slowest
    bar(axes, 0, 0, s.listed, LISTED, f"lists {len(s.children)} subproblems")
    bar(axes, s.listed, 0, s.spawn, SPAWN, "spawn()")
    axes.plot([s.start, end], [0, 0], color=GREY, linewidth=1, linestyle=":")
    axes.text(s.start + s.slowest / 2, 0.16, "waits", ha="center", va="top", fontsize=8, color=GREY)
    bar(axes, end, 0, s.rest, REST, "reads results, answers")
    for number, (_, sampled) in enumerate(s.children):
        slowest = sampled == s.slowest
        bar(axes, s.start, number + 1, sampled, CHILD, f"child {number}", alpha=1 if slowest else 0.6)
        if not slowest:
            axes.plot([s.start + sampled, end], [number + 1] * 2, color=GREY, linewidth=0.6, linestyle=":")
    low, high = -0.7, len(s.children) + 0.55
    for x, name in ((s.start, "children start"), (end, "join()")):
        axes.plot([x, x], [low, high], color=JOIN if x == end else SPAWN, linewidth=1)
        axes.text(x, low - 0.05, name, ha="center", va="bottom", color=JOIN if x == end else SPAWN, fontsize=8)
    total = s.start + s.rest + sum(sampled for _, sampled in s.children)
    longest = end + s.rest
    axes.set(xlim=(-2, longest + 2), ylim=(high, low - 0.6), yticks=range(len(s.children) + 1))
    axes.set_yticklabels(["parent", *[""] * len(s.children)])
    axes.set_xlabel(f"tokens sampled one after another: {longest} (all threads together: {total})")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return figure


def rows(s: Spawned) -> Figure:
    """The same rollout as rows of the KV cache, at three moments."""
    shown = s.children[:3]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    panels = figure.subplots(3, 1, height_ratios=(4, 5, 4))
    kept = s.prompt + s.listed
    width = max(kept + s.join + s.rest, kept + s.spawn)
    titles = (
        "1. The parent samples the spawn token. Its row waits. Each child gets a row of its own.",
        "2. The last child ends. The parent's row is rewound: only the length changes, nothing is copied.",
        "3. The join block is prefilled, and the parent decodes on. The rows of the children are free.",
    )
    for step, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        bar(axes, 0, 0, s.prompt, PROMPT)
        bar(axes, s.prompt, 0, s.listed, LISTED, f"list: {s.listed}")
        if step < 2:
            bar(axes, kept, 0, s.spawn, SPAWN, f"spawn: {s.spawn}", alpha=1 if step == 0 else 0.25)
        else:
            bar(axes, kept, 0, s.join, JOIN, f"join: {s.join}")
            bar(axes, kept + s.join, 0, s.rest, REST, f"rest: {s.rest}")
        for number, (given, sampled) in enumerate(shown):
            free = step == 2
            bar(axes, 0, number + 1, given, PROMPT, alpha=0.25 if free else 1)
            bar(axes, given, number + 1, sampled, CHILD, "" if free else f"child: {sampled}", alpha=0.25 if free else 1)
        if step == 1:
            axes.annotate("keep", (kept, -0.42), (kept, -1.1), ha="center", fontsize=8, arrowprops={"arrowstyle": "->"})
        blank(axes)
        axes.set(xlim=(-1, width + 1), ylim=(len(shown) + 0.5, -1.5 if step == 1 else -0.6))
        axes.set_yticks(range(len(shown) + 1), [f"row {number}" for number in range(len(shown) + 1)], fontsize=8)
        axes.tick_params(left=False)
        axes.set_title(title, loc="left", fontsize=9)
    figure.supxlabel("grey: prompt. Numbers are tokens. Further children have rows like rows 1 to 3.", fontsize=8)
    return figure


# ------------------------------------------------------------------- who sees whom


def until() -> Figure:
    """The visibility of the example in packing.py."""
    kinds = ["P", "P", "L", "L", "S", "S", "J", "J", "R", "X", "X", "."]
    ends = np.asarray([9, 9, 9, 9, 6, 6, 9, 9, 9, 11, 11, 12])
    colors = dict(P=PROMPT, L=LISTED, S=SPAWN, J=JOIN, R=REST, X=CHILD) | {".": "#DDDDDD"}
    count = len(kinds)
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for i in range(count):
        for j in range(count):
            seen = j <= i < ends[j]
            face = colors[kinds[j]] if seen else "white"
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=face, edgecolor="#DDDDDD", linewidth=0.8))
    axes.add_patch(Rectangle((4, 6), 2, 3, facecolor="none", edgecolor=SPAWN, linewidth=1.6, linestyle="--"))
    text = "after the join,\nnobody sees\nthe spawn block"
    axes.annotate(
        text, (6.0, 6.6), (8.0, 2.6), fontsize=8, color=SPAWN, arrowprops={"arrowstyle": "->", "color": SPAWN}
    )
    middles = np.arange(count) + 0.5
    axes.set(xlim=(0, count), ylim=(count, 0))
    axes.set_xticks(middles, [f"{kind}\n{end}" for kind, end in zip(kinds, ends, strict=True)])
    axes.set_yticks(middles, kinds)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("token j (below it: until[j]) is visible to token i if j <= i < until[j]", fontsize=9)
    axes.set_ylabel("token i looks at")
    return figure


# ------------------------------------------------------------------- history and tail


def tail() -> Figure:
    """Three rows of the sampler in one burst of three steps: history, view and tail, then the flush."""
    lengths, view, steps, slots = (5, 7, 2), 8, 3, 12
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(2, 1)
    for panel, axes in enumerate(panels):
        for row, length in enumerate(lengths):
            for slot in range(slots):
                filled, flushed = slot < length, panel == 1 and length <= slot < length + steps
                face = LISTED if filled else CHILD if flushed else "white"
                axes.add_patch(Rectangle((slot, row), 1, 0.8, facecolor=face, edgecolor="#CCCCCC", linewidth=0.8))
            for step in range(steps if panel == 0 else 0):
                face = CHILD if step < 2 else "white"
                axes.add_patch(
                    Rectangle((slots + 1 + step, row), 1, 0.8, facecolor=face, edgecolor="#CCCCCC", linewidth=0.8)
                )
        if panel == 0:
            axes.plot([0, view, view, 0, 0], [-0.12, -0.12, 2.92, 2.92, -0.12], color=GREY, linewidth=1.4)
            axes.text(
                view / 2, -0.2, "view: 8 slots, as long as the longest row needs", ha="center", fontsize=8, color=GREY
            )
            axes.text(slots + 1 + steps / 2, -0.2, "tail: 3 columns", ha="center", fontsize=8, color="#A86F00")
            axes.annotate(
                "this step writes one column",
                (slots + 3.5, 2.85),
                (slots + 4.2, 3.5),
                fontsize=8,
                arrowprops={"arrowstyle": "->"},
                ha="left",
                va="center",
            )
        else:
            axes.text(
                slots + 1,
                1.4,
                "flush: the tail goes behind each\nrow's own history, once per burst",
                fontsize=8,
                va="center",
            )
        blank(axes)
        axes.set(xlim=(-0.2, slots + 9.5), ylim=(3.6 if panel == 0 else 3, -0.6))
        axes.set_yticks([0.4, 1.4, 2.4], ["row 0", "row 1", "row 2"], fontsize=8)
        axes.tick_params(left=False)
    return figure


# ------------------------------------------------------------------- the headline


def headline() -> Figure:
    """APR and SoS+ at `laptop`, seed 0: the share of problems solved within a context window.

    The dashed line is APR whose demonstrator ranks children as that of SoS+ does.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for run, name, color in (("apr", "APR: threads", LISTED), ("sosp", "SoS+: one thread", CHILD)):
        windows = evaluation(run)["windows"]
        x = [int(window) for window in windows]
        y, low, high = np.asarray([*windows.values()]).T
        axes.plot(x, y, color=color, marker="o", linewidth=2)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.text(x[-1] + 8, y[-1], f"{name}\n{y[-1]:.3f}", color=color, va="top" if run == "sosp" else "center")
    same = [estimate[0] for estimate in evaluation("apr-total")["windows"].values()]
    axes.plot(x, same, color=LISTED, linestyle="--", linewidth=1)
    axes.text(x[-1] + 8, same[-1], f"by SoS+'s ranking\n{same[-1]:.3f}", color=LISTED, fontsize=8, va="bottom")
    axes.set(xlim=(110, 665), ylim=(0, 1), xticks=x, xlabel="context window, tokens", ylabel="accuracy")
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    return figure


def main() -> None:
    """Draws as the flags say."""
    parser = argparse.ArgumentParser(description="Draws the diagrams of README.md and docs/.")
    parser.add_argument("--trace", help="Trace file for timeline.png and rows.png (evaluate.py --record).")
    parser.add_argument("--output", default="docs", help="Folder of the pictures.")
    args = parser.parse_args()
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):
        pictures = {"until": until(), "tail": tail(), "headline": headline()}
        if args.trace:
            spawned = read(args.trace)
            pictures |= {"timeline": timeline(spawned), "rows": rows(spawned)}
        for name, figure in pictures.items():
            figure.savefig(output / f"{name}.png", dpi=DPI, metadata={"Software": None})
            print(f"wrote {output / name}.png")


if __name__ == "__main__":
    main()

"""Pictures: the viewer's page of a single rollout, and what evaluations and runs add up to.

    python evaluate.py --numbers=4,12,18 --target=21 --record=trace.json          # a rollout of the model,
    python solver.py --numbers=22,26,31,53 --target=27 --seed=1 --json > trace.json    # or a demonstration
    python figures.py --trace=trace.json --output=page.html
"""

from __future__ import annotations

import pathlib

from absl import flags

from viewer import page, page_data, read_trace
from workdir import UsageError, launch, usage_errors

# ---------------------------------------------------------------- command line


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("trace", None, "Trace file to show (evaluate.py --record, solver.py --json).")
    flags.DEFINE_string("output", None, "The page to write (default: beside the trace file, with suffix .html).")


def main(_: list[str]) -> None:
    """Draws as the flags say."""
    args = flags.FLAGS
    if args.trace is None:
        raise UsageError("nothing to draw: name a trace file with --trace=FILE")
    output = pathlib.Path(args.output or pathlib.Path(args.trace).with_suffix(".html"))
    html = page(page_data(*read_trace(args.trace)))
    with usage_errors():
        output.write_text(html, encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    launch(define_flags, main)

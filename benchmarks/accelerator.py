"""How close the code is to its hardware, in a few minutes: one command for a GPU, a TPU or a CPU.

    python -m benchmarks.accelerator                            # preset gpu, at most 8 minutes
    python -m benchmarks.accelerator --sections=train,decode
    python -m benchmarks.accelerator --preset=smoke --minutes=20    # a CPU runs it all

  device    what it is, its versions, its measured matrix rate and memory bandwidth; always first
  feeding   tokens a second that one worker makes, and the share of them that carries a segment
  check     forward, gradients and greedy spawn-and-join against a float64 reference
  train     the training step: tokens a second, share of the matrix rate, memory, seconds to compile; PyTorch beside it
  decode    decode steps, rollouts with the lengths of demonstrations, one problem alone, compiled functions
  sft       supervised training for as many minutes as there are, its evaluation, and the exported model
  grpo      some steps of reinforcement learning from that model

Every part runs in a process of its own with a time limit of its own (`SECTIONS`, as a share of --minutes). What it
found is in OUTPUT/SECTION.json as soon as it is found, its warnings and errors are in OUTPUT/SECTION.log. A part that
failed or ran out of time says so and does not stop the others. The last line is one JSON object, a key per section.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import typing

ROOT = pathlib.Path(__file__).parents[1]
MARK = "figures: "  # starts a line with figures among what a part prints
SECTIONS: dict[str, dict[str, float]] = {  # section -> its parts, and the minutes of each of 8
    "device": {"device": 0.4},
    "feeding": {"feeding": 0.6},
    "check": {"check": 1.0},
    "train": {"train": 1.8, "train_peer": 0.6},
    "decode": {"decode": 1.5},
    "sft": {"supervised": 1.4},
    "grpo": {"reinforced": 0.7},
}
MINUTES = 8.0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. An unknown section ends the process with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = ",".join(name for name in SECTIONS if name != "device")
    parser.add_argument("--sections", default=chosen, help=f"comma-separated, of {chosen}")
    parser.add_argument("--preset", default="gpu", help="preset of configs/apr.py")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all sections together")
    parser.add_argument("--output", default="runs/accelerator", help="folder for figures, logs and the trained model")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # what a process of this command runs
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)  # its seconds
    args = parser.parse_args(argv)
    if unknown := set(filter(None, args.sections.split(","))) - set(SECTIONS):
        parser.error(f"--sections={args.sections}: there is no section {sorted(unknown)[0]}, choose from {chosen}")
    if args.minutes <= 0:
        parser.error(f"--minutes={args.minutes} must be above 0")
    return args


def run_part(args: argparse.Namespace, section: str, part: str, limit: float, found: dict[str, typing.Any]) -> None:
    """Runs a part in a process of its own for at most `limit` seconds, and adds its figures to `found` as they come."""
    file, log = (pathlib.Path(args.output) / f"{section}.{kind}" for kind in ("json", "log"))
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={part}", f"--limit={limit}"]
    command += [f"--preset={args.preset}", f"--output={args.output}"]
    began = time.monotonic()
    with (
        open(log, "a") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        end = functools.partial(os.killpg, process.pid, signal.SIGKILL)  # the part and what it started
        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for line in typing.cast(typing.IO[str], process.stdout):
                if line.startswith(MARK):
                    found |= json.loads(line.removeprefix(MARK))
                    file.write_text(json.dumps(found, indent=1) + "\n")
            status = process.wait()
        except BaseException:  # Ctrl-C
            end()
            raise
        finally:
            timer.cancel()
    seconds = time.monotonic() - began
    if status == -signal.SIGKILL and seconds >= limit:
        found[f"{part}_stopped"] = f"after {limit:.0f} s, its limit: what it had not measured is unmeasured"
    elif status:
        found[f"{part}_failed"] = f"with status {status}: see {log}"
    found[f"{part}_seconds"] = round(seconds, 1)
    file.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Runs the chosen sections, and prints what they found on the last line."""
    args = parse(argv)
    if args.part:
        from benchmarks import sections

        for figures in getattr(sections, args.part)(args):
            print(MARK + json.dumps(figures, default=float), flush=True)
        return 0
    args.output = str(pathlib.Path(args.output).absolute())
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    everything = {}
    for section in ["device", *filter(lambda name: name != "device", filter(None, args.sections.split(",")))]:
        found: dict[str, typing.Any] = {}
        (output / f"{section}.log").unlink(missing_ok=True)
        for part, minutes in SECTIONS[section].items():
            run_part(args, section, part, 60 * minutes * args.minutes / MINUTES, found)
        everything[section] = found
        print(f"{section}: {json.dumps(found)}", flush=True)
    (output / "all.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(everything))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part ends too
    sys.exit(main(sys.argv[1:]))

"""Demonstrations as segments, in the order of their index, made in this process or ahead by worker processes.

Worker w of W makes the demonstrations first + w, first + w + W, ... and writes them to a pipe. The reader takes
them in turn, so their order does not depend on the number of workers. Each worker may be `AHEAD` demonstrations
ahead. Workers are programs of their own that never import JAX: a fork of a process that runs JAX can deadlock.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import typing
import weakref

import numpy as np
from ml_collections import ConfigDict

import packing
from harness.cli import UsageError
from harness.tasks import part
from packing import Segment
from protocols import Domain
from records import Thread, longest_context

AHEAD = 16  # demonstrations that one worker may be ahead
ROOT = pathlib.Path(__file__).parents[1]
COMPACT = {"tokens": np.int32, "positions": np.int32, "until": np.int32, "calls": np.int32}
Made = tuple[list[Segment], bool]  # segments of a demonstration, and whether it overran the context


def make(domain: Domain, config: ConfigDict, index: int) -> Made:
    """Demonstration number `index` of a run, in segments. `train.overlong` says what becomes of a long one."""
    rollout = domain.demonstration("train", config.seed, index)
    context = config.model.context
    if too_long := longest_context(rollout.root) > context:
        if config.train.overlong == "drop":
            return [], True
        for thread in rollout.threads():
            packing.cut(thread, context)
    pieces = [piece for thread in rollout.threads() for piece in packing.segments(thread, context)]
    for number, piece in enumerate(pieces):
        piece.source = index, number
    return pieces, too_long


class Feeder:
    """The demonstrations of a run from index `first` on, made by `workers` processes; with 0 in this one."""

    def __init__(self, domain: Domain, config: ConfigDict, first: int, workers: int) -> None:
        self._domain, self._config, self._next = domain, config, itertools.count(first)
        self._workers = [_Worker(config, first + number, workers) for number in range(workers)]
        self._turns = itertools.cycle(self._workers)
        for worker in self._workers:  # they end with the feeder, and with this process at the latest
            weakref.finalize(self, _end, worker.process)

    def next(self) -> Made:
        """The next demonstration. Raises UsageError if its worker failed."""
        if not self._workers:
            return make(self._domain, self._config, next(self._next))
        return next(self._turns).take()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


class _Worker:
    """A process that makes every `stride`-th demonstration from `first` on, and the thread that reads from it."""

    def __init__(self, config: ConfigDict, first: int, stride: int) -> None:
        command = [sys.executable, "-m", "harness.feeding", str(first), str(stride), config.to_json()]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=ROOT)
        self._made: queue.Queue[Made | str] = queue.Queue(AHEAD)  # a string says why there is no more
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        made: Made | str = [], False
        while not isinstance(made, str):
            try:
                made = pickle.load(typing.cast(typing.IO[bytes], self.process.stdout))  # of our own program
            except (EOFError, OSError, pickle.UnpicklingError):
                made = f"it ended with status {self.process.wait()}"
            self._made.put(made)

    def take(self) -> Made:
        """The next demonstration of this worker. Raises UsageError if it failed."""
        if isinstance(made := self._made.get(), str):
            self._made.put(made)  # for whoever asks again
            raise UsageError(f"a process that makes demonstrations failed, {made}: train.feeders=0 makes them without")
        return made


def compact(segment: Segment) -> Segment:
    """A segment with arrays for lists and without its thread: what training reads, quick to send and to lay out."""
    arrays: dict[str, typing.Any] = {name: np.asarray(getattr(segment, name), kind) for name, kind in COMPACT.items()}
    return dataclasses.replace(segment, **arrays, logprobs=[0.0], thread=Thread(segment.thread.path))


def serve(config: ConfigDict, first: int, stride: int, output: typing.IO[bytes]) -> None:
    """Writes every `stride`-th demonstration from `first` on to `output`, without end; a string says what failed."""
    try:
        domain = part(config.task, "domain")(config)
        for index in itertools.count(first, stride):
            segments, too_long = make(domain, config, index)
            pickle.dump(([compact(segment) for segment in segments], too_long), output)
            output.flush()
    except BrokenPipeError:
        return  # the reader is gone
    except Exception as error:  # the reader raises it
        pickle.dump(f"{type(error).__name__}: {error}", output)
        output.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # they end the reader, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    serve(ConfigDict(json.loads(sys.argv[3])), int(sys.argv[1]), int(sys.argv[2]), sys.stdout.buffer)

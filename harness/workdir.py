"""A run on disk: its configuration, its log and its checkpoints.

A workdir holds

    config.json      every hyper-parameter of the run, and a checksum of them
    metrics.jsonl    one JSON object per logged step
    events.out.*     the same numbers for TensorBoard
    checkpoints/     the last two full states (parameters, optimizer, data cursor): a killed run resumes from them
    best/            the parameters with the best validation accuracy so far: evaluation and GRPO start from them
    reference/       the policies that became the reference of GRPO, if any did (`harness.reference`)
    failed/          parameters and batch of the step that stopped the run, if one did (`harness.replay`)

A directory that holds a run of another configuration, or that another process writes to, is refused and never
overwritten. After a failed step alone, the optimizer may change. Every file that is rewritten is replaced whole.

Several processes (`--distributed`) share one directory. Each process saves and restores the arrays that it
holds. The first process alone writes the other files.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import typing
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from harness import files, huggingface
from harness.checkpoints import Checkpoints
from harness.cli import UsageError
from harness.results import match, read_log, signed

PRETRAINED = pathlib.Path(__file__).parents[1] / "pretrained" / "apr"  # the shipped run that commands start from


class Workdir:
    """A directory that belongs to one run of one configuration."""

    def __init__(self, path: str | os.PathLike, config: ConfigDict) -> None:
        """Creates the directory, or reopens it if it holds this very configuration.

        Raises UsageError if it holds another run, something else, or cannot be written.
        """
        self.path = pathlib.Path(path).absolute()
        self._first = jax.process_index() == 0
        self._latest = Checkpoints(self.path / "checkpoints", "state", "extra")
        self._best = Checkpoints(self.path / "best", "params", "result")
        self._failed = Checkpoints(self.path / "failed", "step", "extra")
        wanted = json.loads(config.to_json())
        try:
            if huggingface.holds_model(self.path):
                raise UsageError(f"{path} holds an exported model and no run: choose another --workdir")
            if (self.path / "config.json").exists():
                changed = sorted(_differences(read_config(self.path), wanted))
                if changed and not self._mends(changed):
                    raise UsageError(
                        f"{path} holds a run with another configuration ({', '.join(changed)}): "
                        "choose another --workdir, or remove that one"
                    )
            elif self.path.exists() and any(p.name != files.LOCK and not files.is_part(p) for p in self.path.iterdir()):
                raise UsageError(f"{path} is not empty and holds no run: choose another --workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise UsageError(f"{path} cannot be written: choose another --workdir")
            if self._first:
                files.lock(self.path)
                for part in filter(files.is_part, self.path.iterdir()):  # by a kill
                    part.unlink()
            multihost_utils.sync_global_devices("everyone has looked")
            write_json(self.path / "config.json", signed(wanted))
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error}): choose another --workdir") from error
        self._writer: SummaryWriter | None = None

    def _mends(self, changed: list[str]) -> bool:
        """Whether the changes are of the optimizer alone, and the run has not got past a step that failed."""
        steps, saved = self._failed.steps(), self._latest.steps()
        return all(re.match(r"optimizer\.(?!matrices)", name) for name in changed) and steps[-1:] > saved[-1:]

    def save(self, step: int, state: typing.Any, extra: dict) -> None:
        """Saves the full state after `step` updates, with JSON data (the data cursor); the last two are kept."""
        self._latest.save(step, state, extra)

    def restore(self, like: typing.Any) -> tuple[typing.Any, dict] | None:
        """The latest state (shaped and sharded as `like`) and its extra data; None in a fresh workdir.

        A damaged state is renamed, with a note. What was logged and found best after the state is dropped.
        Raises UsageError if no state is whole, or if there are best parameters but no state: starting again would
        overwrite them.
        """
        steps = self._latest.steps()
        if not steps and self._best.steps():
            raise UsageError(f"{self.path} holds a run without its checkpoints: choose another --workdir")
        damaged: dict[int, str] = {}
        while steps and (wrong := self._latest.damage(steps[-1])):
            if len(steps) == 1:
                raise UsageError(wrong)
            damaged[steps.pop()] = wrong
        for wrong in damaged.values():
            print(f"note: {wrong}; going on from the checkpoint before it, {steps[-1]}", file=sys.stderr, flush=True)
        multihost_utils.sync_global_devices("everyone has looked at the checkpoints")
        step = steps[-1] if steps else -1
        if self._first:
            for other in damaged:
                self._latest.set_aside(other)
            self._forget_after(step)
        return self._latest.load(step, like) if steps else None

    def save_best(self, step: int, params: typing.Any, result: dict) -> None:
        """Keeps these parameters as the best so far; `result` says how good they are."""
        self._best.save(step, params, result)

    def save_failed(self, step: int, tree: typing.Any, reason: str) -> None:
        """Keeps what it takes to run a step again that failed: its parameters and its batch."""
        self._failed.save(step, tree, {"reason": reason})

    def load_failed(self) -> tuple[int, typing.Any, str]:
        """The step that failed, its parameters and batch as host arrays, and what was not finite.

        Raises UsageError if none failed.
        """
        failed = self._failed
        if not failed.steps():
            raise UsageError(f"no step has failed in {self.path}: there is nothing to replay")
        step = failed.steps()[-1]
        if wrong := failed.damage(step):
            raise UsageError(wrong)
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), failed.shapes(step))
        tree, extra = failed.load(step, like)
        return step, tree, extra["reason"]

    def log(self, step: int, values: dict) -> None:
        """Appends numbers to metrics.jsonl and to TensorBoard."""
        if not self._first:
            return
        if self._writer is None:
            # A resumed run writes again what came after. We flush, here: an error in its own thread would be lost.
            self._writer = SummaryWriter(str(self.path), purge_step=step, flush_secs=10**6)
        values = {name: float(value) for name, value in values.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _forget_after(self, step: int) -> None:
        """Drops the log lines and the best later than the checkpoint: the resumed run finds them again."""
        for later in [other for other in self._best.steps() if other > step]:
            self._best.delete(later)
        log = self.path / "metrics.jsonl"
        if log.exists():
            kept = [json.dumps(line) + "\n" for line in read_log(log) if line["step"] <= step]
            files.replace(log, "".join(kept).encode())


def write_json(path: pathlib.Path, value: typing.Any) -> None:
    """Writes a file, whole or not at all; of several processes the first does."""
    if jax.process_index() == 0:
        files.replace(path, files.json_bytes(value))


# The next three functions also read a folder that `python -m harness.export` wrote.


def holds_parameters(path: str | os.PathLike) -> bool:
    """Whether `load_best` has something to read."""
    return (pathlib.Path(path) / "best").is_dir() or huggingface.holds_model(path)


def read_config(path: str | os.PathLike) -> dict:
    """The configuration of the run in a workdir.

    Raises UsageError if there is none, or one that is damaged or of the older format.
    """
    if huggingface.holds_model(path):
        return huggingface.read_recipe(path)
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise UsageError(f"{path} holds no run (no config.json): train one with `python sft.py --workdir={path}`")
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read ({error}): restore it, or choose another --workdir") from error
    if isinstance(config.get("model"), dict) and "temperature" in config["model"]:  # the mark of the older format
        raise UsageError(f"{path} holds a run of an older format: convert it with `python -m harness.migrate {path}`")
    match(config, str(file), f"restore it, or convert an older one with `python -m harness.migrate {path}`")
    del config["checksum"]
    return config


def load_best(path: str | os.PathLike, like: typing.Any) -> tuple[typing.Any, dict]:
    """The best parameters of a workdir, as host arrays, and how good they were.

    Raises UsageError if there are none, or if they do not fit the shapes of `like`.
    """
    if huggingface.holds_model(path):
        return huggingface.load(path, like)
    best = Checkpoints(pathlib.Path(path).absolute() / "best", "params", "result")
    if not best.steps():
        remedy = "let its training reach the first evaluation (docs/reproduce.md has the commands)"
        raise UsageError(f"{path} holds no checkpoint yet: {remedy}")
    step = best.steps()[-1]
    if wrong := best.damage(step):
        raise UsageError(wrong)
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), best.shapes(step))
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), like)
    if changed := sorted(_differences(shapes, wanted)):
        raise UsageError(f"the checkpoint in {path} does not fit the model ({', '.join(changed)}): use its own config")
    # As host arrays: on whatever devices, and by however many processes, the checkpoint was written.
    params, result = best.load(step, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like))
    return params, {**result, "step": step}


def _differences(left: typing.Any, right: typing.Any, name: str = "") -> Iterator[str]:
    """Dotted names of the entries in which two nested dicts differ, with both values."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from _differences(left.get(key), right.get(key), f"{name}.{key}" if name else key)
    elif left != right:
        yield f"{name}={json.dumps(left)} there, {json.dumps(right)} here"

"""A run on disk: its configuration, its log and its checkpoints.

A workdir holds

    config.json      every hyper-parameter of the run
    metrics.jsonl    one JSON object per logged step
    events.out.*     the same numbers for TensorBoard
    checkpoints/     the latest full state (parameters, optimizer, data cursor): a killed run resumes from it
    best/            the parameters with the best validation accuracy so far: evaluation and GRPO start from them

A directory that holds a run of another configuration is refused and never overwritten.

Several processes (`--distributed`) share one directory. Each process saves and restores the arrays that it
holds. The first process alone writes the other files.
"""

from __future__ import annotations

import json
import os
import pathlib
import typing
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from harness import huggingface
from harness.cli import UsageError

PRETRAINED = pathlib.Path(__file__).parents[1] / "pretrained" / "apr"  # the shipped run that commands start from


class Workdir:
    """A directory that belongs to one run of one configuration."""

    def __init__(self, path: str | os.PathLike, config: ConfigDict) -> None:
        """Creates the directory, or reopens it if it holds this very configuration.

        Raises UsageError if it holds another run, something else, or cannot be written.
        """
        self.path = pathlib.Path(path).absolute()
        self._first = jax.process_index() == 0
        wanted = json.loads(config.to_json())
        try:
            if huggingface.holds_model(self.path):
                raise UsageError(f"{path} holds an exported model and no run: choose another --workdir")
            if (self.path / "config.json").exists():
                if changed := sorted(_differences(read_config(self.path), wanted)):
                    raise UsageError(
                        f"{path} holds a run with another configuration ({', '.join(changed)}): "
                        "choose another --workdir, or remove that one"
                    )
            elif self.path.exists() and any(self.path.iterdir()):
                raise UsageError(f"{path} is not empty and holds no run: choose another --workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise UsageError(f"{path} cannot be written: choose another --workdir")
            multihost_utils.sync_global_devices("everyone has looked")
            write_json(self.path / "config.json", wanted)
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error}): choose another --workdir") from error
        self._latest = _manager(self.path / "checkpoints", "state", "extra")
        self._best = _manager(self.path / "best", "params", "result")
        self._writer: SummaryWriter | None = None

    def save(self, step: int, state: typing.Any, extra: dict) -> None:
        """Saves the full state after `step` updates, with JSON data (the data cursor), and drops the one before."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        self._latest.save(step, args=args)

    def restore(self, like: typing.Any) -> tuple[typing.Any, dict] | None:
        """The latest state (shaped and sharded as `like`) and its extra data; None in a fresh workdir.

        Raises UsageError if there are best parameters but no state: starting again would overwrite them.
        """
        if (step := self._latest.latest_step()) is None:
            if self._best.latest_step() is not None:
                raise UsageError(f"{self.path} holds a run without its checkpoints: choose another --workdir")
            self._forget_after(0)
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
        restored = self._latest.restore(step, args=args)
        self._forget_after(step)
        return restored.state, restored.extra

    def save_best(self, step: int, params: typing.Any, result: dict) -> None:
        """Keeps these parameters as the best so far; `result` says how good they are."""
        for later in [other for other in self._best.all_steps() if other >= step]:  # of before the run was resumed
            self._best.delete(later)
        args = ocp.args.Composite(params=ocp.args.StandardSave(params), result=ocp.args.JsonSave(result))
        self._best.save(step, args=args)

    def log(self, step: int, values: dict) -> None:
        """Appends numbers to metrics.jsonl and to TensorBoard."""
        if not self._first:
            return
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path), purge_step=step)  # a resumed run writes again what came after
        values = {name: float(value) for name, value in values.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _forget_after(self, step: int) -> None:
        """Drops log lines later than the checkpoint: the resumed run writes them again."""
        log = self.path / "metrics.jsonl"
        if self._first and log.exists():
            whole = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last
            log.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))


def _manager(path: pathlib.Path, arrays: str, json: str) -> ocp.CheckpointManager:
    """Keeps the newest checkpoint, which holds a tree of arrays and a JSON object under these names."""
    handlers = {arrays: ocp.StandardCheckpointHandler(), json: ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path, options=options, item_names=(arrays, json), item_handlers=handlers)


def write_json(path: pathlib.Path, value: typing.Any) -> None:
    """Writes a file, whole or not at all; of several processes the first does."""
    if jax.process_index() == 0:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)


# The next three functions also read a folder that `python -m harness.export` wrote.


def holds_parameters(path: str | os.PathLike) -> bool:
    """Whether `load_best` has something to read."""
    return (pathlib.Path(path) / "best").is_dir() or huggingface.holds_model(path)


def read_config(path: str | os.PathLike) -> dict:
    """The configuration of the run in a workdir. Raises UsageError if there is none, or one of the older format."""
    if huggingface.holds_model(path):
        return huggingface.read_recipe(path)
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise UsageError(f"{path} holds no run (no config.json): train one with `python sft.py --workdir={path}`")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} cannot be read ({error}): restore it, or choose another --workdir") from error
    if "temperature" in config.get("model", {}):  # the mark of the older format
        raise UsageError(f"{path} holds a run of an older format: convert it with `python -m harness.migrate {path}`")
    return config


def load_best(path: str | os.PathLike, like: typing.Any) -> tuple[typing.Any, dict]:
    """The best parameters of a workdir, as host arrays, and how good they were.

    Raises UsageError if there are none, or if they do not fit the shapes of `like`.
    """
    if huggingface.holds_model(path):
        return huggingface.load(path, like)
    root = pathlib.Path(path).absolute() / "best"
    step = None
    if root.is_dir():
        manager = _manager(root, "params", "result")
        step = manager.latest_step()
    if step is None:
        raise UsageError(f"{path} holds no checkpoint yet: let its training reach the first evaluation")
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), manager.item_metadata(step)["params"].tree)
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), like)
    if changed := sorted(_differences(shapes, wanted)):
        raise UsageError(f"the checkpoint in {path} does not fit the model ({', '.join(changed)}): use its own config")
    # As host arrays: on whatever devices, and by however many processes, the checkpoint was written.
    host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(host), result=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    return restored.params, {**restored.result, "step": step}


def _differences(left: typing.Any, right: typing.Any, name: str = "") -> Iterator[str]:
    """Dotted names of the entries in which two nested dicts differ, with both values."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from _differences(left.get(key), right.get(key), f"{name}.{key}" if name else key)
    elif left != right:
        yield f"{name}={json.dumps(left)} there, {json.dumps(right)} here"

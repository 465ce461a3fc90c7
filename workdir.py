"""A run on disk: its configuration, its log, its checkpoints, and errors a user can act on.

A workdir holds

    config.json      every hyper-parameter of the run
    metrics.jsonl    one JSON object per logged step
    events.out.*     the same numbers for TensorBoard
    checkpoints/     the latest full state (parameters, optimizer, data cursor): a killed run resumes from it
    best/            the parameters with the best held-out accuracy so far: what evaluation and GRPO start from

A directory with another configuration's run is refused, never overwritten.

Several processes (`--distributed`) share one directory: all of them save and restore the arrays they
hold, and the first alone writes everything else and prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from harness import huggingface
from harness.cli import UsageError, usage_errors


def launch(define_flags: Callable[[], None], main: Callable[[list[str]], None]) -> None:
    """Runs an entry point under absl: quiet libraries, a compilation cache, usage errors without a traceback."""
    with _one_sentence(), _config_errors():
        define_flags()
    flags.DEFINE_string(
        "distributed", None, "One of several processes: auto (TPU pod, SLURM, Open MPI), or ADDRESS:PORT,COUNT,INDEX."
    )

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}: flags are written --name=value")
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/apr-jax"))
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        with _one_sentence():
            _join_others(flags.FLAGS.distributed)
            main(argv)

    app.run(guarded, flags_parser=_parse_flags)


def _join_others(distributed: str | None) -> None:
    """Connects the processes of a run as `--distributed` says; all but the first fall silent."""
    if distributed is None:
        return
    form = re.fullmatch(r"(\S+:[0-9]+),([0-9]+),([0-9]+)", distributed)
    if not form and distributed != "auto":
        raise UsageError(f"--distributed must be auto or ADDRESS:PORT,COUNT,INDEX, not {distributed!r}")
    with usage_errors():
        if form:
            jax.distributed.initialize(form[1], int(form[2]), int(form[3]))
        else:
            jax.distributed.initialize()
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _parse_flags(argv: list[str]) -> list[str]:
    with _one_sentence(), _config_errors():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Ends the process with status 2 and one line on stderr where the user made a mistake."""
    try:
        yield
    except UsageError as error:
        _fail(str(error))


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """Says in one sentence what absl and ml_collections raise for a flag, a recipe or a config field that is wrong."""
    try:
        yield
    except flags.Error as error:
        # A recipe's own error arrives as the last line of a traceback.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else " ".join(lines)
        raise UsageError(text) from error
    except OSError as error:  # a recipe that is not there
        raise UsageError(" ".join(str(error).split())) from error
    except (AttributeError, KeyError) as error:
        field = re.search(r"'(\w+)\\?'", str(error))
        named = [arg for arg in sys.argv if field and arg.startswith("--config.") and f".{field[1]}" in arg]
        if not named:
            raise
        guess = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f": did you mean {guess[1]}?" if guess else ": configs/ lists them"
        raise UsageError(f"the config has no field {named[0][2:].partition('=')[0]}{hint}") from error


def _fail(message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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
    """The configuration of the run in a workdir. Raises UsageError if there is none."""
    if huggingface.holds_model(path):
        return huggingface.read_recipe(path)
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise UsageError(f"{path} holds no run (no config.json): train one with `python sft.py --workdir={path}`")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} cannot be read ({error}): restore it, or choose another --workdir") from error


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


class Progress:
    """A progress bar on a terminal, plain lines otherwise."""

    def __init__(self, total: int, start: int, unit: str) -> None:
        self._bar = tqdm.tqdm(total=total, initial=start, unit=unit, disable=not sys.stderr.isatty())
        self._total, self._start, self._unit = total, start, unit
        self._began = time.monotonic()

    def update(self, step: int, text: str | None = None) -> None:
        """Moves to `step`; `text` is shown beside the bar, or printed as a line with the time left."""
        self._bar.update(step - self._bar.n)
        if text is None:
            return
        if self._bar.disable:
            seconds = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
            print(f"{self._unit} {step}/{self._total}  {text}  {seconds / 60:.1f} min left", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

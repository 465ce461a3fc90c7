"""JAX processes: the start of a command that uses devices, and data shared between the processes of a run.

Every process of a run executes the same program. All processes hold a part of each sharded array.
The first process alone prints and writes files; `Workdir` says who saves what.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import typing
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from harness import cli
from harness.cli import UsageError, usage_errors


def launch(define_flags: Callable[[], None], main: Callable[[list[str]], None]) -> None:
    """`cli.launch` for commands that use JAX: adds --distributed and a persistent compilation cache."""

    def define() -> None:
        define_flags()
        flags.DEFINE_string(
            "distributed",
            None,
            "One of several processes: auto (TPU pod, SLURM, Open MPI) or ADDRESS:PORT,COUNT,INDEX.",
        )

    cli.launch(define, main, _start)


def _start() -> None:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/apr-jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _connect(flags.FLAGS.distributed)


def _connect(distributed: str | None) -> None:
    """Connects the processes of a run as `--distributed` says. All but the first stop printing."""
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


def fetch_full_params(params: typing.Any) -> typing.Any:
    """The whole parameters in this process. Fetches the shards that other processes hold."""

    def fetch(leaf: typing.Any) -> typing.Any:
        here = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
        return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, params)


def allgather_interleaved(share: list) -> list:
    """Merges the lists of all processes: item 0 of every process, then item 1 of every process, and so on.

    The inverse of `items[process_index::process_count]`. Every process gets the merged list.
    """
    count = jax.process_count()
    if count == 1:
        return share
    packed = np.frombuffer(pickle.dumps(share), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(packed)))
    padded = np.pad(packed, (0, sizes.max() - len(packed)))
    shares = [
        pickle.loads(data[:size].tobytes())
        for data, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    ]
    items: list = [None] * sum(map(len, shares))
    for process, own in enumerate(shares):
        items[process::count] = own
    return items

"""Hugging Face folders: the parameters of `model.py` as a Llama that `transformers` loads as it is, and back.

    python -m harness.export --workdir=runs/apr --output=exported/apr      # writes a folder
    python evaluate.py --workdir=exported/apr                              # reads it
    transformers.LlamaForCausalLM.from_pretrained("exported/apr")          # so does this

A folder holds

    model.safetensors        the arrays, or model-00001-of-0000N.safetensors with model.safetensors.index.json
    config.json              the architecture, as transformers names it
    generation_config.json   the ids that end a call: end of a thread, spawn
    recipe.json              every hyper-parameter of our run
    result.json              the step of the parameters and what they reached
    exact.arrays             those of our arrays that the Llama does not give back to the bit. In the form of
                             safetensors, but not in its name: others load every file of that name
    checksums.json           SHA-256 of all these (`harness.files`)
    metrics.jsonl eval.json  the log and the evaluation of the run, where it has them; the latter has its own checksum

  1. `llama.to_llama` renames, reshapes and scales the parameters; `llama.from_llama` is its inverse.
  2. `save` writes a folder, whole or not at all, after it has read every parameter back.
  3. `load` looks for damage and returns our parameters, bit for bit.

The product sqrt(D) E is rounded. Division then misses some values of E by one unit in the last place, and no rounding
could avoid this: exact.arrays keeps these arrays. In a folder of bfloat16 the products stay float32: transformers
then computes the logits of the rounded parameters.

There is no tokenizer.json: the language matches the longest phrase first, which is no byte-pair encoding.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import tempfile
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from harness import files, results
from harness.cli import UsageError, usage_errors
from harness.llama import SCALED, fit, from_llama, llama_config, model_config, to_llama
from model import ModelConfig

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION, RECIPE, RESULT = "config.json", "generation_config.json", "recipe.json", "result.json"
EXACT, LOG, EVALUATION = "exact.arrays", "metrics.jsonl", "eval.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16)}  # by their names in a safetensors file
HEADER_BYTES = 256  # at most, of what a header says about one array, or about a file


# ------------------------------------------------------------------- writing


def save(
    folder: str | os.PathLike,
    params: typing.Any,
    recipe: Mapping[str, typing.Any],
    config: ModelConfig,
    stop_ids: Sequence[int],
    result: Mapping[str, typing.Any],
    dtype: str = "float32",
    shard_bytes: int | None = None,
    source: pathlib.Path | None = None,
) -> dict[str, int]:
    """Writes a folder, whole or not at all; returns the size in bytes of each file.

    `stop_ids` end a call, the first of them the thread. No file of arrays exceeds `shard_bytes`. Log and evaluation
    are copied from the folder `source`, where it has them; rounded parameters have no evaluation yet.
    Raises UsageError if the folder is not empty or cannot be written, and on parameters that are not finite.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: choose another --output")
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    if broken := [name for name, array in flat.items() if not np.isfinite(array).all()]:
        raise UsageError(f"the parameters {', '.join(broken[:3])} are not finite: export an earlier checkpoint")
    hf_config, kind = llama_config(config, stop_ids[0]), jnp.dtype(dtype)
    flat = {name: array.astype(kind).astype(np.float32) for name, array in flat.items()}
    tensors = to_llama(traverse_util.unflatten_dict(flat, sep="/"), config)
    back = traverse_util.flatten_dict(from_llama(tensors, config), sep="/")
    exact = {name: array.astype(kind) for name, array in flat.items() if back[name].tobytes() != array.tobytes()}
    tensors = {name: array if name in SCALED else array.astype(kind) for name, array in tensors.items()}
    generation = {"eos_token_id": list(stop_ids), "pad_token_id": hf_config["pad_token_id"], "bos_token_id": None}
    values = {CONFIG: hf_config, GENERATION: generation, RECIPE: dict(recipe), RESULT: dict(result)}
    contents = _model_files(tensors, shard_bytes or sys.maxsize) | {EXACT: safetensors.numpy.save(exact)}
    for name, data in contents.items():
        if shard_bytes and len(data) > shard_bytes and name != INDEX:
            raise UsageError(f"{name} ({len(data):,} bytes) does not fit into {shard_bytes:,}: raise --shard_mb")
    contents |= {name: files.json_bytes(value) for name, value in values.items()}
    if source is not None:
        with usage_errors():
            measured = (LOG, EVALUATION) if dtype == "float32" else (LOG,)  # rounded parameters are others
            contents |= {name: (source / name).read_bytes() for name in measured if (source / name).exists()}
        if EVALUATION in contents:
            results.match_all(contents[EVALUATION], str(source / EVALUATION))
    try:
        _write(folder, contents, flat)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error}): choose another --output") from error
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _model_files(tensors: dict[str, np.ndarray], limit: int) -> dict[str, bytes]:
    """The safetensors files, and their index if there are several."""
    groups: list[dict[str, np.ndarray]] = [{}]
    used = HEADER_BYTES
    for name, array in tensors.items():
        if groups[-1] and used + array.nbytes + HEADER_BYTES > limit:
            groups.append({})
            used = HEADER_BYTES
        groups[-1][name] = array
        used += array.nbytes + HEADER_BYTES
    if len(groups) == 1:
        return {MODEL: safetensors.numpy.save(tensors, {"format": "pt"})}
    parts = {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}
    places = {name: file for file, group in parts.items() for name in group}
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": places}
    contents = {file: safetensors.numpy.save(group, {"format": "pt"}) for file, group in parts.items()}
    return contents | {INDEX: files.json_bytes(index)}


def _write(folder: pathlib.Path, contents: dict[str, bytes], flat: dict[str, np.ndarray]) -> None:
    """Writes the files beside the folder, reads the parameters back, and moves all there at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        draft = pathlib.Path(temporary) / "draft"
        draft.mkdir()
        for name, data in contents.items():
            (draft / name).write_bytes(data)
        files.sign(draft, without=EVALUATION)
        back, _ = load(draft, traverse_util.unflatten_dict(flat, sep="/"))
        for name, array in traverse_util.flatten_dict(back, sep="/").items():
            if array.tobytes() != flat[name].tobytes():
                raise OSError(f"{name} is read as something else")
        draft.replace(folder)


# ------------------------------------------------------------------- reading


def holds_model(folder: str | os.PathLike) -> bool:
    """Whether a folder is one of these, or what is left of one."""
    folder = pathlib.Path(folder)
    return (folder / RECIPE).exists() or any(folder.glob("model*.safetensors*"))


def read_recipe(folder: str | os.PathLike) -> dict[str, typing.Any]:
    """Every hyper-parameter of the run behind a folder. Raises UsageError on any damage, naming file and remedy."""
    _check(pathlib.Path(folder))
    return json.loads((pathlib.Path(folder) / RECIPE).read_text())


def load(folder: str | os.PathLike, like: typing.Any) -> tuple[typing.Any, dict[str, typing.Any]]:
    """Our parameters as float32 host arrays in the shapes of `like`, and the result that they reached.

    They come back as they were saved, bit for bit up to the rounding to the dtype of the folder. Raises UsageError on
    any damage, on a model of another shape and on one of other origin, naming file and remedy.
    """
    folder = pathlib.Path(folder)
    tensors: dict[str, np.ndarray] = {}
    for name in _check(folder):
        if re.fullmatch(r"model.*\.safetensors", name):
            tensors |= _read_arrays(folder / name)
    config = model_config(json.loads((folder / CONFIG).read_text()))
    try:
        flat = traverse_util.flatten_dict(from_llama(tensors, config), sep="/") | _read_arrays(folder / EXACT)
        wanted = traverse_util.flatten_dict(like, sep="/")
        fit({n: a.shape for n, a in flat.items()}, {n: tuple(a.shape) for n, a in wanted.items()})
    except ValueError as error:
        raise UsageError(f"the parameters in {folder} do not fit the model ({error}): use its own config") from error
    return traverse_util.unflatten_dict(flat, sep="/"), json.loads((folder / RESULT).read_text())


def _check(folder: pathlib.Path) -> list[str]:
    """The signed files of a folder. Raises UsageError on any damage, and on a folder of other origin."""
    if not (folder / RECIPE).exists() and not (folder / files.CHECKSUMS).exists():
        without = f"{folder} holds a model, but neither {RECIPE} nor {files.CHECKSUMS}"
        raise UsageError(f"{without}: name a run of ours, or a folder that `python -m harness.export` wrote")
    return files.check(folder)


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as float32. Its own reader for NumPy knows no bfloat16."""
    arrays = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = array.astype(np.float32)
    return arrays

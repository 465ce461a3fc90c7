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
    metrics.jsonl eval.json  the log and the evaluation of the run, where it has them

  1. `llama.to_llama` renames, reshapes and scales the parameters; `llama.from_llama` is its inverse.
  2. `save` writes a folder, whole or not at all.
  3. `load` checks every name, shape, dtype and checksum and returns our parameters, bit for bit.

Deviations from a plain Llama folder, none of which other software reads:

- The product sqrt(D) E is rounded. Division then misses some values of E by one unit in the last place, and no
  rounding could avoid this. The header of the first safetensors file keeps these units ("ulps/embedding").
- In a folder of bfloat16 the products stay float32: transformers then computes the logits of the rounded parameters.
- The header keeps a BLAKE2b checksum of each array (over name, dtype, shape and bytes), of each text file, and of
  all parameters as they come back. An evaluation in eval.json carries its own.

There is no tokenizer.json: the language matches the longest phrase first, which is no byte-pair encoding.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import tempfile
import typing
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from harness import results
from harness.cli import UsageError
from harness.files import REMEDY, check_text, checksum, read
from harness.llama import SCALED, fit, from_llama, llama_config, to_llama
from model import ModelConfig

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION, RECIPE, RESULT = "config.json", "generation_config.json", "recipe.json", "result.json"
TEXTS = (CONFIG, GENERATION, RECIPE, RESULT)  # a folder of ours holds them all, with their checksums
LOG, EVALUATION = "metrics.jsonl", "eval.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16)}  # by their names in a safetensors file
ULPS, ALL = "ulps/", "parameters"  # entries of a header beside the checksums
HEADER_BYTES = 256  # at most, of what a header says about one array


# ------------------------------------------------------------------- checksums, and what a rounded product loses


def _ulps(wanted: np.ndarray, got: np.ndarray) -> str:
    """How many units in the last place lead from `got` to `wanted`, both float32: a checksum and compressed text."""
    steps = wanted.view(np.int32) - got.view(np.int32)  # neighbours of one sign differ by 1
    packed = base64.b64encode(zlib.compress(steps.astype(np.int8).tobytes(), 9))
    return f"{checksum(packed)} {packed.decode()}"


def _nudged(got: np.ndarray, text: str) -> np.ndarray:
    """`got`, moved by the units that `_ulps` found. Raises ValueError on a text that is none of its."""
    total, _, packed = text.partition(" ")
    if checksum(packed.encode()) != total:
        raise ValueError("the checksum is another")
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), got.size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(data) != got.size:
        raise ValueError(f"{len(data)} units for {got.size} numbers")
    return (got.view(np.int32) + np.frombuffer(data, np.int8).reshape(got.shape)).view(np.float32)


# ------------------------------------------------------------------- writing


def _array_checksum(name: str, array: np.ndarray) -> str:
    return checksum(array.tobytes(), name, array.dtype.name, array.shape)


def _tree_checksum(flat: Mapping[str, np.ndarray]) -> str:
    """One checksum of all parameters."""
    return checksum(b"", *(_array_checksum(name, flat[name]) for name in sorted(flat)))


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
    are copied from the folder `source`, where it has them.
    Raises UsageError if the folder is not empty or cannot be written, and on parameters that are not finite.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: choose another --output")
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    if broken := [name for name, array in flat.items() if not np.isfinite(array).all()]:
        raise UsageError(f"the parameters {', '.join(broken[:3])} are not finite: export an earlier checkpoint")
    hf_config = llama_config(config, stop_ids[0])
    kind = jnp.dtype(dtype)
    flat = {name: array.astype(kind).astype(np.float32) for name, array in flat.items()}
    tensors = to_llama(traverse_util.unflatten_dict(flat, sep="/"), config)
    header = _exactness(tensors, hf_config, flat)
    tensors = {name: array if name in SCALED else array.astype(kind) for name, array in tensors.items()}
    generation = {"eos_token_id": list(stop_ids), "pad_token_id": hf_config["pad_token_id"], "bos_token_id": None}
    values = (hf_config, generation, dict(recipe), dict(result))
    texts = {name: _json_bytes(value) for name, value in zip(TEXTS, values, strict=True)}
    if source is not None:
        texts |= {name: read(source / name) for name in (LOG, EVALUATION) if (source / name).exists()}
        results.match_all(texts.get(EVALUATION, b"[]"), str(source / EVALUATION))
    header |= {name: checksum(data, name) for name, data in texts.items() if name != EVALUATION}
    files = {**_model_files(tensors, header, shard_bytes), **texts}
    try:
        _write(folder, files)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error}): choose another --output") from error
    return {name: len(data) for name, data in files.items()}


def _json_bytes(value: dict[str, typing.Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _exactness(tensors: dict[str, np.ndarray], hf_config: dict, wanted: dict[str, np.ndarray]) -> dict[str, str]:
    """Entries of the header by which `wanted`, float32 arrays by name, comes back from `tensors` bit for bit."""
    header = {ALL: _tree_checksum(wanted)}
    for name, got in traverse_util.flatten_dict(from_llama(tensors, hf_config), sep="/").items():
        if not np.array_equal(got, wanted[name]):
            header[ULPS + name] = _ulps(wanted[name], got)
    return header


def _model_files(tensors: dict[str, np.ndarray], header: dict[str, str], limit: int | None) -> dict[str, bytes]:
    """The safetensors files, and their index if there are several; the first carries `header`."""
    groups: list[list[str]] = [[]]
    used = first = HEADER_BYTES + sum(len(name) + len(value) + 6 for name, value in header.items())
    for name, array in tensors.items():
        size = array.nbytes + HEADER_BYTES
        if limit is not None and used + size > limit:
            if size + first > limit:
                raise UsageError(f"{name} ({array.nbytes:,} bytes) does not fit into {limit:,}: raise --shard_mb")
            groups.append([])
            used = HEADER_BYTES
        groups[-1].append(name)
        used += size
    files: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = MODEL if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        part = {name: tensors[name] for name in group}
        sums = {name: _array_checksum(name, array) for name, array in part.items()}
        files[file] = _pack(part, {"format": "pt", **sums, **(header if number == 1 else {})})
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        files[INDEX] = _json_bytes(_index(tensors, weight_map))
    return files


def _index(tensors: dict[str, np.ndarray], weight_map: dict[str, str]) -> dict[str, typing.Any]:
    size = sum(array.nbytes for array in tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _pack(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file. Its header is sorted, for the library's own order changes from call to call."""
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    """Writes the files beside the folder and moves them there at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        draft = pathlib.Path(temporary) / "draft"
        draft.mkdir()
        for name, data in files.items():
            (draft / name).write_bytes(data)
        draft.replace(folder)


# ------------------------------------------------------------------- reading


def holds_model(folder: str | os.PathLike) -> bool:
    """Whether a folder is one of these, or what is left of one."""
    folder = pathlib.Path(folder)
    return (folder / RECIPE).exists() or any(folder.glob("model*.safetensors*"))


def read_recipe(folder: str | os.PathLike) -> dict[str, typing.Any]:
    """Every hyper-parameter of the run behind a folder. Raises UsageError if the file is missing or damaged."""
    recipe = _parse(pathlib.Path(folder) / RECIPE)
    check_text(pathlib.Path(folder) / RECIPE)
    return recipe


def load(folder: str | os.PathLike, like: typing.Any) -> tuple[typing.Any, dict[str, typing.Any]]:
    """Our parameters as float32 host arrays in the shapes of `like`, and the result that they reached.

    A folder of ours comes back as it was saved, bit for bit up to the rounding to its dtype. A Llama of other origin
    carries no checksums, and its step is 0. Raises UsageError on any damage, naming file and remedy.
    """
    folder = pathlib.Path(folder)
    tensors, header, unsigned = _read_arrays(folder)
    own = RECIPE in header or (folder / RECIPE).exists()
    if own:
        _check_header(folder, header, unsigned)
    hf_config = _parse(folder / CONFIG)
    try:
        plain = from_llama({name: array.astype(np.float32) for name, array in tensors.items()}, hf_config)
    except ValueError as error:
        raise UsageError(f"{folder / CONFIG} and the arrays beside it disagree ({error}): {REMEDY}") from error
    flat = traverse_util.flatten_dict(plain, sep="/")
    for key in [key for key in header if key.startswith(ULPS)]:
        name = key.removeprefix(ULPS)
        try:
            flat[name] = _nudged(flat[name], header[key])
        except (KeyError, ValueError) as error:
            raise UsageError(f"the entry {key} in the header of {folder}'s arrays is damaged: {REMEDY}") from error
    if own and _tree_checksum(flat) != header[ALL]:
        raise UsageError(f"the parameters of {folder} do not match their common checksum: {REMEDY}")
    if broken := [name for name, array in flat.items() if not np.isfinite(array).all()]:
        raise UsageError(f"{folder} holds parameters that are not finite ({broken[0]}): {REMEDY}")
    try:
        wanted = traverse_util.flatten_dict(like, sep="/")
        fit({n: a.shape for n, a in flat.items()}, {n: tuple(a.shape) for n, a in wanted.items()})
    except ValueError as error:
        raise UsageError(f"the parameters in {folder} do not fit the model ({error}): use its own config") from error
    return traverse_util.unflatten_dict(flat, sep="/"), _parse(folder / RESULT) if own else {"step": 0}


def _check_header(folder: pathlib.Path, header: Mapping[str, str], unsigned: Sequence[str]) -> None:
    """Raises UsageError unless a folder of ours has all its checksums, and its text files match theirs."""
    known = {"format", ALL, LOG, *TEXTS}
    wrong = [*unsigned, *({"format", ALL, *TEXTS} - header.keys())]
    wrong += [name for name in header if name not in known and not name.startswith(ULPS)]
    if wrong:
        raise UsageError(f"the headers of {folder}'s arrays lack the checksum of {', '.join(wrong[:3])}: {REMEDY}")
    for name in (*TEXTS, LOG):
        if name in header:
            check_text(folder / name)


def _read_arrays(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """All arrays by name, what the headers hold beside their checksums, and the arrays that have no checksum."""
    single, index = folder / MODEL, folder / INDEX
    if single.exists() or not index.exists():
        if not single.exists() and (parts := sorted(folder.glob("model-*.safetensors"))):
            raise UsageError(f"{index} is missing, which says what {parts[0].name} is part of: {REMEDY}")
        return _read_file(single)
    plan = _parse(index)
    weight_map = plan.get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w-]+\.safetensors", name) for name in names):
        raise UsageError(f"{index} names no safetensors files of its own folder: {REMEDY}")
    tensors: dict[str, np.ndarray] = {}
    header: dict[str, str] = {}
    found: dict[str, str] = {}
    unsigned: list[str] = []
    for name in sorted(set(names)):
        part, more, bare = _read_file(folder / name)
        tensors, header = tensors | part, header | more
        unsigned += bare
        found |= dict.fromkeys(part, name)
    if found != weight_map or (ALL in header and plan != _index(tensors, found)):
        raise UsageError(f"{index} and the files it names disagree: {REMEDY}")
    return tensors, header, unsigned


def _read_file(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """The same of one safetensors file; arrays that have a checksum match it."""
    data = read(path)
    try:
        entries = safetensors.deserialize(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): {REMEDY}") from error
    if header.get("format", "pt") != "pt":
        raise UsageError(f"{path} is damaged (its format is {header['format']!r}): {REMEDY}")
    tensors, unsigned = {}, []
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            known = " or ".join(DTYPES)
            raise UsageError(f"{path}: {name} has dtype {entry['dtype']}, not {known}: save it as one of these")
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if name not in header:
            unsigned.append(name)
        elif header.pop(name) != _array_checksum(name, array):
            raise UsageError(f"{path}: {name} does not match its checksum: {REMEDY}")
        tensors[name] = array
    return tensors, header, unsigned


def _parse(path: pathlib.Path) -> dict[str, typing.Any]:
    """A JSON object. Raises UsageError if the file holds none."""
    data = read(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object: {REMEDY}")
    return value

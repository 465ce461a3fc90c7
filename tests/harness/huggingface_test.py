"""Exported models: they come back bit for bit, any damage is one sentence, and transformers computes the same logits.

What needs torch and transformers is skipped where they are not installed: pip install -e ".[test,interop]".
"""

import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
import zipfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from ml_collections import ConfigDict

import evaluate
import grpo
import sft
from analysis import choose, sweep
from harness import export, huggingface, llama, results
from harness.build import build
from harness.cli import UsageError
from harness.workdir import Workdir, holds_parameters, load_best, read_config
from model import Decoder, ModelConfig
from train_state import init_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
PRETRAINED = ROOT / "pretrained" / "apr"
TINY = ModelConfig(
    vocab_size=11,
    width=24,  # its root is no power of two, and heads x head_width is another number
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=10,
    mlp_width=14,
    context=64,
    rope_theta=5_000.0,
    tied=True,
    dtype="float32",
)
SHAPES = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "one kv head, power of two": dataclasses.replace(TINY, kv_heads=1, width=64),
    "as many kv heads": dataclasses.replace(TINY, kv_heads=4, layers=1, tied=False),
}
RECIPE = {"name": "tiny", "seed": 3}
RESULT = {"validation_accuracy": 0.25, "step": 7}


def make(config: ModelConfig, seed: int = 0) -> dict:
    """Random parameters as host arrays; norms are not all ones."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.standard_normal(shape)
        return (1 + 0.3 * drawn if len(shape) == 1 else drawn / np.sqrt(shape[0])).astype(np.float32)

    return jax.tree.map(lambda leaf: draw(leaf.shape), shapes_of(config))


@functools.cache
def shapes_of(config: ModelConfig) -> dict:
    return jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0)))


def write(folder: pathlib.Path, config: ModelConfig = TINY, **options) -> dict:
    """Saves random parameters and returns them."""
    params = make(config)
    huggingface.save(folder, params, RECIPE, config, (1, 9), RESULT, **options)
    return params


def rounded(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32), params)


def same(left: dict, right: dict) -> bool:
    """Bit for bit, and the same tree."""
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), left, right))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logits(params: dict, config: ModelConfig, rows: list[list[int]]) -> list[np.ndarray]:
    """Ours, [T, V] a row: tokens see those before them."""
    longest = max(map(len, rows))
    tokens = jnp.array([row + [0] * (longest - len(row)) for row in rows])
    positions = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
    params = jax.tree.map(jnp.asarray, params)
    found, _ = jax.jit(Decoder(config).apply)({"params": params}, tokens, positions, jnp.full_like(tokens, longest))
    return [np.asarray(found[i, : len(row)]) for i, row in enumerate(rows)]


# ------------------------------------------------------------------- the mapping


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_to_llama_and_from_llama_are_inverse(config):
    params = make(config)
    tensors = llama.to_llama(params, config)
    back = llama.from_llama(tensors, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1.2e-7), params, back)
    flat, found = traverse_util.flatten_dict(params, sep="/"), traverse_util.flatten_dict(back, sep="/")
    changed = {name for name, array in flat.items() if not same(array, found[name])}
    assert changed <= {"embedding", "final_norm/scale"}  # the others are bit-equal


def test_the_arrays_by_hand():
    params = make(TINY)
    tensors = llama.to_llama(params, TINY)
    assert len(tensors) == 2 + 9 * TINY.layers and "lm_head.weight" not in tensors
    root = np.sqrt(24.0)
    np.testing.assert_allclose(tensors["model.embed_tokens.weight"], params["embedding"] * root, rtol=1e-6)
    np.testing.assert_allclose(tensors["model.norm.weight"], params["final_norm"]["scale"] / root, rtol=1e-6)
    query, out = params["attention_1"]["query"], params["attention_1"]["out"]
    assert tensors["model.layers.1.self_attn.q_proj.weight"][2 * 10 + 3, 5] == query[5, 2, 3]
    assert tensors["model.layers.1.self_attn.o_proj.weight"][5, 2 * 10 + 3] == out[2, 3, 5]
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (24, 14)
    untied = SHAPES["untied"]
    tensors = llama.to_llama(make(untied), untied)
    assert np.array_equal(tensors["lm_head.weight"], make(untied)["head"].T)
    np.testing.assert_allclose(tensors["model.norm.weight"], make(untied)["final_norm"]["scale"], rtol=1e-6)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_config_comes_back(config):
    assert llama.model_config(llama.llama_config(config)) == config
    assert llama.model_config(json.loads(json.dumps(llama.llama_config(config)))) == config


def test_parameters_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="head is missing"):
        llama.to_llama(make(TINY), SHAPES["untied"])
    with pytest.raises(ValueError, match=r"embedding is \[11, 24\], not \[12, 24\]"):
        llama.to_llama(make(TINY), dataclasses.replace(TINY, vocab_size=12))
    with pytest.raises(ValueError, match=r"lm_head\.weight is left over"):
        llama.from_llama(llama.to_llama(make(SHAPES["untied"]), SHAPES["untied"]), TINY)


# ------------------------------------------------------------------- folders


@pytest.mark.parametrize("shard_bytes", [None, 16_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_folder_comes_back_bit_for_bit(tmp_path, config, dtype, shard_bytes):
    params = write(tmp_path / "out", config, dtype=dtype, shard_bytes=shard_bytes)
    back, result = huggingface.load(tmp_path / "out", shapes_of(config))
    assert same(back, rounded(params, dtype)) and result == RESULT
    assert huggingface.read_recipe(tmp_path / "out") == RECIPE
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 9]


def test_parameters_that_are_bfloat16_already_lose_nothing(tmp_path):
    params = rounded(make(SHAPES["untied"]), "bfloat16")
    huggingface.save(tmp_path / "out", params, RECIPE, SHAPES["untied"], (1,), RESULT, "bfloat16", 6_000)
    assert same(huggingface.load(tmp_path / "out", params)[0], params)


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path):
    write(tmp_path / "out", shard_bytes=9_000)
    names = sorted(file.name for file in (tmp_path / "out").glob("model*.safetensors"))
    assert len(names) > 2 and names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= 9_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(make(TINY)))
    for name in names:
        held = safetensors.numpy.load_file(tmp_path / "out" / name)
        assert all(index["weight_map"][array] == name for array in held)


def test_a_shard_smaller_than_an_array_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"bytes\) does not fit into 2,000: raise --shard_mb"):
        write(tmp_path / "out", shard_bytes=2_000)
    assert not (tmp_path / "out").exists()


def test_two_exports_of_one_model_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, shard_bytes=12_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_the_llama_gives_back_alone_is_kept_once(tmp_path):
    """With 64 wide rows nothing is lost, and with 24 wide ones two arrays are."""
    write(tmp_path / "whole", SHAPES["one kv head, power of two"])
    assert safetensors.numpy.load_file(tmp_path / "whole" / "exact.arrays") == {}
    write(tmp_path / "out")
    assert safetensors.numpy.load_file(tmp_path / "out" / "exact.arrays").keys() == {"embedding", "final_norm/scale"}


def test_a_run_without_log_and_evaluation_is_exported(tmp_path):
    (tmp_path / "run").mkdir()
    params = write(tmp_path / "out", source=tmp_path / "run")
    assert not {"metrics.jsonl", "eval.json"} & contents(tmp_path / "out").keys()
    assert same(huggingface.load(tmp_path / "out", params)[0], params)


def test_log_and_evaluation_are_copied(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "eval.json").write_text(json.dumps([results.signed({"accuracy": 0.5})]))
    params = write(tmp_path / "out", source=tmp_path / "run")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (tmp_path / "out" / "eval.json").write_text("[1]\n")  # as evaluate.py does
    huggingface.load(tmp_path / "out", params)
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl does not match checksums\.json"):
        huggingface.load(tmp_path / "out", params)


def test_rounded_parameters_have_no_evaluation_yet(tmp_path):
    write(tmp_path / "whole", source=PRETRAINED)
    write(tmp_path / "rounded", dtype="bfloat16", source=PRETRAINED)
    found = [(tmp_path / name / "eval.json").exists() for name in ("whole", "rounded")]
    assert found == [True, False] and (tmp_path / "rounded" / "metrics.jsonl").exists()


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not lose me")
    for path in (tmp_path / "out", tmp_path / "out" / "thesis.tex"):
        with pytest.raises(UsageError, match="not an empty folder: choose another --output"):
            write(path)
    with pytest.raises(UsageError, match="cannot be written.*choose another --output"):
        write(tmp_path / "out" / "thesis.tex" / "below")
    assert contents(tmp_path / "out") == {"thesis.tex": b"do not lose me"}


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    written = pathlib.Path.write_bytes

    def full(path: pathlib.Path, data: bytes) -> int:
        if path.name == "recipe.json":
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_does_not_read_back_leaves_nothing(tmp_path, monkeypatch):
    saved = safetensors.numpy.save
    turned = lambda arrays, *rest: saved({name: -array for name, array in arrays.items()}, *rest)
    monkeypatch.setattr(safetensors.numpy, "save", turned)
    with pytest.raises(UsageError, match=r"cannot be written \(.* is read as something else\)"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_not_finite_are_not_exported(tmp_path):
    params = make(TINY)
    params["mlp_0"]["up"][3, 4] = np.nan
    with pytest.raises(UsageError, match="mlp_0/up are not finite"):
        huggingface.save(tmp_path / "out", params, RECIPE, TINY, (1,), RESULT)
    assert not (tmp_path / "out").exists()


def test_a_llama_of_other_origin_is_refused(tmp_path):
    params = write(tmp_path / "out")
    for name in ("recipe.json", "checksums.json"):
        (tmp_path / "out" / name).unlink()
    words = "neither recipe.json nor checksums.json: name a run of ours, or a folder that `python -m harness.export` wrote"
    for read in (read_config, functools.partial(huggingface.load, like=params)):
        with pytest.raises(UsageError, match=words) as caught:
            read(tmp_path / "out")
        assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_were_added_are_not_read(tmp_path):
    params = write(tmp_path / "out")
    (tmp_path / "out" / ".git").mkdir()
    for name in ("README.md", "model-00001-of-00002.safetensors", ".git/HEAD"):
        (tmp_path / "out" / name).write_text("added")
    assert same(huggingface.load(tmp_path / "out", params)[0], params)


# ------------------------------------------------------------------- damage


def cut(path: pathlib.Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def resign(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    """Changes checksums.json and nothing else."""
    sums = json.loads((folder / "checksums.json").read_text())
    change(sums)
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")


FILES = ("config.json", "exact.arrays", "generation_config.json", "model.safetensors", "recipe.json", "result.json")
DAMAGE: dict[str, tuple[Callable, str]] = {
    **{f"no {name}": (lambda f, name=name: (f / name).unlink(), f"{name} is missing") for name in (*FILES, "checksums.json")},
    **{f"half of {name}": (lambda f, name=name: cut(f / name, 9), f"{name} does not match checksums") for name in FILES},
    "an empty model": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors does not match checksums.json"),
    "edited recipe": (lambda f: (f / "recipe.json").write_text("{}"), "recipe.json does not match checksums.json"),
    "a folder for a file": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json is missing"),
    "half of the checksums": (lambda f: cut(f / "checksums.json", 100), "checksums.json cannot be read"),
    "a deep list": (lambda f: (f / "checksums.json").write_text("[" * 100_000), "checksums.json cannot be read"),
    "a list": (lambda f: (f / "checksums.json").write_text("[]\n"), "checksums.json cannot be read"),
    "a checksum twice": (
        lambda f: (f / "checksums.json").write_text((f / "checksums.json").read_text().replace("result", "recipe")),
        "checksums.json cannot be read",
    ),
    "an unknown file": (lambda f: resign(f, lambda m: m.update({"a\nb": ""})), "a b is missing"),
    "no arrays signed": (lambda f: resign(f, lambda m: m.pop("model.safetensors")), r"embed_tokens\.weight is missing"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_sentence_with_file_and_remedy(tmp_path, damage, words):
    params = write(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UsageError, match=words) as caught:
        huggingface.load(tmp_path / "out", params)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    assert re.search("copy the folder again, or write it again with `python -m harness.export`|use its own", str(caught.value))


SHARD_DAMAGE: dict[str, tuple[Callable, str]] = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"model-00002-of-00003\.safetensors is missing",
    ),
    "missing index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"index\.json is missing"),
    "truncated index": (lambda f: cut(f / "model.safetensors.index.json", 99), r"index\.json does not match checksums"),
    "shards swapped": (
        lambda f: (
            shutil.copy(f / "model-00002-of-00003.safetensors", f / "x"),
            (f / "model-00003-of-00003.safetensors").rename(f / "model-00002-of-00003.safetensors"),
            (f / "x").rename(f / "model-00003-of-00003.safetensors"),
        ),
        r"model-00002-of-00003\.safetensors does not match checksums",
    ),
}


@pytest.mark.parametrize(("damage", "words"), SHARD_DAMAGE.values(), ids=SHARD_DAMAGE)
def test_damage_of_shards_is_one_sentence_with_file_and_remedy(tmp_path, damage, words):
    params = write(tmp_path / "out", shard_bytes=18_000)
    damage(tmp_path / "out")
    with pytest.raises(UsageError, match=words) as caught:
        huggingface.load(tmp_path / "out", params)
    assert "\n" not in str(caught.value) and "harness.export" in str(caught.value)


@pytest.mark.parametrize("shard_bytes", [None, 9_000])
def test_every_flipped_bit_is_found(tmp_path, shard_bytes):
    """One of each byte of the checksums, and one of every ninth byte of the other files."""
    config = dataclasses.replace(TINY, layers=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    params = write(tmp_path / "out", config, dtype="bfloat16", shard_bytes=shard_bytes, source=tmp_path / "run")
    rng = random.Random(0)
    for file in sorted((tmp_path / "out").iterdir()):
        data = file.read_bytes()
        for place in range(0, len(data), 1 if file.name == "checksums.json" else 9):
            broken = bytearray(data)
            broken[place] ^= 1 << rng.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(UsageError, match="copy the folder again") as caught:
                huggingface.load(tmp_path / "out", params)
                pytest.fail(f"{file.name}, byte {place}: {data[place]} -> {broken[place]} loaded")
            assert "\n" not in str(caught.value), caught.value
            assert file.name in str(caught.value) or file.name == "checksums.json", caught.value
        file.write_bytes(data)
    huggingface.load(tmp_path / "out", params)


def test_a_model_of_another_shape_is_refused(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(UsageError, match=r"do not fit the model \(head is missing\): use its own config"):
        huggingface.load(tmp_path / "out", make(SHAPES["untied"]))
    with pytest.raises(UsageError, match=r"embedding is \[11, 24\], not \[12, 24\]"):
        huggingface.load(tmp_path / "out", make(dataclasses.replace(TINY, vocab_size=12)))


# ------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The smoke run as a folder."""
    path = tmp_path_factory.mktemp("exported") / "apr-smoke"
    config = ConfigDict(read_config(smoke_run.path))
    config.mesh.data = 1
    parts = build(config)
    params, result = load_best(smoke_run.path, parts.param_shapes())
    ids = (parts.domain.task.end_id, parts.domain.task.spawn_id)
    recipe = read_config(smoke_run.path)
    huggingface.save(path, params, recipe, parts.model.config, ids, result, source=smoke_run.path)
    return path


def test_the_command_writes_what_save_does_and_says_so(smoke_run, exported, command: Callable, tmp_path):
    ended = command(export, f"--workdir={smoke_run.path}", f"--output={tmp_path / 'out'}")
    assert ended.status == 0, ended.err
    assert contents(tmp_path / "out") == contents(exported)
    said = json.loads(ended.out.splitlines()[-1])
    sizes = {name: len(data) for name, data in contents(exported).items()}
    assert said == {"output": str(tmp_path / "out"), "files": len(sizes), "bytes": sum(sizes.values())}
    assert all(f"{size:,} bytes  {name}" in ended.out for name, size in sizes.items())


def test_into_a_zip_file_the_command_puts_evidence(smoke_run, command: Callable, tmp_path):
    ended = command(export, f"--workdir={smoke_run.path}", f"--output={tmp_path / 'evidence.zip'}")
    assert ended.status == 0, ended.err
    names = [f"{smoke_run.path.name}/{name}" for name in ("config.json", "eval.json", "metrics.jsonl")]
    assert json.loads(ended.out.splitlines()[-1]) == {"output": str(tmp_path / "evidence.zip"), "added": names}
    with zipfile.ZipFile(tmp_path / "evidence.zip") as file:
        assert {*file.namelist()} == {*names, "checksums.json"}
        for name in names:
            assert file.read(name) == (smoke_run.path.parent / name).read_bytes()


def test_an_exported_folder_converts_to_shards_of_bfloat16(exported, command: Callable, tmp_path):
    ended = command(
        export, f"--workdir={exported}", f"--output={tmp_path / 'out'}", "--dtype=bfloat16", "--shard_mb=1"
    )
    assert ended.status == 0, ended.err
    shapes = build(ConfigDict(read_config(exported))).param_shapes()
    params = load_best(exported, shapes)[0]
    assert same(load_best(tmp_path / "out", shapes)[0], rounded(params, "bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--workdir=RUN", "--output=FOLDER"]),
        (["--dtype=float16"], ["dtype", "float32", "bfloat16"]),
        (["--shard_mb=0"], ["shard_mb"]),
        (["--workdir=nothing", "--output=x"], ["nothing holds no run", "python sft.py"]),
    ],
)
def test_a_bad_export_is_one_sentence(command: Callable, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ended = command(export, *arguments)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in words), ended.err
    assert not list(tmp_path.iterdir())


def test_an_exported_run_is_the_run(smoke_run, exported):
    """Config, parameters and result are those of the workdir, so that --init and sweeps take either."""
    assert read_config(exported) == read_config(smoke_run.path)
    assert holds_parameters(exported) and holds_parameters(smoke_run.path) and not holds_parameters(ROOT / "tests")
    shapes = build(ConfigDict(read_config(exported))).param_shapes()
    (ours, result), (theirs, expected) = load_best(smoke_run.path, shapes), load_best(exported, shapes)
    assert same(jax.tree.map(np.asarray, ours), theirs) and result == expected
    assert grpo.combine(exported, grpo_recipe()).model == grpo.combine(smoke_run.path, grpo_recipe()).model
    entries = [{"label": "smoke", "workdir": str(exported), "grid": {}}]
    (point,) = sweep.points(entries, {})
    assert point.config.name == "apr-smoke"


def grpo_recipe() -> ConfigDict:
    from configs import grpo as recipe

    return recipe.get_config("smoke")


def test_its_evaluation_equals_that_of_its_workdir(smoke_run, exported, command: Callable, tmp_path):
    records = []
    for source in (smoke_run.path, exported):
        output = tmp_path / source.parent.name
        ended = command(evaluate, f"--workdir={source}", f"--output={output}", "--config.mesh.data=1")
        assert ended.status == 0, ended.err
        (record,) = json.loads((output / "eval.json").read_text())
        untimed = [{n: v for n, v in result.items() if "milliseconds" not in n} for result in record["results"]]
        kept = {n: v for n, v in record.items() if "seconds" not in n and "_ms" not in n and n != "checksum"}
        records.append(kept | {"results": untimed})
    ours, theirs = records
    assert ours["results"] and {name for name in ours if ours[name] != theirs[name]} == set()


def test_a_renamed_field_of_its_recipe_is_damage(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    text = (folder / "recipe.json").read_text()
    (folder / "recipe.json").write_text(text.replace("learning_rate", "learning_rats", 1))
    with pytest.raises(UsageError, match=r"recipe\.json does not match checksums\.json: copy the folder again"):
        read_config(folder)


def test_a_changed_number_of_its_log_is_never_drawn(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    assert choose.read_logs([str(folder)])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("1", "2", 1))
    with pytest.raises(UsageError, match=r"metrics\.jsonl does not match checksums\.json"):
        choose.read_logs([str(folder)])


def test_an_evaluation_of_it_is_written_elsewhere(exported, command: Callable, tmp_path, monkeypatch):
    before = contents(exported)
    monkeypatch.chdir(tmp_path)
    ended = command(evaluate, f"--workdir={exported}")
    assert ended.status == 0, ended.err
    assert contents(exported) == before and len([*tmp_path.glob("runs/evaluation-*/eval.json")]) == 1


def test_no_run_begins_in_an_exported_folder(exported, command: Callable):
    before = contents(exported)
    with pytest.raises(UsageError, match="holds an exported model and no run: choose another --workdir"):
        Workdir(exported, ConfigDict(read_config(exported)))
    ended = command(sft, "--config=configs/apr.py:smoke", "--config.mesh.data=1", f"--workdir={exported}")
    assert ended.status == 2 and "exported model" in ended.err
    assert contents(exported) == before


# ------------------------------------------------------------------- against transformers


def theirs_logits(model, rows: list[list[int]]) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def loaded(folder: pathlib.Path):
    """The folder as transformers loads it: every array is found and used."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference; pytest -rP shows it."""
    found = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference {found:.1e} of logits up to {max(float(np.abs(a).max()) for a in ours):.1f}")
    return found


@pytest.mark.parametrize("shard_bytes", [None, 12_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits(tmp_path, name, dtype, shard_bytes):
    config = SHAPES[name]
    pytest.importorskip("transformers")
    params = write(tmp_path / "out", config, dtype=dtype, shard_bytes=shard_bytes)
    assert (tmp_path / "out" / huggingface.INDEX).exists() == (shard_bytes is not None)
    model = loaded(tmp_path / "out")
    assert model.generation_config.eos_token_id == [1, 9]
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 11, length).tolist() for length in (1, 7, 64)]
    difference = worst(logits(rounded(params, dtype), config, rows), theirs_logits(model, rows))
    assert difference < 1e-4


def test_transformers_computes_the_logits_of_the_shipped_model(tmp_path):
    pytest.importorskip("transformers")
    config = ConfigDict(read_config(PRETRAINED))
    config.mesh.data = 1
    parts = build(config)
    params, result = load_best(PRETRAINED, parts.param_shapes())
    ids = (parts.domain.task.end_id, parts.domain.task.spawn_id)
    huggingface.save(tmp_path / "out", params, config.to_dict(), parts.model.config, ids, result)
    made = [parts.domain.demonstration("heldout", 0, index) for index in range(12)]
    rows = [row for rollout in made for thread in rollout.threads() if len(row := thread.ids()) <= 512]
    ours, theirs = logits(params, parts.model.config, rows), theirs_logits(loaded(tmp_path / "out"), rows)
    assert len(rows) > 12 and worst(ours, theirs) < 1e-4
    assert all((a.argmax(-1) == b.argmax(-1)).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_of_transformers_is_ours(tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(settings)
    config = ModelConfig(
        vocab_size=50,
        width=24,
        layers=3,
        heads=6,
        kv_heads=2,
        head_width=8,
        mlp_width=40,
        context=64,
        rope_theta=10_000.0,
        tied=tied,
        dtype="float32",
    )
    tensors = {name: array.numpy() for name, array in model.state_dict().items() if not tied or name != "lm_head.weight"}
    params = llama.from_llama(tensors, config)
    rows = [np.random.default_rng(1).integers(0, 50, length).tolist() for length in (3, 64)]
    difference = worst(logits(params, config, rows), theirs_logits(model, rows))
    assert difference < 1e-4

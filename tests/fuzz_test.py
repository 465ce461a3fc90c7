"""Whatever is typed, read from a file or written by a model: an answer or one sentence, soon, and nothing evaluated.

The quick tier runs some 600 cases; `-m slow` runs 200,000 (`CASES`).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import json
import pathlib
import pickle
import random
import sys
import time
import typing
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import solver
from analysis import choose, viewer
from configs import apr
from countdown.grader import Problem, grade_path
from countdown.language import Tokenizer, parse
from countdown.task import Countdown, record
from harness import files, grid, huggingface, problems, results
from harness.build import build
from harness.cli import UsageError, _config_errors, usage_errors
from harness.workdir import read_config
from protocols import MalformedSpawn
from records import Call, Thread, stored
from tests.countdown.language_test import render
from train_state import init_params

SECONDS = 20.0  # most of one case, on a busy machine
CASES = {  # quick, slow
    "overrides": (80, 2_000),
    "problems": (150, 40_000),
    "traces": (60, 8_000),
    "exported": (40, 10_000),
    "recorded": (60, 10_000),
    "grammar": (250, 130_000),
}
ROOT = pathlib.Path(__file__).resolve().parents[1]
Case = Callable[[random.Random], object]
ALLOWED = (UsageError, MalformedSpawn)

ODD_NUMBERS = (0, 1, -1, 2, 9, 2**31, 2**63, 2**64 - 1, 10**8, 10**30, 0.0, -0.5, 1e-30, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", " ", "a", "-1", "nan", "inf", "null", "None", "[]", "{}", "()", "1e999", "0x1", "é", "'", '"', "\\", "\n", "a.b", "__class__")
EVIL = "__import__('os').system('touch /tmp/owned')"


def odd_json(rng: random.Random, depth: int = 0) -> typing.Any:
    """Any JSON value, odd ones above all."""
    kind = rng.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return rng.choice(ODD_NUMBERS)
    if kind == 2:
        return rng.choice((*ODD_TEXTS, EVIL))
    if kind < 5:
        return rng.choice((None, True, False, rng.randint(-5, 99)))
    if kind < 7:
        return [odd_json(rng, depth + 1) for _ in range(rng.randrange(5))]
    names = ("numbers", "target", "task", "facts", "rollout", "root", "calls", *ODD_TEXTS)
    return {rng.choice(names): odd_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, value: typing.Any) -> typing.Any:
    """A JSON value with one place in it changed, removed or doubled."""
    value = copy.deepcopy(value)
    place: typing.Any = value
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        if not keys:
            return value
        key = rng.choice(keys)
        if not (isinstance(place[key], dict | list) and rng.random() < 0.8):
            break
        place = place[key]
    action = rng.randrange(3)
    if action == 0:
        place[key] = odd_json(rng)
    elif action == 1:
        del place[key]
    elif isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    else:
        place[rng.choice(ODD_TEXTS)] = copy.deepcopy(place[key])
    return value


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, overwritten, or nested deeply."""
    place = rng.randrange(len(data) + 1)
    return rng.choice(
        (
            lambda: data[:place],
            lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
            lambda: data[:place] + rng.randbytes(rng.randrange(9)) + data[place:],
            lambda: b"[" * 20_000 + data,
            lambda: b'{"a":' * 20_000 + data,
            lambda: pickle.dumps({"numbers": [1, 2]}),
        )
    )()


# ------------------------------------------------------------------- overrides


def fields_of(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all sections and fields."""
    found = []
    for name in config:
        found.append(prefix + name)
        if isinstance(config[name], ConfigDict):
            found += fields_of(config[name], f"{prefix}{name}.")
    return found


FIELDS = fields_of(apr.get_config("smoke"))


def override(rng: random.Random) -> str:
    name = rng.choice(FIELDS)
    if rng.random() < 0.2:
        name = rng.choice((f"{name}.{rng.choice(ODD_TEXTS)}", f".{name}", "", ".", name[:-1], name.replace(".", ".."), f"{name} 0"))
    value = rng.choice((*map(str, ODD_NUMBERS), *ODD_TEXTS, str(rng.randint(-2, 20)), EVIL))
    return f"--config.{name}{rng.choice(('=', '=', '=', '=', ' ', ''))}{value}"


def overrides(_: pathlib.Path) -> Case:
    def case(rng: random.Random) -> object:
        arguments = ["sft.py", "--config=configs/apr.py:smoke", "--config.mesh.data=1"]
        arguments += [override(rng) for _ in range(rng.choice((1, 1, 2)))]
        values = flags.FlagValues()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            with _config_errors():
                config_flags.DEFINE_config_file("config", "configs/apr.py", flag_values=values)
                values(arguments)
        with usage_errors():
            parts = build(values.config)
            return parts.domain.demonstration("train", parts.config.seed, 0)

    return case


# ------------------------------------------------------------------- files


def problem_files(folder: pathlib.Path) -> Case:
    domain = build(small()).domain
    good = [{"numbers": [1, 2, 3], "target": 6}, {"numbers": [9, 8, 7, 6], "target": 24}]

    def case(rng: random.Random) -> object:
        file = folder / "problems.json"
        value = mutated(rng, good) if rng.random() < 0.7 else odd_json(rng)
        data = json.dumps(value).encode()
        file.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
        return problems.read_problems(str(file), domain)

    return case


def traces(folder: pathlib.Path) -> Case:
    domain = build(small()).domain
    rollout = next(r for r in (domain.demonstration("train", 0, i) for i in range(99)) if r.root.spawns)
    good = json.loads(json.dumps(stored("countdown", domain.facts(), rollout, domain.to_json(rollout.problem))))

    def case(rng: random.Random) -> object:
        file = folder / "trace.json"
        value = good
        for _ in range(rng.randrange(1, 4)):
            value = mutated(rng, value) or good
        data = json.dumps(value).encode()
        file.write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
        return viewer.page(viewer.page_data(viewer.read_trace(str(file))))

    return case


def small() -> ConfigDict:
    config = apr.get_config("smoke")
    config.update_from_flattened_dict({"mesh.data": 1, "model.layers": 1, "model.width": 8, "number_limit": 21})
    return config


def exported(folder: pathlib.Path) -> Case:
    """The right parameters or a refusal: no other ones."""
    config = small()
    parts = build(config)
    like, task = parts.param_shapes(), parts.domain.task
    params = jax.tree.map(np.asarray, init_params(parts.model, jax.random.key(0)))
    recipe = json.loads(config.to_json())
    stop_ids = (task.end_id, task.spawn_id)
    huggingface.save(folder / "model", params, recipe, parts.model.config, stop_ids, {"step": 1}, shard_bytes=9000)
    whole = {file: file.read_bytes() for file in (folder / "model").iterdir()}

    def case(rng: random.Random) -> object:
        file, data = rng.choice([*whole.items()])
        if file.suffix == ".json" and rng.random() < 0.5:
            file.write_bytes(files.json_bytes(mutated(rng, json.loads(data))))
        else:
            file.write_bytes(damaged(rng, data))
        try:
            found, _ = huggingface.load(folder / "model", like)
            jax.tree.map(np.testing.assert_array_equal, found, params)
        finally:
            file.write_bytes(data)
        return found

    return case


def recorded(folder: pathlib.Path) -> Case:
    """What runs leave. Evaluations, evidence and points of a grid: the right ones or a refusal, no other ones."""
    run, archive, point = folder / "apr", folder / "evidence.zip", grid.Run({}, ("--config.seed=0",))
    run.mkdir()
    entry = json.loads((ROOT / "pretrained" / "apr" / "eval.json").read_text())[0]
    entry |= {"n": 2, "samples": 1, "results": entry["results"][:2]}
    texts = {
        run / "config.json": json.dumps(results.signed(small().to_dict())),
        run / "eval.json": json.dumps([results.signed(entry)]),
        run / "metrics.jsonl": '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n',
        folder / "only.json": json.dumps(results.signed({"command": "sft.py", "flags": [*point.flags], "result": {"accuracy": 0.5}})),
    }
    for file, text in texts.items():
        file.write_text(text)
    results.add_evidence(run, archive)
    readers: dict[pathlib.Path, Callable[[], typing.Any]] = {
        run / "config.json": lambda: read_config(run),
        run / "metrics.jsonl": lambda: choose.read_logs([str(run)]),
        run / "eval.json": lambda: choose.read_entries(run / "eval.json"),
        folder / "only.json": lambda: grid.ended("sft.py", point, folder),
        archive: lambda: [choose.read_entries(path) for path in results.evaluations(folder) if isinstance(path, zipfile.Path)],
    }
    whole = {file: (file.read_bytes(), read()) for file, read in readers.items()}

    def case(rng: random.Random) -> object:
        file = rng.choice([*readers])
        data, expected = whole[file]
        if file.suffix == ".json" and rng.random() < 0.5:
            file.write_text(json.dumps(mutated(rng, json.loads(data))))
        else:
            file.write_bytes(damaged(rng, data))
        try:
            found = readers[file]()
            if file.stem == "eval":
                assert all(entry in expected for entry in found)  # one may be missing, or there twice
            elif file.stem != "metrics":
                assert found == expected
        finally:
            file.write_bytes(data)
        return found

    return case


# ------------------------------------------------------------------- what a model may write


def grammar(_: pathlib.Path) -> Case:
    tokenizer = Tokenizer(21)
    task = Countdown(tokenizer, "apr")
    config = solver.DemonstratorConfig("apr", 1, 5, 8, 0.9, budget_fraction=0, token_bin=64)
    problem = Problem((4, 12, 18), 21)
    whole = record(problem, solver.demonstrate(problem, config, random.Random(1)), task)
    threads = [thread.ids() for thread in whole.threads()]

    def case(rng: random.Random) -> object:
        ids = list(rng.choice(threads))
        for _ in range(rng.randrange(1, 5)):
            start, length = rng.randrange(len(ids)), rng.randrange(4)
            ids[start : start + length] = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(4))]
            ids = ids or [0]
        text = tokenizer.decode(ids)
        with contextlib.suppress(ValueError):
            assert render(parse(text)) == text
        with contextlib.suppress(ValueError):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        root = Thread((), [Call(0, ids[:9], ids[9:], [], "end")])
        task.grade(problem, root)
        task.force_answer(problem, ids)
        steps = "".join(rng.choice("0123456789+-*/=, ()e._") for _ in range(rng.randrange(40)))
        assert not grade_path(problem, rng.choice((steps, EVIL, "9" * 5000 + "+1=2"))).correct
        return task.spawn([*ids, task.spawn_id])

    return case


KINDS = {
    "overrides": overrides,
    "problems": problem_files,
    "traces": traces,
    "exported": exported,
    "recorded": recorded,
    "grammar": grammar,
}


def run(kind: str, count: int, folder: pathlib.Path) -> collections.Counter:
    """Runs so many cases; counts answers and refusals."""
    case, ended = KINDS[kind](folder), collections.Counter[str]()
    for number in range(count):
        began = time.process_time()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                case(random.Random(f"{kind} {number}"))
            ended["answer"] += 1
        except ALLOWED as refusal:
            assert str(refusal) and "\n" not in str(refusal), (number, refusal)
            ended["refusal"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of {kind} ends in {type(error).__name__}: {error}") from error
        assert time.process_time() - began < SECONDS, f"case {number} of {kind} takes too long"
    assert not pathlib.Path("/tmp/owned").exists()
    return ended


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_odd_inputs(kind, tmp_path):
    ended = run(kind, CASES[kind][0], tmp_path)
    assert ended["refusal"] > 3, ended


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_thousand_odd_inputs(kind, tmp_path):
    assert sum(many for _, many in CASES.values()) == 200_000
    assert run(kind, CASES[kind][1], tmp_path)["refusal"] > 100

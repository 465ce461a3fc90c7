"""The parts of `benchmarks.accelerator`. Each yields its figures as it finds them, as dicts of JSON values."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import sft
from benchmarks import decode as decoding_speed
from benchmarks import reference
from benchmarks.train import peer_step
from configs import apr, sos, sosp
from harness.build import Parts, build
from harness.plan import bytes_per_id, flops_per_token
from harness.results import read_log
from harness.rollouts import RolloutPool
from harness.workdir import PRETRAINED, load_best, read_config
from model import Decoder
from protocols import PrefillRequest
from sampler import Sampler
from train_state import init_params, make_train_step, state_from_key, token_stats

Figures = dict[str, typing.Any]
ROOT = pathlib.Path(__file__).parents[1]
METHODS = {"apr": apr, "sosp": sosp, "sos": sos}
FED_TOKENS = 32_768  # of a batch whose making is timed
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
VARIANTS: dict[str, dict[str, typing.Any]] = {  # of the training step: fields of the config
    "blocks": {"model.attention": "blocks"},
    "pallas": {"model.attention": "pallas"},
    "unrolled": {"model.attention": "blocks", "model.scan_layers": False},  # as a CPU trains; slow to compile
}


def settings(preset: str, module: typing.Any = apr, **changes: typing.Any) -> ConfigDict:
    """A recipe on one device; `model__layers=2` sets a field."""
    config = module.get_config(preset)
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({"mesh.data": 1, **fields})
    return config


def median_seconds(action: Callable[[], object], budget: float) -> float:
    """Median time of an action that runs until `budget` seconds are over, three times at least."""
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < budget:
        began = time.perf_counter()
        jax.block_until_ready(action())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of each compilation of a device function within the block."""
    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(note)


def attempt(action: Callable[[], Figures]) -> Figures | str:
    """What an action finds, or in words why it failed: one variant must not cost the others."""
    try:
        return action()
    except Exception as error:  # whatever a compiler throws
        return f"failed: {type(error).__name__}: {str(error)[:300]}"


def on_cpu() -> bool:
    """Whether there is no accelerator: sizes are small then."""
    return jax.default_backend() == "cpu"


def matrix_rate(dtype: str) -> float:
    """Floating-point operations per second of a large square matrix product."""
    size = 1024 if on_cpu() else 8192
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    jax.block_until_ready(multiply(x))
    return 2 * size**3 / median_seconds(lambda: multiply(x), 0.5)


def bandwidth() -> float:
    """Bytes per second, read and written, of adding one to a large array."""
    x = jnp.zeros(1 << (24 if on_cpu() else 28), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    return 2 * x.nbytes / median_seconds(lambda: add(x), 0.5)


def device(_: argparse.Namespace) -> Iterator[Figures]:
    """What runs here, and what it can do."""
    here = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    yield {"kind": here.device_kind, "platform": here.platform, "devices": jax.device_count(), "versions": versions}
    yield {"python": platform.python_version(), "machine": platform.machine()}
    yield {"bytes_per_s": bandwidth()}
    for dtype in ("bfloat16", "float32"):
        yield {f"matrix_flops_{dtype}": matrix_rate(dtype)}


# ------------------------------------------------------------------- feeding


def feeding(args: argparse.Namespace) -> Iterator[Figures]:
    """Rates of one worker and the share of the tokens that carry a segment, per preset and method."""
    presets = ("laptop", "desktop", "gpu", "paper") if args.preset == "gpu" else (args.preset,)
    seconds = args.limit / (6 * len(presets) * len(METHODS))
    for preset, method in itertools.product(presets, METHODS):
        yield {f"{preset} {method}": fed(preset, METHODS[method], 1, seconds)}
    if workers := apr.get_config(args.preset).train.feeders:
        yield {f"{args.preset} apr, {workers} workers": fed(args.preset, apr, workers, 2 * seconds)}


def fed(preset: str, module: typing.Any, workers: int, seconds: float) -> Figures:
    """How many row tokens a second some workers feed, after their head start, and the share that is used."""
    config = settings(preset, module)
    rows = max(1, FED_TOKENS // config.model.context)
    config.train.rows, config.train.micro_rows = rows, rows
    stream = sft.DemonstrationStream(build(config), None, workers)
    used, batches = [], 0
    stream.next()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or batches < 2:
        stream.next()
        used.append(stream.used)
        batches += 1
    rate = batches * rows * config.model.context / (time.perf_counter() - began)
    return {"used": statistics.mean(used), "tokens_per_s": rate, "workers": workers}


# ------------------------------------------------------------------- check


def check(args: argparse.Namespace) -> Iterator[Figures]:
    """Largest deviations from float64 of log-probs, of gradients, and of threads that spawn and join."""
    base = apr.get_config(args.preset)
    rows = {"train__rows": 2, "train__micro_rows": 2, "train__overlong": "cut"}
    context = min(128 if on_cpu() else 512, base.model.context)
    small = {"model__layers": 2, "model__context": context, "model__dtype": "float32"}
    parts = build(settings(args.preset, **rows, **small))
    batch = jax.tree.map(lambda field: jnp.asarray(field[0]), sft.DemonstrationStream(parts).next())
    params = init_params(parts.model, jax.random.key(0))

    def loss(params: typing.Any, logp: Callable) -> tuple[typing.Any, typing.Any]:
        found = logp(params)
        return -(found * batch.weight[:, 1:]).sum(), found

    with jax.enable_x64(True):
        config = parts.model.config
        exact = lambda p: reference.logprobs(p, config, batch.tokens, batch.positions, batch.until)  # noqa: E731
        true_gradient, true_logp = jax.device_get(
            jax.jit(jax.grad(lambda p: loss(p, exact), has_aux=True))(reference.double(params))
        )

    def apart(dtype: str, changes: Figures) -> Figures:
        fields = {field.removeprefix("model."): value for field, value in changes.items()}
        model = Decoder(dataclasses.replace(parts.model.config, dtype=dtype, **fields))
        ours = lambda p: token_stats(model, p, batch).logp[:, 1:]  # noqa: E731
        gradient, logp = jax.device_get(jax.jit(jax.grad(lambda p: loss(p, ours), has_aux=True))(params))
        gap = np.abs(logp - true_logp)[np.asarray(batch.sampled[:, 1:])].max()
        return {"logprob_gap": gap, "gradient_gap": distance(gradient, true_gradient)}

    for dtype, (name, changes) in itertools.product(("float32", "bfloat16"), VARIANTS.items()):
        yield {f"{name} {dtype}": attempt(functools.partial(apart, dtype, changes))}
    for dtype in ("float32", "bfloat16"):
        yield {f"spawn and join {dtype}": spawn_and_join(dtype, problems=1 if on_cpu() else 16)}


def distance(tree: typing.Any, truth: typing.Any) -> float:
    """Norm of the difference of two trees, as a share of the norm of the second."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True))
    apart = sum(((a.astype(np.float64) - b) ** 2).sum() for a, b in pairs)
    return float(np.sqrt(apart / sum((b**2).sum() for _, b in pairs)))


def spawn_and_join(dtype: str, problems: int) -> Figures:
    """Greedy rollouts of the shipped model against the float64 reference.

    `agree` is the share of sampled ids that the reference finds most likely after the same ids: at 1 an oracle
    without a cache would have written the same threads.
    """
    config = ConfigDict(read_config(PRETRAINED))
    config.update_from_flattened_dict({"mesh.data": 1, "model.dtype": dtype, "sampler.temperature": 0.0})
    parts = build(config)
    params, _ = load_best(PRETRAINED, parts.param_shapes())
    rollouts = RolloutPool(parts).solve(params, parts.test_set()[:problems])
    agree, gaps = [], []
    with jax.enable_x64(True):
        length, shape, double = parts.model.config.context, parts.model.config, reference.double(params)
        place = jnp.arange(length)[None]
        full = jax.jit(lambda ids: reference.logits(double, shape, ids, place, jnp.full_like(place, length)))
        for thread in (thread for rollout in rollouts for thread in rollout.threads()):
            before: list[int] = []
            for call in thread.calls:
                ids = before[: call.keep] + call.injected
                before = ids + call.sampled
                row = np.zeros((1, length), np.int64)
                row[0, : len(before)] = before
                logp = np.asarray(jax.nn.log_softmax(full(row)[0]))[len(ids) - 1 : len(before) - 1]
                agree += list(logp.argmax(-1) == call.sampled)
                gaps += list(np.abs(logp[np.arange(len(logp)), call.sampled] - call.logprobs))
    children = sum(len(rollout.threads()) - 1 for rollout in rollouts)
    return {"agree": np.mean(agree), "logprob_gap": max(gaps), "ids": len(agree), "children": children}


# ------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> Iterator[Figures]:
    """The training step of every variant, on real batches of one forward pass."""
    presets = ("gpu", "paper") if args.preset == "gpu" else (args.preset,)
    for preset in presets:
        config = settings(preset)
        config.train.rows = config.train.micro_rows
        rate = matrix_rate(config.model.dtype)
        batch = sft.DemonstrationStream(build(config)).next()
        for name, changes in VARIANTS.items():
            if on_cpu() and name == "pallas":
                yield {f"{preset} {name}": "unmeasured: a CPU interprets the kernel"}
                continue
            config.update_from_flattened_dict(changes)
            yield {f"{preset} {name}": attempt(functools.partial(trained, build(config), batch, rate, args.limit / 30))}


def trained(parts: Parts, batch: typing.Any, rate: float, budget: float) -> Figures:
    """Seconds to the first step, and the speed of those after it."""
    began = time.perf_counter()
    state = state_from_key(parts.model, parts.optimizer, parts.mesh, jax.random.key(0))
    step = make_train_step(parts.model, parts.optimizer, sft.sft_loss, parts.mesh)

    def run() -> typing.Any:
        nonlocal state
        state, metrics, _ = step(state, batch)
        return metrics

    jax.block_until_ready(run())
    first = time.perf_counter() - began
    seconds = median_seconds(run, budget)
    tokens = batch.tokens.size
    keys = (batch.tokens.shape[-1] + 1) / 2  # as if rows were one causal segment: the usual count
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds_to_first_step": first,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "matrix_share": flops_per_token(parts.model.config, keys) * tokens / seconds / rate,
        "peak_bytes_so_far": memory.get("peak_bytes_in_use"),
        "parameters": parts.parameter_count(),
    }


def train_peer(args: argparse.Namespace) -> Iterator[Figures]:
    """The same step in PyTorch, eager and compiled, where it is installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"pytorch": f"unmeasured: {missing[0]} is not installed"}
        return
    import torch

    config = settings(args.preset)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    rows, shape = config.train.micro_rows, dataclasses.asdict(build(config).model.config)
    for name, compiled in (("eager", False), ("compiled", True)):
        began = time.perf_counter()
        step = peer_step(shape, rows, rows, config.model.tied, where, compiled)
        first = time.perf_counter() - began
        seconds = median_seconds(step, args.limit / 20)
        figures = {"seconds_to_first_step": first, "step_ms": 1e3 * seconds, "device": where}
        yield {f"pytorch {name}": {**figures, "tokens_per_s": rows * shape["context"] / seconds}}


# ------------------------------------------------------------------- decoding


def decode(args: argparse.Namespace) -> Iterator[Figures]:
    """Decode steps by rows, rollouts with the lengths of demonstrations, one problem alone."""
    parts = build(settings(args.preset))
    params = init_params(parts.model, jax.random.key(0))
    speed = bandwidth()
    most = 2 * parts.sampler.rows

    def engine(rows: int) -> Sampler:
        sizes = dataclasses.replace(parts.sampler, rows=rows, temperature=1.0)
        return Sampler(parts.model, params, sizes, (), parts.sampler_mesh())

    for rows in (rows for rows in (1, 16, 64, 512, 1024) if rows <= most):
        yield {f"{rows} rows": steps(parts, functools.partial(engine, rows), rows, speed)}
    rollouts = decoding_speed.demonstrations(parts, 4 if on_cpu() else 500)
    with compilations() as compiled:
        began = time.perf_counter()
        replayed = decoding_speed.replay(parts, [engine(parts.sampler.rows)], rollouts, 1, "refill")
    yield {"compiled": len(compiled), "compile_s": sum(compiled), "rollouts": replayed}
    yield {"rollouts_first_and_second_run_s": time.perf_counter() - began}
    yield {"alone": alone(parts, engine)}


def steps(parts: Parts, make: Callable[[], Sampler], rows: int, speed: float) -> Figures:
    """Rows of equal length: time of a step, and bytes it has to read against what the memory gives."""
    config = parts.model.config
    size = jnp.dtype(config.dtype).itemsize
    cached = decoding_speed.PROMPT + decoding_speed.NEW / 2
    with compilations() as compiled:
        began = time.perf_counter()
        sampler = make()
        decoding_speed.equal(sampler, 1)
        first = time.perf_counter() - began
    rate = decoding_speed.equal(sampler, 2)
    step = rows / rate  # of all rows by the clock, with its share of the prefill
    needed = parts.parameter_count() * size + rows * cached * bytes_per_id(config)
    return {
        "tokens_per_s": rate,
        "step_us": 1e6 * step,
        "bandwidth_share": needed / step / speed,
        "seconds_to_first_figure": first,
        "compiled": len(compiled),
    }


def alone(parts: Parts, make: Callable[[int], Sampler]) -> Figures:
    """One problem with eight children and nothing else in flight; the first id after a prompt and after a join."""
    wide = decoding_speed.demonstrations(parts, 2 if on_cpu() else 8, children=8)
    milliseconds, together = decoding_speed.alone(parts, make(16), wide)
    _, in_turn = decoding_speed.alone(parts, make(2), wide)
    sampler, context = make(1), parts.model.config.context

    def first_id(keep: int, ids: int) -> float:
        began = time.perf_counter()
        sampler.prefill([PrefillRequest(0, keep, [2] * ids, (0, 0), 0, 1)])
        sampler.decode()
        return 1e3 * (time.perf_counter() - began)

    def join() -> float:
        first_id(0, context // 2)
        return first_id(context // 4, 64)

    prompts, joins = ([action() for _ in range(6)][1:] for action in (lambda: first_id(0, 64), join))
    return {
        "milliseconds": milliseconds,
        "children_ms": together,
        "children_in_turn_ms": in_turn,
        "first_id_of_a_prompt_of_64_ms": statistics.median(prompts),
        "first_id_after_a_join_of_64_ms": statistics.median(joins),
    }


# ------------------------------------------------------------------- whole commands


def command(*words: str) -> Figures:
    """Runs a command of the repository, and returns the JSON object of its last line."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


EVALUATED = ("accuracy", "interval", "n", "children", "total_tokens", "sequential_tokens", "throughput_ms")


def sft_steps(args: argparse.Namespace) -> int:
    """Updates that take two fifths of the part by the step that section `train` measured; without it 300 at most."""
    config, measured = apr.get_config(args.preset), pathlib.Path(args.output) / "train.json"
    figures = json.loads(measured.read_text()).get(f"{args.preset} blocks") if measured.exists() else None
    if not isinstance(figures, dict):  # a text says why it failed
        return min(config.optimizer.steps, 300)
    update_ms = figures["step_ms"] * config.train.rows / config.train.micro_rows  # that step was of one forward pass
    return min(config.optimizer.steps, max(20, int(400 * args.limit / update_ms)))


def supervised(args: argparse.Namespace) -> Iterator[Figures]:
    """Trains by the command, with the schedule of the preset in fewer updates, and exports the best parameters."""
    workdir, exported = (pathlib.Path(args.output) / name for name in ("apr", "apr-exported"))
    for folder in (workdir, exported):
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier measurement
    steps = sft_steps(args)
    own = apr.get_config(args.preset)
    schedule = {"optimizer.steps": steps, "optimizer.warmup_steps": steps // 10, "train.eval_every": steps}
    schedule |= {"train.eval_problems": min(own.train.eval_problems, 32)}
    schedule |= {"evaluation.problems": min(own.evaluation.problems, 200)}
    fields = [f"--config.{name}={value}" for name, value in schedule.items()]
    yield {"steps": steps}
    recipe = f"--config=configs/apr.py:{args.preset}"
    result = command("sft.py", recipe, f"--workdir={workdir}", "--config.mesh.data=1", *fields)
    last = [line for line in read_log(workdir / "metrics.jsonl") if "loss" in line][-1]
    yield {name: last[name] for name in ("loss", "token_accuracy", "tokens_per_second", "used")}
    yield {"evaluation": {name: result[name] for name in EVALUATED}}
    words = (f"--workdir={workdir}", f"--output={exported}", "--dtype=bfloat16", "--shard_mb=15")
    yield {"exported": command("-m", "harness.export", *words)}


def reinforced(args: argparse.Namespace) -> Iterator[Figures]:
    """Some steps of GRPO by the command, from what section `sft` left, else from the run that ships."""
    workdir, start = pathlib.Path(args.output) / "grpo", pathlib.Path(args.output) / "apr-exported"
    shutil.rmtree(workdir, ignore_errors=True)
    start = start if start.exists() else PRETRAINED
    fields = ["--config.grpo.steps=2", "--config.train.eval_every=2", "--config.mesh.data=1"]
    fields += ["--config.evaluation.problems=16", "--config.train.eval_problems=8"]
    recipe = f"--config=configs/grpo.py:{args.preset}"
    result = command("grpo.py", recipe, f"--init={start}", f"--workdir={workdir}", *fields)
    names = ("rollout_seconds", "score_seconds", "update_seconds", "pack_seconds", "total_tokens", "children")
    gaps = tuple(f"sampler_trainer_gap_{kind}" for kind in ("parent", "child", "joined"))
    steps = [line for line in read_log(workdir / "metrics.jsonl") if "rollout_seconds" in line]
    yield {"start": str(start), "steps": [{n: line[n] for n in names + gaps if n in line} for line in steps]}
    yield {"evaluation": {name: result[name] for name in EVALUATED}}

"""Decoding speed: APR rollouts with the lengths of real demonstrations, and rows of equal length.

An untrained model of the preset's shape decodes, and a replay makes every call
stop where the recorded demonstration stopped, so that the runtime sees real
spawns, joins and lengths while the sampler does all the work. The same problems
run

  refill    as the runtime does it, freed rows taken at once;
  waves     no row is refilled before all have stopped, but rows that have stopped are left out of the next burst;
  lockstep  waves in which every row decodes on until the longest has stopped, as in a batch that is padded;
  workers   refill, by `--workers` samplers of as many rows each, side by side;
  serial    on a single row: one thread at a time.

"alone" is the latency of one problem with eight children and nothing else in flight: over
its ideal (its sequential tokens times one step of a single row), and of its children's part
against the same children one after another (two rows: the parent keeps one).

"equal" rows have a prompt of 24 ids and 192 sampled ones. The peer is
transformers' `generate` with the same model shape, in a process of its own, on
the same rows and on the same calls in batches, each padded to its longest and
with its whole context sent again after a join; only ids that were asked for count.
A second peer for rows of equal length is llama.cpp's `llama-batched-bench` on a
random model of the same shape in float32 (it samples nothing: its ids are given).
Rates are the best of `--repeats` runs, compilation excluded.

Prints as its last line one JSON object.

Run: python -m benchmarks.decode
     python -m benchmarks.decode --peer=PYTHON  # one with torch and transformers
     python -m benchmarks.decode --llama-bench=PROGRAM  # llama-batched-bench; needs the gguf package
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence

PROMPT, NEW = 24, 192  # of the rows of equal length
SEED = (0,)


def best(repeats: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# ------------------------------------------------------------------- ours


class Replay:
    """A sampler under the runtime whose calls stop where recorded ones did, and seem to sample their ids."""

    def __init__(self, engine: typing.Any, rollouts: Sequence[typing.Any], schedule: str = "refill") -> None:
        from parallel_runtime import thread_key
        from protocols import Request

        self.engine, self.schedule = engine, schedule
        self.rows, self.devices, self.context = engine.rows, engine.devices, engine.context
        self.requests = [Request(rollout.problem, index) for index, rollout in enumerate(rollouts)]
        self._recorded: dict[tuple[tuple[int, int], int], list[int]] = {}
        self._held: dict[int, list[int]] = {}
        for request, rollout in zip(self.requests, rollouts, strict=True):
            for thread in rollout.threads():
                drawn = 0
                for call in thread.calls:
                    self._recorded[thread_key(SEED, request, thread.path), drawn] = call.sampled
                    drawn += len(call.sampled)

    def reset(self) -> None:
        """Stops every row."""
        self.engine.reset()

    def prefill(self, fills: list[typing.Any]) -> None:
        """Sets rows going, for as many ids as were recorded."""
        for fill in fills:
            self._held[fill.row] = self._recorded[fill.key, fill.num_sampled]
        limits = {fill.row: len(self._held[fill.row]) for fill in fills}
        if self.schedule == "lockstep":
            limits = dict.fromkeys(limits, max(limits.values()))
        self.engine.prefill([dataclasses.replace(fill, max_new_tokens=limits[fill.row]) for fill in fills])

    def decode(self) -> list[typing.Any]:
        """Rows that have stopped, with the recorded ids; all of them unless rows are refilled."""
        stopped = self.engine.decode()
        while self.schedule != "refill" and (more := self.engine.decode()):
            stopped += more
        return [dataclasses.replace(row, ids=self._held[row.row]) for row in stopped]


def replay(
    experiment: typing.Any, engines: Sequence[typing.Any], rollouts: Sequence[typing.Any], repeats: int, schedule: str
) -> dict:
    """Figures of the best run of the rollouts, spread over the engines; the first run compiles and is not counted."""
    from harness.workers import run_on_workers
    from parallel_runtime import Runtime
    from records import total_tokens

    replaying = [Replay(engine, rollouts, schedule) for engine in engines]
    runtimes = [Runtime(lane, experiment.domain.task, experiment.limits) for lane in replaying]

    def run() -> None:
        run_on_workers(runtimes, replaying[0].requests, SEED)

    first = best(1, run)
    for engine in engines:
        engine.counters.clear()
    seconds = best(repeats, run)
    counters = sum((collections.Counter(engine.counters) for engine in engines), collections.Counter())
    tokens = sum(total_tokens(rollout.root) for rollout in rollouts)
    assert counters["decode_tokens"] == tokens * repeats or schedule == "lockstep"
    total = sum(counters[f"{part}_seconds"] for part in ("prefill", "decode", "host"))
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "occupancy": tokens * repeats / counters["row_steps"],
        "evictions": sum(runtime.evictions for runtime in runtimes) / (repeats + 1),
        "prefill_share": counters["prefill_seconds"] / total,
        "host_share": counters["host_seconds"] / total,
        "prefill_tokens": counters["prefill_tokens"] / repeats,
        "compile_s": first - seconds,
    }


def alone(experiment: typing.Any, engine: typing.Any, rollouts: Sequence[typing.Any]) -> tuple[float, float]:
    """Milliseconds of these rollouts one at a time, and those from spawn to join; means, after a first run."""
    from parallel_runtime import Runtime
    from records import Thread

    stops: list[float] = []  # when the calls of the rollout stopped: parent's first, children's, parent's last

    def on_call(_: Thread) -> None:
        stops.append(time.perf_counter())

    replaying = Replay(engine, rollouts)
    runtime = Runtime(replaying, experiment.domain.task, experiment.limits, on_call)
    for _ in range(2):
        whole, children = [], []
        for request in replaying.requests:
            stops.clear()
            whole.append(runtime.run([request], SEED)[0].milliseconds)
            children.append(1e3 * (stops[-2] - stops[0]))
    return sum(whole) / len(rollouts), sum(children) / len(rollouts)


def equal(engine: typing.Any, repeats: int) -> float:
    """Tokens per second of rows of equal length."""
    from protocols import PrefillRequest

    def run() -> None:
        engine.reset()
        ids = list(range(2, 2 + PROMPT))
        engine.prefill([PrefillRequest(row, 0, ids, (row, 0), 0, NEW) for row in range(engine.rows)])
        while engine.decode():
            pass

    run()
    return engine.rows * NEW / best(repeats, run)


def demonstrations(parts: typing.Any, count: int, children: int = 0) -> list[typing.Any]:
    """The first that fit the context; if `children` is given, those that start so many at once and no others."""
    import solver
    from records import longest_context

    domain, demonstrator = parts.domain, parts.domain.demonstrator
    if children:
        beams = dict.fromkeys(("beam_low", "beam_high", "beam_low_without_budget", "sub_beam_high"), children)
        demonstrator = dataclasses.replace(demonstrator, prune=False, **beams)
    found: list[typing.Any] = []
    for index in itertools.count():
        rollout = solver.demonstration(domain.family, demonstrator, domain.demo_task, "train", 0, index)
        fits = longest_context(rollout.root) <= parts.model.config.context
        if fits and (children == 0 or [len(spawned) for spawned in rollout.root.spawns] == [children]):
            found.append(rollout)
        if len(found) == count:
            break
    return found


def ours(args: argparse.Namespace) -> tuple[dict[str, typing.Any], dict[str, typing.Any]]:
    """All our figures, and the workload for the peer."""
    import jax

    from configs import apr
    from decoding import SamplerConfig
    from harness.build import build
    from records import sequential_tokens
    from sampler import Sampler
    from train_state import init_params

    config = apr.get_config(args.preset).unlock()
    experiment: typing.Any = build(config)
    params = init_params(experiment.model, jax.random.key(0))

    def engine(rows: int) -> typing.Any:
        settings = SamplerConfig(rows, args.steps, config.sampler.length_bucket, args.slots, args.temperature, 0, 1.0)
        return Sampler(experiment.model, params, settings, ())

    rollouts = demonstrations(experiment, args.problems)
    wide = demonstrations(experiment, 8, children=8)
    few = rollouts[: max(1, args.problems // 10)]
    figures: dict[str, typing.Any] = {
        "equal_tokens_per_s": {n: equal(engine(n), args.repeats) for n in args.equal_rows}
    }
    many, step = engine(args.rows), 1 / equal(engine(1), args.repeats)
    for schedule in ("refill", "waves", "lockstep"):
        figures[schedule] = replay(experiment, [many], rollouts, args.repeats, schedule)
    several = [many, *(engine(args.rows) for _ in range(1, args.workers))]
    figures["workers"] = replay(experiment, several, rollouts, args.repeats, "refill")
    milliseconds, children = alone(experiment, many, wide)
    figures["alone"] = {
        "milliseconds": milliseconds,
        "over_ideal": milliseconds / (1e3 * step * sum(sequential_tokens(r.root) for r in wide) / len(wide)),
        "children_speedup": alone(experiment, engine(2), wide)[1] / children,
    }
    figures["serial"] = replay(experiment, [engine(1)], few, 1, "refill")
    calls = []
    for thread in (thread for rollout in rollouts for thread in rollout.threads()):
        for call in thread.calls:
            calls.append(((call.keep or 0) + len(call.injected), len(call.sampled)))
    shape = dataclasses.asdict(experiment.model.config)
    return figures, {"shape": shape, "calls": calls, "rows": args.rows, "equal_rows": args.equal_rows}


# ------------------------------------------------------------------- peer


def serve_peer(args: argparse.Namespace) -> None:
    """Runs in the peer's python: reads the workload from standard input and prints tokens per second."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    work = json.load(sys.stdin)
    shape = work["shape"]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2 * shape["context"],
        tie_word_embeddings=shape["tied"],
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=0,
    )
    llama = transformers.LlamaForCausalLM(config).float().eval()

    def generate(calls: list[list[int]]) -> None:
        longest, new = (max(column) for column in zip(*calls, strict=True))
        ids = torch.randint(1, shape["vocab_size"], (len(calls), longest))
        mask = torch.tensor([[0] * (longest - prompt) + [1] * prompt for prompt, _ in calls])
        with torch.no_grad():
            llama.generate(ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new)

    figures: dict[str, typing.Any] = {"equal_tokens_per_s": {}}
    for rows in work["equal_rows"]:
        seconds = best(args.repeats, functools.partial(generate, [[PROMPT, NEW]] * rows))
        figures["equal_tokens_per_s"][rows] = rows * NEW / seconds
    calls, rows = work["calls"], work["rows"]
    batches = [calls[start : start + rows] for start in range(0, len(calls), rows)]

    def all_batches() -> None:
        for batch in batches:
            generate(batch)

    seconds = best(args.repeats, all_batches)
    figures["rollouts_tokens_per_s"] = sum(new for _, new in calls) / seconds
    print(json.dumps(figures))


def peer(args: argparse.Namespace, work: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The peer's figures."""
    command = [args.peer, str(pathlib.Path(__file__).resolve()), "--serve-peer", *sys.argv[1:]]
    done = subprocess.run(command, input=json.dumps(work), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_gguf(path: pathlib.Path, shape: dict[str, typing.Any]) -> None:
    """A random Llama of this shape in llama.cpp's file format, without a vocabulary's text."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["width"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["mlp_width"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(shape["head_width"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    width, mlp = shape["width"], shape["mlp_width"]
    queries, keys = (shape[heads] * shape["head_width"] for heads in ("heads", "kv_heads"))
    matrices = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (mlp, width),
        "ffn_up": (mlp, width),
        "ffn_down": (width, mlp),
    }
    tensors = {"token_embd": (shape["vocab_size"], width), "output_norm": (width,)}
    for layer in range(shape["layers"]):
        tensors |= {f"blk.{layer}.{name}": size for name, size in matrices.items()}
        tensors |= {f"blk.{layer}.{name}_norm": (width,) for name in ("attn", "ffn")}
    for name, size in tensors.items():
        values = np.ones(size) if len(size) == 1 else rng.normal(0, 0.02, size)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(args: argparse.Namespace, work: dict[str, typing.Any]) -> dict[int, float]:
    """Rows -> sampled tokens per second of llama.cpp's parallel slots, prompts included in the time."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.gguf"
        write_gguf(path, work["shape"])
        slots = max(work["equal_rows"]) * (PROMPT + NEW)
        command = [args.llama_bench, "-m", str(path), "-c", str(slots), "-ctk", "f32", "-ctv", "f32"]
        command += ["-t", str(args.threads), "-npp", str(PROMPT), "-ntg", str(NEW), "--output-format", "jsonl"]
        command += ["-npl", ",".join(map(str, work["equal_rows"]))]
        runs = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(args.repeats)]
    rates: dict[int, float] = {}
    for line in (json.loads(line) for run in runs for line in run.stdout.splitlines() if line.startswith("{")):
        rows = line["pl"]
        rates[rows] = max(rates.get(rows, 0.0), rows * NEW / (line["t_pp"] + line["t_tg"]))
    return rates


def parse() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = dict(problems=100, rows=64, workers=2, steps=32, slots=2048, repeats=3, threads=os.cpu_count())
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--equal-rows", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--peer", default="", help="python of an environment with torch and transformers")
    parser.add_argument("--llama-bench", default="", help="llama.cpp's program llama-batched-bench")
    parser.add_argument("--serve-peer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    figures, work = ours(args)
    if args.peer:
        figures["peer"] = peer(args, work)
        figures["over_peer"] = figures["refill"]["tokens_per_s"] / figures["peer"]["rollouts_tokens_per_s"]
    if args.llama_bench:
        figures["llama_cpp_equal_tokens_per_s"] = llama_cpp(args, work)
    print(json.dumps(figures, default=float))


if __name__ == "__main__":
    arguments = parse()
    if arguments.serve_peer:
        serve_peer(arguments)
    else:
        main(arguments)

"""Training throughput: forward, backward and AdamW, against the same Llama in PyTorch + transformers.

Ours is the project's own `train_step` with the SFT loss, on one device. The
peer is LlamaForCausalLM (sdpa attention, float32, `--threads` threads) with
torch.optim.AdamW, in a process of its own, on one segment per row. Both add up
gradients over micro-batches of `--micro` rows, and take turns step by step, so
that a busy machine is busy for both; medians are reported, and the ratio is the
median of the ratios.
"dense" rows hold one segment each, "packed" rows segments of lognormal length
with a mean of about 110.

Prints as its last line one JSON object. CPU seconds (user and system) per step
are there as well: they are the steadier figure on a shared machine.

Run from the root: python -m benchmarks.train
     python -m benchmarks.train --peer=PYTHON  # one with torch and transformers
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one step cost."""

    wall: float  # seconds
    cpu: float  # seconds over all threads of the process


def timed(step: Callable[[], object]) -> Timing:
    """Runs a step and measures it."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def ours(args: argparse.Namespace, packed: bool) -> Callable[[], object]:
    """Our train step as a function without arguments, compiled and warm."""
    import jax
    import numpy as np

    import model
    import packing
    import sft
    import train_state

    config = model.ModelConfig(
        vocab_size=args.vocab,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.heads,
        head_width=args.width // args.heads,
        mlp_width=args.mlp,
        context=args.tokens,
        rope_theta=10000.0,
        tied=True,
        dtype="float32",
    )
    mesh = train_state.make_mesh(data=1, fsdp=1, tensor=1)
    settings = train_state.OptimizerConfig("adam", 1e-3, 1e-4, 1, 1000, 0.1, 1.0, 0.9, 0.95, 0.0)
    optimizer = train_state.make_optimizer(settings)
    decoder = model.Decoder(config)
    step = train_state.make_train_step(decoder, optimizer, sft.sft_loss, mesh)
    state = train_state.state_from_key(decoder, optimizer, mesh, jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (args.rows // args.micro, args.micro, args.tokens)
    ends = [segment_ends(rng, args.tokens, packed) for _ in range(args.rows)]
    until = np.reshape([np.repeat(e, np.diff(e, prepend=0)) for e in ends], shape)
    starts = np.reshape([np.repeat([0, *e[:-1]], np.diff(e, prepend=0)) for e in ends], shape)
    batch = packing.TokenBatch(
        tokens=rng.integers(0, args.vocab, shape, dtype=np.int32),
        positions=(np.arange(args.tokens) - starts).astype(np.int32),
        until=until.astype(np.int32),
        sampled=np.ones(shape, bool),
        weight=np.full(shape, 1 / (args.rows * args.tokens), np.float32),
        **{name: np.zeros(shape, np.float32) for name in ("kl_weight", "advantage", "old_logp", "ref_logp")},
    )

    def run() -> None:
        nonlocal state
        state, metrics, _ = step(state, batch)
        jax.block_until_ready((state, metrics))

    run()
    return run


def segment_ends(rng, tokens: int, packed: bool) -> list[int]:
    """Ends of a row's segments: the row's own, or those of lognormal lengths."""
    ends = [0]
    while packed and ends[-1] < tokens:
        ends.append(ends[-1] + max(20, int(rng.lognormal(4.55, 0.55))))
    return [*(end for end in ends if 0 < end < tokens), tokens]


def peer_step(
    shape: dict[str, int], rows: int, micro: int, tied: bool, device: str = "cpu", compiled: bool = False
) -> Callable[[], object]:
    """A training step of the same Llama in PyTorch, one segment per row; on "cuda" in bfloat16 with fused AdamW.

    `shape` holds vocab_size, width, layers, heads, kv_heads, mlp_width and context.
    """
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    llama = transformers.LlamaForCausalLM(config).float().train().to(device)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3, fused=device == "cuda")
    tokens = torch.randint(0, shape["vocab_size"], (rows, shape["context"]), device=device)
    forward = torch.compile(llama) if compiled else llama

    def step() -> None:
        optimizer.zero_grad()
        for part in tokens.split(micro):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = forward(input_ids=part, labels=part, use_cache=False).loss
            (loss * len(part) / rows).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    return step


def serve_peer(args: argparse.Namespace) -> None:
    """Runs in the peer's python: one training step, and one line with its timing, per line of input."""
    import torch

    torch.set_num_threads(args.threads)
    heads = {"heads": args.heads, "kv_heads": args.heads}
    shape = {"vocab_size": args.vocab, "width": args.width, "layers": args.layers, "mlp_width": args.mlp, **heads}
    step = peer_step({**shape, "context": args.tokens}, args.rows, args.micro, tied=True)
    for _ in sys.stdin:
        print(json.dumps(dataclasses.asdict(timed(step))), flush=True)


def peer(args: argparse.Namespace) -> Iterator[Timing]:
    """Timings of the peer, a step per item; its process ends with the iterator."""
    command = [args.peer, str(pathlib.Path(__file__).resolve()), "--serve-peer", *sys.argv[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout
        try:
            while True:
                print("step", file=process.stdin, flush=True)
                yield Timing(**json.loads(process.stdout.readline()))
        finally:
            process.stdin.close()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Interleaved steps of every contender; tokens per second, CPU seconds per step and ratios to the peer."""
    contenders: dict[str, Callable[[], Timing]] = {}
    for name in ("dense", "packed"):
        contenders[name] = functools.partial(timed, ours(args, packed=name == "packed"))
    if args.peer:
        contenders["peer"] = peer(args).__next__
        contenders["peer"]()
    timings = collections.defaultdict(list)
    for _ in range(args.repeats):
        for name, take in contenders.items():
            timings[name].append(take())
    figures = {}
    for name, taken in timings.items():
        figures[f"{name}_tokens_per_s"] = args.rows * args.tokens / statistics.median(t.wall for t in taken)
        figures[f"{name}_cpu_s"] = statistics.median(t.cpu for t in taken)
        if args.peer and name != "peer":
            pairs = list(zip(timings["peer"], taken, strict=True))
            figures[f"{name}_ratio"] = statistics.median(theirs.wall / our.wall for theirs, our in pairs)
            figures[f"{name}_cpu_ratio"] = statistics.median(theirs.cpu / our.cpu for theirs, our in pairs)
    return {name: round(value, 3) for name, value in figures.items()}


def parse() -> argparse.Namespace:
    """Flags; the defaults are the laptop preset's model with a vocabulary of 600, and more rows than it trains on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = dict(rows=16, micro=4, tokens=512, vocab=600, width=128, layers=4, heads=2, mlp=352, repeats=9)
    for name, value in {**shape, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer", default="", help="python of an environment with torch and transformers")
    parser.add_argument("--serve-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows % args.micro or args.width % args.heads:
        parser.error("--micro must divide --rows, and --heads must divide --width")
    return args


if __name__ == "__main__":
    arguments = parse()
    if arguments.serve_peer:
        serve_peer(arguments)
    else:
        print(json.dumps(measure(arguments)))

"""What the recipes of SoS, SoS+ and APR share: for each preset the problems, the model, the schedule and the sampler.

`recipe(method, preset, ...)` is the configuration of one method at one preset. Every field is read somewhere, and a
hyper-parameter that is not here does not exist. Override any field on the command line: --config.model.width=256.
"""

from typing import Any

from ml_collections import ConfigDict

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # A run of under a minute through the whole path, for tests: 3 small numbers, a tiny model.
    "smoke": dict(
        problems=dict(count=3, low=1, high=9, target_low=10, target_high=20),
        model=dict(width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=64, context=512),
        train=dict(rows=4, micro_rows=2, log_every=1, eval_every=10, eval_problems=8),
        optimizer=dict(steps=20, learning_rate=3e-3, warmup_steps=5),
        sampler=dict(rows=16, workers=2, max_gathered_slots=8192),
        evaluation=dict(problems=16),
    ),
    # Two CPU cores, half an hour: 3 numbers to 20, about 1M parameters.
    "laptop": dict(
        problems=dict(count=3, low=1, high=20, target_low=10, target_high=50),
        model=dict(width=128, layers=4, heads=2, kv_heads=2, head_width=64, mlp_width=352, context=512),
        train=dict(rows=4, micro_rows=2, log_every=70, eval_every=1750, eval_problems=905),  # all there are
        optimizer=dict(steps=7000, learning_rate=1.5e-3, warmup_steps=60),
        sampler=dict(rows=128, workers=2, max_gathered_slots=2048),
        evaluation=dict(problems=865),  # there are no more
    ),
    # Two CPU cores, two hours: 4 numbers to 12. Searches of this size overflow a context of 1,024.
    "desktop": dict(
        problems=dict(count=4, low=1, high=12, target_low=10, target_high=24),
        model=dict(width=128, layers=4, heads=2, kv_heads=2, head_width=64, mlp_width=352, context=1024),
        train=dict(rows=4, micro_rows=2, log_every=60, eval_every=1500, eval_problems=200),
        optimizer=dict(steps=6000, learning_rate=1.5e-3, warmup_steps=100),
        sampler=dict(rows=128, workers=2, max_gathered_slots=2048),
        evaluation=dict(problems=1000),
    ),
    # One GPU of the 80 GB class: the paper's problems, tens of millions of parameters.
    "gpu": dict(
        problems=dict(count=4, low=1, high=99, target_low=10, target_high=100),
        model=dict(width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1376, context=2048),
        train=dict(rows=64, micro_rows=64, log_every=80, eval_every=1000, eval_problems=500),
        optimizer=dict(steps=8000, learning_rate=1e-3, warmup_steps=400),
        sampler=dict(rows=512, workers=1, max_gathered_slots=512 * 2048),
        evaluation=dict(problems=1000),
    ),
    # The paper: 228M parameters, on a mesh of accelerators.
    "paper": dict(
        problems=dict(count=4, low=1, high=99, target_low=10, target_high=100),
        model=dict(width=1024, layers=18, heads=16, kv_heads=16, head_width=64, mlp_width=2752, context=4096),
        train=dict(rows=1024, micro_rows=8, log_every=190, eval_every=1000, eval_problems=1000),
        optimizer=dict(steps=19_000, learning_rate=5e-5, warmup_steps=1000),
        sampler=dict(rows=256, workers=1, max_gathered_slots=256 * 4096),
        evaluation=dict(problems=1000),
    ),
}
EXPLORING = ("laptop", "desktop")  # whose APR explores every operation; the rows of smoke are too short
LARGE = ("gpu", "paper")  # presets of the paper's problems, for accelerators
MESH = dict(data=-1, fsdp=1, tensor=1)  # devices per axis; -1: all that are left
BUDGET = dict(children=-1, tokens=-1)  # budget that prompts of rollouts state (`budget_fraction`); -1 is none
LIMITS = dict(
    children=16,  # per spawn
    spawns=16,  # per thread
    depth=1,  # of nesting
    thread_tokens=4096,
    rollout_tokens=65536,
    forced_answer_tokens=0,  # budget forcing: more tokens for the answer of a root that reached thread_tokens
    min_budget_rounds=0,  # budget forcing: times that a root which gives up must continue
)


def choose(presets: dict[str, Any], preset: str) -> Any:
    """The values of a preset. Raises ValueError on an unknown one."""
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(presets)}")
    return presets[preset]


def evaluation(preset: str) -> dict[str, Any]:
    """How a preset evaluates."""
    return dict(
        problems=PRESETS[preset]["evaluation"]["problems"],  # held out
        samples=1,  # rollouts of each problem, for pass@k and cons@k
        concurrent=0,  # rollouts that start together, when the ones before are done: 1 measures latency, 0 is all
        seed=0,  # of the draws; the problems are always the same
        split="heldout",  # or "unseen": problems of the targets that problems.unseen_targets keeps from training
    )


def buckets(preset: str) -> dict[str, Any]:
    """Sizes of the sampler's calls: compiling is dear on an accelerator and in short runs, computing on a CPU."""
    context = PRESETS[preset]["model"]["context"]
    if preset == "smoke":
        return dict(buckets="coarse", length_bucket=context)
    if preset in LARGE:
        return dict(buckets="coarse", length_bucket=context // 2)
    return dict(buckets="fine", length_bucket=64)


def recipe(method: str, preset: str, beam_high: int, sub_beam_high: int, spawn_probability: float) -> ConfigDict:
    """The configuration of one method at one preset. Raises ValueError on an unknown preset."""
    p = choose(PRESETS, preset)
    config = dict(
        name=method if preset == "laptop" else f"{method}-{preset}",
        task="countdown",
        seed=0,
        # Run whose parameters to start from; empty: random ones. Desktop has laptop's model and longer searches.
        init=f"{'pretrained' if method in ('sosp', 'apr') else 'runs'}/{method}" if preset == "desktop" else "",
        problems=dict(**p["problems"], unseen_targets=0.0),  # share of targets in none of the splits but "unseen"
        demonstrator=demonstrator(method, preset, beam_high, sub_beam_high, spawn_probability),
        number_limit=10 if preset in LARGE else 500,  # numbers below are one token; 10 means digit by digit
        model=dict(
            **p["model"],
            rope_theta=10_000.0 if preset in LARGE else 500.0,
            tied=preset not in LARGE,  # Llama 2's head is its own
            dtype="bfloat16" if preset in LARGE else "float32",
            attention="blocks",  # or "pallas": a kernel for one GPU (docs/hardware.md)
            scan_layers=preset in LARGE,  # a loop over layers: compiling is dear on an accelerator, running on a CPU
        ),
        train=dict(
            **p["train"],  # micro_rows: most rows per forward pass of a device; on a CPU few rows stay in its cache
            overlong="drop",  # demonstrations that do not fit the context: "drop" or "cut"
            feeders=8 if preset in LARGE else 0,  # processes that make demonstrations ahead, beside the one that trains
        ),
        optimizer=dict(
            **p["optimizer"],
            matrices="adam" if preset == "paper" else "muon",  # the rest always uses Adam
            end_learning_rate=p["optimizer"]["learning_rate"] / 100,
            weight_decay=0.01 if preset in LARGE else 0.1,
            clip=1.0,
            beta1=0.9,
            beta2=0.999 if preset == "paper" else 0.99,
            momentum=0.95,  # of Muon
            embedding_multiplier=1.0 if preset in LARGE else 4.0,  # beside Muon: rate of embeddings and norms
        ),
        threads=dict(
            child_returns="path",  # what a child returns: the path it found, or "text", all it wrote
            inherit_context=False,  # whether a child sees what its parent saw
        ),
        budget=BUDGET,
        limits=LIMITS,
        # rows: over all workers; workers: samplers at work at once, on a CPU one per core
        sampler=dict(**p["sampler"], **buckets(preset), steps_per_call=32, temperature=0.0, top_k=0, top_p=1.0),
        evaluation=evaluation(preset),
        mesh=MESH,
    )
    return ConfigDict(config).lock()


def demonstrator(
    method: str, preset: str, beam_high: int, sub_beam_high: int, spawn_probability: float
) -> dict[str, Any]:
    """How demonstrations are made. Every field here seeds them."""
    searched = method in ("sosp", "apr")
    explores = method == "apr" and preset in EXPLORING  # SoS+ learns less from such searches (docs/results.md)
    return dict(
        method=method,
        beam_low=1,
        # Small models: the widest beam alone, so that a demonstration holds nothing that cannot be predicted.
        beam_low_without_budget=1 if preset in LARGE else beam_high,
        beam_high=beam_high,
        sub_beam_high=sub_beam_high,  # APR's children draw theirs from beam..sub_beam_high
        spawn_probability=spawn_probability,  # that an expanded node is judged promising
        budget_fraction=0.5 if searched else 0.0,  # share that states its budget in the prompt
        token_bin={"desktop": 128}.get(preset, 512 if preset in LARGE else 64),  # of SoS+'s budget: context / 8
        prune=preset not in LARGE,  # repeated states, and what costs more than the target; the paper prunes nothing
        heuristic="near" if explores else "paper" if preset in LARGE else "total",  # which children are best
        cost_limit=5 if explores else -1,  # explore all and keep what is near: a model then judges what it sees
        order="fixed",  # in which children are listed: of generation; "random" is the paper's
        depth=1,  # levels of threads below the root's (APR), at most limits.depth; the paper has one
        spawn_when="coin",  # or "large": a node is promising if its children have three or more numbers left
        unjoined=-1,  # most children that run while APR's parent lists others; -1, the paper's: it waits for all
    )

"""The parts that the recipes of SoS, SoS+ and APR share: problem families, model sizes, schedules.

A recipe is `recipe(method, preset)`; `configs/apr.py` and its siblings only say
what is particular to their method. Every field is read somewhere, and a
hyper-parameter that is not here does not exist.
"""

from ml_collections import ConfigDict

# Preset -> numbers per problem, their range, the targets' range, and the widest beam of a demonstration.
FAMILIES = {
    "smoke": dict(count=3, low=1, high=9, target_low=10, target_high=20),
    "laptop": dict(count=3, low=1, high=20, target_low=10, target_high=50),
    "desktop": dict(count=4, low=1, high=12, target_low=10, target_high=24),
    "gpu": dict(count=4, low=1, high=99, target_low=10, target_high=100),
    "paper": dict(count=4, low=1, high=99, target_low=10, target_high=100),
}
MODELS = {
    "smoke": dict(width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=64, context=512),
    "laptop": dict(width=128, layers=4, heads=2, kv_heads=2, head_width=64, mlp_width=352, context=512),
    "desktop": dict(width=128, layers=4, heads=2, kv_heads=2, head_width=64, mlp_width=352, context=1024),
    "gpu": dict(width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1376, context=2048),
    "paper": dict(width=1024, layers=18, heads=16, kv_heads=16, head_width=64, mlp_width=2752, context=4096),
}
# Preset -> updates, packed rows per update and per forward pass of a device, peak rate, warm-up, held-out evaluations.
TRAINING = {
    "smoke": (20, 4, 2, 3e-3, 5, 10, 8),
    "laptop": (7000, 4, 2, 3e-3, 60, 500, 200),
    "desktop": (6000, 4, 2, 1.5e-3, 100, 1500, 200),
    "gpu": (8000, 64, 64, 1e-3, 400, 1000, 500),
    "paper": (19000, 1024, 8, 5e-5, 1000, 1000, 1000),
}
# Preset -> threads decoded side by side, lanes they are spread over (on a CPU one per core), and history slots
# (rows x length) per device call: all, but on a CPU.
SAMPLING = {
    "smoke": (16, 2, 8192),
    "laptop": (128, 2, 2048),
    "desktop": (128, 2, 2048),
    "gpu": (512, 1, 512 * 2048),
    "paper": (256, 1, 256 * 4096),
}
PRESETS = tuple(FAMILIES)
MESH = dict(data=-1, fsdp=1, tensor=1)  # devices per axis; -1: all that are left
LIMITS = dict(
    children=16,  # per spawn
    spawns=16,  # per thread
    depth=1,  # of nesting
    thread_tokens=4096,
    rollout_tokens=65536,
    answer_tokens=0,  # budget forcing: more tokens for the answer of a root that reached thread_tokens
    extensions=0,  # budget forcing: times that a root which gives up is sent on
)


def evaluation(preset: str) -> dict[str, int]:
    """How a preset evaluates."""
    return dict(
        problems={"smoke": 16, "laptop": 865}.get(preset, 1000),  # held out; laptop has no more
        samples=1,  # rollouts of each problem, for pass@k and cons@k
        concurrent=0,  # rollouts in flight: 1 measures latency, 0 is all
        seed=0,  # of the draws; the problems are always the same
    )


def recipe(method: str, preset: str, beam_high: int, sub_beam_high: int, spawn_probability: float) -> ConfigDict:
    """The configuration of one method at one preset. Raises ValueError on an unknown preset."""
    small = preset in ("smoke", "laptop", "desktop")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    steps, rows, micro_rows, learning_rate, warmup_steps, eval_every, eval_problems = TRAINING[preset]
    rollout_rows, lanes, view = SAMPLING[preset]
    config = ConfigDict(
        dict(
            name=method if preset == "laptop" else f"{method}-{preset}",
            seed=0,
            # Run whose parameters to start from; empty: random ones. Desktop has laptop's model and longer searches.
            init=f"pretrained/{method}" if preset == "desktop" else "",
            problems=FAMILIES[preset],
            demonstrator=dict(
                method=method,
                # A beam of 1 hands nothing out; a small model has no time for it.
                beam_low=2 if small else 1,
                beam_high=beam_high,
                sub_beam_high=sub_beam_high,  # APR's children draw theirs from beam..sub_beam_high
                spawn_probability=spawn_probability,  # that an expanded node is judged promising
                condition=0.0 if method == "sos" else 0.5,  # share that states its budget in the prompt
                # Granularity of SoS+'s token budget: an eighth of the context.
                token_bin={"smoke": 64, "laptop": 64, "desktop": 128}.get(preset, 512),
                order="fixed",  # in which children are listed: of generation; "random" is the paper's
            ),
            # Numbers below the limit are one token each; 10 means digit by digit.
            number_limit=10 if preset in ("gpu", "paper") else 500,
            model=dict(**MODELS[preset], rope_theta=10_000.0, tied=True, temperature=1.0, dtype="float32"),
            train=dict(
                rows=rows,  # per update: a row is packed with threads up to model.context
                micro_rows=micro_rows,  # most rows per forward pass on a device; on a CPU few rows stay in its cache
                overlong="drop",  # demonstrations that do not fit the context: "drop" or "cut"
                log_every=max(1, steps // 100),
                eval_every=eval_every,  # also checkpoints
                eval_problems=eval_problems,  # validation problems of an evaluation during training
            ),
            optimizer=dict(
                matrices="adam" if preset == "paper" else "muon",  # the rest is always Adam's
                learning_rate=learning_rate,
                end_learning_rate=learning_rate / 100,
                warmup_steps=warmup_steps,
                steps=steps,
                weight_decay=0.01,
                clip=1.0,
                beta1=0.9,
                beta2=0.99,
                momentum=0.95,  # of Muon
            ),
            threads=dict(
                join="path",  # what a child hands over: the path it found, or "text", all it wrote
                inherit=False,  # whether a child sees what its parent saw
            ),
            prompt=dict(sub_calls=-1, tokens=-1),  # budget that rollouts are told of (`condition`); -1 is none
            limits=LIMITS,
            sampler=dict(
                rows=rollout_rows,  # over all lanes
                lanes=lanes,  # samplers at work at once, a thread of the host each
                burst=32,
                bucket=64,
                view=view,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
            ),
            evaluation=evaluation(preset),
            mesh=MESH,
        )
    )
    if preset in ("gpu", "paper"):
        config.model.dtype, config.model.tied = "bfloat16", False  # Llama 2's head is its own
    if preset == "paper":
        config.optimizer.beta2 = 0.999
    return config.lock()

"""GRPO from a supervised run: how widely to spawn is learned from the reward alone.

    python grpo.py                                    # preset laptop, from runs/apr or the shipped run
    python grpo.py --config=configs/grpo.py:PRESET    # smoke, laptop, desktop, gpu, paper: from apr-PRESET
    python grpo.py --config.grpo.advantage=mean       # Dr.GRPO's, and so on

Time: laptop about 20 minutes on 2 CPU cores. Expected score: see README.

Each section is laid over the same section of the supervised run, field by field. Problems, model and the method of
the demonstrations come from there.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import BUDGET, LIMITS, MESH, buckets, choose, evaluation

PAPERS: dict[str, Any] = dict(temperature=1.0, aggregate="call", dead_groups="keep")
# Groups without a signal would cost a CPU as much time as others. The temperature is one at which a rollout fails now
# and then: at 0.5 most groups of the supervised `laptop` model are right throughout.
SMALL: dict[str, Any] = dict(aggregate="token", dead_groups="drop")
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": dict(
        grpo=dict(PAPERS, steps=2, problems=4, rollouts=2, updates=1),
        optimizer=dict(learning_rate=1e-4),
        train=dict(eval_every=1, eval_problems=8),
        sampler=dict(rows=16, temperature=0.0),
    ),
    "laptop": dict(
        grpo=dict(SMALL, temperature=1.0, steps=100, problems=16, rollouts=8, updates=1),
        optimizer=dict(learning_rate=1e-4),
        train=dict(eval_every=25, eval_problems=400),
        # Measured where the policy samples. Greedy, the supervised run is near its demonstrator already.
        sampler=dict(rows=128, temperature=1.0),
    ),
    "desktop": dict(
        grpo=dict(SMALL, temperature=0.5, steps=60, problems=8, rollouts=8, updates=1),
        optimizer=dict(learning_rate=1e-4),
        train=dict(eval_every=20, eval_problems=200),
        # What 60 steps teach shows where the policy samples, not yet in its most likely tokens.
        sampler=dict(rows=128, temperature=0.5),
    ),
    "gpu": dict(
        grpo=dict(PAPERS, steps=150, problems=64, rollouts=8, updates=2),
        optimizer=dict(learning_rate=2e-5),
        train=dict(eval_every=25, eval_problems=200),
        sampler=dict(rows=512, temperature=0.0),
    ),
    "paper": dict(
        grpo=dict(PAPERS, steps=150, problems=64, rollouts=5, updates=2),
        optimizer=dict(learning_rate=1e-5),
        train=dict(eval_every=25, eval_problems=200),
        sampler=dict(rows=256, temperature=0.0),
    ),
}
SWITCHES: dict[str, Any] = dict(  # of the objective, alike in all presets
    advantage="std",  # "std", "mean" (Dr.GRPO) or "leave_one_out" (RLOO)
    clip_low=0.2,
    clip_high=0.2,  # larger than clip_low: clip-higher (DAPO)
    kl_estimator="k3",  # towards the starting policy: "k1", "k2" or "k3"
    kl_weight=0.001,  # paper: 0.001 for APR, 0.01 for SoS+
    rollout_constant=512.0,  # ids that the aggregate "rollout" divides by
    old_logp="sampler",  # or "trainer": whose log-probs the ratio compares with
    tis_cap=0.0,  # with "trainer": weights min(trainer / sampler, cap); 0 is off
    format_reward=0.0,  # of a wrong answer that can be read (TinyZero: 0.1)
    acceleration=0.0,  # bonus for parallelism, if correct (ThreadWeaver: 0.5)
    acceleration_cap=0.2,
    thread_penalty=0.0,  # per child thread
    token_penalty=0.0,  # per sampled token beyond free_tokens
    free_tokens=4096.0,
    concurrency=0.0,  # bonus for mean active workers, up to concurrency_cap of them, if correct (AsyncThink)
    concurrency_cap=2.0,
    structure=0.0,  # bonus for having spawned at all
    structure_schedule="always",  # in a share of the steps "alternate" (Parallel-R1), or "anneal" over them (PARL)
    structure_share=0.2,
    loss="clip",  # or "apa" (Stream of Search; kl_weight=0 with it)
    apa_lambda=0.5,  # how far an advantage of 1 moves a log-prob
    reference="start",  # or "flat": the policy, once the reward of eval_every steps no longer rises
    credit="all",  # threads that are trained on; "parent" freezes children (PARL)
)


def get_config(preset: str = "laptop") -> ConfigDict:
    """The recipe of one preset. Raises ValueError on an unknown one."""
    p = choose(PRESETS, preset)
    p = {**p, "sampler": {**p["sampler"], **buckets(preset)}}
    return overlay("" if preset == "laptop" else f"-{preset}", p, evaluation(preset), BUDGET)


def overlay(suffix: str, p: dict[str, Any], evaluation: dict[str, Any], budget: dict[str, Any]) -> ConfigDict:
    """The sections of an RL recipe."""
    rate = p["optimizer"]["learning_rate"]
    config = dict(
        name="grpo",
        suffix=suffix,  # of runs of this preset
        seed=0,
        # steps; problems per step; rollouts per problem (the group); inner updates per step; temperature of the policy;
        # aggregate "call" (paper), "token", "rollout" or "thread"; dead_groups (of equal rewards) "keep", "drop" or
        # "refill"
        grpo=dict(**p["grpo"], **SWITCHES),
        optimizer=dict(  # its steps are grpo.steps x grpo.updates
            matrices="adam",
            learning_rate=rate,
            end_learning_rate=rate / 10,
            warmup_steps=0,
            weight_decay=0.0,
            clip=1.0,
            beta1=0.9,
            beta2=0.99,
            momentum=0.0,  # of Muon, which is not used
        ),
        train=dict(p["train"], log_every=1),
        budget=budget,
        limits=LIMITS,
        # temperature: of validation and evaluation; 0 is greedy. Rollouts come from the policy: no top-k, no top-p.
        sampler=dict(**p["sampler"], top_k=0, top_p=1.0),
        mesh=MESH,
        evaluation=evaluation,
    )
    return ConfigDict(config).lock()

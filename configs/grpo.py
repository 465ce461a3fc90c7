"""GRPO from a supervised run: how widely to spawn is learned from the reward alone.

    python grpo.py                                    # preset laptop, from runs/apr or the shipped run
    python grpo.py --config=configs/grpo.py:PRESET    # smoke, laptop, desktop, gpu, paper: from apr-PRESET
    python grpo.py --config.grpo.advantage=mean       # Dr.GRPO's, and so on

Problems, model and demonstrations' method come from the supervised run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import LIMITS, MESH, evaluation

PAPERS: dict[str, Any] = dict(temperature=1.0, aggregate="call", dead_groups="keep", eval_temperature=0.0)
# A small model slips so often at temperature 1 (0.43 right; at 0.5 it is 0.63) that the reward says little about how
# it searched; and groups without a signal would cost it as much time as others.
SMALL: dict[str, Any] = dict(temperature=0.5, aggregate="token", dead_groups="drop", eval_temperature=0.0)
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(PAPERS, steps=2, problems=4, rollouts=2, updates=1, learning_rate=1e-4, eval_every=1, rows=16),
    "laptop": dict(SMALL, steps=200, problems=16, rollouts=8, updates=1, learning_rate=1e-4, eval_every=25, rows=128),
    # What 60 steps teach shows where the policy draws, not yet in its most likely tokens.
    "desktop": dict(
        SMALL, steps=60, problems=8, rollouts=8, updates=1, learning_rate=1e-4, eval_every=20, rows=128,
        eval_temperature=1.0,
    ),
    "gpu": dict(PAPERS, steps=150, problems=64, rollouts=8, updates=2, learning_rate=2e-5, eval_every=25, rows=512),
    "paper": dict(PAPERS, steps=150, problems=64, rollouts=5, updates=2, learning_rate=1e-5, eval_every=25, rows=256),
}


def get_config(preset: str = "laptop") -> ConfigDict:
    """The recipe of one preset. Raises ValueError on an unknown one."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    p = PRESETS[preset]
    return ConfigDict(
        dict(
            name="grpo",
            suffix="" if preset == "laptop" else f"-{preset}",  # of runs of this preset
            seed=0,
            grpo=dict(
                steps=p["steps"],
                problems=p["problems"],  # per step
                rollouts=p["rollouts"],  # per problem: the group
                updates=p["updates"],  # inner updates per step
                temperature=p["temperature"],  # of the policy: logits are divided by it
                advantage="std",  # "std", "mean" (Dr.GRPO) or "leave_one_out" (RLOO)
                clip_low=0.2,
                clip_high=0.2,  # larger than clip_low: clip-higher (DAPO)
                kl_estimator="k3",  # towards the starting policy: "k1", "k2" or "k3"
                kl_weight=0.001,  # paper: 0.001 for APR, 0.01 for SoS+
                aggregate=p["aggregate"],  # "call" (paper), "token" or "rollout"
                rollout_constant=512.0,  # ids that "rollout" divides by
                old_logp="sampler",  # or "trainer": whose log-probs the ratio compares with
                importance_cap=0.0,  # with "trainer": weights min(trainer / sampler, cap); 0 is off
                dead_groups=p["dead_groups"],  # groups of equal rewards: "keep", "drop" or "refill"
                acceleration=0.0,  # bonus for parallelism, if correct (ThreadWeaver: 0.5)
                acceleration_cap=0.2,
                thread_penalty=0.0,  # per child thread
                token_penalty=0.0,  # per sampled token beyond token_budget
                token_budget=4096.0,
                eval_every=p["eval_every"],  # also checkpoints
            ),
            optimizer=dict(  # its steps are grpo.steps x grpo.updates
                matrices="adam",
                learning_rate=p["learning_rate"],
                end_learning_rate=p["learning_rate"] / 10,
                warmup_steps=0,
                weight_decay=0.0,
                clip=1.0,
                beta1=0.9,
                beta2=0.99,
                momentum=0.0,  # of Muon, which is not used
            ),
            prompt=dict(sub_calls=-1, tokens=-1),  # budget that rollouts are told of; -1 is none
            limits=LIMITS,
            mesh=MESH,
            rows=p["rows"],  # of the sampler
            eval_problems=8 if preset == "smoke" else 200,
            eval_temperature=p["eval_temperature"],  # 0: greedy, 1: as the policy draws
            evaluation=evaluation(preset),
        )
    ).lock()

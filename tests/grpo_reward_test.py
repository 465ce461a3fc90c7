"""GRPO through the real sampler and runtime: on a tiny task the reward rises from chance to nearly certain."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

import grpo
from examples import products
from harness import tasks
from harness.build import build
from harness.reference import Reference
from harness.rollouts import RolloutPool
from protocols import Domain, Spawn
from records import END, Grade
from train_state import init_params, state_from_params

END_ID, SPAWN_ID, WANTED = 1, 2, 5


class Letters:
    """The answer is right if the last sampled id before the end is `WANTED`."""

    end_id, spawn_id = END_ID, SPAWN_ID

    def prompt(self, problem):
        return [3, 4 + problem % 4]

    def spawn(self, ids) -> Spawn:
        return Spawn(len(ids) - 1, [[6]])

    def join(self, children):
        return [7]

    def grade(self, problem, root) -> Grade:
        right = root.stop == END and root.ids()[-2:] == [WANTED, END_ID]
        return Grade(right, "" if right else "other letters")


class LettersDomain(Domain):
    """Eight ids, numbered problems."""

    task = Letters()

    class language:
        vocab_size = 8

    def __init__(self, config: ConfigDict) -> None:
        pass

    def problem(self, split, seed, index):
        return index

    def problems(self, split, n):
        return list(range(n))


def test_the_reward_rises_on_a_tiny_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "letters", tasks.Entry("tests.grpo_reward_test:LettersDomain"))
    config, rl = products.get_config(), products.get_config("grpo")
    with config.unlocked():
        config.task, config.grpo = "letters", rl.grpo
    config.update_from_flattened_dict(
        {
            "mesh.data": 1, "model.width": 16, "model.layers": 1, "model.heads": 1, "model.kv_heads": 1,
            "model.head_width": 16, "model.mlp_width": 32, "model.context": 16, "limits.thread_tokens": 6,
            "sampler.rows": 64, "sampler.workers": 1, "sampler.length_bucket": 16, "train.micro_rows": 16,
            "grpo.problems": 8, "grpo.rollouts": 8, "grpo.kl_weight": 0.0, "grpo.dead_groups": "drop",
            "optimizer.matrices": "adam", "optimizer.learning_rate": 2e-2, "optimizer.warmup_steps": 0,
        }
    )
    pool = RolloutPool(build(config))
    params = init_params(pool.parts.model, jax.random.key(0))
    trainer = grpo.Trainer(pool, Reference(params))
    state = state_from_params(pool.parts.optimizer, pool.parts.mesh, jax.device_get(params))
    rewards = []
    for step in range(1, 26):
        state, values = trainer.step(state, step)
        rewards.append(values["reward"])
    assert sum(rewards[:2]) / 2 < 0.4 and sum(rewards[-3:]) / 3 > 0.9, rewards

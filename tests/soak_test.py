"""Many steps of reinforcement learning: no growth, no compilation, no slow-down after the first ones (slow tier).

`STEPS=200 python -m pytest -m slow tests/soak_test.py` takes 200 steps where the default is 1,000.
"""

import os
import pathlib
import statistics
import time

import jax
import pytest

import grpo
from harness.build import build
from harness.rollouts import RolloutPool
from tests.grpo_train_test import rl_config
from train_state import init_params, state_from_params

STEPS = int(os.environ.get("STEPS", "1000"))


@pytest.mark.slow
def test_a_thousand_steps_leave_memory_and_compiled_functions_as_they_are():
    config = rl_config(grpo__steps=STEPS, grpo__thread_penalty=0.01, grpo__token_penalty=0.01)
    pool = RolloutPool(build(config))
    trainer = grpo.Trainer(pool, init_params(pool.parts.model, jax.random.key(0)))
    state = state_from_params(pool.parts.optimizer, pool.parts.mesh, trainer.reference.params)
    trainer.reference.params = jax.tree.map(lambda leaf: leaf.copy(), state.params)
    compiled: list[int] = []
    seconds: list[float] = []
    memory: list[int] = []
    step = 0
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(step) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    for step in range(1, STEPS + 1):
        began = time.process_time()
        state, _ = trainer.step(state, step)
        seconds.append(time.process_time() - began)
        memory.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
    quarter = STEPS // 4
    print(f"memory {memory[quarter] / 2**20:.1f} MB, then {memory[-1] / 2**20:.1f}; last compiled at step {max(compiled)}")
    assert compiled and max(compiled) <= quarter
    assert memory[-1] < 1.01 * memory[quarter]
    assert statistics.median(seconds[-quarter:]) < 1.1 * statistics.median(seconds[quarter : 2 * quarter])

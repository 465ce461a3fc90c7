"""Many steps of reinforcement learning: no growth, no compilation, no slow-down after the first ones (slow tier).

`STEPS=200 python -m pytest -m slow tests/soak_test.py` takes 200 steps where the default is 1,000.
"""

import ctypes
import os
import pathlib
import statistics
import time

import jax
import pytest

import grpo
from harness.build import build
from harness.rollouts import RolloutPool
from harness.workdir import Workdir
from tests.grpo_train_test import rl_config
from train_state import init_params

LIBC = ctypes.CDLL("libc.so.6")
LIBC.mallopt(-8, 1)  # M_ARENA_MAX: with an arena per thread, memory in use varies by 4 %, whatever the code does
STEPS = int(os.environ.get("STEPS", "1000"))


@pytest.mark.slow
def test_a_thousand_steps_leave_memory_and_compiled_functions_as_they_are(tmp_path, monkeypatch):
    """Of the whole loop: rollouts, updates, log, validation, checkpoints."""
    penalties = dict(grpo__thread_penalty=0.01, grpo__token_penalty=0.01)
    few = dict(sampler__buckets="coarse", sampler__length_bucket=512, sampler__rows=2)  # functions: rare shapes come late
    config = rl_config(grpo__steps=STEPS, train__eval_every=max(STEPS // 40, 1), **penalties, **few)
    pool = RolloutPool(build(config))
    compiled: list[int] = []
    seconds: list[float] = []
    memory: list[int] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(len(seconds)) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    step = grpo.Trainer.step

    def timed(trainer, state, number):
        began = time.process_time()
        result = step(trainer, state, number)
        seconds.append(time.process_time() - began)
        LIBC.malloc_trim(0)  # memory in use, not what the allocator keeps for later
        memory.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
        return result

    monkeypatch.setattr(grpo.Trainer, "step", timed)
    grpo.train(pool, Workdir(tmp_path / "run", config), jax.device_get(init_params(pool.parts.model, jax.random.key(0))))
    quarter = STEPS // 4
    early, late = (statistics.median(values) for values in (memory[quarter : 2 * quarter], memory[-quarter:]))
    print(f"memory {early / 2**20:.1f} MB, then {late / 2**20:.1f}; last compiled at step {max(compiled)}")
    assert len(seconds) == STEPS and compiled and max(compiled) <= quarter
    assert late < 1.01 * early
    assert statistics.median(seconds[-quarter:]) < 1.1 * statistics.median(seconds[quarter : 2 * quarter])

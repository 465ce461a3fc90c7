"""Shipped checkpoints through spawn and join, on 1 and 8 devices, against forwards of whole rows without a cache.

The parents of one wait for their children, those of the other go on.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

import records
from decoding import SamplerConfig
from harness.build import Parts, build
from harness.workdir import PRETRAINED, load_best, read_config
from parallel_runtime import Runtime
from protocols import Request, stop_ids
from records import Rollout
from sampler import Sampler

NEAR_TIE = 1e-4  # nats between the two best ids: float32 may order them either way
REQUESTS = 4


@pytest.fixture(scope="module", params=["apr", "apr-async"])
def setting(request) -> tuple[Parts, dict, list[Request]]:
    """A shipped model and a few held-out problems."""
    run = PRETRAINED.parent / request.param
    config = ConfigDict(read_config(run))
    config.mesh.data = 1
    experiment = build(config)
    params = jax.tree.map(jnp.asarray, load_best(run, experiment.param_shapes())[0])
    return experiment, params, [Request(problem) for problem in experiment.test_set()[:REQUESTS]]


@pytest.fixture(scope="module")
def oracle(setting) -> Callable[[list[int]], tuple[np.ndarray, np.ndarray]]:
    """For every place of a row, the two best log-probs [T, 2] of the next id, and these ids [T, 2]."""
    experiment, params, _ = setting
    context = experiment.model.config.context

    @jax.jit
    def best(tokens_1T: Array) -> tuple[Array, Array]:
        positions = jnp.arange(context)[None]
        logits, _ = experiment.model.apply({"params": params}, tokens_1T, positions, jnp.full_like(positions, context))
        return jax.lax.top_k(jax.nn.log_softmax(logits[0]), 2)

    def padded(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        logp, best_ids = best(np.asarray([ids + [0] * (context - len(ids))], np.int32))
        return np.asarray(logp), np.asarray(best_ids)

    return padded


def run(setting, devices: int, rows: int, temperature: float, **sizes: int | str) -> list[Rollout]:
    experiment, params, requests = setting
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    config = SamplerConfig(rows=rows, steps_per_call=16, max_gathered_slots=1536, temperature=temperature, top_k=0, top_p=1.0, **sizes)
    engine = Sampler(experiment.model, params, config, stop_ids(experiment.domain.task), mesh)
    return Runtime(engine, experiment.domain.task, experiment.limits).run(requests, seed=(0,))


@pytest.mark.parametrize(
    ("devices", "rows", "sizes"),
    [(1, 4, dict(length_bucket=512, buckets="coarse")), (8, 8, dict(length_bucket=192))],
)
def test_every_greedy_id_is_the_best_of_a_forward_of_the_whole_row(setting, oracle, devices, rows, sizes):
    rollouts = run(setting, devices, rows, 0.0, **sizes)
    assert any(rollout.root.spawns for rollout in rollouts) and any(rollout.grade.correct for rollout in rollouts)
    stops = set(stop_ids(setting[0].domain.task))
    for thread in (thread for rollout in rollouts for thread in rollout.threads()):
        row: list[int] = []
        for call in thread.calls:
            row = row[: call.keep] + call.injected + call.sampled
            logp, best = (field[len(row) - len(call.sampled) - 1 : len(row) - 1] for field in oracle(row))
            assert min(logp[:, 0] - logp[:, 1]) > NEAR_TIE, "choose other problems: in a near tie either order is right"
            assert call.sampled == best[:, 0].tolist()
            np.testing.assert_allclose(call.logprobs, logp[:, 0], atol=1e-4)
            assert not stops & set(call.sampled[:-1])
            assert (call.sampled[-1] in stops) == (call.stop in (records.END, *records.SPAWNED, records.JOIN))


def calls(rollouts: list[Rollout]) -> list[tuple]:
    return [
        (thread.path, call.keep, call.injected, call.sampled, call.stop)
        for rollout in rollouts
        for thread in rollout.threads()
        for call in thread.calls
    ]


def test_sampled_threads_do_not_depend_on_rows_or_devices(setting):
    few = run(setting, 1, 2, 1.0, length_bucket=512, buckets="coarse")
    spread = run(setting, 8, 16, 1.0, length_bucket=192)
    assert calls(few) == calls(spread)
    assert any(len(rollout.threads()) > 1 for rollout in few)

"""The shipped checkpoint through spawn and join: the fast engine against a slow oracle, on 1 and 8 devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from decoding import SamplerConfig
from harness.build import Parts, build
from harness.workdir import PRETRAINED, load_best, read_config
from parallel_runtime import Runtime
from protocols import Completion, PrefillRequest, Request
from records import Rollout
from sampler import Sampler

NEAR_TIE = 1e-4  # nats between the two best ids: float32 may order them either way
REQUESTS = 4


class Oracle:
    """An engine with no cache: every id is the best one of a full forward of the whole row, one row at a time."""

    rows, devices = 1, 1

    def __init__(self, experiment: Parts, params) -> None:
        self.context = experiment.model.config.context
        self.stop_ids = (experiment.domain.task.end_id, experiment.domain.task.spawn_id)
        self.ids: list[int] = []
        self.margins: list[float] = []

        @jax.jit
        def best(tokens_1T: Array, last: Array) -> tuple[Array, Array]:
            positions = jnp.arange(tokens_1T.shape[1])[None]
            until = jnp.full_like(tokens_1T, tokens_1T.shape[1])
            logits, _ = experiment.model.apply({"params": params}, tokens_1T, positions, until)
            return jax.lax.top_k(jax.nn.log_softmax(logits[0, last]), 2)

        self.best = best

    def reset(self) -> None:
        self.ids = []

    def prefill(self, fills: list[PrefillRequest]) -> None:
        (self.fill,) = fills
        self.ids = self.ids[: self.fill.keep] + self.fill.ids

    def decode(self) -> list[Completion]:
        new: list[int] = []
        logprobs: list[float] = []
        while len(new) < self.fill.max_new_tokens and not (new and new[-1] in self.stop_ids):
            padded = np.zeros((1, -(-(len(self.ids) + 1) // 128) * 128), np.int32)
            padded[0, : len(self.ids)] = self.ids
            (first, second), (token, _) = map(np.asarray, self.best(padded, len(self.ids) - 1))
            self.margins.append(float(first - second))
            logprobs.append(float(first))
            new.append(int(token))
            self.ids.append(int(token))
        return [Completion(0, new, logprobs)]


@pytest.fixture(scope="module")
def setting() -> tuple[Parts, dict, list[Request]]:
    """The shipped model and a few held-out problems."""
    config = ConfigDict(read_config(PRETRAINED))
    config.mesh.data = 1
    experiment = build(config)
    params = jax.tree.map(jnp.asarray, load_best(PRETRAINED, experiment.param_shapes())[0])
    return experiment, params, [Request(problem) for problem in experiment.test_set()[:REQUESTS]]


@pytest.fixture(scope="module")
def truth(setting) -> tuple[list[Rollout], list[float]]:
    experiment, params, requests = setting
    oracle = Oracle(experiment, params)
    return Runtime(oracle, experiment.domain.task, experiment.limits).run(requests, seed=(0,)), oracle.margins


def calls(rollouts: list[Rollout]) -> list[tuple]:
    return [
        (thread.path, call.keep, call.injected, call.sampled, call.stop)
        for rollout in rollouts
        for thread in rollout.threads()
        for call in thread.calls
    ]


def run(setting, devices: int, rows: int, temperature: float) -> list[Rollout]:
    experiment, params, requests = setting
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    config = SamplerConfig(rows=rows, steps_per_call=16, length_bucket=192, max_gathered_slots=1536, temperature=temperature, top_k=0, top_p=1.0)
    stop_ids = (experiment.domain.task.end_id, experiment.domain.task.spawn_id)
    engine = Sampler(experiment.model, params, config, stop_ids, mesh)
    return Runtime(engine, experiment.domain.task, experiment.limits).run(requests, seed=(0,))


def test_the_oracle_spawns_joins_and_solves(truth):
    rollouts, _ = truth
    assert any(rollout.root.spawns for rollout in rollouts) and any(rollout.grade.correct for rollout in rollouts)


@pytest.mark.parametrize(("devices", "rows"), [(1, 4), (8, 8)])
def test_greedy_threads_equal_the_oracle_token_for_token(setting, truth, devices, rows):
    rollouts, margins = truth
    assert min(margins) > NEAR_TIE, "choose other problems: these have a near tie, where either order is right"
    fast = run(setting, devices, rows, temperature=0.0)
    assert calls(fast) == calls(rollouts)
    for call, slow in zip(*map(_logprobs, (fast, rollouts)), strict=True):
        np.testing.assert_allclose(call, slow, atol=1e-4)


def _logprobs(rollouts: list[Rollout]) -> list[list[float]]:
    return [call.logprobs for rollout in rollouts for thread in rollout.threads() for call in thread.calls]


def test_sampled_threads_do_not_depend_on_rows_or_devices(setting):
    few, spread = (functools.partial(run, setting)(d, r, temperature=1.0) for d, r in ((1, 2), (8, 16)))
    assert calls(few) == calls(spread)
    assert any(len(rollout.threads()) > 1 for rollout in few)

"""Rollouts of a configuration: samplers in host threads, requests shared between processes, results in order."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax

from harness.build import Parts
from harness.processes import allgather_interleaved, fetch_full_params
from harness.workers import Interrupted, run_on_workers
from parallel_runtime import Runtime
from protocols import Request, stop_ids
from records import Rollout, Thread
from sampler import Sampler


class RolloutPool:
    """Runs rollouts of the task of `parts`. Samplers are made when first used and kept per temperature."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._samplers: dict[float, list[Sampler]] = {}

    def runtimes(
        self, params: typing.Any, temperature: float, on_call: Callable[[Thread], None] | None = None
    ) -> list[Runtime]:
        """One runtime per worker, sampling with these parameters at this temperature."""
        parts, params = self.parts, fetch_full_params(params)
        if temperature not in self._samplers:
            settings = dataclasses.replace(parts.sampler, temperature=temperature)
            stops = stop_ids(parts.domain.task)
            self._samplers[temperature] = [
                Sampler(parts.model, params, settings, stops, parts.sampler_mesh()) for _ in range(parts.workers)
            ]
        for sampler in self._samplers[temperature]:
            sampler.update(params)
        return [Runtime(sampler, parts.domain.task, parts.limits, on_call) for sampler in self._samplers[temperature]]

    def seconds(self, temperature: float) -> dict[str, float]:
        """Seconds that a worker at this temperature has spent: on the device (two parts) and on the host."""
        counters = [sampler.counters for sampler in self._samplers.get(temperature, [])]
        parts = ("prefill_seconds", "decode_seconds", "host_seconds")
        return {part: sum(counter[part] for counter in counters) / self.parts.workers for part in parts}

    def run(
        self,
        params: typing.Any,
        temperature: float,
        requests: Sequence[Request],
        seed: Sequence[int],
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """Runs the requests, an equal share in each process. Every process gets all rollouts, in order.

        `on_rollout` is called after each rollout of this process.
        """
        share = requests[jax.process_index() :: jax.process_count()]
        return allgather_interleaved(run_on_workers(self.runtimes(params, temperature), share, seed, on_rollout))

    def solve(
        self,
        params: typing.Any,
        problems: Sequence[typing.Any],
        samples: int = 1,
        concurrent: int = 0,
        on_rollout: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`samples` rollouts of each problem, in order, as the configuration evaluates.

        `concurrent` of them start together (0: all). `on_rollout` is called after each rollout. Raises Interrupted,
        with those that are done, on Ctrl-C.
        """
        requests = [Request(problem, index) for problem in problems for index in range(samples)]
        temperature, seed = self.parts.sampler.temperature, (self.parts.evaluation.seed,)
        together = concurrent or max(1, len(requests))
        done: list[Rollout] = []
        for start in range(0, len(requests), together):
            try:
                done += self.run(params, temperature, requests[start : start + together], seed, on_rollout)
            except KeyboardInterrupt as stop:  # within a run, or between two
                raise Interrupted(done + getattr(stop, "rollouts", [])) from stop
        return done

"""What a config means, in objects: problems, demonstrations, task, model, optimizer, runtime.

Every entry point builds one `Experiment` from its config before it touches the
disk, so that a bad value is one sentence and nothing is half done.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import solver
from countdown.grader import Problem
from countdown.language import Tokenizer
from countdown.task import Countdown
from harness.processes import gather, local
from model import Decoder, ModelConfig
from parallel_runtime import Interrupted, Limits, Request, Rollout, Runtime, Thread, side_by_side
from sampler import Sampler, SamplerConfig
from solver import DemonstratorConfig, ProblemRange, Split
from train_state import OptimizerConfig, init_params, make_mesh, make_optimizer


class Experiment:
    """The objects of one config. Raises ValueError, naming the field, on values that cannot work."""

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        d = config.demonstrator
        self.tokenizer = Tokenizer(config.number_limit)
        self.family = ProblemRange(**config.problems)
        self.demonstrator = DemonstratorConfig(
            d.method,
            (d.beam_low, d.beam_high),
            d.sub_beam_high,
            d.spawn_probability,
            d.condition,
            d.token_bin,
            d.order,
        )
        self.model_config = ModelConfig(vocab_size=self.tokenizer.vocab_size, **config.model)
        self.model = Decoder(self.model_config)
        self.limits = Limits(**config.limits)
        self.mesh = make_mesh(**config.mesh)
        told = {name: None if value == -1 else value for name, value in config.prompt.items()}
        if None not in told.values():
            raise ValueError(f"prompt.sub_calls={told['sub_calls']} and prompt.tokens={told['tokens']}: ask for one")
        threads = config.threads
        self.variant = Countdown(self.tokenizer, d.method, threads.join, threads.inherit)
        self.task = dataclasses.replace(self.variant, sub_calls=told["sub_calls"], token_budget=told["tokens"])
        settings = dict(config.sampler)
        self.lanes = settings.pop("lanes")
        if self.lanes < 1:
            raise ValueError(f"sampler.lanes={self.lanes} must be at least 1")
        if settings["rows"] % (self.lanes * self._sampler_mesh().size):
            raise ValueError(
                f"sampler.rows={settings['rows']} must be a multiple of sampler.lanes={self.lanes} "
                f"x {self._sampler_mesh().size} devices"
            )
        settings["rows"] //= self.lanes
        self.sampler_config = SamplerConfig(**settings)
        self.sampler_config.check(self.model_config, self._sampler_mesh().size)
        self.optimizer()
        self._check()
        self._samplers: dict[float, list[Sampler]] = {}

    def _check(self) -> None:
        """Raises ValueError on fields that do not go together."""
        config, mesh = self.config, self.mesh.shape
        for section, field in (
            ("train", "rows"),
            ("train", "micro_rows"),
            ("train", "log_every"),
            ("train", "eval_every"),
            ("train", "eval_problems"),
            ("evaluation", "problems"),
            ("evaluation", "samples"),
        ):
            if config[section][field] < 1:
                raise ValueError(f"{section}.{field}={config[section][field]} must be at least 1")
        if config.evaluation.samples > 1 and not config.sampler.temperature:
            raise ValueError(
                f"evaluation.samples={config.evaluation.samples} would draw one rollout over and over "
                "at temperature 0: set sampler.temperature"
            )
        if config.evaluation.concurrent < 0:
            raise ValueError(f"evaluation.concurrent={config.evaluation.concurrent} must not be negative; 0 is all")
        for field, axis in (("heads", "tensor"), ("kv_heads", "tensor"), ("mlp_width", "tensor"), ("width", "fsdp")):
            if config.model[field] % mesh[axis]:
                raise ValueError(f"model.{field}={config.model[field]} must be a multiple of mesh.{axis}={mesh[axis]}")
        problems = self.test_set() + self.validation_set()
        if (longest := max(len(self.task.prompt(problem)) for problem in problems)) >= config.model.context:
            raise ValueError(
                f"model.context={config.model.context} is too small for a prompt of {longest} ids: raise it"
            )

    @property
    def devices(self) -> int:
        """Devices that rows are spread over in training."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the config."""
        return make_optimizer(OptimizerConfig(**self.config.optimizer))

    def param_shapes(self) -> typing.Any:
        """Shapes of the parameters, for restoring them."""
        return jax.eval_shape(lambda key: init_params(self.model, key), jax.random.key(0))

    def parameter_count(self) -> int:
        """Number of parameters, embedding included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.param_shapes()))

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """Problem number `index` of a run."""
        return solver.problem(self.family, split, seed, index)

    def demonstration(self, split: Split, seed: int, index: int) -> Rollout:
        """Demonstration number `index` of a run."""
        return solver.demonstration(self.family, self.demonstrator, self.variant, split, seed, index)

    def test_set(self) -> tuple[Problem, ...]:
        """Held-out problems of the final evaluation: they choose nothing."""
        return solver.problems_of(self.family, "heldout", self.config.evaluation.problems)

    def validation_set(self) -> tuple[Problem, ...]:
        """Problems that choose the best checkpoint."""
        return solver.problems_of(self.family, "validation", self.config.train.eval_problems)

    def _sampler_mesh(self) -> Mesh:
        """This process's devices: rows share nothing, so that every device is one more for the axis "data"."""
        return Mesh(np.asarray(self.mesh.local_devices), ("data",))

    def runtimes(
        self, params: typing.Any, temperature: float, watch: Callable[[Thread], None] | None = None
    ) -> list[Runtime]:
        """One runtime per lane, sampling with these parameters; samplers are kept per temperature, compiled once."""
        params = local(params)
        if temperature not in self._samplers:
            settings = dataclasses.replace(self.sampler_config, temperature=temperature)
            stop_ids = (self.task.end_id, self.task.spawn_id)
            self._samplers[temperature] = [
                Sampler(self.model, params, settings, stop_ids, self._sampler_mesh()) for _ in range(self.lanes)
            ]
        for sampler in self._samplers[temperature]:
            sampler.update(params)
        return [Runtime(sampler, self.task, self.limits, watch) for sampler in self._samplers[temperature]]

    def sampler_seconds(self, temperature: float) -> dict[str, float]:
        """Seconds that a lane at this temperature has taken so far: on the device (two parts) and on the host."""
        counters = [sampler.counters for sampler in self._samplers.get(temperature, [])]
        parts = ("prefill_seconds", "decode_seconds", "host_seconds")
        return {part: sum(counter[part] for counter in counters) / self.lanes for part in parts}

    def rollouts(
        self,
        params: typing.Any,
        temperature: float,
        requests: Sequence[Request],
        seed: Sequence[int],
        tell: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """Runs the requests, each process an equal share of them; every process gets all, in order.

        `tell` is called after each rollout of this process.
        """
        share = requests[jax.process_index() :: jax.process_count()]
        return gather(side_by_side(self.runtimes(params, temperature), share, seed, tell))

    def solve(
        self,
        params: typing.Any,
        problems: Sequence[Problem],
        samples: int = 1,
        concurrent: int = 0,
        tell: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """`samples` rollouts of each problem, in order, at the config's temperature; so many in flight (0: all).

        `tell` is called after each rollout. Raises Interrupted, with those that are done, on Ctrl-C.
        """
        requests = [Request(problem, index) for problem in problems for index in range(samples)]
        temperature, seed = self.config.sampler.temperature, (self.config.evaluation.seed,)
        together = concurrent or max(1, len(requests))
        done: list[Rollout] = []
        for start in range(0, len(requests), together):
            try:
                done += self.rollouts(params, temperature, requests[start : start + together], seed, tell)
            except Interrupted as interrupt:
                raise Interrupted(done + interrupt.rollouts) from interrupt
        return done

"""A configuration as objects, checked as a whole before anything touches the disk.

`build(config)` is the only validator: bounds of single fields are declared beside the fields (`checks.py`), and
what fields must hold together is checked here. Every message names the field, its value and the remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from checks import SEED, Checked, at_least, one_of, require, within
from decoding import SamplerConfig
from harness.cli import one_line
from harness.tasks import part
from model import Decoder, ModelConfig
from parallel_runtime import Limits
from protocols import Domain
from train_state import OptimizerConfig, init_params, make_mesh, make_optimizer


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """How many rows an update sees, and when a run logs and validates."""

    section = "train"
    rows: Annotated[int, within(1, 1 << 16)]  # per update: a row is packed with threads up to model.context
    micro_rows: Annotated[int, at_least(1)]  # most rows per forward pass on a device
    overlong: Annotated[str, one_of("drop", "cut")]  # demonstrations that do not fit the context
    log_every: Annotated[int, at_least(1)]
    eval_every: Annotated[int, at_least(1)]  # updates between validations, each followed by a checkpoint
    eval_problems: Annotated[int, at_least(1)]  # validation problems
    feeders: Annotated[int, within(0, 256)] = 0  # processes that make demonstrations ahead; with 0 training makes them

    def rows_per_pass(self, devices: int) -> int:
        """Rows per forward pass over all devices. Raises ValueError if that does not divide `rows`."""
        rows = min(self.rows, self.micro_rows * devices)
        require(
            self.rows % rows == 0 and rows % devices == 0,
            f"train.rows={self.rows} must be a multiple of train.micro_rows={self.micro_rows} "
            f"x {devices} devices, or fewer and a multiple of the devices",
        )
        return rows


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What an evaluation runs."""

    section = "evaluation"
    problems: Annotated[int, at_least(1)]  # held out
    samples: Annotated[int, at_least(1)]  # rollouts of each problem, for pass@k and cons@k
    concurrent: Annotated[int, at_least(0)]  # rollouts that start together; 0 is all, 1 measures latency
    seed: Annotated[int, SEED]  # of the draws; the problems are always the same
    split: Annotated[str, one_of("heldout", "unseen")] = "heldout"  # "unseen": targets that training never met


@dataclasses.dataclass(frozen=True)
class Parts:
    """The objects of one configuration."""

    config: ConfigDict
    domain: Domain
    model: Decoder
    optimizer: optax.GradientTransformation
    limits: Limits
    mesh: Mesh
    train: TrainConfig
    evaluation: EvaluationConfig
    sampler: SamplerConfig  # of one worker
    workers: int  # samplers in this process, a host thread each

    @property
    def devices(self) -> int:
        """Devices that rows are spread over in training."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def sampler_mesh(self) -> Mesh:
        """This process's devices, all along the axis "data": rows share nothing."""
        return Mesh(np.asarray(self.mesh.local_devices), ("data",))

    def param_shapes(self) -> typing.Any:
        """Shapes of the parameters, for restoring them."""
        return jax.eval_shape(lambda key: init_params(self.model, key), jax.random.key(0))

    def parameter_count(self) -> int:
        """Number of parameters, embedding included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.param_shapes()))

    def test_set(self) -> Sequence[typing.Any]:
        """Held-out problems of the final evaluation. They choose no checkpoint."""
        return self.domain.problems(self.evaluation.split, self.evaluation.problems)

    def validation_set(self) -> Sequence[typing.Any]:
        """Problems that choose the best checkpoint."""
        return self.domain.problems("validation", self.train.eval_problems)


def check_targets(config: ConfigDict, start: Mapping[str, typing.Any]) -> None:
    """Raises ValueError if the parameters of a run met targets that `config` keeps unseen; `start` is its config."""
    kept, met = (each.get("problems", {}).get("unseen_targets", 0.0) for each in (config, start))
    require(kept <= met, f"problems.unseen_targets={kept}: the run met some of these (its share is {met}), train anew")


def check_parents(config: ConfigDict, start: Mapping[str, typing.Any]) -> None:
    """Raises ValueError if parents go on after a spawn in one of two configs and wait in the other."""
    here, there = (each.get("demonstrator", {}).get("unjoined", -1) for each in (config, start))
    same = (here >= 0) == (there >= 0)
    require(same, f"demonstrator.unjoined={here}: the parameters learned another way to join (it was {there})")


@contextlib.contextmanager
def field_errors() -> Iterator[None]:
    """Turns what a wrong field of a configuration raises, in a block or a decorated function, into a ValueError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        wrong = "a field of the configuration is missing, unknown or of another kind"
        raise ValueError(f"{wrong}: {one_line(error)}") from error


@field_errors()
def build(config: ConfigDict) -> Parts:
    """The objects of a configuration. Raises ValueError, naming the field, on values that cannot work."""
    require(type(config.seed) is int and SEED.allows(config.seed), f"seed={config.seed!r} must be {SEED.words}")
    domain: Domain = part(config.task, "domain")(config)
    model = ModelConfig(vocab_size=domain.language.vocab_size, **config.model)
    settings = dict(config.sampler)
    workers = settings.pop("workers")
    require(workers >= 1, f"sampler.workers={workers} must be at least 1")
    parts = Parts(
        config,
        domain,
        Decoder(model),
        make_optimizer(OptimizerConfig(**config.optimizer)),
        Limits(**config.limits),
        make_mesh(**config.mesh),
        TrainConfig(**config.train),
        EvaluationConfig(**config.evaluation),
        SamplerConfig(**dict(settings, rows=settings["rows"] // workers or settings["rows"])),
        workers,
    )
    _check_together(parts)
    return parts


def _check_together(parts: Parts) -> None:
    """Raises ValueError on fields that do not go together."""
    config, mesh, model = parts.config, parts.mesh.shape, parts.model.config
    local = parts.sampler_mesh().size
    require(local > 0, f"the mesh {dict(mesh)} leaves a process without a device: use those of all processes")
    require(
        config.sampler.rows % (parts.workers * local) == 0,
        f"sampler.rows={config.sampler.rows} must be a multiple of sampler.workers={parts.workers} x {local} devices",
    )
    parts.sampler.fit(model, local)
    require(
        parts.evaluation.samples == 1 or parts.sampler.temperature > 0,
        f"evaluation.samples={parts.evaluation.samples} would draw one rollout over and over "
        "at temperature 0: set sampler.temperature",
    )
    if model.attention == "pallas":
        device, size, width = jax.devices()[0].platform, parts.mesh.size, model.head_width
        runs = size == 1 and device != "tpu"
        require(runs, f"model.attention='pallas' runs on one device, a GPU, not on {size} of {device}: use 'blocks'")
        fits = width >= 16 and width.bit_count() == 1
        require(fits, f"model.attention='pallas' needs a power of two from 16 as model.head_width, not {width}")
    for field, axis in (("heads", "tensor"), ("kv_heads", "tensor"), ("mlp_width", "tensor"), ("width", "fsdp")):
        value, size = getattr(model, field), mesh[axis]
        require(value % size == 0, f"model.{field}={value} must be a multiple of mesh.{axis}={size}")
    forced = parts.limits.min_budget_rounds or parts.limits.forced_answer_tokens
    can = not forced or hasattr(parts.domain.task, "force_answer")
    require(can, f"{config.task} has no budget forcing: limits.min_budget_rounds and forced_answer_tokens must be 0")
    check_prompts(parts, (*parts.test_set(), *parts.validation_set()))


def check_prompts(parts: Parts, problems: Sequence[typing.Any]) -> None:
    """Raises ValueError if a prompt leaves no room in the context."""
    context, longest = parts.model.config.context, max(len(parts.domain.task.prompt(problem)) for problem in problems)
    require(longest < context, f"model.context={context} is too small for a prompt of {longest} ids: raise it")

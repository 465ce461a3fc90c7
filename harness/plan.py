"""What training takes, from its configuration alone: `--dry_run` prints it and ends.

Bytes are those of the state between two updates, and of the parameters and caches of the samplers. Activations, the
workspace of the compiler and one or two copies of the parameters (those before a step) come on top. They depend on the
device, and `benchmarks.accelerator` measures them.
"""

from __future__ import annotations

import functools
import math
import typing

import jax
import jax.numpy as jnp

from harness.build import Parts
from model import ModelConfig
from sampler import cast, make_buckets, row_slots
from train_state import new_state, state_shardings


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: the matrices of all layers, and the head."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    return config.layers * config.width * (heads + 3 * config.mlp_width) + config.width * config.vocab_size


def flops_per_token(config: ModelConfig, keys: float) -> float:
    """Floating-point operations of one token in training that looks at `keys` keys on average.

    A multiplication and an addition are two. The backward pass takes twice the forward pass. Norms, rotations and
    softmax are left out, as is usual (PaLM, arXiv 2204.02311, appendix B).
    """
    attention = 4 * config.layers * config.heads * config.head_width * keys
    return 3 * (2 * matrix_parameters(config) + attention)


def state_bytes(parts: Parts) -> tuple[int, int]:
    """Bytes on each device of the mesh: of the whole state, and of the parameters in it (gradients take as many)."""
    params = parts.param_shapes()
    state = jax.eval_shape(functools.partial(new_state, parts.optimizer), params)
    shardings = state_shardings(parts.mesh, parts.optimizer, params)

    def size(leaf: typing.Any, where: typing.Any) -> int:
        return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    sizes = jax.tree.map(size, state, shardings)
    return sum(jax.tree.leaves(sizes)), sum(jax.tree.leaves(sizes.params))


def bytes_per_id(config: ModelConfig) -> int:
    """Bytes of the keys and values of one id."""
    return 2 * config.layers * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize


def count_samplers(parts: Parts) -> int:
    """Samplers of this process: of each temperature, one per worker."""
    return len({parts.sampler.temperature, parts.config.get("grpo", parts.sampler).temperature}) * parts.workers


def sampler_parameter_bytes(parts: Parts) -> int:
    """Bytes of the samplers' parameters on each device: each has all of them, matrices in the model's type."""
    held = jax.eval_shape(functools.partial(cast, dtype=parts.model.config.dtype), parts.param_shapes())
    return count_samplers(parts) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def cache_bytes(parts: Parts) -> int:
    """Bytes of the samplers' keys and values on each device of this process."""
    config, rows = parts.model.config, parts.sampler.rows // parts.sampler_mesh().size
    slots = row_slots(parts.sampler, make_buckets(parts.sampler, rows, config.context))
    return count_samplers(parts) * rows * slots * bytes_per_id(config)


def plan(parts: Parts) -> dict[str, typing.Any]:
    """The figures of a configuration; how many tokens a step of GRPO has depends on its rollouts."""
    config, (state, gradients) = parts.model.config, state_bytes(parts)
    flops = flops_per_token(config, (config.context + 1) / 2)  # as if rows were one causal segment
    figures: dict[str, typing.Any] = {
        "parameters": parts.parameter_count(),
        "devices": parts.mesh.size,
        "state_bytes_per_device": state,
        "gradient_bytes_per_device": gradients,
        "reference_bytes_per_device": gradients if "grpo" in parts.config else 0,  # GRPO's start, kept
        "sampler_parameter_bytes_per_device": sampler_parameter_bytes(parts),
        "cache_bytes_per_device": cache_bytes(parts),
        "flops_per_token": flops,
        "steps": parts.config.optimizer.steps,
    }
    if "grpo" not in parts.config:
        tokens = parts.train.rows * config.context
        figures |= {"tokens_per_step": tokens, "flops_per_step": tokens * flops}
    return figures

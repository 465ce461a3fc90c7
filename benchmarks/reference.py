"""The decoder written down once more, in float64 and without a cache, blocks or kernels: what the fast ones must equal.

It shares no code with `model.py`. Call it inside `jax.enable_x64(True)`.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EPSILON = 1e-6


def double(params: typing.Any) -> typing.Any:
    """Parameters in float64."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)


def _norm(x: Array, scale: Array) -> Array:
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def _rotate(x: Array, positions: Array, theta: float) -> Array:
    """x [R, T, N, H] as complex numbers x[h] + i x[h + H/2], turned by position * theta^(-2h/H)."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None, None] * theta ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def logits(params: typing.Any, config: typing.Any, tokens: Array, positions: Array, until: Array) -> Array:
    """Logits float64 [R, T, V] of integers [R, T]. Token j is visible to token i iff j <= i < until[j]."""
    place = jnp.arange(tokens.shape[1])
    visible = (place[None, :] <= place[:, None]) & (place[:, None] < until[:, None, :])
    group = config.heads // config.kv_heads
    x = params["embedding"][tokens] * config.width**0.5
    for layer in range(config.layers):
        p, h = params[f"attention_{layer}"], _norm(x, params[f"attention_norm_{layer}"]["scale"])
        q, k, v = (jnp.einsum("rtd,dnh->rtnh", h, p[name]) for name in ("query", "key", "value"))
        q, k = (_rotate(part, positions, config.rope_theta) for part in (q, k))
        k, v = (jnp.repeat(part, group, axis=2) for part in (k, v))
        scores = jnp.einsum("rinh,rjnh->rnij", q, k) / config.head_width**0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
        x = x + jnp.einsum("rnij,rjnh,nhd->rid", weights, v, p["out"])
        p, h = params[f"mlp_{layer}"], _norm(x, params[f"mlp_norm_{layer}"]["scale"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    x = _norm(x, params["final_norm"]["scale"])
    return x @ (params["embedding"].T if config.tied else params["head"])


def logprobs(params: typing.Any, config: typing.Any, tokens: Array, positions: Array, until: Array) -> Array:
    """Log-probability float64 [R, T - 1] of tokens 1, 2, ... given those before them."""
    logp = jax.nn.log_softmax(logits(params, config, tokens, positions, until)[:, :-1])
    return jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]

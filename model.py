"""Llama decoder in Flax linen: RMSNorm, RoPE, grouped-query attention, SwiGLU, tied or untied head.

One module serves training, prefill and decoding, by what it is given:

  1. training: whole packed rows, `past=()`;
  2. prefill and extend: a chunk of new tokens and one `Past` (the row's history);
  3. decode: one new token per row and two `Past`s (history and tail).

It returns the keys and values of the tokens it was given; where they are kept is
the caller's business. Who sees whom is one integer per token: token j of a row
is visible to token i of the same row iff j <= i < until[j]. That one rule says
causality, isolation of packed segments (until = end of the segment), rewinds
(until of a spawn block = start of the join block) and padding (until = j + 1).

Deviations from the paper: none in the architecture (Llama). The query, key and
value projections are one matrix, and so are the gate and up projections.

Dimension key, used as name suffixes:
  R rows         T tokens of a row     S slots of a past part    L layers
  D width        N query heads         K key/value heads         G query heads per kv head (N / K)
  H head width   F mlp width           V vocabulary
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

NORM_EPSILON = 1e-6
HIDDEN = -1e30  # score of what must not be seen; finite, so that a row that sees nothing stays free of NaN
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Raises ValueError on a shape that cannot be built."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int  # longest row
    rope_theta: float
    tied: bool  # the head is the transposed embedding
    dtype: str  # of the computation; parameters are float32

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "context"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, not {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise ValueError(f"model.head_width must be even for rotary positions, not {self.head_width}")
        if self.rope_theta <= 0:
            raise ValueError(f"model.rope_theta must be positive, not {self.rope_theta}")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


class Past(typing.NamedTuple):
    """Keys and values of earlier tokens; one part of possibly several (history and tail)."""

    k: Array  # [L, R, S, K, H], rotated
    v: Array  # [L, R, S, K, H]
    visible: Array  # bool [R, S]: slots that the current tokens may look at


def rotary_table(positions_RT: Array, head_width: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine [R, T, 1, H/2] of the rotary angles (RoFormer, arXiv 2104.09864), float32."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_RT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_RTNH: Array, table: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2) of every head by the angles of its position; keeps shape and dtype."""
    cos, sin = table
    left, right = jnp.split(x_RTNH, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_RTNH.dtype)


def visibility(until_RT: Array) -> Array:
    """bool [R, T, T]: may token i (second axis) look at token j (third axis)? j <= i < until[j]."""
    i = jnp.arange(until_RT.shape[1])
    return (i[None, None, :] <= i[None, :, None]) & (i[None, :, None] < until_RT[:, None, :])


def attend(q_RTNH: Array, parts: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Attention over several parts with one joint softmax, in float32; returns o [R, T, N, H].

    A part is k [R, S, K, H], v [R, S, K, H] and visible, bool [R, T or 1, S].
    Parts are never concatenated, so that a cache is read and not copied.
    """
    R, T, N, H = q_RTNH.shape
    K = parts[0][0].shape[2]
    q_RTKGH = q_RTNH.reshape(R, T, K, N // K, H) * H**-0.5
    scores = []
    for k_RSKH, _, visible_RTS in parts:
        s = jnp.einsum("RTKGH,RSKH->RKGTS", q_RTKGH, k_RSKH, preferred_element_type=jnp.float32)
        scores.append(jnp.where(visible_RTS[:, None, None, :, :], s, HIDDEN))
    top = jnp.stack([s.max(axis=-1) for s in scores]).max(axis=0)[..., None]
    exps = [jnp.exp(s - top) for s in scores]
    total_RTKG1 = jnp.moveaxis(sum(e.sum(axis=-1, keepdims=True) for e in exps), 3, 1)
    o_RTKGH = sum(
        jnp.einsum("RKGTS,RSKH->RTKGH", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for e, (_, v, _) in zip(exps, parts, strict=True)
    )
    return (o_RTKGH / total_RTKG1).reshape(R, T, N, H).astype(q_RTNH.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467), computed in float32."""

    @nn.compact
    def __call__(self, x_RTD: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_RTD.shape[-1],))
        x = x_RTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
        return (x * scale_D[None, None, :]).astype(x_RTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245). Keys and values of one kv head sit next to its queries."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_RTD: Array, table: tuple[Array, Array], visible_RTT: Array, past: Sequence[tuple[Array, Array, Array]]
    ) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        R, T, D = x_RTD.shape
        K, G, H = c.kv_heads, c.heads // c.kv_heads, c.head_width
        init = nn.initializers.lecun_normal
        w_qkv = self.param("qkv", init(in_axis=0, out_axis=(1, 2, 3)), (D, K, G + 2, H)).astype(x_RTD.dtype)
        w_out = self.param("out", init(in_axis=(0, 1), out_axis=2), (K * G, H, D)).astype(x_RTD.dtype)
        qkv = (x_RTD.reshape(R * T, D) @ w_qkv.reshape(D, -1)).reshape(R, T, K, G + 2, H)
        q_RTNH = rotate(qkv[..., :G, :].reshape(R, T, K * G, H), table)
        k_RTKH, v_RTKH = rotate(qkv[..., G, :], table), qkv[..., G + 1, :]
        o_RTNH = attend(q_RTNH, [*past, (k_RTKH, v_RTKH, visible_RTT)])
        return (o_RTNH.reshape(R * T, -1) @ w_out.reshape(-1, D)).reshape(R, T, D), (k_RTKH, v_RTKH)


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): silu(x gate) * (x up), then down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_RTD: Array) -> Array:
        R, T, D = x_RTD.shape
        F = self.config.mlp_width
        init = nn.initializers.lecun_normal
        w_in = self.param("gate_up", init(in_axis=0, out_axis=(1, 2)), (D, 2, F)).astype(x_RTD.dtype)
        w_down = self.param("down", init(), (F, D)).astype(x_RTD.dtype)
        gate_up = x_RTD.reshape(R * T, D) @ w_in.reshape(D, 2 * F)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return ((nn.silu(gate) * up) @ w_down).reshape(R, T, D)


class Decoder(nn.Module):
    """The decoder. Parameters are float32; see the module header for its three uses."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_RT: Array, positions_RT: Array, until_RT: Array, past: Sequence[Past] = ()
    ) -> tuple[Array, tuple[Array, Array]]:
        """Logits float32 [R, T, V] of the next token, and the tokens' keys and values, each [L, R, T, K, H].

        tokens, positions, until: int [R, T]. Tokens see each other as `until` says, and every `past` slot
        that is visible. Raises ValueError when the rows are longer than the context.
        """
        c = self.config
        if tokens_RT.shape[1] > c.context:
            raise ValueError(f"rows of {tokens_RT.shape[1]} tokens do not fit model.context = {c.context}")
        embedding_VD = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        table = rotary_table(positions_RT, c.head_width, c.rope_theta)
        visible_RTT = visibility(until_RT)
        x_RTD = embedding_VD[tokens_RT].astype(c.dtype)
        ks, vs = [], []
        for layer in range(c.layers):
            parts = [(p.k[layer], p.v[layer], p.visible[:, None, :]) for p in past]
            h_RTD = RMSNorm(name=f"attention_norm_{layer}")(x_RTD)
            h_RTD, (k, v) = Attention(c, name=f"attention_{layer}")(h_RTD, table, visible_RTT, parts)
            x_RTD = x_RTD + h_RTD
            x_RTD = x_RTD + SwiGLU(c, name=f"mlp_{layer}")(RMSNorm(name=f"mlp_norm_{layer}")(x_RTD))
            ks.append(k)
            vs.append(v)
        x_RTD = RMSNorm(name="final_norm")(x_RTD)
        if c.tied:
            w_DV = embedding_VD.T
        else:
            w_DV = self.param("head", nn.initializers.lecun_normal(), (c.width, c.vocab_size))
        logits = jnp.matmul(x_RTD.reshape(-1, c.width), w_DV.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*tokens_RT.shape, c.vocab_size), (jnp.stack(ks), jnp.stack(vs))


def token_logprobs(logits_RTV: Array, tokens_RT: Array) -> Array:
    """Log-probability float32 [R, T] of every token given those before it in the row; 0 for the first one."""
    logits = logits_RTV[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens_RT[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen - jax.nn.logsumexp(logits, axis=-1), ((0, 0), (1, 0)))


# Mesh axes of every parameter, by its last name. "tensor" splits kv heads, mlp width and vocabulary.
_SPECS = {
    "embedding": PartitionSpec("tensor", "fsdp"),
    "qkv": PartitionSpec("fsdp", "tensor", None, None),
    "out": PartitionSpec("tensor", None, "fsdp"),
    "gate_up": PartitionSpec("fsdp", None, "tensor"),
    "down": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("fsdp", "tensor"),
    "scale": PartitionSpec(),
}


def param_specs(params: typing.Any) -> typing.Any:
    """PartitionSpec over the mesh axes ("data", "fsdp", "tensor") for every leaf of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _SPECS[path[-1].key], params)

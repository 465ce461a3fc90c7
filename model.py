"""Llama decoder in Flax linen: RMSNorm, RoPE, grouped-query attention, SwiGLU, tied or untied head.

One module serves training, prefill and decoding. What it is given tells them apart:

  1. training: whole packed rows, `past=()`;
  2. prefill and extend: a chunk of new tokens and one `Past` (the row's history);
  3. decode: one new token per row and two `Past`s (history and tail).

It returns the keys and values of the tokens it was given, and the caller stores them.
Who sees whom is one integer per token: token j of a row is visible to token i of the
same row iff j <= i < until[j]. That one rule says causality, isolation of packed segments
(until = end of the segment), rewinds (until of a spawn block = start of the join block)
and padding (until = j + 1).

Attention of whole rows (the training path) is written for the cache of a CPU and
the memory of an accelerator, after FlashAttention (arXiv 2205.14135): queries
are cut into a few blocks, a block looks only at the keys up to its own end, and
the backward pass computes the probabilities again (`jax.checkpoint`).

Deviation from the paper, which is the same Llama: the initial weights. Embeddings are scaled to
unit size, the output matrices of attention and MLP by 1 / sqrt(2 L). LOG.md has the curves ("Initial weights").

Dimension key, used as name suffixes:
  R rows         T tokens of a row     S slots of a past part    L layers
  D width        N query heads         K key/value heads         G query heads per kv head (N / K)
  H head width   F mlp width           V vocabulary              Q queries of a block
  M micro-batches (train_state)        B rows of one device call, I steps of a burst (decoding)
  P problems and G rollouts of each problem (objective)
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from checks import Checked, above, at_least, one_of, require, within
from kernels.scan_layers import scan_layers
from kernels.until_attention import HIDDEN, until_attention

NORM_EPSILON = 1e-6
KEPT = "kept"  # what attention keeps for its backward pass: outputs, and the largest and summed scores
QUERY_BLOCKS = 8  # per row: more skip more of what lies in the future, and make smaller matrix products


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """Shape of a decoder. Raises ValueError on a shape that cannot be built."""

    section = "model"
    vocab_size: Annotated[int, at_least(1)]
    width: Annotated[int, within(1, 1 << 15)]
    layers: Annotated[int, within(1, 200)]
    heads: Annotated[int, within(1, 1 << 10)]
    kv_heads: Annotated[int, at_least(1)]
    head_width: Annotated[int, within(1, 1 << 10)]
    mlp_width: Annotated[int, within(1, 1 << 17)]
    context: Annotated[int, within(1, 1 << 17)]  # longest row
    rope_theta: Annotated[float, above(0)]
    tied: bool  # the head is the transposed embedding
    dtype: Annotated[str, one_of("float32", "bfloat16")]  # of the computation; parameters are float32
    attention: Annotated[str, one_of("blocks", "pallas")] = "blocks"  # of whole rows; "pallas" is a GPU kernel
    scan_layers: bool = False  # in training a loop over layers: quicker to compile, and on a CPU slower to run

    def check(self) -> None:
        """Checks the heads."""
        shared = self.heads % self.kv_heads == 0
        require(shared, f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        require(self.head_width % 2 == 0, f"model.head_width={self.head_width} must be even for rotary positions")


class Past(typing.NamedTuple):
    """Keys and values of earlier tokens; one part of possibly several (history and tail)."""

    k: Array | Sequence[Array]  # [L, R, S, K, H], or its L layers; rotated
    v: Array | Sequence[Array]  # [L, R, S, K, H], or its L layers
    visible: Array  # bool [R, S]: slots that the current tokens may look at


def rotary_table(positions_RT: Array, head_width: int, theta: float) -> tuple[Array, Array]:
    """Rotary angles (RoFormer, arXiv 2104.09864): (cos, cos) and (-sin, sin), each float32 [R, T, 1, 2, H/2]."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_RT[:, :, None, None, None].astype(jnp.float32) * frequencies[None, None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-2), jnp.concatenate([-sin, sin], axis=-2)


def rotate(x_RTNH: Array, table: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2) of every head by the angles of its position; keeps shape and dtype."""
    cos, sin = table
    halves = x_RTNH.reshape(*x_RTNH.shape[:-1], 2, -1)
    # Swapping the halves as a reversed axis, not as a concatenation, keeps the loop vectorised on CPU.
    return (halves * cos + halves[..., ::-1, :] * sin).astype(x_RTNH.dtype).reshape(x_RTNH.shape)


def visibility(until_RT: Array) -> Array:
    """bool [R, T, T]: may token i (second axis) look at token j (third axis)? j <= i < until[j]."""
    i = jnp.arange(until_RT.shape[1])
    return (i[None, None, :] <= i[None, :, None]) & (i[None, :, None] < until_RT[:, None, :])


def attend_parts(q_RTNH: Array, parts: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Attention over several parts with one joint softmax, in float32; returns o [R, T, N, H]. q comes scaled.

    A part is k [R, S, K, H], v [R, S, K, H] and visible, bool [R, T or 1, S].
    Parts are never concatenated, so that a cache is read and not copied.
    """
    R, T, N, H = q_RTNH.shape
    K = parts[0][0].shape[2]
    q_RTKGH = q_RTNH.reshape(R, T, K, N // K, H)
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


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Blocks of queries. The block [start, stop) needs the keys [0, stop): eight blocks skip 44 % of the square."""
    size = -(-length // QUERY_BLOCKS)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend_block(q_GTH: Array, k_TH: Array, v_TH: Array, until_T: Array, start: int, stop: int) -> Array:
    """Queries start..stop over the keys up to their end: o [G, stop - start, H]. k and v are float32."""
    q_GQH, k_SH, v_SH = q_GTH[:, start:stop], k_TH[:stop].astype(q_GTH.dtype), v_TH[:stop].astype(q_GTH.dtype)
    s_GQS = jnp.einsum("GQH,SH->GQS", q_GQH, k_SH, preferred_element_type=jnp.float32)
    i, j = jnp.arange(start, stop)[:, None], jnp.arange(stop)[None, :]
    s_GQS = jnp.where(((j <= i) & (i < until_T[None, :stop]))[None], s_GQS, HIDDEN)
    p_GQS = jnp.exp(s_GQS - checkpoint_name(jax.lax.stop_gradient(s_GQS.max(axis=-1, keepdims=True)), KEPT))
    total_GQ1 = checkpoint_name(p_GQS.sum(axis=-1, keepdims=True), KEPT)
    o_GQH = jnp.einsum("GQS,SH->GQH", p_GQS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
    return (checkpoint_name(o_GQH, KEPT) / total_GQ1).astype(q_GTH.dtype)


def _attend_head(q_GTH: Array, k_TH: Array, v_TH: Array, until_T: Array) -> Array:
    """One kv head of one row: o [G, T, H]. The backward pass computes the scores again, block by block."""
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    block = jax.checkpoint(_attend_block, static_argnums=(4, 5), policy=policy)
    k, v = k_TH.astype(jnp.float32), v_TH.astype(jnp.float32)  # so that the gradients of the blocks add up in float32
    outputs = [block(q_GTH, k, v, until_T, start, stop) for start, stop in _query_blocks(k_TH.shape[0])]
    return jnp.concatenate(outputs, axis=1)


# attend_rows(q [R, K, G, T, H], k, v [R, K, T, H], until [R, T]) -> o [R, K, G, T, H]. q comes scaled.
attend_rows = jax.vmap(jax.vmap(_attend_head, in_axes=(0, 0, 0, None)))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467), computed in float32."""

    @nn.compact
    def __call__(self, x_RTD: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_RTD.shape[-1],))
        x = x_RTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
        return (x * scale_D[None, None, :]).astype(x_RTD.dtype)


def _kernel(module: Attention | SwiGLU, name: str, shape: tuple[int, ...], inputs: int = 1) -> Array:
    """A weight whose first `inputs` axes are contracted, in the compute dtype.

    Its initial variance is 1 / inputs; what the 2 L branches add to the residual stream is scaled down so
    that they add up to about the embedding's own size (GPT-2's rule).
    """
    axes = range(len(shape))
    scale = 1 / (2 * module.config.layers) if name in ("out", "down") else 1.0
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal", in_axis=axes[:inputs], out_axis=axes[inputs:])
    return module.param(name, init, shape).astype(module.config.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): N / K neighbouring query heads share a kv head."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_RTD: Array, table: tuple[Array, Array], until_RT: Array, past: Sequence[tuple[Array, Array, Array]]
    ) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        R, T, D = x_RTD.shape
        N, K, H = c.heads, c.kv_heads, c.head_width
        x = x_RTD.reshape(R * T, D)  # plain matrix products are the fast ones on CPU
        q_RTNH = rotate((x @ _kernel(self, "query", (D, N, H)).reshape(D, -1)).reshape(R, T, N, H), table) * H**-0.5
        k_RTKH = rotate((x @ _kernel(self, "key", (D, K, H)).reshape(D, -1)).reshape(R, T, K, H), table)
        v_RTKH = (x @ _kernel(self, "value", (D, K, H)).reshape(D, -1)).reshape(R, T, K, H)
        if past:
            o_RTNH = attend_parts(q_RTNH, [*past, (k_RTKH, v_RTKH, visibility(until_RT))])
        else:
            q_RKGTH = q_RTNH.reshape(R, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
            attend = until_attention if c.attention == "pallas" else attend_rows
            o_RKGTH = attend(q_RKGTH, k_RTKH.transpose(0, 2, 1, 3), v_RTKH.transpose(0, 2, 1, 3), until_RT)
            o_RTNH = o_RKGTH.transpose(0, 3, 1, 2, 4)
        w_out = _kernel(self, "out", (N, H, D), inputs=2)
        return (o_RTNH.reshape(R * T, N * H) @ w_out.reshape(N * H, D)).reshape(R, T, D), (k_RTKH, v_RTKH)


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): silu(x gate) * (x up), then down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_RTD: Array) -> Array:
        D, F = x_RTD.shape[-1], self.config.mlp_width
        x = x_RTD.reshape(-1, D)
        gate, up = x @ _kernel(self, "gate", (D, F)), x @ _kernel(self, "up", (D, F))
        return ((nn.silu(gate) * up) @ _kernel(self, "down", (F, D))).reshape(x_RTD.shape)


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
        embedding_VD = self.param("embedding", nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width))
        table = rotary_table(positions_RT, c.head_width, c.rope_theta)
        # Unit-size inputs (LOG.md has the curves), cast first as the sampler's table is: else bfloat16 would differ.
        x_RTD = embedding_VD[tokens_RT].astype(c.dtype) * c.width**0.5
        modules: dict[str, Callable] = {"attention": functools.partial(Attention, c), "attention_norm": RMSNorm}
        modules |= {"mlp": functools.partial(SwiGLU, c), "mlp_norm": RMSNorm}

        def layer(run: Callable, x_RTD: Array, parts: Sequence) -> tuple[Array, tuple[Array, Array]]:
            h_RTD, kv = run("attention", run("attention_norm", x_RTD), table, until_RT, parts)
            x_RTD = x_RTD + h_RTD
            return x_RTD + run("mlp", run("mlp_norm", x_RTD)), kv

        if c.scan_layers and not past and not self.is_initializing():
            x_RTD, (ks, vs) = scan_layers(layer, modules, self.variables["params"], c.layers, x_RTD)
        else:
            kvs = []
            for i in range(c.layers):
                parts = [(p.k[i], p.v[i], p.visible[:, None, :]) for p in past]
                x_RTD, kv = layer(lambda name, *args, i=i: modules[name](name=f"{name}_{i}")(*args), x_RTD, parts)
                kvs.append(kv)
            ks, vs = (jnp.stack(x) for x in zip(*kvs, strict=True))
        x_RTD = RMSNorm(name="final_norm")(x_RTD)
        w_DV = embedding_VD.T if c.tied else self.param("head", nn.initializers.normal(0.02), (c.width, c.vocab_size))
        logits = jnp.matmul(x_RTD.reshape(-1, c.width), w_DV.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*tokens_RT.shape, c.vocab_size), (ks, vs)


def token_logprobs(logits_RTV: Array, tokens_RT: Array) -> Array:
    """Log-probability float32 [R, T] of every token given those before it in the row; 0 for the first one."""
    # Shifting the targets instead of cutting the logits saves a copy of the largest array of the model.
    following_RT = jnp.roll(tokens_RT, -1, axis=1)
    chosen_RT = jnp.take_along_axis(logits_RTV, following_RT[:, :, None], axis=-1)[..., 0]
    return jnp.pad((chosen_RT - jax.nn.logsumexp(logits_RTV, axis=-1))[:, :-1], ((0, 0), (1, 0)))


# Mesh axes of every parameter, by its own name. "tensor" splits heads and mlp width.
_SPECS = {
    "embedding": PartitionSpec(None, "fsdp"),
    "query": PartitionSpec("fsdp", "tensor", None),
    "key": PartitionSpec("fsdp", "tensor", None),
    "value": PartitionSpec("fsdp", "tensor", None),
    "out": PartitionSpec("tensor", None, "fsdp"),
    "gate": PartitionSpec("fsdp", "tensor"),
    "up": PartitionSpec("fsdp", "tensor"),
    "down": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("fsdp", None),
    "scale": PartitionSpec(),
}

# The kernels, and how many of their leading axes are contracted.
MATRICES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


def param_spec(path: tuple[typing.Any, ...]) -> PartitionSpec:
    """Spec over the mesh axes ("data", "fsdp", "tensor") of the leaf at a path of a tree of parameters.

    Trees that hold parameters under their names, such as an optimizer's moments, are served alike; other leaves are
    replicated. "tensor" must divide kv_heads and mlp_width, "fsdp" the width.
    """
    return _SPECS.get(getattr(path[-1], "key", ""), PartitionSpec()) if path else PartitionSpec()

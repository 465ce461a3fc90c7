"""Attention with `until` as one GPU kernel per direction (Pallas, lowered through Triton).

The rule is the causal case of FlashMask (arXiv 2410.01359): token i looks at token j of its row iff

    j <= i < until[j]

so one integer per key says causality, packed segments, rewinds and padding. The algorithm is that of
FlashAttention-2 (arXiv 2307.08691): blocks of queries go over blocks of keys with a running softmax, and the
backward pass computes the probabilities again from the log-sum-exp. Scores are never written to memory.

Which blocks look at each other is decided before the kernels start (`_plan`): a block of keys is skipped that lies in
the future of a block of queries, or whose every `until` lies before it. The kernels are given the numbers of the
blocks that are left, so they neither visit nor test the others.

Inputs may be bfloat16 or float32. All sums, the softmax and the log-sum-exp are float32. On a CPU the kernels run in
Pallas's interpreter, which is slow and serves tests.

Suffixes as in model.py; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # queries and keys of a block
HIDDEN = -1e30  # score of what must not be seen; finite, so that a query that sees nothing stays free of NaN
WARPS, STAGES = 4, 2  # per kernel; not tuned
F32 = jnp.float32
Saved = tuple[Array, Array, Array, Array, Array, Array]  # q, k, v, until, o, log-sum-exp


class _Plan(typing.NamedTuple):
    """Who looks at whom, in blocks. Lists hold first the numbers that count, in order."""

    keys_RXY: Array  # int32: blocks of keys that a block of queries looks at
    num_keys_RX: Array  # int32: how many
    queries_RYX: Array  # int32: blocks of queries that look at a block of keys
    num_queries_RY: Array  # int32: how many


def visible_blocks(until_RT: Array, block: int) -> Array:
    """bool [R, X, Y]: may any query of block x look at any key of block y?"""
    last_RY = until_RT.reshape(until_RT.shape[0], -1, block).max(axis=-1)
    number = jnp.arange(last_RY.shape[1])
    past = number[None, None, :] <= number[None, :, None]
    return past & (last_RY[:, None, :] > block * number[None, :, None])


def _plan(until_RT: Array) -> _Plan:
    visible_RXY = visible_blocks(until_RT, BLOCK)
    keys, queries = (jnp.argsort(~x, axis=-1, stable=True) for x in (visible_RXY, visible_RXY.mT))
    counts = (visible_RXY.sum(axis=axis, dtype=jnp.int32) for axis in (2, 1))
    num_keys, num_queries = counts
    return _Plan(keys.astype(jnp.int32), num_keys, queries.astype(jnp.int32), num_queries)


# ------------------------------------------------------------------- kernels (the axes R, K and G are taken away)


def _span(number: Array) -> typing.Any:
    return pl.ds(number * BLOCK, BLOCK)


def _product(a: Array, b: Array) -> Array:
    """A matrix product with float32 sums, exact for float32 inputs."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jnp.dot(a, b, preferred_element_type=F32, precision=exact)


def _scores(q_QH: Array, k_SH: Array, until_S: Array, x: Array, y: Array) -> Array:
    """Scores float32 [Q, S] of block x of queries with block y of keys."""
    i, j = x * BLOCK + jnp.arange(BLOCK), y * BLOCK + jnp.arange(BLOCK)
    seen = (j[None, :] <= i[:, None]) & (i[:, None] < until_S[None, :])
    return jnp.where(seen, _product(q_QH, k_SH.T), HIDDEN)


def _forward_kernel(q, k, v, until, keys, num_keys, o, logsum):
    """One block of queries of one head: q, o [Q, H], k, v [T, H], until [T], keys [Y], num_keys [], logsum [Q]."""
    x, q_QH = pl.program_id(2), q[...]

    def add(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        o_QH, top_Q, total_Q = so_far
        y = keys[number]
        s_QS = _scores(q_QH, k[_span(y), :], until[_span(y)], x, y)
        new_Q = jnp.maximum(top_Q, s_QS.max(axis=1))
        p_QS = jnp.where(s_QS == HIDDEN, 0.0, jnp.exp(s_QS - new_Q[:, None]))
        shrink_Q = jnp.exp(top_Q - new_Q)
        v_SH = v[_span(y), :]
        o_QH = o_QH * shrink_Q[:, None] + _product(p_QS.astype(v_SH.dtype), v_SH)
        return o_QH, new_Q, total_Q * shrink_Q + p_QS.sum(axis=1)

    nothing = jnp.zeros(q_QH.shape, F32), jnp.full(BLOCK, HIDDEN, F32), jnp.zeros(BLOCK, F32)
    o_QH, top_Q, total_Q = jax.lax.fori_loop(0, num_keys[()], add, nothing)
    total_Q = jnp.where(total_Q == 0, 1.0, total_Q)  # queries of the padding see nothing
    o[...] = (o_QH / total_Q[:, None]).astype(o.dtype)
    logsum[...] = top_Q + jnp.log(total_Q)


def _again(q_QH: Array, k_SH: Array, until_S: Array, logsum_Q: Array, x: Array, y: Array) -> Array:
    """Probabilities [Q, S], computed again."""
    s_QS = _scores(q_QH, k_SH, until_S, x, y)
    return jnp.where(s_QS == HIDDEN, 0.0, jnp.exp(s_QS - logsum_Q[:, None]))


def _query_kernel(q, k, v, until, keys, num_keys, do, logsum, inner, dq):
    """Gradient of one block of queries of one head: dq = sum over keys of p (do v^T - inner) k."""
    x, q_QH, do_QH, logsum_Q, inner_Q = pl.program_id(2), q[...], do[...], logsum[...], inner[...]

    def add(number: Array, dq_QH: Array) -> Array:
        y = keys[number]
        k_SH, v_SH = k[_span(y), :], v[_span(y), :]
        p_QS = _again(q_QH, k_SH, until[_span(y)], logsum_Q, x, y)
        ds_QS = p_QS * (_product(do_QH, v_SH.T) - inner_Q[:, None])
        return dq_QH + _product(ds_QS.astype(k_SH.dtype), k_SH)

    dq[...] = jax.lax.fori_loop(0, num_keys[()], add, jnp.zeros(q_QH.shape, F32)).astype(dq.dtype)


def _key_kernel(q, k, v, until, queries, num_queries, do, logsum, inner, dk, dv):
    """Gradients of one block of keys of one kv head: q, do [G, T, H], logsum, inner [G, T]; k, v, dk, dv [S, H]."""
    y, k_SH, v_SH, until_S, count = pl.program_id(2), k[...], v[...], until[...], num_queries[()]

    def add(number: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_SH, dv_SH = so_far
        g, x = jax.lax.div(number, count), queries[jax.lax.rem(number, count)]
        q_QH, do_QH = q[g, _span(x), :], do[g, _span(x), :]
        p_QS = _again(q_QH, k_SH, until_S, logsum[g, _span(x)], x, y)
        ds_QS = p_QS * (_product(do_QH, v_SH.T) - inner[g, _span(x)][:, None])
        dk_SH = dk_SH + _product(ds_QS.T.astype(q_QH.dtype), q_QH)
        return dk_SH, dv_SH + _product(p_QS.T.astype(do_QH.dtype), do_QH)

    nothing = jnp.zeros(k_SH.shape, F32), jnp.zeros(v_SH.shape, F32)
    dk_SH, dv_SH = jax.lax.fori_loop(0, q.shape[0] * count, add, nothing)
    dk[...], dv[...] = dk_SH.astype(dk.dtype), dv_SH.astype(dv.dtype)


# ------------------------------------------------------------------- calls


def _interpreted() -> bool:
    return jax.default_backend() == "cpu"


def _call(kernel: typing.Callable, grid: tuple[int, ...], ins: list, outs: list, *arrays: Array) -> typing.Any:
    """Runs a kernel over a grid. `ins` are specs, `outs` a spec, a shape and a type each."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=ins,
        out_specs=[spec for spec, *_ in outs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outs],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=_interpreted(),
        name=kernel.__name__.strip("_"),
    )(*arrays)


def _row(*lengths: int) -> pl.BlockSpec:
    """All of a row's own [lengths]."""
    return pl.BlockSpec((None, *lengths), lambda r, n, b: (r, *[0] * len(lengths)))


def _of_block(*lengths: int) -> pl.BlockSpec:
    """What belongs to block b of a row: [R, blocks, lengths]."""
    return pl.BlockSpec((None, None, *lengths), lambda r, n, b: (r, b, *[0] * len(lengths)))


def _head(*lengths: int, share: int = 1) -> pl.BlockSpec:
    """All of head n / share of a row: [R, heads, lengths]."""
    return pl.BlockSpec((None, None, *lengths), lambda r, n, b: (r, jax.lax.div(n, share), *[0] * len(lengths)))


def _part(*lengths: int) -> pl.BlockSpec:
    """Block b of head n of a row: [R, heads, T, lengths]."""
    return pl.BlockSpec((None, None, BLOCK, *lengths), lambda r, n, b: (r, n, b, *[0] * len(lengths)))


def _run_forward(q_RKGTH: Array, k_RKTH: Array, v_RKTH: Array, until_RT: Array) -> tuple[Array, Array]:
    """o [R, K, G, T, H] and the log-sum-exp, float32 [R, K, G, T]; T is a multiple of `BLOCK`."""
    R, K, G, T, H = q_RKGTH.shape
    plan, blocks, N = _plan(until_RT), T // BLOCK, K * G
    q_RNTH, keys = q_RKGTH.reshape(R, N, T, H), _head(T, H, share=G)
    ins = [_part(H), keys, keys, _row(T), _of_block(blocks), _of_block()]
    outs = [(_part(H), q_RNTH.shape, q_RNTH.dtype), (_part(), (R, N, T), F32)]
    arrays = q_RNTH, k_RKTH, v_RKTH, until_RT, plan.keys_RXY, plan.num_keys_RX
    o, logsum = _call(_forward_kernel, (R, N, blocks), ins, outs, *arrays)
    return o.reshape(q_RKGTH.shape), logsum.reshape(R, K, G, T)


def _run_backward(
    q_RKGTH: Array, k_RKTH: Array, v_RKTH: Array, until_RT: Array, o: Array, logsum_RKGT: Array, do: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    R, K, G, T, H = q_RKGTH.shape
    plan, blocks, N = _plan(until_RT), T // BLOCK, K * G
    inner_RKGT = jnp.sum(o.astype(F32) * do.astype(F32), axis=-1)  # what the softmax Jacobian subtracts
    flat = [x.reshape(R, N, *x.shape[3:]) for x in (q_RKGTH, do, logsum_RKGT, inner_RKGT)]
    keys = _head(T, H, share=G)
    ins = [_part(H), keys, keys, _row(T), _of_block(blocks), _of_block(), _part(H), _part(), _part()]
    arrays = [flat[0], k_RKTH, v_RKTH, until_RT, plan.keys_RXY, plan.num_keys_RX, *flat[1:]]
    (dq,) = _call(_query_kernel, (R, N, blocks), ins, [(_part(H), flat[0].shape, q_RKGTH.dtype)], *arrays)
    until_part = pl.BlockSpec((None, BLOCK), lambda r, n, b: (r, b))
    queries, per_query = _head(G, T, H), _head(G, T)
    ins = [queries, _part(H), _part(H), until_part, _of_block(blocks), _of_block(), queries, per_query, per_query]
    outs = [(_part(H), x.shape, x.dtype) for x in (k_RKTH, v_RKTH)]
    arrays = [q_RKGTH, k_RKTH, v_RKTH, until_RT, plan.queries_RYX, plan.num_queries_RY, do, logsum_RKGT, inner_RKGT]
    dk, dv = _call(_key_kernel, (R, K, blocks), ins, outs, *arrays)
    return dq.reshape(q_RKGTH.shape), dk, dv


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, until: Array) -> Array:
    return _run_forward(q, k, v, until)[0]


def _keep(q: Array, k: Array, v: Array, until: Array) -> tuple[Array, Saved]:
    o, logsum = _run_forward(q, k, v, until)
    return o, (q, k, v, until, o, logsum)


def _gradients(saved: Saved, do: Array) -> tuple[Array, Array, Array, None]:
    return *_run_backward(*saved, do), None  # `until` is an integer


_attend.defvjp(_keep, _gradients)


def until_attention(q_RKGTH: Array, k_RKTH: Array, v_RKTH: Array, until_RT: Array) -> Array:
    """Attention within whole rows, visibility by `until`; returns o [R, K, G, T, H]. q comes scaled.

    H must be a power of two of at least 16 on a GPU. Rows of any length are padded to whole blocks.
    """
    T = q_RKGTH.shape[3]
    more = -T % BLOCK
    q, k, v = (jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, more), (0, 0)]) for x in (q_RKGTH, k_RKTH, v_RKTH))
    until = jnp.pad(until_RT, ((0, 0), (0, more)))  # 0: seen by no one
    return _attend(q, k, v, until)[..., :T, :]

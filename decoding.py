"""The device side of the sampler: pure functions that prefill rows, sample ids and decode bursts.

`Cache` holds the keys and values of all rows, `Burst` what a decode loop carries. All shapes are those of one
device. `compiled` wraps the functions in `shard_map` over the mesh axis "data"; nothing is communicated.

Row suffixes: B rows that take part in a call, I steps of a burst; the others are those of model.py.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checks import Bound, Checked, at_least, one_of, require, within
from model import Decoder, ModelConfig, Past

REFILL_ONE_IN = 4  # a burst ends when one in so many of its rows is done, decoding when one in so many of all is
ROWS = PartitionSpec("data")
# Columns of what the host sends about a row. `row` is the row's number on its device, or one past the last: no row.
DECODE_COLUMNS = ("row", "length", "token", "drawn", "limit", "key_low", "key_high")
PREFILL_COLUMNS = ("row", "length")
WARM = Bound(lambda value: value == 0 or 1e-3 <= value < 1e9, "0, or from 0.001 to a billion")  # else logits overflow


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Checked):
    """How many rows there are and how they are sampled. Raises ValueError on values that cannot work."""

    section = "sampler"
    rows: Annotated[int, within(1, 1 << 16)]  # threads decoded side by side, over all devices of a process
    steps_per_call: Annotated[int, within(1, 1 << 12)]  # most decode steps per device call
    length_bucket: Annotated[int, within(1, 1 << 17)]  # histories are viewed in multiples of this many slots
    max_gathered_slots: Annotated[int, at_least(1)]  # rows x length of a device call: few fit the cache of a CPU
    temperature: Annotated[float, WARM]  # of the policy; 0 is greedy
    top_k: Annotated[int, at_least(0)]  # sample from the k most likely ids; 0 is off
    top_p: Annotated[float, Bound(lambda p: 0 < p <= 1, "above 0 and at most 1")]  # of the likely ids; 1 is off
    buckets: Annotated[str, one_of("fine", "coarse")] = "fine"  # sizes that device functions are compiled for

    def fit(self, model: ModelConfig, devices: int) -> None:
        """Raises ValueError if this model or number of devices cannot be sampled with these settings."""
        require(self.rows % devices == 0, f"sampler.rows={self.rows} must be a multiple of the {devices} devices")
        fits = self.top_k <= model.vocab_size
        require(fits, f"sampler.top_k={self.top_k} exceeds the vocabulary of {model.vocab_size}")


class Cache(typing.NamedTuple):
    """Keys and values, layer by layer; per device [R/data, K, S, H], the order in which attention reads them.

    One array per layer and the heads outside the slots: otherwise XLA on CPU copies the cache in every step.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    @classmethod
    def of(cls, new: typing.Any) -> Cache:
        """From the keys and values [L, B, T, K, H] that the model returns."""
        return cls(*(tuple(jnp.swapaxes(x, 2, 3)) for x in new))

    def past(self, visible_BS: Array) -> Past:
        """As the model reads it; lists stand for the axis of layers."""
        k, v = ([jnp.swapaxes(x, 1, 2) for x in part] for part in self)
        return Past(typing.cast(Array, k), typing.cast(Array, v), visible_BS)


class Burst(typing.NamedTuple):
    """What a burst carries from step to step, per device; B rows take part."""

    step: Array  # int32 scalar
    count_B: Array  # int32: ids drawn in this burst
    done_B: Array  # bool
    token_B: Array  # int32: id to feed next
    tail: Cache  # [B, K, burst, H], column i written at step i
    ids_BI: Array  # int32 [B, burst]
    logp_BI: Array  # float32 [B, burst]: log-probs of the policy


# ------------------------------------------------------------------- the draw


def adjusted_logprobs(logits_BV: Array, config: SamplerConfig) -> Array:
    """Log-probs [B, V] of the distribution sampled from: the policy's top-k, and of those top-p. Ties stay in.

    `config.temperature` must not be 0. Ids outside the support have -inf.
    """
    logits_BV = logits_BV / config.temperature
    if config.top_k:
        kth_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    logp_BV = jax.nn.log_softmax(logits_BV)
    if config.top_p < 1:
        falling_BV = jnp.sort(logp_BV, axis=-1, descending=True)
        p_BV = jnp.exp(falling_BV)
        needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < config.top_p
        least_B1 = jnp.where(needed_BV, falling_BV, jnp.inf).min(axis=-1, keepdims=True)
        logp_BV = jax.nn.log_softmax(jnp.where(logp_BV < least_B1, -jnp.inf, logp_BV))
    return logp_BV


def sample(logits_BV: Array, key_B2: Array, number_B: Array, config: SamplerConfig) -> tuple[Array, Array]:
    """Samples one id per row; returns the ids and their log-probs under the policy, each [B].

    `key` is uint32 [B, 2], `number` the count of ids that the thread of the row has sampled before. The id is
    looked up in the cumulative distribution: one random number per row, where `jax.random.categorical` needs V.
    """
    logp_BV = jax.nn.log_softmax(logits_BV / (config.temperature or 1.0))  # greedy: the model's own
    if config.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1)
    else:
        p_BV = jnp.exp(adjusted_logprobs(logits_BV, config))
        # Rounding can leave the cumulative sum not quite monotone: ids of probability 0 are excluded explicitly.
        cumulative_BV = jnp.where(p_BV > 0, jnp.cumsum(p_BV, axis=-1), -1)
        u_B = jax.vmap(_uniform)(key_B2, number_B) * cumulative_BV.max(axis=-1)
        ids_B = jnp.argmax(cumulative_BV >= u_B[:, None], axis=-1)
    return ids_B.astype(jnp.int32), jnp.take_along_axis(logp_BV, ids_B[:, None], axis=-1)[:, 0]


def _uniform(key_2: Array, number: Array) -> Array:
    """A number above 0 and at most 1: 0 would choose the first id, however improbable."""
    return 1 - jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), number))


# ------------------------------------------------------------------- device functions (all shapes per device)


def _view(history: Array, row_B: Array, slots: int) -> Array:
    """The first `slots` slots of some rows: [R/data, K, S, H] -> [B, K, slots, H]."""
    if row_B.shape[0] == history.shape[0]:
        return history[:, :, :slots]  # the host sends the rows in order then
    return history.at[row_B, :, :slots].get(mode="clip")


def _write(history: Array, row_B: Array, start_B: Array, new: Array) -> Array:
    """Writes new [B, K, T, H] to slots [start, start + T) of the rows; those of "no row" are dropped."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    where_B2 = jnp.stack([row_B, start_B], axis=1)
    return jax.lax.scatter(history, where_B2, new, numbers, unique_indices=True, mode="drop")


def _prefill_device(
    model: Decoder, params: typing.Any, history: Cache, rows_B: Array, ids_BT: Array, slots: int
) -> Cache:
    """Feeds ids [B, T] after the first `length` slots of their rows; rows is int32 [B, columns]."""
    row_B, length_B = rows_B.T
    T = ids_BT.shape[1]
    view = jax.tree.map(lambda x: _view(x, row_B, slots), history)
    past = [view.past(jnp.arange(slots)[None] < length_B[:, None])] if slots else []
    positions_BT = length_B[:, None] + jnp.arange(T)[None]
    until_BT = jnp.full_like(ids_BT, T)
    _, new = model.apply({"params": params}, ids_BT, positions_BT, until_BT, past)
    return jax.tree.map(lambda x, new: _write(x, row_B, length_B, new), history, Cache.of(new))


def _decode_device(
    model: Decoder,
    config: SamplerConfig,
    stop_ids: tuple[int, ...],
    params: typing.Any,
    history: Cache,
    rows_B: Array,
    slots: int,
) -> tuple[Cache, tuple[Array, Array, Array]]:
    """One burst of the rows int32 [B, columns]; returns what a `Burst` says of counts, ids and log-probs."""
    row_B, length_B, token_B, drawn_B, limit_B, *key = rows_B.T
    key_B2 = jax.lax.bitcast_convert_type(jnp.stack(key, axis=1), jnp.uint32)
    view = jax.tree.map(lambda x: _view(x, row_B, slots), history)
    old_BS = jnp.arange(slots)[None] < length_B[:, None]
    idle_B = limit_B == 0
    enough = (jnp.sum(~idle_B) + REFILL_ONE_IN - 1) // REFILL_ONE_IN

    def going(burst: Burst) -> Array:
        """Whether the burst takes another step."""
        return (burst.step < config.steps_per_call) & (jnp.sum(burst.done_B & ~idle_B) < enough)

    def step(burst: Burst) -> Burst:
        """Feeds the last id of every row, and samples the next one."""
        visible_BI = jnp.broadcast_to(jnp.arange(config.steps_per_call) < burst.step, burst.ids_BI.shape)
        tokens_B1 = burst.token_B[:, None]
        positions_B1 = length_B[:, None] + burst.step
        past = view.past(old_BS), burst.tail.past(visible_BI)
        logits, new = model.apply({"params": params}, tokens_B1, positions_B1, jnp.ones_like(tokens_B1), past)
        ids_B, logp_B = sample(logits[:, 0], key_B2, drawn_B + burst.step, config)
        # Always burst.step, as no id is negative: but XLA sees that it needs the ids, so it ends all reads of the
        # tail before this write, and writes in place.
        column = jnp.where(ids_B[0] < 0, 0, burst.step)
        count_B = burst.count_B + ~burst.done_B
        stop_B = (ids_B[:, None] == jnp.asarray(stop_ids, jnp.int32)[None]).any(axis=1)
        return Burst(
            burst.step + 1,
            count_B,
            burst.done_B | stop_B | (count_B >= limit_B),
            ids_B,
            jax.tree.map(lambda x, new: _put(x, new, column, 2), burst.tail, Cache.of(new)),
            _put(burst.ids_BI, ids_B[:, None], burst.step),
            _put(burst.logp_BI, logp_B[:, None], burst.step),
        )

    start = _first_burst(idle_B, token_B, view, config.steps_per_call)
    end = jax.lax.while_loop(going, step, start)
    history = jax.tree.map(lambda x, tail: _write(x, row_B, length_B, tail), history, end.tail)
    return history, (end.count_B, end.ids_BI, end.logp_BI)


def _first_burst(idle_B: Array, token_B: Array, view: Cache, steps: int) -> Burst:
    """A burst of at most `steps` steps before its first one. Idle rows count as done."""
    B = token_B.shape[0]
    tail = jax.tree.map(lambda x: _zeros((*x.shape[:2], steps, x.shape[3]), x.dtype), view)
    ids_BI, logp_BI = _zeros((B, steps), jnp.int32), _zeros((B, steps), jnp.float32)
    return Burst(_zeros((), jnp.int32), _zeros((B,), jnp.int32), idle_B, token_B, tail, ids_BI, logp_BI)


def _put(x: Array, column: Array, step: Array, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, column.astype(x.dtype), step, axis)


def _zeros(shape: tuple[int, ...], dtype: typing.Any) -> Array:
    """Zeros of one device. In the types of shard_map a loop's carry must not turn from replicated to per-device."""
    return jax.lax.pcast(jnp.zeros(shape, dtype), "data", to="varying")


@functools.cache
def compiled(model: Decoder, config: SamplerConfig, stop_ids: tuple[int, ...], mesh: Mesh) -> tuple[typing.Any, ...]:
    """The jitted (prefill, decode) over all devices. They compile once per combination of buckets."""

    def prefill(params: typing.Any, history: Cache, rows: Array, ids: Array, slots: int) -> Cache:
        """`_prefill_device` on every device: rows [devices * B, columns], ids [devices * B, T]."""
        specs = (PartitionSpec(), ROWS, ROWS, ROWS)
        device = functools.partial(_prefill_device, model, slots=slots)
        return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=ROWS)(params, history, rows, ids)

    def decode(params: typing.Any, history: Cache, rows: Array, slots: int) -> typing.Any:
        """`_decode_device` on every device: rows [devices * B, columns]."""
        specs = (PartitionSpec(), ROWS, ROWS)
        device = functools.partial(_decode_device, model, config, stop_ids, slots=slots)
        return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=ROWS)(params, history, rows)

    # One spelling of the history's sharding, in and out: a second spelling would compile every function twice.
    jit = functools.partial(
        jax.jit, static_argnames="slots", donate_argnames="history", out_shardings=NamedSharding(mesh, ROWS)
    )
    return jit(prefill), jit(decode)

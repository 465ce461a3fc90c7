"""The sampler: rows that are threads, decoded in bursts on the device, refilled, rewound and extended.

A row is a KV cache of `context` ids. The host keeps what is small (the ids of
every row, who is active, how much each may still draw) and the device what is
large (the history); every device call is a pure function of both.

  prefill  1. rewind the row to `keep` ids, append the fill's ids;
           2. feed those that are not cached yet, but for the last one, in chunks of
              a few fixed lengths, several rows per call; nothing else is fed.
  decode   3. part the active rows into groups of like length, small enough for a CPU's
              cache, and gather the histories of a group into a view of `bucket`-sized
              steps, as long as the longest of them: compute follows the active
              rows and their length, not the number of rows and the context;
           4. burst, group by group: a `while_loop` feeds each row its last id and draws the next one.
              New keys and values go into a tail which all rows write at the same
              column (cheap), attention looks at view and tail. A row is done at a
              stop id or at its limit; the burst ends after `burst` steps, or when
              a quarter of its rows are done;
           5. flush the tail into the histories, each row's at its own length;
           6. the host reads ids and log-probs of a group while the next one decodes,
              and repeats until a quarter of the rows have stopped, so that as many are
              refilled at once: few large prefills are faster than many small ones.

The last id of a row is never fed before there is something to draw after it, so a
row that stopped holds one id more than its cache, and a fill of a single id needs
no prefill.

Draw n of a thread is a function of (its key, n) and its distribution alone: one
uniform, `fold_in(key, n)`, looked up in the cumulative distribution. Rows,
devices and neighbours cannot change it, but for rounding at a near tie.

Several devices: `shard_map` over the mesh axis "data"; each owns rows / devices
rows (device d the rows d * rows / devices and on), their history and its own
loop, and nothing is communicated. This module knows nothing of tasks, spawn or join.

Deviations from the paper: its engine sends the whole context again after a join.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
import typing
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import Decoder, ModelConfig, Past
from parallel_runtime import Fill, Stopped

PREFILL_LENGTHS = (32, 128)  # ids per row in one call; longer fills take several
PREFILL_ROWS = (1, 4, 16)  # rows per device in one call; more take several
ENOUGH = 4  # a burst ends when 1 / ENOUGH of its rows are done, decoding when 1 / ENOUGH of all are
ROWS = PartitionSpec("data")
# Columns of what the host sends about a row. `row` is the row's number on its device, or one past the last: no row.
DECODE_COLUMNS = ("row", "length", "token", "drawn", "limit", "key_low", "key_high")
PREFILL_COLUMNS = ("row", "length")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How many rows there are and how they are sampled. Raises ValueError on values that make no sense."""

    rows: int  # threads decoded side by side, over all devices of a process
    burst: int  # most decode steps per device call
    bucket: int  # histories are viewed in multiples of this many slots
    view: int  # most slots, rows x length, that one device call views: on a CPU as many as its cache holds
    temperature: float  # 0 is greedy
    top_k: int  # sample from the k most likely ids; 0 is off
    top_p: float  # sample from the most likely ids that together have this probability; 1 is off

    def __post_init__(self) -> None:
        for field in ("rows", "burst", "bucket", "view"):
            if getattr(self, field) < 1:
                raise ValueError(f"sampler.{field} must be at least 1, not {getattr(self, field)}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampler.temperature={self.temperature} and top_k={self.top_k} must not be negative, "
                f"and 0 < top_p={self.top_p} <= 1"
            )

    def check(self, model: ModelConfig, devices: int) -> None:
        """Raises ValueError if this model or number of devices cannot be sampled with these settings."""
        if self.rows % devices:
            raise ValueError(f"sampler.rows={self.rows} must be a multiple of the {devices} devices")
        if self.top_k > model.vocab_size:
            raise ValueError(f"sampler.top_k={self.top_k} exceeds the vocabulary of {model.vocab_size}")


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
    logp_BI: Array  # float32 [B, burst]: model's log-probs
    sampled_logp_BI: Array  # float32 [B, burst]: log-probs of the distribution drawn from


# ------------------------------------------------------------------- the draw


def sampling_logprobs(logits_BV: Array, config: SamplerConfig) -> Array:
    """Log-probs [B, V] of the distribution sampled from: temperature, then top-k, then top-p (ties stay in).

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


def draw(logits_BV: Array, key_B2: Array, number_B: Array, config: SamplerConfig) -> tuple[Array, Array, Array]:
    """One id per row: (ids, the model's log-probs of them, log-probs under the distribution drawn from), each [B].

    key is uint32 [B, 2], number the count of draws its thread has made before.
    """
    logp_BV = jax.nn.log_softmax(logits_BV)
    if config.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return ids_B, _pick(logp_BV, ids_B), jnp.zeros_like(logp_BV[:, 0])
    sampled_BV = sampling_logprobs(logits_BV, config)
    p_BV = jnp.exp(sampled_BV)
    # Rounding can leave the cumulative sum not quite monotone: an id of probability 0 is excluded by name.
    cumulative_BV = jnp.where(p_BV > 0, jnp.cumsum(p_BV, axis=-1), -1)
    u_B = jax.vmap(_uniform)(key_B2, number_B) * cumulative_BV.max(axis=-1)
    ids_B = jnp.argmax(cumulative_BV > u_B[:, None], axis=-1).astype(jnp.int32)
    return ids_B, _pick(logp_BV, ids_B), _pick(sampled_BV, ids_B)


def _uniform(key_2: Array, number: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), number))


def _pick(x_BV: Array, ids_B: Array) -> Array:
    return jnp.take_along_axis(x_BV, ids_B[:, None], axis=-1)[:, 0]


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
) -> tuple[Cache, tuple[Array, Array, Array, Array]]:
    """One burst of the rows int32 [B, columns]; returns what a `Burst` says of counts, ids and log-probs."""
    row_B, length_B, token_B, drawn_B, limit_B, *key = rows_B.T
    key_B2 = jax.lax.bitcast_convert_type(jnp.stack(key, axis=1), jnp.uint32)
    view = jax.tree.map(lambda x: _view(x, row_B, slots), history)
    old_BS = jnp.arange(slots)[None] < length_B[:, None]
    idle_B = limit_B == 0
    enough = (jnp.sum(~idle_B) + ENOUGH - 1) // ENOUGH

    def going(burst: Burst) -> Array:
        return (burst.step < config.burst) & (jnp.sum(burst.done_B & ~idle_B) < enough)

    def step(burst: Burst) -> Burst:
        visible_BI = jnp.broadcast_to(jnp.arange(config.burst) < burst.step, burst.ids_BI.shape)
        tokens_B1 = burst.token_B[:, None]
        positions_B1 = length_B[:, None] + burst.step
        past = view.past(old_BS), burst.tail.past(visible_BI)
        logits, new = model.apply({"params": params}, tokens_B1, positions_B1, jnp.ones_like(tokens_B1), past)
        ids_B, logp_B, sampled_logp_B = draw(logits[:, 0], key_B2, drawn_B + burst.step, config)
        # Never the 0, but now the tail is written after all reads of it; else XLA copies it in every step.
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
            _put(burst.sampled_logp_BI, sampled_logp_B[:, None], burst.step),
        )

    B = row_B.shape[0]
    start = Burst(
        _zeros((), jnp.int32),
        _zeros((B,), jnp.int32),
        idle_B,
        token_B,
        jax.tree.map(lambda x: _zeros((*x.shape[:2], config.burst, x.shape[3]), x.dtype), view),
        _zeros((B, config.burst), jnp.int32),
        _zeros((B, config.burst), jnp.float32),
        _zeros((B, config.burst), jnp.float32),
    )
    end = jax.lax.while_loop(going, step, start)
    history = jax.tree.map(lambda x, tail: _write(x, row_B, length_B, tail), history, end.tail)
    return history, (end.count_B, end.ids_BI, end.logp_BI, end.sampled_logp_BI)


def _put(x: Array, column: Array, step: Array, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, column.astype(x.dtype), step, axis)


def _zeros(shape: tuple[int, ...], dtype: typing.Any) -> Array:
    """Zeros that differ between devices once the loop has run: its carry must have one type."""
    return jax.lax.pcast(jnp.zeros(shape, dtype), "data", to="varying")


@functools.cache
def _compiled(model: Decoder, config: SamplerConfig, stop_ids: tuple[int, ...], mesh: Mesh) -> tuple[typing.Any, ...]:
    """The jitted (prefill, decode) over all devices. They compile once per combination of buckets."""

    def prefill(params: typing.Any, history: Cache, rows: Array, ids: Array, slots: int) -> Cache:
        specs = (PartitionSpec(), ROWS, ROWS, ROWS)
        device = functools.partial(_prefill_device, model, slots=slots)
        return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=ROWS)(params, history, rows, ids)

    def decode(params: typing.Any, history: Cache, rows: Array, slots: int) -> typing.Any:
        specs = (PartitionSpec(), ROWS, ROWS)
        device = functools.partial(_decode_device, model, config, stop_ids, slots=slots)
        return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=ROWS)(params, history, rows)

    # The history goes out as it came in: were its sharding spelled another way, every function would compile twice.
    jit = functools.partial(
        jax.jit, static_argnames="slots", donate_argnames="history", out_shardings=NamedSharding(mesh, ROWS)
    )
    return jit(prefill), jit(decode)


# ------------------------------------------------------------------- host


@dataclasses.dataclass
class _Row:
    """What the host knows of a row. `ids` are the row's, of which the first `cached` are in the history."""

    ids: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    limit: int = 0  # ids that may still be drawn; 0 is inactive
    key: tuple[int, int] = (0, 0)
    drawn: int = 0
    drew: Stopped = dataclasses.field(default_factory=lambda: Stopped(0, [], [], []))  # since its last fill


class Sampler:
    """`rows` threads of a decoder, decoded side by side; an `Engine` for `parallel_runtime.Runtime`.

    `params` are the decoder's, `stop_ids` end a row, `mesh` (default: one device) has an axis "data" over
    which the rows are spread. Raises ValueError if the rows do not divide evenly over it.
    """

    def __init__(
        self,
        model: Decoder,
        params: typing.Any,
        config: SamplerConfig,
        stop_ids: Sequence[int],
        mesh: Mesh | None = None,
    ) -> None:
        self.mesh = mesh or Mesh(np.asarray(jax.local_devices()[:1]), ("data",))
        self.rows, self.devices, self.context = config.rows, self.mesh.shape["data"], model.config.context
        config.check(model.config, self.devices)
        self.model, self.config = model, config
        self.per_device = self.rows // self.devices
        self.row_buckets = _doubling(self.per_device)
        self.slot_buckets = _two_bits(config.bucket, self.context)
        self.prefill_lengths = tuple(sorted({min(length, self.context) for length in PREFILL_LENGTHS}))
        self.prefill_slots = (0, *self.slot_buckets[::-4][::-1])
        # Ids fed (prefill_tokens) and drawn (decode_tokens), decode_steps, steps x rows that were computed
        # (row_steps), and prefill_seconds, decode_seconds, host_seconds.
        self.counters: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._stop_ids = frozenset(stop_ids)
        self._history = self._empty()
        self._prefill, self._decode = _compiled(model, config, tuple(stop_ids), self.mesh)
        self.update(params)
        self.reset()

    @property
    def compilations(self) -> int:
        """Device functions compiled so far, by all samplers alike in model, config, stop ids and mesh."""
        return self._prefill._cache_size() + self._decode._cache_size()

    def _empty(self) -> Cache:
        c = self.model.config
        # Chunks and tails are written whole: what lies beyond a row's length is overwritten later.
        slots = self.slot_buckets[-1] + max(self.config.burst, self.prefill_lengths[-1])
        shape = (self.rows, c.kv_heads, slots, c.head_width)
        zeros = jax.jit(lambda: jnp.zeros(shape, c.dtype), out_shardings=NamedSharding(self.mesh, ROWS))
        return Cache(*(tuple(zeros() for _ in range(c.layers)) for _ in range(2)))

    def update(self, params: typing.Any) -> None:
        """Takes new parameters of the same shapes. Rows keep what they have cached under the old ones."""
        dtype = self.model.config.dtype  # matrices are computed in it; the scales of norms stay float32
        params = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
        self._params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))

    def reset(self) -> None:
        """Stops and empties every row, even after an exception that left no history behind."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._history)):
            self._history = self._empty()
        self._rows = [_Row() for _ in range(self.rows)]

    def warmup(self) -> None:
        """Compiles the device functions for every combination of buckets; otherwise each compiles when first used."""
        for slots in self.slot_buckets:
            for size in self.row_buckets[: self.row_buckets.index(self._most(slots)) + 1]:
                jax.block_until_ready(self._run_decode(self._layout([], size, len(DECODE_COLUMNS))[0], slots))
        sizes = [size for size in PREFILL_ROWS if size <= self.per_device]
        for slots, size, length in itertools.product(self.prefill_slots, sizes, self.prefill_lengths):
            rows, _ = self._layout([], size, len(PREFILL_COLUMNS))
            self._run_prefill(rows, np.zeros((len(rows), length), np.int32), slots)

    def _run_prefill(self, rows: np.ndarray, ids: np.ndarray, slots: int) -> None:
        self._history = self._prefill(self._params, self._history, *self._put(rows, ids), slots=slots)
        jax.block_until_ready(self._history)

    def _run_decode(self, rows: np.ndarray, slots: int) -> tuple[Array, ...]:
        self._history, drawn = self._decode(self._params, self._history, *self._put(rows), slots=slots)
        return drawn

    def prefill(self, fills: list[Fill]) -> None:
        """Sets rows going: each is rewound to its first `keep` ids and extended by `ids`.

        Raises ValueError if there is no such row, if it has not stopped, if it has fewer ids than it is to
        keep, or if the fill has no ids, no limit, or leaves no room to draw in the context.
        """
        begin = time.perf_counter()
        device = self.counters["prefill_seconds"]
        for fill in fills:
            self._check(fill)
            row = self._rows[fill.row]
            row.ids = row.ids[: fill.keep] + fill.ids
            row.cached = min(row.cached, fill.keep)
            row.limit, row.key, row.drawn = min(fill.limit, self.context - len(row.ids)), fill.key, fill.drawn
            row.drew = Stopped(fill.row, [], [], [])
        while waiting := [fill.row for fill in fills if self._lacking(fill.row)]:
            self._feed(*self._group(waiting))
        self.counters["host_seconds"] += time.perf_counter() - begin - (self.counters["prefill_seconds"] - device)

    def _check(self, fill: Fill) -> None:
        if not 0 <= fill.row < self.rows:
            raise ValueError(f"there is no row {fill.row} of {self.rows}")
        length = len(self._rows[fill.row].ids)
        if not 0 <= fill.keep <= length:
            raise ValueError(f"row {fill.row} has {length} ids and cannot keep {fill.keep}")
        if self._rows[fill.row].limit:
            raise ValueError(f"row {fill.row} has not stopped yet")
        if not fill.ids or fill.limit < 1:
            raise ValueError(f"a fill needs ids ({len(fill.ids)} given) and a limit of at least 1 ({fill.limit} given)")
        if fill.keep + len(fill.ids) >= self.context:
            raise ValueError(f"{fill.keep} + {len(fill.ids)} ids leave no room to draw in a context of {self.context}")

    def _lacking(self, number: int) -> int:
        return len(self._rows[number].ids) - 1 - self._rows[number].cached

    def _chunk(self, number: int) -> int:
        return _fit(self.prefill_lengths, min(self._lacking(number), self.prefill_lengths[-1]))

    def _group(self, waiting: list[int]) -> tuple[list[int], int, int]:
        """Rows to feed in one call, how many that call takes per device, and how many ids of each."""
        length = min(map(self._chunk, waiting))
        alike = [number for number in waiting if self._chunk(number) == length]
        alike.sort(key=lambda number: self._rows[number].cached)
        devices = [[n for n in alike if n // self.per_device == device] for device in range(self.devices)]
        size = max(size for size in PREFILL_ROWS if size <= max(map(len, devices)))
        return [number for rows in devices for number in rows[:size]], size, length

    def _feed(self, numbers: list[int], size: int, length: int) -> None:
        """A chunk of each row goes through the model and into the history."""
        slots = _fit(self.prefill_slots, max(self._rows[number].cached for number in numbers))
        rows, order = self._layout(numbers, size, len(PREFILL_COLUMNS))
        ids = np.zeros((len(rows), length), np.int32)
        for place, number in order:
            row = self._rows[number]
            chunk = row.ids[row.cached : -1][:length]
            rows[place, 1], ids[place, : len(chunk)] = row.cached, chunk
            row.cached += len(chunk)
            self.counters["prefill_tokens"] += len(chunk)
        begin = time.perf_counter()
        self._run_prefill(rows, ids, slots)
        self.counters["prefill_seconds"] += time.perf_counter() - begin

    def _layout(self, numbers: list[int], size: int, columns: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """int32 [devices * size, columns] with the column `row` filled in, and (place in it, number) of every row."""
        rows = np.zeros((self.devices * size, columns), np.int32)
        rows[:, 0] = self.per_device  # no row
        order, taken = [], collections.Counter[int]()
        for number in numbers:
            device, row = divmod(number, self.per_device)
            place = device * size + (row if size == self.per_device else taken[device])
            rows[place, 0] = row
            order.append((place, number))
            taken[device] += 1
        return rows, order

    def _put(self, *arrays: np.ndarray) -> typing.Any:
        return jax.device_put(arrays, NamedSharding(self.mesh, ROWS))

    def decode(self) -> list[Stopped]:
        """Bursts until a quarter of the active rows have stopped; returns those, in order. No active row: []."""
        started = active = [number for number, row in enumerate(self._rows) if row.limit]
        while ENOUGH * (len(started) - len(active)) < len(started):  # one that has stopped costs nothing meanwhile
            self._bursts(active)
            active = [number for number in active if self._rows[number].limit]
        return [self._rows[number].drew for number in started if not self._rows[number].limit]

    def _bursts(self, active: list[int]) -> None:
        """A burst of every active row, group by group, and what they drew."""
        begin = time.perf_counter()
        groups = [self._decode_call(*group) for group in self._groups(active)]
        called = time.perf_counter()
        for size, order, drawn in groups:
            count, *outputs = jax.device_get(drawn)  # the next groups decode while this one is booked
            returned = time.perf_counter()
            for place, number in order:
                self._book(number, count[place], *(x[place] for x in outputs))
            self.counters["decode_steps"] += int(count.max())
            self.counters["row_steps"] += int(count.max()) * size
            self.counters["decode_tokens"] += int(count.sum())
        self.counters["decode_seconds"] += returned - called
        self.counters["host_seconds"] += time.perf_counter() - begin - (returned - called)

    def _groups(self, active: list[int]) -> Iterator[tuple[list[int], int, int]]:
        """Rows to decode in one call, how many that call takes per device, and how many slots it views."""
        devices = [
            sorted((n for n in active if n // self.per_device == device), key=lambda n: self._rows[n].cached)
            for device in range(self.devices)
        ]
        while left := [rows for rows in devices if rows]:
            slots = _fit(self.slot_buckets, max(self._rows[rows[-1]].cached for rows in left))
            group = [rows[-self._most(slots) :] for rows in left]
            for rows, taken in zip(left, group, strict=True):
                del rows[-len(taken) :]
            yield [n for taken in group for n in taken], _fit(self.row_buckets, max(map(len, group))), slots

    def _most(self, slots: int) -> int:
        """How many rows of this length one call takes per device."""
        return max([size for size in self.row_buckets if size * slots <= self.config.view] or [1])

    def _decode_call(
        self, numbers: list[int], size: int, slots: int
    ) -> tuple[int, list[tuple[int, int]], tuple[Array, ...]]:
        """Starts a burst of some rows; returns rows computed, the place of every row, and what will be drawn."""
        rows, order = self._layout(numbers, size, len(DECODE_COLUMNS))
        for place, number in order:
            row = self._rows[number]
            rows[place, 1:5] = row.cached, row.ids[-1], row.drawn, row.limit
            rows[place, 5:] = np.asarray(row.key, np.uint32).view(np.int32)
        return len(rows), order, self._run_decode(rows, slots)

    def _book(self, number: int, count: int, ids: np.ndarray, logp: np.ndarray, sampled_logp: np.ndarray) -> None:
        """Notes what a row has drawn; one that has stopped gets the limit 0."""
        row, new = self._rows[number], ids[:count].tolist()
        row.ids += new
        row.cached += len(new)
        row.drawn += len(new)
        row.limit = 0 if new and new[-1] in self._stop_ids else row.limit - len(new)
        row.drew.ids += new
        row.drew.logprobs += logp[:count].tolist()
        row.drew.sampled_logprobs += sampled_logp[:count].tolist()


def _fit(buckets: Sequence[int], needed: int) -> int:
    return next(bucket for bucket in buckets if bucket >= needed)


def _doubling(last: int) -> tuple[int, ...]:
    """1, 4, 8, 16, ... and last: a step of two rows costs what one of four does."""
    return (*(1 << i for i in range((last - 1).bit_length()) if i != 1), last)


def _two_bits(unit: int, last: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... times unit, up to the first that is not below `last`: a third is wasted at most."""
    buckets = [unit]
    while buckets[-1] < last:
        times = buckets[-1] // unit
        buckets.append(unit * (times + max(1, (1 << times.bit_length()) // 4)))
    return tuple(buckets)

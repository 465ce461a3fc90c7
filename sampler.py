"""The sampler: rows that are threads, decoded in bursts on the device, refilled, rewound and extended.

A row is a KV cache of `context` ids. The host keeps what is small: the ids of every row, who is active,
how many ids each may still sample. The device keeps what is large: the *history*, the keys and values of
every row. Every device call is a pure function of both (`decoding.py`).

  prefill  1. Rewind the row to `keep` ids and append the ids of the fill.
           2. Feed the ids that are not cached yet, except the last one, in chunks of a few fixed lengths,
              several rows per call. Nothing else is fed.
  decode   3. Part the active rows into groups of similar length that fit the cache of a CPU. Gather the
              histories of a group into a *view*, as long as the longest row, rounded up to 1, 2, 3, 4, 6, 8, ...
              times `length_bucket` slots.
              So compute follows the active rows and their lengths, not the number of rows and the context.
           4. Burst: a `while_loop` feeds each row its last id and samples the next one. New keys and values
              go into a *tail* that all rows write at the same column, which is cheap. Attention reads view
              and tail. A row is done at a stop id or at its limit. The burst ends after `steps_per_call` steps, or
              when a quarter of its rows are done.
           5. Flush the tail into the histories, each row at its own length.
           6. The host reads the ids of one group while the next one decodes. It repeats until a quarter of
              the rows have stopped, and they are refilled at once: few large prefills beat many small ones.

Example: three rows, a bucket of 4 slots, a burst of 3 steps; h is history, t the tail, . is not visible.

    row 0  h h h h h . . .  | t t t      The view has 8 slots, two buckets, because row 1 is the longest.
    row 1  h h h h h h h .  | t t t      The tail is the same three columns for all rows.
    row 2  h h . . . . . .  | t t t      The flush writes it behind each row's own h: from slots 5, 7 and 2 on.

The last id of a row is fed only when an id is to be sampled after it. So a row that stopped holds one id
more than its cache, and a fill of one id needs no prefill: ids [5, 7, 9] have a cache of 5 and 7, the next
step feeds 9 and samples.

Draw n of a thread depends on (its key, n) and on its distribution alone: one uniform number,
`fold_in(key, n)`, is looked up in the cumulative distribution. A rewind repeats positions, never counts,
so draws are keyed by count. Rows, devices and neighbours change no draw, except by rounding at a near tie.

Several devices: each owns rows / devices rows, their history and its own loop. Nothing is communicated.
This module knows nothing of tasks, spawn or join.

Deviation from the paper: its engine sends the whole context again after a join.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
import typing
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checks import require
from decoding import DECODE_COLUMNS, PREFILL_COLUMNS, REFILL_ONE_IN, ROWS, Cache, SamplerConfig, compiled
from model import Decoder
from protocols import Completion, PrefillRequest

PREFILL_LENGTHS = (32, 128)  # ids per row in one call; longer fills take several
PREFILL_ROWS = (1, 4, 16)  # rows per device in one call; more take several


class Buckets(typing.NamedTuple):
    """Sizes of device calls. Decoding compiles a function for each rows x slots, prefill for each of all three."""

    rows: tuple[int, ...]
    slots: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    prefill_slots: tuple[int, ...]


def make_buckets(config: SamplerConfig, rows: int, context: int) -> Buckets:
    """Sizes for so many rows of a device.

    "fine" sizes waste little, which a CPU needs. "coarse" ones are few, because an accelerator takes seconds to
    compile each function and computes the waste at little cost.
    """
    slots = _length_buckets(config.length_bucket, context)
    if config.buckets == "coarse":
        decoded, fed = {max(1, rows // 32), max(1, rows // 4), rows}, {max(1, rows // 32), max(1, rows // 8)}
        lengths, every = {PREFILL_LENGTHS[-1]}, len(slots)
    else:  # a step of two rows costs what one of four does
        decoded, fed = {1 << i for i in range((rows - 1).bit_length()) if i != 1} | {rows}, {*PREFILL_ROWS}
        lengths, every = {*PREFILL_LENGTHS}, 4
    sizes = (tuple(sorted(sizes)) for sizes in (decoded, fed, {min(length, context) for length in lengths}))
    row_sizes, fed_rows, fed_lengths = sizes
    return Buckets(row_sizes, slots, fed_rows, fed_lengths, (0, *slots[::-every][::-1]))


def row_slots(config: SamplerConfig, buckets: Buckets) -> int:
    """Slots of a row. Chunks and tails are written whole: what lies beyond a row's length is overwritten later."""
    return buckets.slots[-1] + max(config.steps_per_call, buckets.prefill_lengths[-1])


@dataclasses.dataclass
class _Row:
    """What the host knows of a row. `ids` are the row's, of which the first `cached` are in the history."""

    ids: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    max_new_tokens: int = 0  # ids that may still be sampled; 0 is inactive
    key: tuple[int, int] = (0, 0)
    num_sampled: int = 0  # by its thread
    drew: Completion = dataclasses.field(default_factory=lambda: Completion(0, [], []))  # since its last fill


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
        config.fit(model.config, self.devices)
        model = Decoder(dataclasses.replace(model.config, attention="blocks", scan_layers=False))  # of training alone
        self.model, self.config = model, config
        self.per_device = self.rows // self.devices
        self.buckets = make_buckets(config, self.per_device, self.context)
        # Ids fed (prefill_tokens) and drawn (decode_tokens), decode_steps, steps x rows that were computed
        # (row_steps), and prefill_seconds, decode_seconds, host_seconds.
        self.counters: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._stop_ids = frozenset(stop_ids)
        self._history = self._empty()
        self._prefill, self._decode = compiled(model, config, tuple(stop_ids), self.mesh)
        self.update(params)
        self.reset()

    def _empty(self) -> Cache:
        c = self.model.config
        shape = (self.rows, c.kv_heads, row_slots(self.config, self.buckets), c.head_width)
        zeros = jax.jit(lambda: jnp.zeros(shape, c.dtype), out_shardings=NamedSharding(self.mesh, ROWS))
        return Cache(*(tuple(zeros() for _ in range(c.layers)) for _ in range(2)))

    def update(self, params: typing.Any) -> None:
        """Takes new parameters of the same shapes. Rows keep what they have cached under the old ones."""
        self._params = jax.device_put(cast(params, self.model.config.dtype), NamedSharding(self.mesh, PartitionSpec()))

    def reset(self) -> None:
        """Stops and empties every row, even after an exception that left no history behind."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._history)):
            self._history = self._empty()
        self._rows = [_Row() for _ in range(self.rows)]

    def _run_prefill(self, rows: np.ndarray, ids: np.ndarray, slots: int) -> None:
        self._history = self._prefill(self._params, self._history, *self._put(rows, ids), slots=slots)
        jax.block_until_ready(self._history)

    def _run_decode(self, rows: np.ndarray, slots: int) -> tuple[Array, ...]:
        self._history, drawn = self._decode(self._params, self._history, *self._put(rows), slots=slots)
        return drawn

    def prefill(self, fills: list[PrefillRequest]) -> None:
        """Sets rows going: each is rewound to its first `keep` ids and extended by `ids`.

        Raises ValueError if there is no such row, if it has not stopped, if it has fewer ids than it is to
        keep, or if the fill has no ids, no limit, or leaves no room to draw in the context.
        """
        begin = time.perf_counter()
        device = self.counters["prefill_seconds"]
        for fill in fills:
            self._check(fill)
            ids = self._rows[fill.row].ids[: fill.keep] + fill.ids
            cached = min(self._rows[fill.row].cached, fill.keep)
            limit = min(fill.max_new_tokens, self.context - len(ids))
            drew = Completion(fill.row, [], [])
            self._rows[fill.row] = _Row(ids, cached, limit, fill.key, fill.num_sampled, drew)
        while waiting := [fill.row for fill in fills if self._uncached(fill.row)]:
            self._feed(*self._group(waiting))
        self.counters["host_seconds"] += time.perf_counter() - begin - (self.counters["prefill_seconds"] - device)

    def _check(self, fill: PrefillRequest) -> None:
        require(0 <= fill.row < self.rows, f"there is no row {fill.row} of {self.rows}")
        row, new = self._rows[fill.row], len(fill.ids)
        require(0 <= fill.keep <= len(row.ids), f"row {fill.row} has {len(row.ids)} ids and cannot keep {fill.keep}")
        require(not row.max_new_tokens, f"row {fill.row} has not stopped yet")
        limit = fill.max_new_tokens
        require(new > 0 and limit >= 1, f"a fill needs ids ({new} given) and a limit of at least 1, not {limit}")
        fits = fill.keep + new < self.context
        require(fits, f"{fill.keep} + {new} ids leave no room to draw in a context of {self.context}")

    def _uncached(self, number: int) -> int:
        return len(self._rows[number].ids) - 1 - self._rows[number].cached

    def _chunk(self, number: int) -> int:
        return _fit(self.buckets.prefill_lengths, min(self._uncached(number), self.buckets.prefill_lengths[-1]))

    def _group(self, waiting: list[int]) -> tuple[list[int], int, int]:
        """Rows to feed in one call, how many that call takes per device, and how many ids of each."""
        length = min(map(self._chunk, waiting))
        devices = self._by_device([number for number in waiting if self._chunk(number) == length])
        sizes = self.buckets.prefill_rows
        size = max([size for size in sizes if size <= max(map(len, devices))] or sizes[:1])
        return [number for rows in devices for number in rows[:size]], size, length

    def _by_device(self, numbers: list[int]) -> list[list[int]]:
        """Rows parted by their device, each part sorted by length."""
        numbers = sorted(numbers, key=lambda number: self._rows[number].cached)
        return [[n for n in numbers if n // self.per_device == device] for device in range(self.devices)]

    def _feed(self, numbers: list[int], size: int, length: int) -> None:
        """A chunk of each row goes through the model and into the history."""
        slots = _fit(self.buckets.prefill_slots, max(self._rows[number].cached for number in numbers))
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

    def decode(self) -> list[Completion]:
        """Bursts until a quarter of the active rows have stopped; returns those, in order. No active row: []."""
        started = active = [number for number, row in enumerate(self._rows) if row.max_new_tokens]
        while REFILL_ONE_IN * (len(started) - len(active)) < len(started):  # a stopped row costs nothing meanwhile
            self._bursts(active)
            active = [number for number in active if self._rows[number].max_new_tokens]
        return [self._rows[number].drew for number in started if not self._rows[number].max_new_tokens]

    def _bursts(self, active: list[int]) -> None:
        """A burst of every active row, group by group, and what they drew."""
        begin = time.perf_counter()
        groups = [self._decode_call(*group) for group in self._groups(active)]
        called = time.perf_counter()
        for size, order, drawn in groups:
            count, *outputs = jax.device_get(drawn)  # the next groups decode while this one is booked
            returned = time.perf_counter()
            for place, number in order:
                self._record(number, count[place], *(x[place] for x in outputs))
            self.counters["decode_steps"] += int(count.max())
            self.counters["row_steps"] += int(count.max()) * size
            self.counters["decode_tokens"] += int(count.sum())
        self.counters["decode_seconds"] += returned - called
        self.counters["host_seconds"] += time.perf_counter() - begin - (returned - called)

    def _groups(self, active: list[int]) -> Iterator[tuple[list[int], int, int]]:
        """Rows to decode in one call, how many that call takes per device, and how many slots it views."""
        devices = self._by_device(active)
        while left := [rows for rows in devices if rows]:
            slots = _fit(self.buckets.slots, max(self._rows[rows[-1]].cached for rows in left))
            group = [rows[-self._rows_per_call(slots) :] for rows in left]
            for rows, taken in zip(left, group, strict=True):
                del rows[-len(taken) :]
            yield [n for taken in group for n in taken], _fit(self.buckets.rows, max(map(len, group))), slots

    def _rows_per_call(self, slots: int) -> int:
        """How many rows of this length one call takes per device."""
        return max([size for size in self.buckets.rows if size * slots <= self.config.max_gathered_slots] or [1])

    def _decode_call(
        self, numbers: list[int], size: int, slots: int
    ) -> tuple[int, list[tuple[int, int]], tuple[Array, ...]]:
        """Starts a burst of some rows; returns rows computed, the place of every row, and what will be drawn."""
        rows, order = self._layout(numbers, size, len(DECODE_COLUMNS))
        for place, number in order:
            row = self._rows[number]
            rows[place, 1:5] = row.cached, row.ids[-1], row.num_sampled, row.max_new_tokens
            rows[place, 5:] = np.asarray(row.key, np.uint32).view(np.int32)
        return len(rows), order, self._run_decode(rows, slots)

    def _record(self, number: int, count: int, ids: np.ndarray, logp: np.ndarray) -> None:
        """Notes what a row has drawn; one that has stopped gets the limit 0."""
        row, new = self._rows[number], ids[:count].tolist()
        row.ids += new
        row.cached += len(new)
        row.num_sampled += len(new)
        row.max_new_tokens = 0 if new and new[-1] in self._stop_ids else row.max_new_tokens - len(new)
        row.drew.ids += new
        row.drew.logprobs += logp[:count].tolist()


@functools.partial(jax.jit, static_argnames="dtype")
def cast(params: typing.Any, dtype: str) -> typing.Any:
    """Matrices in the type that they are computed in; the scales of norms stay float32."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


def _fit(buckets: Sequence[int], needed: int) -> int:
    return next(bucket for bucket in buckets if bucket >= needed)


def _length_buckets(unit: int, last: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... times unit, up to the first that is not below `last`: a third is wasted at most."""
    buckets = [unit]
    while buckets[-1] < last:
        times = buckets[-1] // unit
        buckets.append(unit * (times + max(1, (1 << times.bit_length()) // 4)))
    return tuple(buckets)

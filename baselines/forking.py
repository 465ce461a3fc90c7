"""A sampler whose rows can be forked: copies of a row go on from what it holds, and nothing is fed again."""

from __future__ import annotations

import bisect
import dataclasses
import typing
from collections.abc import Sequence

import jax
from jax import Array
from jax.sharding import NamedSharding

from decoding import ROWS, Cache, SamplerConfig
from model import Decoder
from protocols import Completion
from sampler import Sampler


class Fork(typing.NamedTuple):
    """Row `row` becomes a copy of row `source` and goes on; `key` and `max_new_tokens` are as in a fill."""

    row: int
    source: int
    key: tuple[int, int]
    max_new_tokens: int


def _copy(history: Cache, source_R: Array, slots: int) -> Cache:
    """Every row [K, S, H] takes the first `slots` slots of its source."""
    return jax.tree.map(lambda x: x.at[:, :, :slots].set(x[source_R, :, :slots]), history)


class ForkingSampler(Sampler):
    """A `Sampler` on one device with `fork`."""

    def __init__(self, model: Decoder, params: typing.Any, config: SamplerConfig, stop_ids: Sequence[int]) -> None:
        super().__init__(model, params, config, stop_ids)
        rows = NamedSharding(self.mesh, ROWS)
        self._copy = jax.jit(_copy, donate_argnums=0, static_argnums=2, out_shardings=rows)

    def fork(self, forks: Sequence[Fork]) -> None:
        """Sets rows going as copies, all at once: a source may be overwritten in the same call."""
        sources, rows = list(range(self.rows)), {}
        for fork in forks:
            source, drew = self._rows[fork.source], Completion(fork.row, [], [])
            limit = min(fork.max_new_tokens, self.context - len(source.ids))
            rows[fork.row] = dataclasses.replace(
                source, ids=[*source.ids], max_new_tokens=limit, key=fork.key, drew=drew
            )
            sources[fork.row] = fork.source
        for number, row in rows.items():
            self._rows[number] = row
        longest = max(row.cached for row in rows.values())
        slots = self.buckets.slots[bisect.bisect_left(self.buckets.slots, longest)]
        self._history = self._copy(self._history, jax.numpy.asarray(sources), slots)

    def drain(self) -> dict[int, list[int]]:
        """Decodes until every row has stopped; row -> ids drawn since its fork."""
        drawn: dict[int, list[int]] = {}
        while stopped := self.decode():
            drawn |= {completion.row: completion.ids for completion in stopped}
        return drawn

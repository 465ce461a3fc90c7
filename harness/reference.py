"""The policy that a reinforced one is held to: where it started, or from a flat stretch on the policy it was then.

APA replaces its reference when the reward has converged (Stream of Search, arXiv 2404.03683). Here a stretch is the
steps between two checkpoints. If its mean reward is not above that of the stretch before, the reference becomes the
policy, and the next stretch has none to be compared with.

A new reference is written to PATH/STEP, whole and with checksums, before the checkpoint that names it. So a killed run
goes on to the same bits.
"""

from __future__ import annotations

import pathlib
import typing

import jax
import jax.numpy as jnp

from harness.checkpoints import Checkpoints
from harness.cli import UsageError


class Reference:
    """`params`, and the `step` after which they were the policy (0: the start)."""

    def __init__(self, start: typing.Any, path: pathlib.Path | None = None, fingerprint: str = "") -> None:
        """`path` is where replacements are kept: without one there can be none.

        The fingerprint is of the start; "" where nothing reads the reference, and any start will do.
        """
        self.params, self.step, self.fingerprint = start, 0, fingerprint
        self._kept = Checkpoints(path, "params", "values") if path else None
        self._before: float | None = None  # mean reward of the last stretch
        self._rewards: list[float] = []  # of the steps since

    @property
    def cursor(self) -> dict[str, typing.Any]:
        """All but the parameters, as JSON."""
        return {"start": self.fingerprint, "step": self.step, "before": self._before, "rewards": [*self._rewards]}

    def resume(self, cursor: dict[str, typing.Any]) -> None:
        """Goes on at a cursor. Raises UsageError if the start is another, or the reference missing or damaged."""
        if self.fingerprint and cursor.get("start", self.fingerprint) != self.fingerprint:
            raise UsageError("--init holds other parameters than those that this run started from: name a copy of them")
        self.step, self._before, self._rewards = cursor["step"], cursor["before"], list(cursor["rewards"])
        if self.step and self._kept:
            if wrong := self._kept.damage(self.step):
                raise UsageError(wrong)
            self.params, _ = self._kept.load(self.step, self.params)

    def note(self, step: int, reward: float, params: typing.Any, ends: bool) -> None:
        """Notes the mean reward of a step, and `params` after it; `ends` says whether a checkpoint follows."""
        self._rewards.append(reward)
        if not ends:
            return
        mean, self._rewards = sum(self._rewards) / len(self._rewards), []
        flat = self._before is not None and mean <= self._before
        self._before = None if flat else mean
        # The loop stops a run whose parameters are not finite.
        if flat and self._kept and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            self.params, self.step = jax.tree.map(jnp.copy, params), step  # the policy's own are donated
            self._kept.save(step, self.params, {})

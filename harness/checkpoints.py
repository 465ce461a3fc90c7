"""Checkpoints on disk: a folder per step, PATH/STEP, of a tree of arrays and a JSON object, with checksums.

A folder is written beside its place, signed (`harness.files`), and moved there at once. The last two are kept.
Several processes write one folder together, each the arrays that it holds; the first does the rest.
"""

from __future__ import annotations

import pathlib
import shutil
import typing

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from harness import files
from harness.cli import UsageError, one_line

KEEP = 2


class Checkpoints:
    """The checkpoints below a path. `arrays` and `values` name the tree and the JSON object in a folder."""

    def __init__(self, path: pathlib.Path, arrays: str, values: str) -> None:
        self.path, self._arrays, self._values = path, arrays, values
        handlers: typing.Any = {arrays: ocp.StandardCheckpointHandler(), values: ocp.JsonCheckpointHandler()}
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))

    def steps(self) -> list[int]:
        """Steps of the checkpoints, the newest last."""
        return sorted(int(folder.name) for folder in self.path.glob("*") if folder.name.isdecimal())

    def damage(self, step: int) -> str:
        """What is wrong with a checkpoint, and the remedy; "" if it is as it was written."""
        wrong, place = files.damage(self.path / str(step)), self.path / str(step)
        return wrong and f"{wrong}: copy the run again, or remove {place} to use the checkpoint before it, if any"

    def save(self, step: int, tree: typing.Any, values: dict) -> None:
        """Saves a checkpoint, whole or not at all; only then drops those before the last two.

        Those of later steps go too: what they were part of was given up. Raises UsageError if there is no room.
        """
        part, place = self.path / f"{step}{files.PART}", self.path / str(step)
        arrays: typing.Any = {self._arrays: ocp.args.StandardSave(tree), self._values: ocp.args.JsonSave(values)}
        first = jax.process_index() == 0
        try:
            if first:
                self.path.mkdir(exist_ok=True)
                for left in [*self.path.glob(f"*{files.PART}*"), *self.path.glob("*.old")]:  # by a kill
                    shutil.rmtree(left, ignore_errors=True)
            multihost_utils.sync_global_devices("room for a checkpoint")
            self._orbax.save(part, args=ocp.args.Composite(**arrays))
            if first:
                files.sign(part)
                self.delete(step)
                part.rename(place)
                files.sync(self.path)
                earlier = [other for other in self.steps() if other < step]
                for other in [*earlier[: 1 - KEEP], *(other for other in self.steps() if other > step)]:
                    self.delete(other)
        except (OSError, ValueError) as error:
            remedy = "make room there and run the same command again, which goes on from the last whole checkpoint"
            raise UsageError(f"{place} cannot be written ({one_line(error)}): {remedy}") from error
        multihost_utils.sync_global_devices("a checkpoint is whole")

    def delete(self, step: int) -> None:
        """Removes a checkpoint if it is there."""
        place = self.path / str(step)
        if place.exists():
            shutil.rmtree(place.rename(place.with_name(f"{step}.old")))

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint: it counts no more, and yet is not lost."""
        place = self.path / str(step)
        aside = place.with_name(f"{step}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    def shapes(self, step: int) -> typing.Any:
        """The tree of a checkpoint, its arrays as something with a shape."""
        return self._orbax.metadata(self.path / str(step)).item_metadata[self._arrays].tree

    def load(self, step: int, like: typing.Any) -> tuple[typing.Any, dict]:
        """The tree of a checkpoint, shaped and placed as `like`, and its JSON object. Look for damage first."""
        wanted: typing.Any = {self._arrays: ocp.args.StandardRestore(like), self._values: ocp.args.JsonRestore()}
        restored = self._orbax.restore(self.path / str(step), args=ocp.args.Composite(**wanted))
        return restored[self._arrays], restored[self._values]

"""Bounds of configuration fields, declared beside each field and checked in one place.

@dataclasses.dataclass(frozen=True)
class Shape(Checked):
    section = "model"
    width: Annotated[int, at_least(1)]

Shape(width=0)  # ValueError: model.width=0 must be at least 1
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable


class Bound(typing.NamedTuple):
    """What a value must be: `words` complete the sentence "NAME=VALUE must be ..."."""

    allows: Callable[[typing.Any], bool]
    words: str


def at_least(bound: float) -> Bound:
    """A finite number of at least `bound`."""
    return Bound(lambda value: bound <= value < math.inf, f"at least {bound}")


def above(bound: float) -> Bound:
    """A finite number above `bound`."""
    return Bound(lambda value: bound < value < math.inf, f"above {bound}")


def within(low: float, high: float) -> Bound:
    """A number from `low` to `high`, both included."""
    return Bound(lambda value: low <= value <= high, f"from {low} to {high}")


def one_of(*choices: str) -> Bound:
    """One of some words."""
    return Bound(lambda value: value in choices, f"one of {', '.join(choices)}")


SEED = within(0, 2**32 - 1)
FRACTION = Bound(lambda value: 0 <= value < 1, "at least 0 and below 1")


KINDS: dict[typing.Any, Bound] = {
    bool: Bound(lambda value: isinstance(value, bool), "true or false"),
    int: Bound(lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: Bound(lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    str: Bound(lambda value: isinstance(value, str), "a word"),
}


class Checked:
    """Base of frozen dataclasses: checks every plain or bounded field, then the relations between fields.

    Raises ValueError that names the field, its value and the bound.
    """

    section: typing.ClassVar[str]  # of the configuration; messages name a field SECTION.FIELD

    def __post_init__(self) -> None:
        for name, bound in _bounds(typing.cast(typing.Hashable, type(self))):
            value = getattr(self, name)
            shown = repr(value) if len(repr(value)) < 80 else f"{value!r:.80}..."
            require(bound.allows(value), f"{self.section}.{name}={shown} must be {bound.words}")
        self.check()

    def check(self) -> None:
        """Raises ValueError where fields do not go together."""


@functools.cache
def _bounds(kind: typing.Hashable) -> list[tuple[str, Bound]]:
    hints = typing.get_type_hints(typing.cast(type, kind), include_extras=True)
    found = []
    for name, hint in hints.items():
        plain, *extras = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        found += [(name, KINDS[plain])] if plain in KINDS else []
        found += [(name, extra) for extra in extras if isinstance(extra, Bound)]
    return found


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)

"""What every command shares: errors of one sentence. This module never imports JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """A mistake of the user. The message is one sentence with the value and the remedy."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError or OSError of the block into a UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error

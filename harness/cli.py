"""What every command shares: its start, errors of one sentence, and a progress bar. This module never imports JAX."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator

import tqdm
from absl import app, flags, logging


class UsageError(Exception):
    """A mistake of the user. The message is one sentence with the value and the remedy."""


class Stopped(KeyboardInterrupt):
    """A signal that ends a command in good order."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Notes Ctrl-C and SIGTERM in a list, so that the block can end when it is ready. A second one ends it at once.

    Those within a second are one: a terminal or a scheduler may signal a command and what started it.
    """
    noted: list[int] = []
    first = 0.0

    def note(number: int, _: typing.Any) -> None:
        nonlocal first
        if noted:
            if time.monotonic() - first > 1:
                raise Stopped(number)
            return
        noted.append(number)
        first = time.monotonic()
        print("stopping as soon as the state is saved (once more: at once)", file=sys.stderr, flush=True)

    with _handled(note):
        yield noted


@contextlib.contextmanager
def _handled(handler: Callable[[int, typing.Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _stop(number: int, _: typing.Any) -> typing.NoReturn:
    raise Stopped(number)


def one_line(error: Exception | str) -> str:
    """The message of an error of another package, or what a user wrote, on one line and not too long."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError or OSError of the block into a UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Ends the process with one line on stderr after a UsageError, a failing disk, Ctrl-C or SIGTERM in the block."""
    with _one_sentence(), _handled(_stop):
        yield


def launch(
    define_flags: Callable[[], None], main: Callable[[list[str]], None], prepare: Callable[[], None] = lambda: None
) -> None:
    """Runs a command under absl. A usage error ends the process with status 2 and one line on stderr.

    `prepare` runs after the flags are parsed and before `main`.
    """
    with _one_sentence(), _config_errors():
        define_flags()

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}: flags are written --name=value")
        with in_order():
            prepare()
            main(argv)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    with _one_sentence(), _config_errors():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Ends the process with one line on stderr: status 2 after a UsageError or a failing disk, 128 + N by signal N."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # here, where a closed pipe is handled, and not when Python ends
                sys.stdout.flush()
    except UsageError as error:
        _fail(str(error))
    except BrokenPipeError:  # as of `| head`; nothing is left to print to, not even when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}: mend that, and run the same command again")
    except KeyboardInterrupt as stop:
        told: BaseException | None = stop
        while told is not None and not isinstance(told, Stopped):  # an interrupted run is caused by one
            told = told.__cause__
        number = told.number if told else signal.SIGINT
        _fail(f"{told or 'stopped'}: run the same command again to go on", 128 + number)


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """Turns the errors of absl and ml_collections about a flag, a recipe or a field into a UsageError."""
    try:
        yield
    except flags.Error as error:
        # An error inside a recipe arrives as the last line of a traceback.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else " ".join(lines)
        raise UsageError(text) from error
    except OSError as error:  # the recipe does not exist
        raise UsageError(one_line(error)) from error
    except UsageError:
        raise
    except Exception as error:  # of a recipe, which is code
        field = re.search(r"'(\w+)\\?'", str(error))
        named = [arg for arg in sys.argv if field and arg.startswith("--config.") and f".{field[1]}" in arg]
        if not named:
            given = ", ".join(arg for arg in sys.argv[1:] if "config" in arg) or "the config"
            raise UsageError(f"{one_line(given)} cannot be read ({one_line(error)})") from error
        guess = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f": did you mean {guess[1]}?" if guess else ": configs/ lists them"
        raise UsageError(f"the config has no field {one_line(named[0][2:].partition('=')[0])}{hint}") from error


def _fail(message: str, status: int = 2) -> typing.NoReturn:
    print(message if status > 128 else f"error: {message}", file=sys.stderr)
    sys.unraisablehook = lambda _: None  # open files fail again as Python ends, and so do threads that write
    threading.excepthook = lambda _: None
    sys.exit(status)


class Progress:
    """A progress bar on a terminal, plain lines otherwise."""

    def __init__(self, total: int, start: int, unit: str) -> None:
        self._bar = tqdm.tqdm(total=total, initial=start, unit=unit, disable=not (sys.stderr and sys.stderr.isatty()))
        self._total, self._start, self._unit = total, start, unit
        self._began = time.monotonic()

    def update(self, step: int, text: str | None = None) -> None:
        """Moves to `step`. `text` is shown beside the bar, or printed as a line with the time left."""
        self._bar.update(step - self._bar.n)
        if text is None:
            return
        if self._bar.disable:
            seconds = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
            print(f"{self._unit} {step}/{self._total}  {text}  {seconds / 60:.1f} min left", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

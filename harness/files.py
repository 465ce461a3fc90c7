"""Files that are whole: replaced at once, held to checksums, in a folder that one run at a time may write. No JAX.

A signed folder holds `checksums.json`: the SHA-256 of every other file in it, written last. So a bit that flipped,
a file that was cut, one that is missing and one that was added are all found before anything is read. To the folder
of an exported model, files may be added: an evaluation, a page about it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import typing

from harness.cli import UsageError, one_line

REMEDY = "copy the folder again, or write it again with `python -m harness.export`"  # of an exported model
CHECKSUMS, LOCK, PART = "checksums.json", ".lock", ".part"


def replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file, whole or not at all, even if the machine stops, or another process writes it too."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)


def is_part(path: pathlib.Path) -> bool:
    """Whether a path is what a kill left of a file that was to be replaced."""
    return bool(re.search(rf"\.\d+\{PART}$", path.name))


def sync(folder: pathlib.Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(folder: pathlib.Path, settle: bool = False) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its name from there. `settle` waits until all is on the disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            if settle:
                sync(path)
        elif path != folder / CHECKSUMS:
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
                if settle:
                    os.fsync(file.fileno())
    return found


def digest(data: bytes) -> str:
    """Eight hexadecimal digits that differ where the data do."""
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def json_bytes(value: typing.Any) -> bytes:
    """A JSON file as we write it."""
    return (json.dumps(value, indent=1) + "\n").encode()


def sign(folder: pathlib.Path, without: str = "") -> None:
    """Writes the checksums of a folder, but for the file `without`, after its files are on the disk."""
    found = _checksums(folder, settle=True)
    replace(folder / CHECKSUMS, json_bytes({name: found[name] for name in found if name != without}))


def damage(folder: pathlib.Path, added: bool = False) -> str:
    """What is wrong with a signed folder, naming the first file; "" if nothing is. Files may be `added`, or not."""
    file = folder / CHECKSUMS
    if not file.exists():
        return f"{file} is missing"
    try:
        data = file.read_bytes()
        wanted, found = json.loads(data), _checksums(folder)
        if not isinstance(wanted, dict) or json_bytes(wanted) != data:  # a name may be there twice
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, RecursionError) as error:
        return f"{file} cannot be read ({error})"
    for name in sorted(wanted if added else wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            return f"{folder / one_line(name)} {f'does not match {CHECKSUMS}' if name in found else 'is missing'}"
    return ""


def check(folder: pathlib.Path) -> list[str]:
    """The signed files of an exported model. Raises UsageError, with file and remedy, unless they are as written."""
    if wrong := damage(folder, added=True):
        raise UsageError(f"{wrong}: {REMEDY}")
    return [*json.loads((folder / CHECKSUMS).read_bytes())]


@functools.cache  # held until this process ends
def lock(folder: pathlib.Path) -> typing.IO[str]:
    """Keeps other processes from writing to a folder. Raises UsageError if another one does.

    The kernel drops the lock of a process that ends, however it ends.
    """
    file = open(folder / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(f"{folder} is in use by another run: wait for it, or choose another folder") from error
    return file

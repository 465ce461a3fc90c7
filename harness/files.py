"""Files that are whole: replaced at once, held to checksums, in a folder that one run at a time may write. No JAX.

A signed folder holds `checksums.json`: the SHA-256 of every other file in it, written last. So a bit that flipped,
a file that was cut, one that is missing and one that was added are all found before anything is read. The texts of an
exported model are held to what the header of its arrays says of them.
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

import safetensors

from harness.cli import UsageError

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


def sign(folder: pathlib.Path) -> None:
    """Writes the checksums of a folder, after its files are on the disk."""
    replace(folder / CHECKSUMS, (json.dumps(_checksums(folder, settle=True), indent=1) + "\n").encode())


def damage(folder: pathlib.Path) -> str:
    """What is wrong with a signed folder, naming the first file; "" if nothing is."""
    try:
        wanted = json.loads((folder / CHECKSUMS).read_bytes())
        found = _checksums(folder)
    except FileNotFoundError:
        return f"{folder / CHECKSUMS} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{folder / CHECKSUMS} cannot be read ({error})"
    if not isinstance(wanted, dict):
        return f"{folder / CHECKSUMS} holds no checksums"
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            return f"{folder / name} {f'does not match {CHECKSUMS}' if name in found else 'is missing'}"
    return ""


def checksum(data: bytes, *about: typing.Any) -> str:
    """BLAKE2b of some bytes and of what they are: what an exported model says of its arrays and texts."""
    return hashlib.blake2b(json.dumps(about).encode() + b"\n" + data, digest_size=16).hexdigest()


def read(path: pathlib.Path) -> bytes:
    """The bytes of a file of an exported model. Raises UsageError if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: {REMEDY}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}): {REMEDY}") from error


def check_text(path: pathlib.Path) -> None:
    """Raises UsageError if a text file does not match what the arrays beside it say of it, if there are any.

    The arrays are those of an exported model.
    """
    header: dict[str, str] = {}
    models = sorted(path.parent.glob("model*.safetensors"))
    if not models:
        return
    found = checksum(read(path), path.name)
    for arrays in models:
        try:
            with safetensors.safe_open(arrays, framework="numpy") as file:
                header |= file.metadata() or {}
        except (OSError, safetensors.SafetensorError) as error:
            raise UsageError(f"{arrays} is damaged ({error}): {REMEDY}") from error
    if header.get(path.name, found) != found:
        raise UsageError(f"{path} does not match its checksum: {REMEDY}")


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

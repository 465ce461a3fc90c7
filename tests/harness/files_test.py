"""Whole files, checksums, and the lock of a folder that a dead process does not hold."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from harness import files
from harness.cli import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file"
    files.replace(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            files.replace(file, b"new")
    assert file.read_bytes() == b"old" and all(map(files.is_part, {*tmp_path.iterdir()} - {file}))
    files.replace(file, b"new")
    assert file.read_bytes() == b"new" and [*tmp_path.iterdir()] == [file]


def test_what_differs_from_the_checksums_is_named(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_bytes(b"data")
    assert "checksums.json is missing" in files.damage(tmp_path)
    files.sign(tmp_path)
    assert files.damage(tmp_path) == ""
    (tmp_path / "deep" / "b").write_bytes(b"dat")
    assert files.damage(tmp_path).endswith("deep/b does not match checksums.json")
    (tmp_path / "deep" / "b").unlink()
    assert files.damage(tmp_path).endswith("deep/b is missing")
    (tmp_path / "deep" / "b").write_bytes(b"data")
    (tmp_path / "more").touch()
    assert files.damage(tmp_path).endswith("more does not match checksums.json")
    (tmp_path / "more").unlink()
    twice = (tmp_path / files.CHECKSUMS).read_text().replace('"a"', '"deep/b"')
    for text in ("{", "[]", "[" * 9999, "", twice):
        (tmp_path / files.CHECKSUMS).write_text(text)
        assert f"{files.CHECKSUMS} cannot be read" in files.damage(tmp_path)
    (tmp_path / files.CHECKSUMS).write_bytes(files.json_bytes({"a\nb": ""}))
    assert files.damage(tmp_path, added=True) == f"{tmp_path / 'a b'} is missing"


def test_an_exported_folder_may_hold_more_than_is_signed(tmp_path):
    for name in ("a", "free"):
        (tmp_path / name).write_bytes(b"data")
    files.sign(tmp_path, without="free")
    (tmp_path / "more").touch()
    (tmp_path / "free").write_bytes(b"other")
    assert files.check(tmp_path) == ["a"]
    (tmp_path / "a").write_bytes(b"dat")
    with pytest.raises(UsageError, match=r"a does not match checksums\.json: copy the folder again, or write it again"):
        files.check(tmp_path)


def test_a_folder_is_locked_until_its_process_ends_however_it_ends(tmp_path):
    program = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from harness import files, cli; import pathlib\n"
    program += f"files.lock(pathlib.Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(999)"
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="in use by another run: wait for it, or choose another folder"):
            files.lock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert files.lock(tmp_path) is files.lock(tmp_path)
            return
        except UsageError:
            time.sleep(0.05)
    pytest.fail("a dead process holds the lock")

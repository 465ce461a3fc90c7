"""What the end-to-end tests share: entry points run in this process or another, and one finished smoke run."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
from absl import app, flags

from harness import processes
from tests import FAST

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What an entry point left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user's shell: the machine's own devices, not the eight that tests/__init__.py asks for."""
    return {**os.environ, "XLA_FLAGS": FAST}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs an entry point in this process: `command(sft, "--workdir=x")`. Its flags are gone afterwards."""

    def run(module: types.ModuleType, *arguments: str) -> Ended:
        app.define_help_flags()
        before = set(flags.FLAGS)
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                processes.launch(module.define_flags, module.main)
        except SystemExit as end:
            code = end.code
        finally:
            for name in set(flags.FLAGS) - before:
                flags.FLAGS.__delattr__(name)
            flags.FLAGS.unparse_flags()
        if isinstance(code, str):  # as the interpreter does
            return Ended(1, out.getvalue(), err.getvalue() + code + "\n")
        return Ended(code or 0, out.getvalue(), err.getvalue())

    return run


@dataclasses.dataclass(frozen=True)
class SmokeRun:
    """The finished `python sft.py --config=configs/apr.py:smoke` of the session."""

    path: pathlib.Path  # its workdir
    ended: Ended


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> SmokeRun:
    """Trains the smoke preset once for all workers, as a user would."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path, said = shared / "apr-smoke", shared / "apr-smoke.json"
    with (shared / "apr-smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            arguments = [sys.executable, "sft.py", "--config=configs/apr.py:smoke", f"--workdir={path}"]
            ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
            said.write_text(json.dumps([ended.returncode, ended.stdout, ended.stderr]))
    return SmokeRun(path, Ended(*json.loads(said.read_text())))

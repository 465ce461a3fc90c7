"""The shell blocks of README.md run: as printed, except that training takes the smoke preset.

Each ```bash or ```sh block is one script, run in order in a copy of the repository. What is changed is listed in
`shortened`; set-up (environment, installation) is left out, because it made the environment this test runs in.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"(git clone|cd|source|\.|python3?(\.\d+)? -m venv|(\S*/)?pip3? install|\S+ -m pip install) ")
PYTHON = re.compile(r"(?<![\w./-])(\.venv/bin/)?python3?(?= )")
PYTEST = re.compile(r"(?<![\w./-])(\.venv/bin/)?pytest\b(?! *[=>])")


def blocks() -> list[str]:
    """The shell blocks of the README, continued lines joined."""
    text = README.read_text() if README.exists() else ""
    return [block.replace("\\\n", " ") for block in BLOCK.findall(text)]


def shortened(line: str) -> str:
    """A command with what takes long made short; "" if it is set-up alone."""
    parts = [part for part in re.split(r"\s*&&\s*", line.removeprefix("$ ")) if not SET_UP.match(f"{part} ")]
    return " && ".join(map(_short, parts))


def _short(part: str) -> str:
    script = re.search(r"\b(sft|grpo|evaluate)\.py\b", part)
    words = part.partition(" #")[0].rstrip()
    if script and script[1] in ("sft", "grpo"):
        words = _smoke(words, script[1])
    elif script and not re.search(r"--(numbers|problems)=", words):
        words += " --config.evaluation.problems=16"
    elif "-m pytest" in words or PYTEST.match(words):
        words += " --collect-only -q"  # the tests do not run themselves
    if "-m pytest" not in words:
        words = PYTEST.sub("python -m pytest", words)
    return PYTHON.sub(shlex.quote(sys.executable), words)


def _smoke(words: str, script: str) -> str:
    """The smoke preset, in the workdir that the printed command would have used: later commands name it."""
    recipe = re.search(r"--config=(configs/(\w+)\.py)(?::(\w+))?", words)
    path, name, preset = recipe.groups() if recipe else (f"configs/{'apr' if script == 'sft' else 'grpo'}.py", "", "")
    words = words.replace(recipe[0], "") if recipe else words
    words = re.sub(r"--config\.((optimizer|train|grpo)\.\w+|init)=\S+", "", words)  # what is of the preset's size
    named = re.search(r"--config\.name=(\S+)", words)
    if "--workdir=" not in words and script == "sft":
        suffix = "" if preset in (None, "", "laptop") else f"-{preset}"
        words += f" --workdir=runs/{named[1] if named else (name or 'apr') + suffix}"
    fields = [word for word in words.split() if word.startswith("--config.")]  # they come after the recipe
    return " ".join([word for word in words.split() if word not in fields] + [f"--config={path}:smoke", *fields])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python3 -m venv .venv", ""),
        ("git clone https://example.org/apr && cd apr", ""),
        ('.venv/bin/pip install -q -e ".[test]"', ""),
        ("source .venv/bin/activate", ""),
        ("python -m pip install .", ""),
        (
            "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python sft.py --config=configs/apr.py",
            "PY sft.py --workdir=runs/apr --config=configs/apr.py:smoke",
        ),
        (
            "$ python sft.py --config=configs/sosp.py:desktop --config.optimizer.steps=100   # two hours",
            "PY sft.py --workdir=runs/sosp-desktop --config=configs/sosp.py:smoke",
        ),
        ("python sft.py --workdir=runs/x", "PY sft.py --workdir=runs/x --config=configs/apr.py:smoke"),
        (
            "python sft.py --config=configs/apr.py --config.init=pretrained/apr --config.name=x --config.train.rows=2",
            "PY sft.py --workdir=runs/x --config=configs/apr.py:smoke --config.name=x",
        ),
        ("python grpo.py --init=runs/sosp", "PY grpo.py --init=runs/sosp --config=configs/grpo.py:smoke"),
        ("python evaluate.py", "PY evaluate.py --config.evaluation.problems=16"),
        ("python evaluate.py --numbers=7,2,19 --target=31", "PY evaluate.py --numbers=7,2,19 --target=31"),
        ("python evaluate.py --problems=problems.json", "PY evaluate.py --problems=problems.json"),
        ("python solver.py --method=apr && ruff check .", "PY solver.py --method=apr && ruff check ."),
        (".venv/bin/python -m pytest -q", "PY -m pytest -q --collect-only -q"),
        ("pytest -m slow", "PY -m pytest -m slow --collect-only -q"),
        ("tensorboard --logdir=runs", "tensorboard --logdir=runs"),
    ],
)
def test_what_is_run_of_a_line(line, expected):
    assert shortened(line) == expected.replace("PY", shlex.quote(sys.executable))


def test_the_readme_prints_the_main_job_and_the_tests():
    text = "\n".join(blocks())
    for command in ("sft.py --config=configs/apr.py", "pytest", "evaluate.py", "venv", "pip install"):
        assert command in text, f"README.md has no shell block with {command!r}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The repository without its history and output."""
    target = tmp_path_factory.mktemp("readme") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "shared", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.mark.parametrize("number", range(max(1, len(blocks()))))
def test_a_block_runs(number: int, copy: pathlib.Path, environment: dict[str, str]):
    assert blocks(), "README.md has no shell block"
    script = "\n".join(map(shortened, blocks()[number].splitlines()))
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=copy,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"

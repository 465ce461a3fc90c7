"""The documentation holds: its shell blocks run, its numbers are those of the shipped results, its links lead somewhere.

The documents are README.md and docs/*.md. Each ```bash block is one script, run in order in a copy of the repository:

  - as printed, except that training takes the smoke preset and evaluation few problems (`shortened`);
  - set-up (environment, installation) is left out, because it made the environment that this test runs in;
  - a block whose first line is `# takes ...` or `# needs ...` is not run. Its commands are checked instead: the files
    are there, the recipe and its preset load, and every field that is set exists (`faults`).

Output is in ```console or ```text blocks, which are only read.

Numbers are held to the shipped results by a comment right after their table, paragraph or block of output
(`docs/fill.py` has the form). {{name}} is yet to be measured.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import typing

import pytest

from docs import fill
from docs.fill import DOCUMENTS, HELD, HELD_LINE, README, ROOT, UNMEASURED
from harness.workdir import read_config

MOST_WORDS = 1000  # of the README
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# (takes|needs) ")
SET_UP = re.compile(r"(git clone|cd|source|\.|python3?(\.\d+)? -m venv|(\S*/)?pip3? install|\S+ -m pip install) ")
COARSE = "--config.sampler.buckets=coarse --config.sampler.length_bucket=512"  # compiles few functions
PYTHON = re.compile(r"(?<![\w./-])(\.venv/bin/)?python3?(?= )")
PYTEST = re.compile(r"(?<![\w./-])(\.venv/bin/)?pytest\b(?! *[=>])")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

# ------------------------------------------------------------------- shell blocks


class Block(typing.NamedTuple):
    """A shell block of a document, continued lines joined."""

    document: str
    number: int
    lines: list[str]

    @property
    def runs(self) -> bool:
        return not NOT_RUN.match(self.lines[0])


def shell_blocks(path: pathlib.Path) -> list[Block]:
    """The shell blocks of a document."""
    texts = [text for language, text in FENCED.findall(path.read_text()) if language in ("bash", "sh")]
    name = path.relative_to(ROOT).as_posix()
    return [Block(name, i, text.replace("\\\n", " ").splitlines()) for i, text in enumerate(texts)]


BLOCKS = [block for path in DOCUMENTS if path.exists() for block in shell_blocks(path)]


def of(blocks: list[Block]) -> dict[str, typing.Any]:
    """Arguments of `parametrize`, with readable names."""
    return {"argvalues": blocks, "ids": [f"{block.document}-{block.number}" for block in blocks]}


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
        words += f" --config.evaluation.problems=16 {COARSE}"
    elif "-m pytest" in words or PYTEST.match(words):
        words += " --collect-only -q"  # the tests do not run themselves
    if "-m pytest" not in words:
        words = PYTEST.sub("python -m pytest", words)
    return PYTHON.sub(shlex.quote(sys.executable), words)


def _smoke(words: str, script: str) -> str:
    """The smoke preset, in the workdir that the printed command would have used: later commands name it."""
    if "--config=examples/" in words:  # a recipe without presets: a few updates
        steps = ("optimizer.steps=10", "optimizer.warmup_steps=5", "train.eval_every=10")
        return " ".join([words, *(f"--config.{x}" for x in (steps if script == "sft" else ("grpo.steps=1",)))])
    recipe = re.search(r"--config=(configs/(\w+)\.py)(?::(\w+))?", words)
    path, name, preset = recipe.groups() if recipe else (f"configs/{'apr' if script == 'sft' else 'grpo'}.py", "", "")
    words = words.replace(recipe[0], "") if recipe else words
    words = re.sub(r"--config\.((optimizer|train|grpo)\.\w+|init)=\S+", "", words)  # what is of the preset's size
    if script == "grpo" and "--init=" not in words:  # as printed it starts from the run that was printed before
        words += " --init=runs/apr"
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
        (
            "python sft.py --config=examples/products.py",
            "PY sft.py --config=examples/products.py --config.optimizer.steps=10 --config.optimizer.warmup_steps=5 --config.train.eval_every=10",
        ),
        (
            "python grpo.py --config=examples/products.py:grpo --init=runs/products",
            "PY grpo.py --config=examples/products.py:grpo --init=runs/products --config.grpo.steps=1",
        ),
        ("python evaluate.py", f"PY evaluate.py --config.evaluation.problems=16 {COARSE}"),
        ("python grpo.py", "PY grpo.py --init=runs/apr --config=configs/grpo.py:smoke"),
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
    text = "\n".join(line for block in BLOCKS if block.document == "README.md" for line in block.lines)
    for command in ("sft.py --config=configs/apr.py", "grpo.py", "pytest", "evaluate.py", "venv", "pip install"):
        assert command in text, f"README.md has no shell block with {command!r}"


class Copy(typing.NamedTuple):
    """The repository without its history and output, and the lines that have run in it."""

    path: pathlib.Path
    done: set[str]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    target = tmp_path_factory.mktemp("readme") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "shared", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignored)
    (target / "runs").mkdir()
    return Copy(target, set())


@pytest.mark.parametrize("block", **of([block for block in BLOCKS if block.runs]))
def test_a_block_runs(block: Block, copy: Copy, environment: dict[str, str]):
    lines = [line for line in map(shortened, block.lines) if line not in copy.done]
    script = "\n".join(lines)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # At smoke size `grpo.py` takes one name, whatever run it starts from.
    shutil.rmtree(copy.path / "runs" / "grpo-apr-smoke", ignore_errors=True)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=copy.path,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    copy.done.update(line for line in lines if re.search(r"\b(sft|grpo|evaluate)\.py\b", line))  # these run once


# ------------------------------------------------------------------- blocks that are not run


def load_recipe(argument: str) -> typing.Any:
    """The config of configs/x.py:preset. Raises ValueError on an unknown preset, OSError without such a file."""
    file, _, preset = argument.partition(":")
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, ROOT / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset) if preset else module.get_config()


def stored(run: str) -> dict[str, typing.Any]:
    """The config of a run: a shipped one, else of the shipped checkpoint."""
    name = pathlib.PurePath(run).name
    return read_config(ROOT / "pretrained" / (name if name and (ROOT / "pretrained" / name).is_dir() else "apr"))


def has(config: typing.Any, field: str) -> bool:
    """Whether a config has a dotted field."""
    for name in field.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def faults(line: str) -> list[str]:
    """What is wrong with a command that is not run."""
    found = []
    for command in re.split(r"\s*(?:&&|;|\|)\s*", line.partition(" #")[0].removeprefix("# ")):
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py") and not word.startswith("-")), "")
        module = words[words.index("-m") + 1].replace(".", "/") if "-m" in words else ""
        for file in filter(None, (script, module and f"{module}.py")):
            if not (ROOT / file).exists() and module not in ("pip", "pytest", "venv"):
                found.append(f"there is no {file}")
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if script not in ("sft.py", "grpo.py", "evaluate.py"):
            continue
        try:
            default = {"sft.py": "configs/apr.py", "grpo.py": "configs/grpo.py"}.get(script, "")
            recipe = flags.get("config", default)
            config = load_recipe(recipe) if recipe else stored(flags.get("workdir", ""))
            if "sweep" in flags:
                load_recipe(flags["sweep"])
        except (OSError, ValueError) as error:
            found.append(str(error))
            continue
        fields = [flag.removeprefix("config.") for flag in flags if flag.startswith("config.")]
        found += [f"{recipe or 'the run'} has no field {field}" for field in fields if not has(config, field)]
        named = [flags[flag] for flag in ("init", "workdir", "config.init") if flag in flags]
        found += [f"there is no {run}" for run in named if run.startswith("pretrained/") and not (ROOT / run).is_dir()]
    return found


@pytest.mark.parametrize("block", **of([block for block in BLOCKS if not block.runs]))
def test_a_block_that_is_not_run_could_be(block: Block):
    assert not [fault for line in block.lines[1:] for fault in faults(line)]
    subprocess.run(["bash", "-n", "-c", "\n".join(block.lines)], check=True)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python sft.py --config=configs/apr.py:desktop", ""),
        ("python sft.py --config=configs/apr.py:pocket", "unknown preset 'pocket'"),
        ("python sft.py --config=configs/none.py", "none.py"),
        ("python sft.py --config.optimizer.steeps=3", "configs/apr.py has no field optimizer.steeps"),
        ("python grpo.py --init=pretrained/none", "there is no pretrained/none"),
        ("python evaluate.py --config.sampler.temperature=1", ""),
        ("python evaluate.py --config.sampler.heat=1", "the run has no field sampler.heat"),
        ("python -m harness_of.nothing --workdir=x", "there is no harness_of/nothing.py"),
        ("pip install -e '.[cuda]' && python sft.py", ""),
    ],
)
def test_what_is_wrong_with_a_command(line, fault):
    found = faults(line)
    assert any(fault in text for text in found) if fault else not found


# ------------------------------------------------------------------- numbers


def cells(text: str) -> list[str]:
    """The cells of a Markdown table, without its header, or the words of a paragraph or a block of output."""
    if text.startswith("|"):
        return [cell.strip(" *`") for row in text.splitlines()[2:] for cell in row.strip("|").split("|")]
    return [word.strip(".") for word in re.split(r"[\s/(),*`]+|(?<=[\d}])-", text)]  # 0.603-0.687 is two


def check(held: fill.HeldNumber) -> None:
    """Fails unless a number stands where its comment says and is what it says."""
    assert held.number in cells(held.text), f"{held.document}: there is no {held.number} above the comment"
    if UNMEASURED.fullmatch(held.number):
        pytest.skip(f"{held.number} is yet to be measured")
    decimals = len(held.number.partition(".")[2])
    assert f"{fill.field(held.run, held.name):,.{decimals}f}" == held.number


@pytest.mark.parametrize("held", fill.held(), ids=lambda held: f"{held.document}-{held.run}-{held.name}")
def test_a_number_is_that_of_the_shipped_results(held: fill.HeldNumber):
    check(held)


def test_every_number_of_the_results_in_the_readme_is_held():
    text = README.read_text()
    tables = [(table, comment) for table, comment in HELD.findall(text) if table.startswith("|")]
    assert tables, "README.md has no table of results"
    for table, comment in tables:
        numbers = {cell for cell in cells(table) if re.fullmatch(r"[\d.,]+|\{\{\w+\}\}", cell)}
        assert numbers <= {number for number, _, _ in HELD_LINE.findall(comment)}


def test_a_held_number_may_not_differ_in_its_last_digit():
    right, wrong = (f"{fill.field('apr-desktop', 'accuracy') + error:.3f}" for error in (0, 0.001))
    check(fill.HeldNumber("", f"| a |\n|---|\n| **{right}** |\n", right, "apr-desktop", "accuracy"))
    check(fill.HeldNumber("", f"It solves {right}.\n", right, "apr-desktop", "accuracy"))
    with pytest.raises(AssertionError):
        check(fill.HeldNumber("", f"| a |\n|---|\n| {wrong} |\n", wrong, "apr-desktop", "accuracy"))


def test_a_field_of_several_runs_is_their_mean_or_another_summary(monkeypatch):
    monkeypatch.setattr(fill, "evaluation", {"a": {"n": [0, 0.5]}, "b": {"n": [0, 0.7]}, "c": {"n": [0, 0.9]}}.get)
    values = [fill.field("a+b+c", f"{summary}n.1") for summary in ("", "least:", "most:", "sd:")]
    assert values == pytest.approx([0.7, 0.5, 0.9, 0.2])
    assert fill.field("b", "n.1") == 0.7


def test_nothing_is_yet_to_be_measured():
    assert not [(path.name, name) for path in DOCUMENTS for name in UNMEASURED.findall(path.read_text())]


# ------------------------------------------------------------------- form


def words(text: str) -> int:
    """Words outside code blocks, comments and the rules of tables."""
    text = re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # the target of a link is not read
    return len([word for word in text.split() if re.search(r"\w", word)])


def test_words_are_counted_outside_code_comments_and_rules():
    assert (
        words("# One two\n\n```bash\nls -l\n```\n<!-- no -->\n| a | b |\n|---|---|\n| 3 | [four](docs/x.md) |\n") == 6
    )


def test_the_readme_is_short():
    assert words(README.read_text()) <= MOST_WORDS


def test_the_readme_says_how_large_the_files_are():
    rows = list(fill.ROW.finditer(README.read_text()))
    assert len(rows) >= 8, "README.md has no map of the code"
    for row in rows:
        stated, counted = int(row[2].replace(",", "")), fill.size(row)
        assert abs(stated - counted) <= max(20, counted / 10), f"run `python -m docs.fill`: {row[0]} has {counted} lines"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: pathlib.Path):
    targets = [target for target in LINK.findall(FENCED.sub("", path.read_text())) if "://" not in target]
    assert not [target for target in targets if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_has_no_semicolons(path: pathlib.Path):
    prose = re.sub(r"<!--.*?-->|`[^`]*`", "", FENCED.sub("", path.read_text()), flags=re.DOTALL)
    assert ";" not in prose


def prose(path: pathlib.Path) -> str:
    """A document without its blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCED.sub("", path.read_text()), flags=re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_tests_that_are_named_exist(path: pathlib.Path):
    quoted = re.findall(r"`([^`]+)`", prose(path))
    files = {name for name in quoted if re.fullmatch(r"[\w/]+\.(py|md)", name)} - {"tables.md", "table.md"}  # what commands write
    here = (ROOT, ROOT / "configs", path.parent)  # recipes are called by their name alone
    assert not [name for name in files if not any((folder / name).exists() for folder in here)]
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*_test.py"))
    assert not [name for name in quoted if re.fullmatch(r"test_\w+", name) and f"def {name}(" not in tests]


def test_what_the_exercises_change_is_there():
    found = re.findall(r"\*\*Break it.*?(?=\n## |\Z)", prose(ROOT / "docs/tutorial.md"), re.DOTALL)
    assert len(found) == 6, "every step of the tutorial breaks something"
    changed = 0
    for exercise in found:
        for file, old in re.findall(r"of\s+`([\w/]+\.py)`[^`]*?\breplace\s+`([^`]+)`\s+by", exercise):
            assert (ROOT / file).read_text().count(old) == 1, f"{file} has no {old}"
            changed += 1
        assert re.search(r"`test_\w+`", exercise), "an exercise names a test that goes red"
    assert changed >= 3

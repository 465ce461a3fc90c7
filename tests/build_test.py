"""BUILD is the architecture diagram: held here against the imports of every file, and against the layering.

Nothing is listed twice: files, imports, rules and packages are read from the tree. Only the layering rules
(the last three tests) are stated here. A BUILD file is valid Python syntax, so that `ast` parses it.
"""

import ast
import collections
import functools
import graphlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import typing

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CORE = {path.stem for path in ROOT.glob("*.py")}  # the top level
HOST_ONLY = (  # these never import JAX, nor anything that needs it
    *("packing", "parallel_runtime", "solver", "countdown.task", "harness.cli", "harness.feeding", "harness.grid", "harness.stats"),
    *("analysis.verifier", "analysis.viewer", "analysis.tables", "analysis.figures"),
)
ACCELERATOR = {"flax", "jax", "jaxlib", "optax", "orbax"}
EXTRAS = {"tests": "test", "benchmarks": "benchmarks"}  # folder: the extra of pyproject.toml it may lean on


class Rule(typing.NamedTuple):
    """One py_binary, py_library or py_test of a BUILD file."""

    kind: str
    label: str  # "//:model", "//tests:model_test"
    srcs: tuple[str, ...]  # paths from the root
    deps: frozenset[str]  # labels: "//:model", "@pip//jax"


def read_rules(build: pathlib.Path) -> list[Rule]:
    """The py_* rules of one BUILD file, labels made absolute."""
    package = build.parent.relative_to(ROOT).as_posix().removeprefix(".")
    found = []
    for call in ast.walk(ast.parse(build.read_text())):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith("py_")):
            continue
        fields = {str(k.arg): k.value for k in call.keywords}
        name = ast.literal_eval(fields["name"])
        srcs = tuple((pathlib.PurePath(package) / src).as_posix() for src in ast.literal_eval(fields["srcs"]))
        deps = ast.literal_eval(fields["deps"]) if "deps" in fields else []
        assert len(deps) == len(set(deps)), f"//{package}:{name} lists a dep twice"
        absolute = frozenset(f"//{package}{dep}" if dep.startswith(":") else dep for dep in deps)
        found.append(Rule(call.func.id, f"//{package}:{name}", srcs, absolute))
    return found


RULES = [rule for build in [ROOT / "BUILD", *sorted(ROOT.glob("*/BUILD"))] for rule in read_rules(build)]


def source_files() -> list[str]:
    """Every Python file of the repository, as a path from its root (`runs/` and `build/` are output)."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"), *ROOT.glob("tests/*/*.py")]
    relative = (path.relative_to(ROOT) for path in paths)
    return sorted(path.as_posix() for path in relative if path.parts[0] not in ("runs", "build"))


def module_name(path: str) -> str:
    """configs/apr.py -> configs.apr, tests/__init__.py -> tests."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in source_files()}


@functools.cache
def imported(path: str) -> frozenset[str]:
    """What a file imports, anywhere in it: our modules by full name, other packages by their first part."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            names |= submodules or {str(node.module)}
    names = {name if name in MODULES else name.split(".")[0] for name in names}
    return frozenset(names - set(sys.stdlib_module_names))


def reachable(module: str) -> set[str]:
    """All that a module imports, directly or through our own modules."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += imported(MODULES[name]) if name in MODULES else ()
    return seen - {module}


@functools.cache
def project() -> dict[str, typing.Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared(folder: str) -> set[str]:
    """Names of the packages that pyproject.toml offers to the files of a folder ("" for the modules)."""
    table = project()["project"]
    asked = table["dependencies"] + (table["optional-dependencies"][EXTRAS[folder]] if folder in EXTRAS else [])
    return {re.split(r"[^\w.-]", line)[0] for line in asked}


@functools.cache
def providers() -> typing.Mapping[str, list[str]]:
    """The installed packages that provide each import."""
    return importlib.metadata.packages_distributions()


def package_of(name: str, folder: str) -> str:
    """The declared package that provides the import `name`: absl -> absl-py (itself if it is not installed)."""
    candidates = declared(folder) & set(providers().get(name, [name]))
    assert len(candidates) == 1, f"import {name}: not one package of pyproject.toml, but {sorted(candidates)}"
    return candidates.pop()


def label_of(name: str, folder: str) -> str:
    """The label that a file of `folder` which imports `name` has to depend on."""
    if name in MODULES:
        return next(rule.label for rule in RULES if MODULES[name] in rule.srcs)
    return "@pip//" + re.sub(r"[-_.]+", "_", package_of(name, folder)).lower()


def test_every_file_is_in_exactly_one_rule() -> None:
    listed = collections.Counter(src for rule in RULES for src in rule.srcs)
    shared = "tests/__main__.py"  # starts pytest: a source of every py_test
    assert listed.pop(shared) == sum(rule.kind == "py_test" for rule in RULES)
    assert listed == collections.Counter(path for path in source_files() if path != shared)
    assert len({rule.label for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_deps_are_the_imports(rule: Rule) -> None:
    folder = rule.label.removeprefix("//").split(":")[0].split("/")[0]
    names = {name for src in rule.srcs for name in imported(src)}
    needed = {label_of(name, folder) for name in names} - {rule.label}
    if rule.kind == "py_test":
        needed |= {"//tests:tests"}  # what runs before any file of tests: __init__.py and conftest.py
    assert rule.deps == needed


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_kind_and_name_follow_from_the_file(rule: Rule) -> None:
    *_, last = rule.srcs
    script = not last.startswith("tests/") and '\nif __name__ == "__main__":\n' in (ROOT / last).read_text()
    kind = "py_test" if last.endswith("_test.py") else "py_binary" if script else "py_library"
    assert rule.kind == kind
    package, name = rule.label.removeprefix("//").split(":")
    path = pathlib.PurePath(last).relative_to(package).with_suffix("").as_posix()
    assert name in (path, path.split("/")[0], package)  # a file, or all files of a folder


def test_pyproject_lists_the_packages_that_production_code_imports() -> None:
    shipped = {name for path in source_files() if path.split("/")[0] not in EXTRAS for name in imported(path)}
    assert {package_of(name, "") for name in shipped - set(MODULES)} == declared("")


def test_an_installation_puts_no_module_beside_other_peoples_packages() -> None:
    """Names such as `model` or `solver` would collide: the commands run from the root of a checkout."""
    settings = project()["tool"]["setuptools"]
    assert settings["py-modules"] == [] and settings["packages"] == []


def test_arrows_point_down_only() -> None:
    graph = {name: imported(path) & set(MODULES) for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert set(order) == set(MODULES)
    above: set[str] = set()
    for rule in RULES:
        below = {dep for dep in rule.deps if dep.startswith("//")} - above
        assert not below, f"{rule.label} stands above {sorted(below)}"
        above.add(rule.label)


@pytest.mark.parametrize("module", HOST_ONLY)
def test_host_modules_never_import_jax(module: str) -> None:
    assert not reachable(module) & ACCELERATOR
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & {ACCELERATOR}))"
    path = os.pathsep.join([str(ROOT), *sys.path])
    loaded = subprocess.check_output([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, text=True)
    assert loaded.split() == []


def test_sampler_and_runtime_know_nothing_of_the_task() -> None:
    assert "solver" not in reachable("sampler")
    assert "jax" in reachable("sampler")  # so that the line above looks at something
    assert reachable("parallel_runtime") & set(MODULES) == {"checks", "protocols", "records"}


def test_analysis_stands_above_everything_but_the_evaluation_command() -> None:
    """Hooks by name (`harness.tasks`) are the only other way into it; configs/sweep.py is a recipe of analysis."""
    for name, path in MODULES.items():
        if not name.startswith(("analysis.", "baselines.", "tests.", "benchmarks.", "docs.")) and name not in ("evaluate", "configs.sweep"):
            assert not {other for other in imported(path) if other.startswith("analysis.")}, name


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_no_training_loop_imports_the_evaluation_command(stage: str) -> None:
    assert "evaluate" not in reachable(stage) and "harness.evaluation" in reachable(stage)


def test_arrows_between_folders_point_down_only() -> None:
    """countdown/ knows nothing of harness/, harness/ nothing of a task or a training stage, the core nothing of examples."""
    allowed_by_harness = CORE - {"solver", "sft", "grpo", "evaluate", "objective"}
    for name, path in MODULES.items():
        ours = imported(path) & set(MODULES)
        if name.startswith("countdown."):
            assert not {other for other in ours if other.startswith(("harness.", "analysis."))}, name
        if name.startswith("harness."):
            assert ours <= allowed_by_harness | {other for other in ours if other.startswith("harness.")}, name
        if name in CORE:
            assert not {other for other in ours if other.startswith(("examples.", "tests."))}, name


def test_ci_installs_one_version_of_every_package_that_is_declared() -> None:
    """From registries alone: no path, no host."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), lines
    locked = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in declared("tests")} <= locked
    assert '-c "${CONSTRAINTS:-constraints.txt}"' in (ROOT / ".ci" / "run").read_text()

"""The list of mutants goes along with the code: every old text is in its file once, and its tests exist."""

import ast
import subprocess

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies_and_is_python(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.old != mutant.new and ast.parse(text.replace(mutant.old, mutant.new))
    assert (ROOT / mutant.tests.split()[0]).exists()


def test_there_are_enough_and_no_two_alike():
    assert len(MUTANTS) >= 40 and len({(m.file, m.new) for m in MUTANTS}) == len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(("status", "alive"), [(0, True), (1, False)])
def test_a_mutant_is_applied_for_its_tests_and_undone(tmp_path, monkeypatch, status, alive):
    (tmp_path / "code.py").write_text("a = 1\n")
    seen = []

    def run(command, cwd, **_):
        seen.append((cwd / "code.py").read_text())
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(mutants.subprocess, "run", run)
    assert mutants.survives(Mutant("name", "code.py", "a = 1", "a = 2", "tests/none_test.py"), tmp_path) == alive
    assert seen == ["a = 2\n"] and (tmp_path / "code.py").read_text() == "a = 1\n"
    with pytest.raises(ValueError, match="0 times, not once"):
        mutants.survives(Mutant("name", "code.py", "b", "c", ""), tmp_path)

"""Code lines of production modules: printed and held, so that the core does not grow unseen.

A code line is no blank line, comment or docstring. Run with -s to see the table.
"""

from __future__ import annotations

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = (".", "countdown", "harness", "analysis", "configs")  # examples have no budget
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
TOTAL, CORE = 6490, 2896  # of all modules; of the top level and countdown/, which a student reads
LONGEST_MODULE, LONGEST_FUNCTION = 350, 45  # lines in all; code lines
WORDS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(path: pathlib.Path) -> set[int]:
    """Numbers of the code lines of a file."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in WORDS:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def test_the_code_keeps_its_budget() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): len(code_lines(path)) for path in MODULES}
    for name, size in sizes.items():
        print(f"{name:30} {size:5}")
    core = sum(size for name, size in sizes.items() if "/" not in name or name.startswith("countdown/"))
    print(f"core {core}, in all {sum(sizes.values())}")
    assert core <= CORE and sum(sizes.values()) <= TOTAL


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_and_its_functions_fit_a_screen_or_few(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
    lines = code_lines(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert sum(node.lineno <= line <= (node.end_lineno or 0) for line in lines) <= LONGEST_FUNCTION, node.name

"""Grader, exact search, problems and the command line, against hand-worked cases and slow references."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import types

import pytest

import solver
from configs import apr, sosp
from countdown.grader import Problem, grade_path
from countdown.language import Tokenizer
from countdown.task import Countdown
from harness.build import build
from solver import ProblemRange, problem
from tests.conftest import Ended
from tests.countdown.search_test import APR, LAPTOP, PAPER, ROOT, SOS, SOSP, TOKENIZER

# ---------------------------------------------------------------- grader and exact search


@pytest.mark.parametrize(
    ("numbers", "target", "path", "reason"),
    [
        ((22, 26, 31, 53), 27, "53-31=22, 22/22=1, 1+26=27", ""),
        ((5, 5), 1, "5/5=1", ""),
        ((5, 5, 7), 7, "5-5=0, 0+7=7", ""),
        ((5, 5, 7), 7, "5-5=0,0*7=0", "ends at 0, not 7"),
        ((2, 3), 8, "2**3=8", "malformed step: 2**3=8"),
        ((7, 2), 3, "7//2=3", "malformed step: 7//2=3"),
        ((3, 2, 4), 6, "3/2=1.5, 1.5*4=6", "malformed step: 3/2=1.5"),
        ((3, 2, 4), 6, "1.5*4=6", "malformed step: 1.5*4=6"),
        ((7, 2), 3, "7/2=3", "division not exact: 7/2=3"),
        ((4, 5), 8, "4+4=8", "4 is not available"),
        ((4, 5), 9, "4+5=9, 9+4=13", "4 is not available"),
        ((4, 5, 3), 9, "4+5=9", "unused number 3"),
        ((3, 4), 8, "3+4=8", "wrong arithmetic: 3+4=8"),
        ((3, 4), 1, "3-4=1", "wrong arithmetic: 3-4=1"),
        ((3, 4), 1, "3-4=-1", "malformed step: 3-4=-1"),
        ((3, 3, 4), 4, "3-3=0, 4/0=4", "division by zero: 4/0=4"),
        ((20, 4), 25, "20+4=24", "ends at 24, not 25"),
        ((20, 4), 24, "", "no answer"),
        ((20, 4), 24, "20+4=24,", "malformed step: "),
        ((20, 4), 24, "(20+4)=24", "malformed step: (20+4)=24"),
        ((20, 4), 24, "020+4=24", "malformed step: 020+4=24"),
        ((20, 4), 24, "20+4", "malformed step: 20+4"),
        ((20, 4), 24, "__import__('os')", "malformed step: __import__('os')"),
        ((7, 8), 15, "7+٨=15", "malformed step: 7+٨=15"),
    ],
)
def test_grader(numbers, target, path, reason):
    grade = grade_path(Problem(numbers, target), path)
    assert grade.reason == reason
    assert grade.correct == (reason == "")


def every_value(numbers):
    """All values that use each number once, by trying every tree: slow and independent."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for result in (a + b, a * b, *([a - b] if a >= b else []), *([a // b] if b and a % b == 0 else [])):
            found |= every_value([*rest, result])
    return found


def test_exact_search_agrees_with_trying_everything():
    rng = random.Random(11)
    for i in range(60):
        numbers = [rng.randint(1, 12) for _ in range(2 + i % 3)]
        values = every_value(numbers)
        for target in range(1, 60):
            assert solver.solvable(numbers, target) == (target in values), (numbers, target)


# ---------------------------------------------------------------- problems


def key(drawn):
    return tuple(sorted(drawn.numbers)), drawn.target


@pytest.mark.parametrize("family", [PAPER, LAPTOP])
def test_problems_are_solvable_and_splits_never_meet(family):
    train = [problem(family, "train", seed, i) for seed in range(3) for i in range(150)]
    held_out, validation = (
        [problem(family, split, seed, i) for seed in range(3) for i in range(60)] for split in ("heldout", "validation")
    )
    for one, other in itertools.combinations((train, held_out, validation), 2):
        assert not {*map(key, one)} & {*map(key, other)}
    for drawn in (*train, *held_out, *validation):
        assert solver.solvable(drawn.numbers, drawn.target)
        assert len(drawn.numbers) == family.count
        assert all(family.low <= x <= family.high for x in drawn.numbers)
        assert family.target_low <= drawn.target <= family.target_high
    assert len({*map(key, train)}) > 250
    assert any(list(drawn.numbers) != sorted(drawn.numbers) for drawn in train)


def test_laptop_family_has_8728_problems_two_in_ten_not_trained_on():
    listings = [solver._listing(LAPTOP, split) or () for split in ("train", "validation", "heldout")]
    assert [len(listing) for listing in listings] == [6958, 905, 865] and 6958 + 905 + 865 == 8728
    assert len({key(drawn) for listing in listings for drawn in listing}) == 8728


@pytest.mark.parametrize("family", [PAPER, LAPTOP])
def test_held_out_set_is_distinct_and_reproducible(family):
    chosen = solver.problems_of(family, "heldout", 100)
    assert len({*map(key, chosen)}) == 100
    assert all(solver.split_of(drawn.numbers, drawn.target) == "heldout" for drawn in chosen)
    assert chosen == solver.problems_of(family, "heldout", 100) == solver.problems_of(family, "heldout", 120)[:100]


def test_held_out_set_says_how_many_there_are():
    small = ProblemRange(3, 1, 12, 10, 24)
    exist = len(solver._listing(small, "heldout"))
    assert len(solver.problems_of(small, "heldout", exist)) == exist
    with pytest.raises(ValueError, match=f"only {exist} problems for the heldout split, {exist + 1} were asked for"):
        solver.problems_of(small, "heldout", exist + 1)


@pytest.mark.parametrize(
    "family",
    [ProblemRange(2, 7, 7, 20, 30), ProblemRange(3, 1, 2, 100, 200), ProblemRange(3, 50, 90, 10**6, 10**7)],
)
def test_impossible_families_are_refused(family):
    for split in ("train", "heldout"):
        with pytest.raises(ValueError, match="no solvable problem"):
            problem(family, split, 0, 0)
    with pytest.raises(ValueError):
        solver.problems_of(family, "heldout", 1)


def test_unseen_targets_are_in_no_other_split():
    """A target is unseen or not, whatever the numbers; without unseen targets every split is as it was."""
    some = dataclasses.replace(LAPTOP, unseen_targets=0.2)
    kept = {split: solver._listing(some, split) or () for split in ("train", "validation", "heldout", "unseen")}
    targets = {split: {drawn.target for drawn in listing} for split, listing in kept.items()}
    seen = targets["train"] | targets["validation"] | targets["heldout"]
    assert targets["unseen"] and not targets["unseen"] & seen and targets["unseen"] | seen == {*range(10, 51)}
    for split in ("train", "validation", "heldout"):
        before = solver._listing(LAPTOP, split) or ()
        assert kept[split] == tuple(drawn for drawn in before if drawn.target in seen)
    share = sum(solver.split_of((1, 2), target, 0.1) == "unseen" for target in range(10_000)) / 10_000
    assert share == pytest.approx(0.1, abs=0.01)
    assert repr(some) == repr(LAPTOP)  # it seeds the draws
    with pytest.raises(ValueError, match="only 0 problems for the unseen split"):
        solver.problems_of(LAPTOP, "unseen", 1)
    wide = dataclasses.replace(PAPER, unseen_targets=0.2)
    drawn = [problem(wide, split, 0, i).target for split in ("unseen", "train") for i in range(40)]
    assert not {*drawn[:40]} & {*drawn[40:]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem((0, 3), 3), "not 0"),
        (lambda: Problem((3, -4), 3), "not -4"),
        (lambda: Problem((3, 4), 0), "not 0"),
        (lambda: Problem((3, 4.0), 7), "not 4.0"),
        (lambda: Problem((3, True), 7), "not True"),
        (lambda: Problem((3, "4"), 7), "not '4'"),
        (lambda: Problem((3,), 3), "from 2 to 6 numbers, not 1"),
        (lambda: Problem((1,) * 7, 3), "from 2 to 6 numbers, not 7"),
        (lambda: Problem((3, 10**10), 7), "not 10000000000"),
        (lambda: ProblemRange(1, 1, 9, 1, 9), "problems.count=1 must be from 2 to 6"),
        (lambda: ProblemRange(3, 9, 1, 1, 9), "numbers .*not 9..1"),
        (lambda: ProblemRange(3, 1, 9, 0, 9), "targets .*not 0..9"),
        (lambda: dataclasses.replace(APR, method="dfs"), "demonstrator.method='dfs' must be one of direct, sos, sosp, apr"),
        (lambda: dataclasses.replace(APR, beam_low=3, beam_high=2), "beam"),
        (lambda: dataclasses.replace(APR, sub_beam_high=9), "sub_beam_high must be at least the beam, 10, not 9"),
        (lambda: dataclasses.replace(APR, spawn_probability=1.5), "spawn_probability=1.5 must be from 0 to 1"),
        (lambda: dataclasses.replace(APR, budget_fraction=-0.1), "budget_fraction=-0.1 must be from 0 to 1"),
        (lambda: dataclasses.replace(SOS, budget_fraction=0.5), "sos has no budget"),
        (lambda: dataclasses.replace(SOSP, token_bin=0), "token_bin=0 must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DIGEST = """
import dataclasses, hashlib, json, solver
from countdown.task import Countdown
from tests.countdown.search_test import CONFIGS, LAPTOP, PAPER, TOKENIZER
made = [
    dataclasses.asdict(solver.demonstration(family, config, Countdown(TOKENIZER, config.method), "train", 3, index))
    for family in (LAPTOP, PAPER) for config in CONFIGS.values() for index in (0, 5)
]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_seed_and_index_fix_everything_in_any_process():
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1
    first, second = (solver.demonstration(PAPER, APR, Countdown(TOKENIZER, "apr"), "train", 3, index) for index in (0, 1))
    assert first.problem != second.problem


# ---------------------------------------------------------------- command line

QUESTION = ("--numbers=22,26,31,53", "--target=27")


def test_command_line_prints_threads(command):
    ended = command(solver, *QUESTION, "--method=apr", "--seed=0")
    assert ended.status == 0
    headings = [line for line in ended.out.splitlines() if line.startswith("[")]
    assert headings[0].startswith("[parent, call 0] ") and ended.out.splitlines()[-1].startswith("answer: ")
    assert any(heading.startswith("[child 0.0, call 0] ") for heading in headings)
    assert ended == command(solver, *QUESTION, "--method=apr", "--seed=0")
    assert ended.out != command(solver, *QUESTION, "--method=apr", "--seed=1").out


def test_command_line_prints_the_record(command):
    ended = command(solver, *QUESTION, "--method=sosp", "--json")
    fields = json.loads(ended.out)
    assert ended.status == 0 and fields["task"] == "countdown" and fields["facts"] == {"method": "sosp", "number_limit": 10}
    assert fields["rollout"]["problem"] == {"numbers": [22, 26, 31, 53], "target": 27}
    (call,) = fields["rollout"]["root"]["calls"]
    assert Tokenizer(10).decode(call["injected"]) == solver.root_prompt(Problem((22, 26, 31, 53), 27), "sosp")


def test_command_line_grades(command):
    assert command(solver, *QUESTION, "--grade=53-31=22, 22/22=1, 1+26=27") == Ended(0, "correct\n", "")
    assert command(solver, *QUESTION, "--grade=53-31=22") == Ended(1, "unused number 22\n", "")
    assert command(solver, *QUESTION, "--grade=").status == 1


def test_command_line_says_what_it_does_and_which_flags_it_has():
    run = subprocess.run([sys.executable, "solver.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "python solver.py --numbers=22,26,31,53" in run.stdout and "--grade" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--numbers=1,2",),
        ("--numbers=1,x", "--target=3"),
        ("--numbers=1,-2", "--target=3"),
        ("--numbers=0,2", "--target=3"),
        ("--numbers=1,2", "--target=three"),
        ("--numbers=1,2", "--target=0"),
        (*QUESTION, "--method=bfs"),
        (*QUESTION, "--sed=0"),
        (*QUESTION, "extra"),
    ],
)
def test_command_line_refuses_bad_input_in_one_sentence(command, arguments):
    ended = command(solver, *arguments)
    assert ended.status == 2 and ended.out == ""
    assert ended.err.startswith("error: ") and len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["--numbers=22,26,31,53", "--target=27"], ["--numbers=5,5", "--target=1", "--grade=5/5=1"]])
def test_a_closed_pipe_ends_a_command_quietly(words):
    """As of `| head`: where the text outgrows the buffer, and where it is written at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "solver.py", *words]
    ended = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def solved(recipe: types.ModuleType, preset: str, context: int, **demonstrator: int | float | str) -> list[tuple]:
    """Of each beam of a demonstrator: solved, solved within the context, mean total tokens."""
    config = recipe.get_config(preset)
    config.demonstrator.update(demonstrator)
    parts = build(config)
    entries = parts.domain.demonstrators(parts.test_set(), context)
    return [(round(e["solved"], 3), round(e["accuracy"], 3), round(e["total_tokens"])) for e in entries]


def test_what_the_documents_say_of_the_demonstrator_of_sosp_at_desktop():
    """docs/results.md: wider searches solve more, and less of that fits a context of 1,024."""
    found = solved(sosp, "desktop", 1024)
    assert [entry[0] for entry in found] == [0.440, 0.511, 0.587, 0.668, 0.734]
    assert [entry[1] for entry in found] == [0.440, 0.511, 0.573, 0.493, 0.448]


@pytest.mark.parametrize(
    ("recipe", "preset", "context", "beam", "heuristic", "expected"),
    [
        (sosp, "desktop", 1024, 3, "near", (0.773, 615)),
        (apr, "desktop", 1024, 7, "total", (0.813, 3478)),
        (apr, "desktop", 1024, 7, "near", (0.885, 3642)),
        (sosp, "laptop", 512, 1, "near", (0.983, 128)),
    ],
)
def test_what_the_documents_say_of_searches_with_the_same_ranking(recipe, preset, context, beam, heuristic, expected):
    """The searches of SoS+ and APR that list the best children, the others not explored."""
    beams = dict(beam_low=beam, beam_high=beam, beam_low_without_budget=beam)
    (found,) = solved(recipe, preset, context, cost_limit=-1, heuristic=heuristic, **beams)
    assert found[1:] == expected

"""REBASE: allocation and votes by hand, labels by brute force, forks against a fresh prefill, and the command."""

import dataclasses
import functools
import itertools
import json
import pathlib
import random
from collections.abc import Callable

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import solver
from baselines import rebase, reward
from baselines.forking import Fork, ForkingSampler
from baselines.rebase import allocate, elect, search
from configs import direct
from countdown.grader import Problem
from countdown.language import END_ID, Tokenizer
from countdown.task import Countdown
from harness.build import Parts, build
from harness.workdir import Workdir
from model import token_logprobs
from protocols import PrefillRequest
from records import Grade
from train_state import init_params

TASK = Countdown(Tokenizer(500), "direct")
PROBLEM = Problem((2, 3, 4), 20)  # 3+2=5, 4*5=20
STATE = "Current State: 20:[2, 3, 4], Operations: []\n"
FIRST = "Exploring Operation: 3+2=5, Resulting Numbers: [4, 5]\n"
SECOND = "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n"
GOAL = "20,20 equal: Goal Reached\n"


# ------------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    ("scores", "budget", "paper", "code"),
    [
        ([1.0], 16, [16], [16]),
        # weights e^5 : 1 = 148.4 : 1; shares of 16 are 15.89 and 0.11
        ([1.0, 0.0], 16, [16, 0], [16, 0]),
        ([0.0, 1.0], 16, [0, 16], [0, 16]),
        # weights e^1 : 1; shares of 16 are 11.70 and 4.30; ceil(11.70) = 12, then ceil(4 * 1 / 1) = 4
        ([0.2, 0.0], 16, [12, 4], [12, 4]),
        # shares of 8: 5.32, 1.96, 0.72; ceil(5.32) = 6, ceil(2 * 2.718 / 3.718 = 1.46) = 2, nothing is left
        ([0.4, 0.2, 0.0], 8, [5, 2, 1], [6, 2, 0]),
        # equal shares of 5.33: rounded 5 each; ceil 6, then ceil(10 / 2) = 5, then 5
        ([0.5, 0.5, 0.5], 16, [5, 5, 5], [6, 5, 5]),
        # equal shares of 1.5 would round to 2 + 2 = 4: the last gets what is left
        ([0.5, 0.5], 3, [2, 1], [2, 1]),
        ([], 5, [], []),
        ([0.3, 0.3], 0, [0, 0], [0, 0]),
    ],
)
def test_shares_worked_by_hand(scores: list[float], budget: int, paper: list[int], code: list[int]):
    assert allocate(scores, budget, "paper") == paper
    assert allocate(scores, budget, "code") == code


def test_widths_never_exceed_the_budget_and_the_best_path_goes_on():
    rng = random.Random(0)
    for _ in range(500):
        budget = rng.randint(1, 40)
        scores = [rng.choice([0.0, 0.5, rng.random(), 1.0]) for _ in range(rng.randint(1, budget))]
        for rounding in rebase.ROUNDINGS:
            widths = allocate(scores, budget, rounding)
            assert min(widths) >= 0 and sum(widths) <= budget and widths[scores.index(max(scores))] >= 1
            ranked = [width for _, width in sorted(zip(scores, widths, strict=True), key=lambda pair: -pair[0])]
            assert all(left + 1 >= right for left, right in itertools.pairwise(ranked))  # +1: the code's ceilings
        assert sum(allocate(scores, budget, "code")) == budget  # the ceilings leave nothing over


# ------------------------------------------------------------------- votes


def test_votes_by_hand():
    right, wrong, other = Grade(True, "", ("a",)), Grade(False, "w", ("b",)), Grade(False, "o", ("c",))
    votes = [
        (wrong, 0.3),
        (right, 0.8),
        (wrong, 0.3),
        (other, 0.7),
        (other, 0.2),
        (wrong, 0.1),
        (Grade(False, ""), 9.0),
    ]
    assert elect(votes, "majority") == wrong  # 3 : 1 : 2
    assert elect(votes, "weighted") == other  # 0.7 : 0.8 : 0.9
    assert elect(votes, "best") == right
    assert elect([*votes[:2], (right, 0.0)], "majority") == right
    assert elect([(wrong, 0.5), (right, 0.5)], "weighted") == wrong  # of equal answers the first
    assert elect([(Grade(False, "none"), 1.0)], "best") == elect([], "majority") == Grade(False, "no answer")


# ------------------------------------------------------------------- labels


def brute_force(numbers: tuple[int, ...], target: int) -> bool:
    """Tries every operation of every ordered pair."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b, rest = numbers[i], numbers[j], tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        results = {a + b, a * b, *([a - b] if a >= b else []), *([a // b] if b and a % b == 0 else [])}
        if any(brute_force((*rest, result), target) for result in results):
            return True
    return False


def test_the_oracle_agrees_with_brute_force_after_any_legal_line():
    rng, seen = random.Random(1), set()
    for _ in range(300):
        numbers = tuple(rng.randint(1, 12) for _ in range(rng.choice([3, 4])))
        problem = Problem(numbers, rng.randint(10, 50))
        left, text = list(numbers), f"Current State: {problem.target}:{list(numbers)}, Operations: []\n"
        for _ in range(rng.randint(1, len(numbers) - 1)):
            a, b = sorted(rng.sample(left, 2), reverse=True)
            sign = rng.choice("+-*/" if b and a % b == 0 else "+-*")
            result = {"+": a + b, "-": a - b, "*": a * b}.get(sign, a // b if b else 0)
            left.remove(a)
            left.remove(b)
            left.append(result)
            text += f"Exploring Operation: {a}{sign}{b}={result}, Resulting Numbers: {left}\n"
        label = reward.reachable(problem, text)
        assert label == brute_force(tuple(left), problem.target), text
        seen.add((label, len(left) == 1))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (FIRST, 1),
        (FIRST + SECOND, 1),
        ("Exploring Operation: 4-2=2, Resulting Numbers: [3, 2]\n", 0),  # 6, 5, 1: 20 is out of reach
        ("Exploring Operation: 3+2=6, Resulting Numbers: [4, 6]\n", 0),  # wrong arithmetic
        ("Exploring Operation: 9+2=11, Resulting Numbers: [4, 11]\n", 0),  # there is no 9
        (FIRST + "Exploring Operation: 4-2=2, Resulting Numbers: [5, 2]\n", 0),  # the 2 is used
        ("No solution found.\n", 0),
        ("Exploring Operation: 3+2=5\n", 0),  # no line of the language
        (FIRST + "4\n", 0),
    ],
)
def test_labels_of_lines_by_hand(text: str, label: int):
    assert reward.oracle(TASK, [(PROBLEM, TASK.tokenizer.encode(STATE) + TASK.tokenizer.encode(text))]) == [label]


def test_a_finished_solution_is_worth_its_grade():
    whole = [*TASK.tokenizer.encode(STATE + FIRST + SECOND + GOAL), END_ID]
    early = [*TASK.tokenizer.encode(STATE + FIRST + GOAL), END_ID]  # 20 is in reach, but the solution is over
    assert reward.oracle(TASK, [(PROBLEM, whole), (PROBLEM, early)]) == [1, 0]


def test_a_step_is_a_line_and_the_goal_ends_with_the_thread():
    ends = {*reward.step_ids(TASK)}
    whole = [*TASK.tokenizer.encode(FIRST + SECOND + GOAL), END_ID]
    steps = [TASK.tokenizer.decode(whole[: i + 1]) for i, token in enumerate(whole) if token in ends]
    assert steps == [FIRST, FIRST + SECOND, FIRST + SECOND + GOAL + "<|end|>"]


# ------------------------------------------------------------------- forks and trees


@functools.cache
def tiny() -> tuple[Parts, dict]:
    """The smoke preset on one device, and random parameters."""
    config = ConfigDict(direct.get_config("smoke").to_dict())
    config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
    parts = build(config)
    return parts, init_params(parts.model, jax.random.key(0))


def forking(rows: int, temperature: float = 1.0) -> ForkingSampler:
    """A sampler of the smoke preset that stops at the ends of lines."""
    parts, params = tiny()
    settings = dataclasses.replace(parts.sampler, rows=rows, temperature=temperature)
    return ForkingSampler(parts.model, params, settings, reward.step_ids(parts.domain.task))


def test_forked_rows_go_on_as_a_fresh_prefill_would_and_feed_nothing_again():
    parts, params = tiny()
    prompts = [parts.domain.task.prompt(problem) for problem in parts.domain.problems("heldout", 2)]
    sampler = forking(8)
    sampler.prefill([PrefillRequest(row, 0, ids, (row, 1), 0, 12) for row, ids in enumerate(prompts)])
    lines = sampler.drain()
    fed = sampler.counters["prefill_tokens"]
    # Rows 0 and 1 change places, and both are copied.
    plan = {0: 1, 1: 0, 2: 0, 5: 1, 7: 0}
    sampler.fork([Fork(row, source, (row, 9), 12) for row, source in plan.items()])
    drawn = {}
    while stopped := sampler.decode():
        drawn |= {completion.row: completion for completion in stopped}
    assert drawn.keys() == plan.keys() and sampler.counters["prefill_tokens"] == fed
    fresh = forking(8)
    starts = {row: prompts[source] + lines[source] for row, source in plan.items()}
    fresh.prefill([PrefillRequest(row, 0, ids, (row, 9), len(lines[plan[row]]), 12) for row, ids in starts.items()])
    assert fresh.drain() == {row: completion.ids for row, completion in drawn.items()}
    assert drawn[2].ids != drawn[7].ids  # copies of one row with keys of their own
    ids_RT = reward.padded([starts[row] + completion.ids for row, completion in drawn.items()], len(drawn), 512)
    positions_RT, until_RT = (
        np.broadcast_to(np.arange(ids_RT.shape[1]), ids_RT.shape),
        np.full_like(ids_RT, ids_RT.shape[1]),
    )
    logits, _ = jax.jit(parts.model.apply)({"params": params}, ids_RT, positions_RT, until_RT)
    expected_RT = jax.jit(token_logprobs)(logits, ids_RT)
    for (row, completion), expected_T in zip(drawn.items(), expected_RT, strict=True):
        first = len(starts[row])
        expected = expected_T[first : first + len(completion.ids)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


class Scripted:
    """Stands for a `ForkingSampler`: the line that a row draws depends on how often it was forked."""

    rows, context = 8, 500

    def __init__(self, lines: list[list[list[int]]]) -> None:
        self.lines, self.forks = lines, []  # depth -> line of each fork

    def reset(self) -> None:
        self.forks = []

    def prefill(self, fills: list[PrefillRequest]) -> None:
        self.fills = fills

    def fork(self, forks: list[Fork]) -> None:
        self.forks.append(forks)

    def drain(self) -> dict[int, list[int]]:
        return {fork.row: line for fork, line in zip(self.forks[-1], self.lines[len(self.forks) - 1], strict=True)}


def test_finished_paths_lower_the_width_and_a_tree_counts_its_tokens():
    encode = TASK.tokenizer.encode
    first, over = encode(FIRST), [*encode(GOAL), END_ID]
    endless = [5] * rebase.LINE_TOKENS
    lines = [[first, first, over, first], [first, endless, over], [over]]
    scores = iter([[1.0, 0.0, 0.5, 0.0], [0.2, 0.9, 0.4], [0.7]])
    sampler = Scripted(lines)
    tree = search(sampler, TASK, [PROBLEM], 4, lambda states: next(scores), "code", 0)[0]
    # Depth 1: one of four is over, so 3 go on: the path of score 1 gets ceil(3 * 148.4 / 150.4) = 3 forks, the others
    # none. Depth 2: two are over (one has no end of line), so 1 goes on. Depth 3: the last is over.
    assert [[(fork.row, fork.source) for fork in forks] for forks in sampler.forks] == [
        [(0, 0), (1, 0), (2, 0), (3, 0)],
        [(0, 0), (1, 0), (2, 0)],
        [(0, 0)],
    ]
    assert tree.budget == 0 and not tree.live and [path.score for path in tree.ended] == [0.5, 0.9, 0.4, 0.7]
    assert tree.total_tokens == sum(len(line) for depth in lines for line in depth)
    assert tree.sequential_tokens == max(len(first), len(over)) + rebase.LINE_TOKENS + len(over)
    assert len({fork.key for forks in sampler.forks for fork in forks}) == 8
    with pytest.raises(ValueError, match="3 x 4 paths need more than 8 rows"):
        search(sampler, TASK, [PROBLEM] * 3, 4, lambda states: [], "code", 0)


def test_problems_side_by_side_find_what_each_finds_alone():
    parts, _ = tiny()
    task, problems = parts.domain.task, parts.domain.problems("heldout", 2)
    score = functools.partial(reward.lots, 3)
    both = search(forking(8), task, problems, 4, score, "paper", 0)
    alone = [search(forking(4), task, [problem], 4, score, "paper", 0)[0] for problem in problems]
    for one, other in zip(both, alone, strict=True):
        assert [path.ids for path in one.ended] == [path.ids for path in other.ended]
        assert (one.total_tokens, one.sequential_tokens) == (other.total_tokens, other.sequential_tokens)


# ------------------------------------------------------------------- the learned reward


def test_the_reward_model_says_one_half_before_and_the_labels_after_training():
    parts, params = tiny()
    fresh = reward.start(parts.model, params)
    good, bad = TASK.tokenizer.encode(STATE + FIRST), TASK.tokenizer.encode(STATE + FIRST + SECOND)
    states = [(PROBLEM, good), (PROBLEM, bad), (PROBLEM, good)]
    assert reward.learned(parts.model, fresh, states) == [0.5, 0.5, 0.5]
    ids_RT = reward.padded([good, bad], 2, 128)
    label_RT, is_end_RT = np.zeros(ids_RT.shape, np.float32), np.zeros(ids_RT.shape, bool)
    is_end_RT[0, len(good) - 1] = is_end_RT[1, len(bad) - 1] = label_RT[0, len(good) - 1] = True
    seen: list[float] = []
    batch = reward.Batch(ids_RT, label_RT, is_end_RT)
    trained = reward.fit(parts.model, fresh, batch, 250, lambda number, loss, accuracy: seen.append(loss))
    assert seen[0] == pytest.approx(np.log(2)) and seen[-1] < 0.1
    scores = reward.learned(parts.model, trained, states)
    assert scores[0] > 0.9 and scores[1] < 0.1 and scores[2] == scores[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with random parameters of the smoke preset."""
    path = tmp_path_factory.mktemp("runs") / "direct-smoke"
    Workdir(path, direct.get_config("smoke")).save_best(7, tiny()[1], {"accuracy": 0.0})
    return path


def test_the_command_trains_a_reward_searches_and_writes_what_it_found(
    run: pathlib.Path, command: Callable, monkeypatch: pytest.MonkeyPatch
):
    at = f"--workdir={run}"
    ended = command(rebase, at, "--problems=2", "--width=4")
    assert ended.status == 2 and "holds no learned reward: train one with" in ended.err and not ended.out
    for name, value in dict(SAMPLES=8, VALIDATION=4, UPDATES=2).items():
        monkeypatch.setattr(reward, name, value)
    ended = command(rebase, at, "--train_reward")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out.splitlines()[-1])["reward"] == str(run / "reward")
    ended = command(rebase, at, "--problems=2", "--width=4", "--vote=best")
    assert ended.status == 0, ended.err
    line = json.loads(ended.out.splitlines()[-1])
    assert (line["n"], line["checkpoint"], line["children"], line["width"]) == (2, 7, 0, 4)
    assert line["accuracy"] == line["votes"]["best"][0] and line["total_tokens"] >= line["sequential_tokens"] > 0
    stored = json.loads((run / "rebase-learned-4-paper-2-0.json").read_text())
    assert len(stored.pop("results")) == 2 and stored == line
    (run / "reward" / "2" / "checksums.json").write_text("{}\n")
    ended = command(rebase, at, "--problems=2")
    assert ended.status == 2 and "does not match checksums.json" in ended.err and not ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which run to search with"),
        (["--workdir=pretrained/apr", "--reward=oracle"], "a line is a step in direct solutions alone, not in 'apr'"),
        (["--workdir=runs/none-at-all"], "holds no run"),
    ],
)
def test_a_wrong_run_is_refused_in_one_sentence(arguments: list[str], message: str, command: Callable):
    ended = command(rebase, *arguments)
    assert ended.status == 2 and message in ended.err and ended.err.count("\n") == 1


def test_solvable_problems_are_reachable_from_the_start():
    family = solver.ProblemRange(3, 1, 20, 10, 50)
    for problem in solver.problems_of(family, "heldout", 20):
        text = f"Current State: {problem.target}:{list(problem.numbers)}, Operations: []\n"
        assert reward.reachable(problem, text) and not reward.reachable(Problem(problem.numbers, 999_983), text)


def test_random_rewards_depend_on_seed_and_text_alone():
    states = [(PROBLEM, [1, 2]), (PROBLEM, [1, 3]), (PROBLEM, [1, 2])]
    first, second, third = reward.lots(0, states)
    assert first == third != second and reward.lots(1, states)[0] != first


def test_rows_are_padded_within_the_context():
    assert reward.padded([[1] * 3, [2] * 17], 3, 60).tolist() == [[1] * 3 + [0] * 29, [2] * 17 + [0] * 15, [0] * 32]
    assert reward.padded([[1] * 59], 1, 60).shape == (1, 60)

"""REBASE (reward balanced search, arXiv 2408.00724): a tree of lines whose width goes where rewards are high.

    python sft.py --config=configs/direct.py                                    # the policy: one operation a line
    python -m baselines.rebase --workdir=runs/direct --train_reward             # the learned reward
    python -m baselines.rebase --workdir=runs/direct --width=16 --reward=learned
    python -m baselines.rebase --workdir=runs/direct --width=16 --reward=oracle # the upper bound
    python -m baselines.rebase --workdir=runs/direct --width=16 --reward=random # the lower bound

  1. The prompt is one path of score 1, and the budget B of a problem is `--width`.
  2. `allocate` shares B among the paths of a depth by the softmax of their scores: W_j = B exp(R_j / T) / sum.
  3. Path j is forked W_j times, and each copy draws one line at temperature 1. Its prefix is not fed again.
  4. The reward scores every new path. A path that has ended leaves the tree, and B falls by one.
  5. When B is 0, the ended paths vote on the answer.

`--rounding=code` is the released code's: from the best path down, a ceiling of the path's share of what is left.
The paper rounds to the nearest number. The sum can then exceed B, so the worst paths get less here.

Sequential tokens add up the longest line of every depth, as a depth waits for all scores of the one before it.
For samples without a tree see `evaluate.py --config.sampler.temperature=1 --config.evaluation.samples=16`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import typing
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from baselines.forking import Fork, ForkingSampler
from baselines.reward import Reward, State, graded, learned, load, lots, oracle, step_ids, train
from checks import require
from countdown.grader import Problem
from countdown.language import END_ID
from countdown.task import Countdown
from harness import stats
from harness.build import Parts, build
from harness.cli import Progress, UsageError, usage_errors
from harness.evaluation import fingerprint, problem_set
from harness.processes import launch
from harness.rollouts import RolloutPool
from harness.workdir import load_best, read_config, write_json
from parallel_runtime import thread_key
from protocols import PrefillRequest, Request
from records import Grade

TEMPERATURE = 0.2  # of the softmax over rewards
DEPTH = 25  # most lines of a path
LINE_TOKENS = 64  # a line that is longer ends its path
ROUNDINGS = ("paper", "code")
VOTES = ("majority", "weighted", "best")


def allocate(scores: Sequence[float], budget: int, rounding: str) -> list[int]:
    """How often each path is forked: at most `budget` in all."""
    weights = [math.exp(score / TEMPERATURE) for score in scores]
    widths, left, total = [0] * len(scores), budget, sum(weights)
    rest = total
    for j in sorted(range(len(scores)), key=lambda j: -scores[j]):  # of equal scores the first comes first
        if rounding == "paper":
            widths[j] = min(left, math.floor(budget * weights[j] / total + 0.5))
        else:  # what rounding of floats adds to a whole number is no reason for one more
            widths[j] = min(left, math.ceil(left * weights[j] / rest - 1e-9))
        left -= widths[j]
        rest -= weights[j]
    return widths


def elect(votes: Sequence[tuple[Grade, float]], how: str) -> Grade:
    """The verdict on the answer that wins: by number ("majority"), sum ("weighted") or maximum ("best") of scores.

    Paths without an answer have no vote; of equal answers the first wins.
    """
    tally: dict[tuple[str, ...], float] = {}
    for grade, score in votes:
        if grade.answer:
            so_far = tally.get(grade.answer, 0.0)
            more = {"majority": so_far + 1, "weighted": so_far + score, "best": max(so_far, score)}
            tally[grade.answer] = more[how]
    winner = max(tally, key=tally.__getitem__, default=())
    return next((grade for grade, _ in votes if winner and grade.answer == winner), Grade(False, "no answer"))


class Path(typing.NamedTuple):
    """A prompt and whole lines, held by a row of the sampler."""

    ids: list[int]
    row: int
    score: float


@dataclasses.dataclass
class Tree:
    """The search of one problem."""

    problem: Problem
    budget: int
    live: list[Path]
    ended: list[Path] = dataclasses.field(default_factory=list)
    total_tokens: int = 0  # drawn ids of all lines
    sequential_tokens: int = 0


def search(
    sampler: ForkingSampler,
    task: Countdown,
    problems: Sequence[Problem],
    width: int,
    reward: Reward,
    rounding: str,
    seed: int,
) -> list[Tree]:
    """Searches problems side by side, `width` rows each. Raises ValueError without so many rows."""
    require(
        width * len(problems) <= sampler.rows, f"{len(problems)} x {width} paths need more than {sampler.rows} rows"
    )
    trees = [Tree(p, width, [Path(task.prompt(p), n * width, 1.0)]) for n, p in enumerate(problems)]
    sampler.reset()
    sampler.prefill([PrefillRequest(path.row, 0, path.ids, (0, 0), 0, 1) for tree in trees for path in tree.live])
    for depth in range(DEPTH):
        parents: dict[int, tuple[Tree, Path]] = {}  # row -> what is forked there
        for number, tree in enumerate(trees):
            widths = allocate([path.score for path in tree.live], tree.budget, rounding)
            copies = [path for path, copies in zip(tree.live, widths, strict=True) for _ in range(copies)]
            parents |= {number * width + i: (tree, path) for i, path in enumerate(copies)}
            tree.live = []
        if not parents:
            break
        sampler.fork(
            [
                Fork(row, path.row, thread_key((seed,), Request(tree.problem), (depth, row % width)), LINE_TOKENS)
                for row, (tree, path) in parents.items()
            ]
        )
        _grow(parents, sampler.drain(), reward, sampler.context)
    return trees


def _grow(parents: dict[int, tuple[Tree, Path]], drawn: dict[int, list[int]], reward: Reward, context: int) -> None:
    """Enters the paths that a line has extended into their trees."""
    texts = {row: [*path.ids, *drawn[row]] for row, (_, path) in parents.items()}
    states: list[State] = [(parents[row][0].problem, ids) for row, ids in texts.items()]
    longest: dict[int, int] = {}
    for (row, ids), score in zip(texts.items(), reward(states), strict=True):
        tree, cut = parents[row][0], len(drawn[row]) == LINE_TOKENS or len(ids) >= context
        ended = ids[-1] == END_ID or cut
        (tree.ended if ended else tree.live).append(Path(ids, row, score))
        tree.budget -= ended
        tree.total_tokens += len(drawn[row])
        longest[id(tree)] = max(longest.get(id(tree), 0), len(drawn[row]))
    for tree in {id(tree): tree for tree, _ in parents.values()}.values():
        tree.sequential_tokens += longest[id(tree)]


# ------------------------------------------------------------------- the report


def measure(
    parts: Parts, params: typing.Any, problems: Sequence[Problem], reward: Reward
) -> list[dict[str, typing.Any]]:
    """What REBASE makes of every problem, in order: whether each vote is right, and costs."""
    args, task = flags.FLAGS, typing.cast(Countdown, parts.domain.task)
    together = max(1, parts.config.sampler.rows // args.width)
    settings = dataclasses.replace(parts.sampler, rows=together * args.width, temperature=1.0)
    sampler = ForkingSampler(parts.model, params, settings, step_ids(task))
    progress, results = Progress(len(problems), 0, "problem"), []
    for group in stats.grouped(problems, together):
        for tree in search(sampler, task, group, args.width, reward, args.rounding, args.seed):
            votes = [(graded(task, tree.problem, path.ids), path.score) for path in tree.ended]
            results.append(
                {
                    "problem": parts.domain.to_json(tree.problem),
                    **{how: elect(votes, how).correct for how in VOTES},
                    "any": any(grade.correct for grade, _ in votes),
                    "answers": sum(bool(grade.answer) for grade, _ in votes),
                    "total_tokens": tree.total_tokens,
                    "sequential_tokens": tree.sequential_tokens,
                }
            )
        progress.update(len(results))
    progress.close()
    return results


def summary(results: Sequence[dict[str, typing.Any]], vote: str) -> dict[str, typing.Any]:
    """Accuracy of each vote with its interval, that of `vote` first, and mean costs."""
    shares = {how: stats.mean_with_interval([float(r[how]) for r in results]) for how in (*VOTES, "any")}
    accuracy, low, high = shares[vote]
    costs = {name: sum(r[name] for r in results) / len(results) for name in ("total_tokens", "sequential_tokens")}
    return {"n": len(results), "accuracy": accuracy, "interval": [low, high], "votes": shares, "children": 0, **costs}


def main(_: list[str]) -> None:
    """Trains the reward, or searches the held-out problems, as the flags say."""
    args = flags.FLAGS
    if args.workdir is None:
        raise UsageError("say which run to search with: --workdir=runs/direct")
    with usage_errors():
        config = ConfigDict(read_config(args.workdir))
        config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
        parts = build(config)
        method = parts.domain.facts()["method"]
        remedy = "train one with `python sft.py --config=configs/direct.py`"
        require(method == "direct", f"a line is a step in direct solutions alone, not in {method!r}: {remedy}")
        problems = parts.domain.problems("heldout", args.problems or parts.evaluation.problems)
    params, result = load_best(args.workdir, parts.param_shapes())
    path, task = pathlib.Path(args.workdir), typing.cast(Countdown, parts.domain.task)
    if args.train_reward:
        print(json.dumps(train(RolloutPool(parts), params, path, args.seed)))
        return
    rewards: dict[str, Reward] = {
        "oracle": functools.partial(oracle, task),
        "random": functools.partial(lots, args.seed),
        "learned": lambda states: learned(parts.model, trained, states),
    }
    trained = load(path, parts, params) if args.reward == "learned" else None
    results = measure(parts, params, problems, rewards[args.reward])
    facts = {name: getattr(args, name) for name in ("width", "reward", "rounding", "vote", "seed")}
    fixed = {"checkpoint": result["step"], "parameters": fingerprint(params), "problem_set": problem_set(problems)}
    report = {"label": config.name, "method": "rebase", **facts, **summary(results, args.vote), **fixed}
    for how, (share, low, high) in report["votes"].items():
        print(f"  {how:<10} {share:.3f}  (95 % {low:.3f}-{high:.3f})")
    name = f"rebase-{args.reward}-{args.width}-{args.rounding}-{len(problems)}-{args.seed}.json"
    write_json(path / name, {**report, "results": results})
    print(json.dumps(report))


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "The run of configs/direct.py to search with.")
    flags.DEFINE_integer("width", 16, "Paths of a problem, the budget of every depth.", lower_bound=1, upper_bound=4096)
    flags.DEFINE_enum("reward", "learned", ["learned", "oracle", "random"], "What scores a line.")
    flags.DEFINE_enum("rounding", "paper", ROUNDINGS, "How shares of the width become whole numbers.")
    flags.DEFINE_enum("vote", "weighted", VOTES, "Which vote is the accuracy of the last line of output.")
    flags.DEFINE_integer("problems", None, "How many held-out problems (default: the run's own).", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draws; the problems are always the same.", lower_bound=0)
    flags.DEFINE_bool("train_reward", False, "Train the learned reward and keep it in WORKDIR/reward, then end.")


if __name__ == "__main__":
    launch(define_flags, main)

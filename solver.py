"""The symbolic solver of Countdown: problems, exact search, demonstrations, and a command line.

Countdown: combine the given numbers, each exactly once, with + - * / to reach the target. Symbolic
searches look for a solution and write the search down. A model that is trained on the text learns to
search (paper section 4).

  1. `problem` draws a solvable problem. A hash of the problem assigns it to the training, validation or
     held-out split, so no seed can mix the splits.
  2. `demonstrate` runs one of the searches of `countdown.search`, which writes a `Trace` (text).
  3. `demonstration` records a trace as the `Rollout` that the runtime would have recorded.
  4. `solvable` decides by exact search whether a target can be reached. `grade_steps` grades answers.

Deviations from the paper and its released code (see also `countdown.search`):
  - Problems of a small family are drawn uniformly among the solvable ones. For a large family the target
    is drawn first, then numbers until they reach it.
  - `Token Budget` is the multiple of the bin that holds the whole trace.
  - The recipes of small models rank by another heuristic and explore every operation (`heuristic`, `cost_limit`).

Run: python solver.py --numbers=22,26,31,53 --target=27 --method=apr --seed=0
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from typing import Annotated

from absl import flags

from checks import Checked, at_least, one_of, require, within
from countdown.asynchronous import Asynchronous
from countdown.grader import MAX_NUMBERS, MAX_VALUE, Problem, grade_path
from countdown.language import Tokenizer
from countdown.search import BreadthFirst, DepthFirst, Direct, Hybrid, Node, Parallel, Rules, Search, Trace
from countdown.task import METHODS, UNBUDGETED, Countdown, record, root_prompt
from harness.cli import launch, usage_errors
from harness.show import show, verdict
from records import Rollout, stored

ORDERS = ("fixed", "random")
HEURISTICS = ("paper", "total", "near")
SPAWN_RULES = ("coin", "large")
MAX_ENUMERATED_SETS = 3000  # families with at most this many sets of numbers are listed whole

# ---------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class ProblemRange(Checked):
    """A family of problems: `count` numbers in low..high, targets in target_low..target_high (all inclusive)."""

    section = "problems"
    count: Annotated[int, within(2, MAX_NUMBERS)]
    low: int
    high: int
    target_low: int
    target_high: int
    # Share of targets that neither training nor validation nor the held-out split draws. Not in the text that seeds.
    unseen_targets: Annotated[float, within(0, 1)] = dataclasses.field(default=0.0, repr=False)

    def check(self) -> None:
        """Checks both ranges."""
        for name, low, high in (("numbers", self.low, self.high), ("targets", self.target_low, self.target_high)):
            ordered = 1 <= low <= high <= MAX_VALUE
            require(ordered, f"range of {name} must satisfy 1 <= low <= high <= {MAX_VALUE}, not {low}..{high}")


def _unseen(target: int, share: float) -> bool:
    return int.from_bytes(hashlib.blake2b(f"target {target}".encode(), digest_size=4).digest()) / 2**32 < share


def split_of(numbers: Sequence[int], target: int, unseen_targets: float = 0.0) -> str:
    """The split of a problem, by a stable hash of sorted numbers and target, whatever the seed.

    It is "train", "validation", "heldout" or "unseen".
    A share of all targets is unseen, by a hash of the target alone. Of the other problems one in ten is held out
    for tests, one in ten chooses checkpoints (validation), the rest is trained on.
    """
    if _unseen(target, unseen_targets):
        return "unseen"
    key = f"{sorted(numbers)} {target}".encode()
    tenth = hashlib.blake2b(key, digest_size=4).digest()[0] % 10
    return "heldout" if tenth == 0 else "validation" if tenth == 1 else "train"


@functools.lru_cache(maxsize=8)
def _listing(family: ProblemRange, split: str) -> tuple[Problem, ...] | None:
    """Every solvable problem of a split (sorted numbers), or None if the family is too large to list."""
    pool = range(family.low, family.high + 1)
    if math.comb(len(pool) + family.count - 1, family.count) > MAX_ENUMERATED_SETS:
        return None
    return tuple(
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(pool, family.count)
        for target in sorted(_reachable(numbers))
        if family.target_low <= target <= family.target_high
        and split_of(numbers, target, family.unseen_targets) == split
    )


def problem(family: ProblemRange, split: str, seed: int, index: int) -> Problem:
    """Solvable problem number `index` of a split: the same in every process; splits never share one.

    Raises ValueError if the split has no solvable problem (for families too large
    to list: if many draws met none).
    """
    rng = random.Random(f"problem {family} {split} {seed} {index}")
    listing = _listing(family, split)
    if listing is None:
        target = 0
        for draw in range(20_000 if family.count <= 4 else 1000):  # five and more numbers take long
            # The target first, then numbers until they can reach it, but not for ever.
            if draw % 1000 == 0 or _unseen(target, family.unseen_targets) != (split == "unseen"):
                target = rng.randint(family.target_low, family.target_high)
            numbers = tuple(rng.randint(family.low, family.high) for _ in range(family.count))
            if split_of(numbers, target, family.unseen_targets) == split and solvable(numbers, target):
                return Problem(numbers, target)
    if not listing:
        raise ValueError(f"{family} has no solvable problem for the {split} split: widen its ranges")
    drawn = rng.choice(listing)
    return Problem(tuple(rng.sample(drawn.numbers, family.count)), drawn.target)


@functools.lru_cache(maxsize=8)
def problems_of(family: ProblemRange, split: str, n: int) -> tuple[Problem, ...]:
    """`n` problems of a split, always the same, distinct as sorted numbers and target.

    Raises ValueError saying how many exist if there are fewer.
    """
    listing = _listing(family, split)
    found: dict[str, Problem] = {}
    for index in range(0 if listing is not None and len(listing) < n else 100 * n):
        drawn = problem(family, split, 0, index)
        found.setdefault(f"{sorted(drawn.numbers)} {drawn.target}", drawn)
        if len(found) == n:
            return tuple(found.values())
    count = len(found) if listing is None else len(listing)
    asked = f"{family} has only {count} problems for the {split} split, {n} were asked for"
    raise ValueError(f"{asked}: widen its ranges, or ask for fewer (evaluation.problems, train.eval_problems)")


# ---------------------------------------------------------------- exact search


@functools.cache
def _splits(n: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Every way to part n indices in two, each once, the smaller part first."""
    parts = [part for size in range(1, n // 2 + 1) for part in itertools.combinations(range(n), size)]
    return tuple((p, tuple(i for i in range(n) if i not in p)) for p in parts if 2 * len(p) < n or 0 in p)


@functools.lru_cache(maxsize=1 << 12)
def _reachable(numbers: tuple[int, ...]) -> set[int]:
    """Every value that uses each of `numbers` exactly once (not to be changed: it is kept)."""
    if len(numbers) == 1:
        return set(numbers)
    values: set[int] = set()
    for part, rest in _splits(len(numbers)):
        others = _reachable(tuple([numbers[i] for i in rest]))
        for a in _reachable(tuple([numbers[i] for i in part])):
            for b in others:
                values.update((a + b, a * b, abs(a - b)))
                if b and a % b == 0:
                    values.add(a // b)
                elif a and b % a == 0:
                    values.add(b // a)
    return values


def solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether `target` can be reached; meets in the middle: the last operation is undone, not tried."""
    for part, rest in _splits(len(numbers)):
        others = _reachable(tuple([numbers[i] for i in rest]))
        # Is there a b among the others with a+b, a-b, b-a, a*b, a/b or b/a the target?
        for a in _reachable(tuple([numbers[i] for i in part])):
            if target - a in others or a - target in others or target + a in others:
                return True
            if a and (target * a in others or (target % a == 0 and target // a in others)):
                return True
            if a and a % target == 0 and a // target in others:
                return True
    return False


# ---------------------------------------------------------------- demonstrations


@dataclasses.dataclass(frozen=True)
class DemonstratorConfig(Checked):
    """How demonstrations are made.

    The beam is drawn from `beam_low`..`beam_high` once per problem, but from `beam_low_without_budget` up if the
    prompt states no budget. The children of APR draw theirs from that beam .. `sub_beam_high`.
    """

    section = "demonstrator"
    method: Annotated[str, one_of(*METHODS)]
    beam_low: int
    beam_high: int
    sub_beam_high: int
    spawn_probability: Annotated[float, within(0, 1)]  # of the coin of SoS+ and APR
    budget_fraction: Annotated[float, within(0, 1)]  # share of demonstrations that state their budget in the prompt
    token_bin: Annotated[int, at_least(1)]  # granularity of a token budget (SoS+)
    order: Annotated[str, one_of(*ORDERS)] = "random"  # of the children that a node lists; "random" is the paper's
    beam_low_without_budget: int = 1
    prune: bool = False  # list neither repeated states nor children that cost more than the target; the paper does
    # Which children are best (`countdown.states.expand`): "paper" is "multiply", for SoS "sum" by lot.
    heuristic: Annotated[str, one_of(*HEURISTICS)] = "paper"
    # Every operation is explored, and the first children that cost at most so much are generated (SoS+ and APR, where
    # children have two or more numbers left); -1, the paper's: the best children are, and no others explored.
    cost_limit: Annotated[int, at_least(-1)] = -1
    depth: Annotated[int, at_least(1)] = 1  # levels of threads below the root's (APR); the paper has one
    # Where children are handed out: "coin", the paper's, or "large": where they have three or more numbers left.
    spawn_when: Annotated[str, one_of(*SPAWN_RULES)] = "coin"
    unjoined: Annotated[int, at_least(-1)] = -1  # children that a parent leaves running; -1: it waits, as in the paper

    def check(self) -> None:
        """Checks what depends on the method."""
        least, most = self.beam_low, self.beam_high
        require(1 <= least <= most, f"beam must satisfy 1 <= low <= high, not {(least, most)}")
        low = self.beam_low_without_budget
        require(1 <= low <= most, f"beam_low_without_budget must be from 1 to the widest beam, {most}, not {low}")
        wide = self.method != "apr" or self.sub_beam_high >= most
        require(wide, f"sub_beam_high must be at least the beam, {most}, not {self.sub_beam_high}")
        nests = self.method == "apr" or self.depth == 1
        require(nests, f"{self.method} has no threads to nest: depth must be 1, not {self.depth}")
        joins = self.method == "apr" or self.unjoined == -1
        require(joins, f"{self.method} has no threads to join: unjoined must be -1, not {self.unjoined}")
        limited = self.cost_limit >= 0 and self.method in UNBUDGETED
        require(not limited, f"{self.method} explores the best children: cost_limit must be -1, not {self.cost_limit}")
        stated = self.budget_fraction if self.method in UNBUDGETED else 0
        require(not stated, f"{self.method} has no budget to condition on: budget_fraction must be 0, not {stated}")

    def seed_text(self) -> str:
        """What seeds the demonstrations. Its words never change, or the same seed would give other demonstrations."""
        return (
            f"DemonstratorConfig(method={self.method!r}, beam={(self.beam_low, self.beam_high)}, "
            f"sub_beam_high={self.sub_beam_high}, spawn_probability={self.spawn_probability}, "
            f"condition={self.budget_fraction}, token_bin={self.token_bin}, order={self.order!r}, "
            f"free_beam_low={self.beam_low_without_budget}{', prune=True' if self.prune else ''}"
            f"{f', heuristic={self.heuristic}' if self.heuristic != 'paper' else ''}"
            f"{f', cost_limit={self.cost_limit}' if self.cost_limit >= 0 else ''}"
            f"{f', depth={self.depth}' if self.depth > 1 else ''}"
            f"{', spawn_when=large' if self.spawn_when == 'large' else ''}"
            f"{f', unjoined={self.unjoined}' if self.unjoined >= 0 else ''})"
        )


def demonstrate(problem: Problem, config: DemonstratorConfig, rng: random.Random) -> Trace:
    """One demonstration as text; every choice comes from `rng`."""
    target, root = problem.target, Node("0", list(problem.numbers), "", 0, "", None)
    beam = rng.randint(config.beam_low, config.beam_high)
    apr = Parallel if config.unjoined < 0 else Asynchronous
    kinds: dict[str, type[Search]] = {"direct": Direct, "sosp": Hybrid, "apr": apr}
    kind = kinds[config.method] if config.method in kinds else rng.choice((DepthFirst, BreadthFirst))
    heuristic = rng.choice(("sum", "multiply")) if config.method == "sos" else "multiply"
    rules = Rules(
        heuristic=heuristic if config.heuristic == "paper" else config.heuristic,
        fixed_order=config.order == "fixed",
        prunes=config.prune,
        cost_limit=config.cost_limit,
        spawn_probability=config.spawn_probability,
        spawn_when=config.spawn_when,
        sub_beam=rng.randint(beam, config.sub_beam_high) if config.method == "apr" else 0,
        depth=config.depth,
        unjoined=config.unjoined,
    )
    search = kind(root, target, beam, rng, rules)
    search.run()
    search.trace.prompt = root_prompt(problem, config.method)
    return search.trace


def demonstration(
    family: ProblemRange, config: DemonstratorConfig, task: Countdown, split: str, seed: int, index: int
) -> Rollout:
    """Demonstration number `index`, recorded as threads of `task` that may state their budget.

    (seed, index) fixes everything, in any process. Raises as `problem` does.
    """
    rng = random.Random(f"demonstration {config.seed_text()} {split} {seed} {index}")
    drawn = problem(family, split, seed, index)
    stated = rng.random() < config.budget_fraction
    low = config.beam_low if stated else config.beam_low_without_budget
    trace = demonstrate(drawn, dataclasses.replace(config, beam_low=low), rng)
    children_budget = token_budget = -1
    if stated:
        if config.method == "apr":
            children_budget = trace.child_threads()
        else:
            tokens = 1 + len(task.tokenizer.encode("".join([trace.prompt, *trace.calls])))
            token_budget = -(-tokens // config.token_bin) * config.token_bin
    return record(drawn, trace, dataclasses.replace(task, children_budget=children_budget, token_budget=token_budget))


# ---------------------------------------------------------------- command line

NUMBER_LIMIT = 10  # of the tokenizer here: digit by digit


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_list("numbers", None, "The numbers, separated by commas.")
    flags.DEFINE_integer("target", None, "The target.")
    flags.DEFINE_enum("method", "apr", METHODS, "The demonstrator.")
    flags.DEFINE_integer("seed", 0, "Seed of the demonstrator's choices.")
    flags.DEFINE_bool("json", False, "Print a trace file (the record) instead of the text.")
    flags.DEFINE_string("grade", None, "Judge this path instead: exit status 0 if it is right, 1 if it is wrong.")


def _problem_of(numbers: Sequence[str] | None, target: int | None) -> Problem:
    if not numbers or target is None:
        raise ValueError("--numbers and --target are needed, e.g. --numbers=22,26,31,53 --target=27")
    for number in numbers:
        if not re.fullmatch("[0-9]{1,10}", number):
            raise ValueError(f"--numbers must be positive integers separated by commas, not {number!r}")
    return Problem(tuple(int(number) for number in numbers), target)


def main(_: list[str]) -> None:
    """Prints a demonstration, or judges a path and exits with status 1 if it is wrong."""
    args = flags.FLAGS
    with usage_errors():
        problem = _problem_of(args.numbers, args.target)
    if args.grade is not None:
        grade = grade_path(problem, args.grade)
        print("correct" if grade.correct else grade.reason)
        sys.exit(0 if grade.correct else 1)
    tokenizer = Tokenizer(NUMBER_LIMIT)
    beam_high, coin = (10, 0.9) if args.method == "apr" else (5, 0.5)  # the paper's
    config = DemonstratorConfig(args.method, 1, beam_high, 15, coin, budget_fraction=0, token_bin=512)
    trace = demonstrate(problem, config, random.Random(args.seed))
    rollout = record(problem, trace, Countdown(tokenizer, args.method))
    if args.json:
        facts = {"method": args.method, "number_limit": NUMBER_LIMIT}
        print(json.dumps(stored("countdown", facts, rollout, dataclasses.asdict(problem))))
    else:
        print(f"{show(rollout, tokenizer)}{verdict(rollout.grade)}")


if __name__ == "__main__":
    launch(define_flags, main)

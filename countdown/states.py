"""States of Countdown and their children: what two numbers can become, what a heuristic says of it, every solution."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator

Child = tuple[float, str, list[int]]  # cost, operation, numbers left


@functools.lru_cache(maxsize=1 << 17)
def combine(a: int, b: int) -> tuple[tuple[int, str], ...]:
    """Results of the legal operations on two numbers, and their text: sum, product, difference, exact quotient."""
    large, small = (b, a) if a <= b else (a, b)
    results = [
        (a + b, f"{a}+{b}={a + b}"),
        (a * b, f"{a}*{b}={a * b}"),
        (large - small, f"{large}-{small}={large - small}"),
    ]
    if small and large % small == 0:
        results.append((large // small, f"{large}/{small}={large // small}"))
    return tuple(results)


@functools.lru_cache(maxsize=1024)
def _large_factors(target: int) -> set[int]:
    """The factors of a target above 1."""
    small = [f for f in range(1, int(target**0.5) + 1) if target % f == 0]
    return {f for s in small for f in (s, target // s) if f > 1} | {target}


@functools.lru_cache(maxsize=1 << 17)
def _to_factor(number: int, target: int) -> int:
    """Distance of a number to the nearest factor of the target above 1; beyond the target that is the target."""
    return number - target if number > target else min(abs(number - factor) for factor in _large_factors(target))


_PAIRS = {n: list(itertools.combinations(range(n), 2)) for n in range(2, 7)}


def nearness(numbers: list[int], target: int) -> float:
    """Distance to the target of the nearest of: the sum of the numbers, the largest less the others, their product.

    A product's distance counts half: products lie wider apart than sums, and are harder to tell without writing them.
    """
    total = sum(numbers)
    by_sums = min(abs(total - target), abs(2 * max(numbers) - total - target))
    return min(by_sums, abs(math.prod(numbers) - target) / 2)


# Costs of the numbers left. The first two are SoS's: distances to the nearest factor >= 2 of the target, added up, and
# the mean distance to the target.
COSTS: dict[str, Callable[[list[int], int], float]] = {
    "multiply": lambda numbers, target: sum([_to_factor(number, target) for number in numbers]),
    "sum": lambda numbers, target: sum(abs(number - target) for number in numbers) / len(numbers),
    "total": lambda numbers, target: abs(sum(numbers) - target),
    "near": nearness,
}


def expand(numbers: list[int], target: int, heuristic: str = "multiply") -> list[Child]:
    """Every child of a state as (cost, operation, numbers left), in order of generation; low costs are good.

    `heuristic` is one of `COSTS`.
    """
    cost = COSTS[heuristic]
    children: list[Child] = []
    for i, j in _PAIRS[len(numbers)]:
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for result, operation in combine(numbers[i], numbers[j]):
            left = [*rest, result]
            children.append((cost(left, target), operation, left))
    return children


def best_first(children: list[Child]) -> list[Child]:
    """The children of `expand` by cost, ties in order of generation."""
    return sorted(children, key=operator.itemgetter(0))


def _each_state_once(children: list[Child]) -> list[Child]:
    first: dict[tuple[int, ...], Child] = {}
    for child in children:
        first.setdefault(tuple(sorted(child[2])), child)
    return [*first.values()]


def pruned(children: list[Child], bound: float) -> list[Child]:
    """The children that cost at most a bound (SoS depth-first: the target), the first of each state alone."""
    return [child for child in _each_state_once(children) if child[0] <= bound]


def solutions(numbers: list[int], target: int, heuristic: str = "multiply") -> Iterator[list[tuple[str, list[int]]]]:
    """Every solution, as a list of (operation, numbers left): depth first, the best children first, each state once."""
    for _, operation, left in _each_state_once(best_first(expand(numbers, target, heuristic))):
        if left == [target]:
            yield [(operation, left)]
        elif len(left) > 1:
            yield from ([(operation, left), *rest] for rest in solutions(left, target, heuristic))

"""States of Countdown and their children: what two numbers can become, what a heuristic says of it, every solution."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator

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


class _Distances(dict[int, int]):
    """Distance of the values up to the target to what a heuristic likes, filled on demand.

    Above the target the distance is value - target for both heuristics.
    """

    def __init__(self, heuristic: str, target: int):
        small = [f for f in range(1, int(target**0.5) + 1) if target % f == 0] if heuristic == "multiply" else []
        self.liked = {f for s in small for f in (s, target // s) if f > 1} | {target}

    def __missing__(self, value: int) -> int:
        self[value] = min(abs(value - liked) for liked in self.liked)
        return self[value]


_distances = functools.lru_cache(maxsize=1024)(_Distances)
_PAIRS = {n: list(itertools.combinations(range(n), 2)) for n in range(2, 7)}


def expand(numbers: list[int], target: int, heuristic: str = "multiply") -> list[Child]:
    """Every child of a state as (cost, operation, numbers left), in order of generation; low costs are good.

    "multiply" sums the distances of the numbers left to the nearest factor >= 2
    of the target; "sum" is the mean distance to the target. Both are SoS's.
    "total" is the distance of the sum of the numbers left to the target, and "near" is `nearness`.
    """
    whole, near = WHOLE.get(heuristic), _distances(heuristic, target)
    costs = [near[value] if value <= target else value - target for value in numbers]
    total = sum(costs)
    size = len(numbers) - 1 if heuristic == "sum" else 1
    children: list[Child] = []
    for i, j in _PAIRS[len(numbers)]:
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        others = total - costs[i] - costs[j]
        for result, operation in combine(numbers[i], numbers[j]):
            left = [*rest, result]
            factors = (others + (near[result] if result <= target else result - target)) / size
            children.append((whole(left, target) if whole else factors, operation, left))
    return children


def nearness(numbers: list[int], target: int) -> int:
    """Distance to the target of the nearest of: the sum of the numbers, their product, the largest less the others."""
    total = sum(numbers)
    return min(abs(value - target) for value in (total, math.prod(numbers), 2 * max(numbers) - total))


WHOLE = {"near": nearness, "total": lambda numbers, target: abs(sum(numbers) - target)}  # costs of all numbers at once


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

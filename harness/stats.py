"""Statistics of rollouts: accuracy with its interval, costs, adherence to budgets, and the curves of the papers.

  1. `summarize` is the one summary of an evaluation: one object per method and budget.
  2. `pass_at` and `cons_at` turn n samples of each problem into the best and the majority of k.
  3. `windows` asks what a smaller context window would have left of the accuracy; `reached_within` the same of any
     cost that grows while a rollout runs (sequential tokens, milliseconds).
  4. `adherence` compares what a rollout was asked to spend with what it spent.
  5. `paired` compares two methods problem by problem; `scaling` is s1's slope over budgets.

All intervals are of 95 %: Wilson's for shares of independent problems, else the normal one of a mean over problems
(samples of one problem are not independent, problems are). No JAX.

Deviations from the paper: none in what is counted (total tokens: all threads; sequential tokens: the longest
dependent chain). cons@k is averaged over the disjoint groups of k that the n samples make, not over one group.
"""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Sequence

import records
from records import Rollout

Z = 1.959964  # standard deviations that hold 95 % of a normal distribution
MEANS = ("total_tokens", "sequential_tokens", "children", "longest_context", "milliseconds", "truncated", "malformed")
T = typing.TypeVar("T")
Estimate = tuple[float, float, float]  # value, and the ends of its interval


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Score interval of a share (Wilson, 1927)."""
    share, spread = correct / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal(values: Sequence[float]) -> Estimate:
    """Mean of one value per problem, with the normal interval."""
    n, value = len(values), sum(values) / len(values)
    half = Z * math.sqrt(sum((v - value) ** 2 for v in values) / max(1, n - 1) / n)
    return value, value - half, value + half


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """Mean of one share per problem; Wilson's interval where all are 0 or 1, or equal, else the normal one.

    Equal values have no spread that could tell how far the mean may be off.
    """
    if all(value in (0, 1) for value in values) or len({*values}) == 1:
        return sum(values) / len(values), *wilson(sum(values), len(values))
    value, low, high = normal(values)
    return value, max(0.0, low), min(1.0, high)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """By how much `second` is above `first` on the same problems, in order."""
    return normal([b - a for a, b in zip(first, second, strict=True)])


def grouped(items: Sequence[T], samples: int) -> list[Sequence[T]]:
    """The samples of each problem; `items` hold them one problem after another."""
    return [items[start : start + samples] for start in range(0, len(items), samples)]


def per_problem(values: Sequence[float], samples: int) -> list[float]:
    """Mean over the samples of each problem."""
    return [sum(group) / samples for group in grouped(values, samples)]


def counts(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`, which is the last."""
    return [*(1 << i for i in range((samples - 1).bit_length())), samples]


def pass_at(k: int, correct: int, samples: int) -> float:
    """Chance that at least one of k samples is correct if `correct` of `samples` are: the unbiased estimate.

    (Chen et al., arXiv 2107.03374, equation 1.)
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def cons_at(k: int, group: Sequence[Rollout]) -> float:
    """Share of the disjoint groups of k samples of a problem whose majority over solution paths is correct.

    Samples without an answer have no vote; of answers with equal votes the first counts.
    """
    right = []
    for votes in (group[start : start + k] for start in range(0, len(group) - k + 1, k)):
        winner = Counter(vote.grade.answer for vote in votes if vote.grade.answer).most_common(1)
        right.append(any(vote.grade.correct for vote in votes if winner and vote.grade.answer == winner[0][0]))
    return sum(right) / len(right)


def summarize(rollouts: Sequence[Rollout], samples: int, seconds: float) -> dict[str, typing.Any]:
    """Accuracy, mean costs, and wall clock per rollout ("throughput_ms"), of `samples` rollouts of each problem.

    "pass_at" and "cons_at" map k to an estimate of what k samples achieve together.
    """
    groups = grouped(rollouts, samples)
    shares = [sum(rollout.grade.correct for rollout in group) for group in groups]
    value, low, high = mean_with_interval([share / samples for share in shares])
    return {
        "n": len(groups),
        "samples": samples,
        "correct": sum(shares),
        "accuracy": value,
        "interval": (low, high),
        **records.mean_costs(rollouts, MEANS),
        "throughput_ms": 1e3 * seconds / len(rollouts),
        "pass_at": {str(k): mean_with_interval([pass_at(k, x, samples) for x in shares]) for k in counts(samples)},
        "cons_at": {str(k): mean_with_interval([cons_at(k, group) for group in groups]) for k in counts(samples)},
    }


def reached_within(correct: Sequence[bool], costs: Sequence[float], bound: float, samples: int = 1) -> Estimate:
    """Accuracy if only rollouts counted that cost at most `bound`."""
    within = [right and cost <= bound for right, cost in zip(correct, costs, strict=True)]
    return mean_with_interval(per_problem(within, samples))


def resampled(correct: Sequence[bool], costs: Sequence[float], bound: float, samples: int) -> tuple[Estimate, float]:
    """Accuracy, and mean cost of an accepted answer, if a problem is sampled until a sample costs at most `bound`.

    A problem none of whose `samples` does is not solved. The cost leaves rejected samples out, as s1's does (arXiv
    2501.19393: rejection sampling); it is 0 if nothing is accepted.
    """
    tried = grouped(list(zip(correct, costs, strict=True)), samples)
    first = [next((sample for sample in group if sample[1] <= bound), None) for group in tried]
    accepted = [sample[1] for sample in first if sample]
    estimate = mean_with_interval([float(sample[0]) if sample else 0.0 for sample in first])
    return estimate, sum(accepted) / max(1, len(accepted))


def windows(rollouts: Sequence[Rollout], context: int, samples: int) -> dict[str, Estimate]:
    """Context window -> accuracy if only rollouts counted whose every context fits (paper, section 5).

    Windows are the eighths of `context` from a quarter up.
    """
    correct = [rollout.grade.correct for rollout in rollouts]
    longest = [records.longest_context(rollout.root) for rollout in rollouts]
    bounds = [context * eighth // 8 for eighth in range(2, 9)]
    return {str(bound): reached_within(correct, longest, bound, samples) for bound in bounds}


def adherence(used: Sequence[float], low: float, high: float) -> dict[str, typing.Any]:
    """What rollouts spent of a budget: the mean, and the share of those in low..high (s1: Control)."""
    inside = [float(low <= value <= high) for value in used]
    return {"asked": [low, high], "used": sum(used) / len(used), "within": sum(inside) / len(inside)}


def scaling(points: Sequence[tuple[float, float]]) -> float:
    """s1's Scaling: mean slope of accuracy over all pairs of budgets, (mean tokens, accuracy) each.

    Raises ValueError unless two of them differ in tokens.
    """
    slopes = [(f - e) / (b - a) for a, e in points for b, f in points if b > a]
    if not slopes:
        raise ValueError(f"a slope needs two budgets that differ in tokens, not {list(points)}")
    return sum(slopes) / len(slopes)

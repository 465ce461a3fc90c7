"""Measures: known intervals, hand-worked summaries, and the estimators against counting all cases."""

import itertools
import math

import pytest

import records
from countdown.grader import Problem
from harness import stats
from records import Call, Grade, Rollout, Thread


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # found by bisection of the score statistic, not by the formula
        (8, 10, 0.4901625, 0.9433178),
        (0, 16, 0.0, 0.1936077),
        (16, 16, 0.8063923, 1.0),
        (355, 500, 0.6687452, 0.7480526),
        (1, 2, 0.0945312, 0.9054688),
    ],
)
def test_wilson_against_known_intervals(correct, n, low, high):
    assert stats.wilson(correct, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_is_where_the_score_test_just_rejects():
    """Wilson's ends are the shares whose score statistic is 1.96: the definition, solved backwards."""
    low, high = stats.wilson(29, 40)
    for share in (low, high):
        assert abs(29 / 40 - share) / math.sqrt(share * (1 - share) / 40) == pytest.approx(1.959964, abs=1e-5)


def rollout_of(correct: bool, parent: list[int], children: list[list[int]], stop: str, milliseconds: float) -> Rollout:
    """A rollout whose threads' calls sampled so many ids after a prompt of ten; children come before the last call."""
    calls = [Call(0 if i == 0 else 10, [2] * (10 if i == 0 else 5), [3] * n) for i, n in enumerate(parent)]
    calls[-1].stop = stop
    root = Thread((), calls)
    for spawn, sizes in enumerate(children):
        calls[spawn].stop = records.SPAWN
        root.spawns.append([Thread((spawn, i), [Call(0, [2] * 10, [3] * n)]) for i, n in enumerate(sizes)])
    return Rollout(Problem((1, 2), 3), root, Grade(correct, "" if correct else "no answer"), 0, milliseconds)


def test_a_summary_by_hand():
    """Two children of 30 and 50 ids between 20 and 7 of the parent; and one thread of 100 that ran out of context."""
    first = rollout_of(True, [20, 7], [[30, 50]], records.END, 40.0)
    second = rollout_of(False, [100], [], records.CONTEXT, 60.0)
    third = rollout_of(False, [3], [], records.MALFORMED, 20.0)
    summary = stats.summarize([first, second, third], 1, seconds=0.6)
    assert (summary["n"], summary["correct"]) == (3, 1)
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["interval"] == stats.wilson(1, 3)
    assert summary["total_tokens"] == pytest.approx((107 + 100 + 3) / 3)
    assert summary["sequential_tokens"] == pytest.approx((77 + 100 + 3) / 3)
    assert summary["children"] == pytest.approx(2 / 3)
    assert summary["longest_context"] == pytest.approx((60 + 110 + 13) / 3)
    assert summary["truncated"] == summary["malformed"] == pytest.approx(1 / 3)
    assert summary["milliseconds"] == pytest.approx(40)
    assert summary["throughput_ms"] == pytest.approx(200)


def test_accuracy_by_context_window_by_hand():
    """Contexts of 60 and 110, both right, and one of 13 that is wrong: a window counts what fits it."""
    rollouts = [
        rollout_of(True, [20, 7], [[30, 50]], records.END, 0.0),
        rollout_of(True, [100], [], records.END, 0.0),
        rollout_of(False, [3], [], records.END, 0.0),
    ]
    windows = stats.windows(rollouts, 160, 1)
    assert list(windows) == ["40", "60", "80", "100", "120", "140", "160"]
    assert [window[0] for window in windows.values()] == pytest.approx([0, *[1 / 3] * 3, *[2 / 3] * 3])
    assert windows["80"][1:] == stats.wilson(1, 3)


def answered(*answers: str) -> list[Rollout]:
    """Samples of one problem; "right" is the right answer, "" none."""
    return [
        Rollout(Problem((1, 2), 3), Thread((), [Call(0, [2], [3])]), Grade(a == "right", "", (a,) if a else ()), i)
        for i, a in enumerate(answers)
    ]


@pytest.mark.parametrize("correct", range(6))
def test_pass_at_k_is_the_share_of_all_draws_of_k_with_a_right_one(correct):
    samples = [True] * correct + [False] * (5 - correct)
    for k in range(1, 6):
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert stats.pass_at(k, correct, 5) == pytest.approx(sum(draws) / len(draws))


def test_cons_at_k_is_the_majority_of_each_group():
    group = answered("wrong", "right", "right", "", "", "wrong", "wrong", "right")
    assert stats.cons_at(1, group) == 3 / 8
    assert stats.cons_at(2, group) == 1 / 4  # wrong (first of a tie), right (the other has no vote), wrong, wrong
    assert stats.cons_at(4, group) == 1 / 2
    assert stats.cons_at(8, group) == 0.0  # three to three: the first
    assert stats.cons_at(3, group) == 1 / 2  # of the two groups of three that there are
    assert stats.cons_at(2, answered("", "")) == 0.0


def test_a_summary_of_samples_counts_problems_not_samples():
    rollouts = (answered("right", "right") + answered("", "right") + answered("wrong", "")) * 3
    summary = stats.summarize(rollouts, 2, seconds=1.8)
    assert (summary["n"], summary["samples"], summary["correct"]) == (9, 2, 9)
    assert summary["accuracy"] == pytest.approx(0.5)
    half = 1.959964 * math.sqrt(6 * 0.5**2 / 8) / math.sqrt(9)  # shares 1, 1/2, 0, three times
    assert summary["interval"] == pytest.approx((0.5 - half, 0.5 + half))
    assert summary["throughput_ms"] == pytest.approx(100)
    assert {k: v[0] for k, v in summary["pass_at"].items()} == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert {k: v[0] for k, v in summary["cons_at"].items()} == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert summary["pass_at"]["2"] == stats.mean_with_interval([1.0, 1.0, 0.0] * 3) == (2 / 3, *stats.wilson(6, 9))


def test_equal_shares_have_no_interval_of_width_zero():
    assert stats.mean_with_interval([0.5]) == (0.5, *stats.wilson(0.5, 1))
    assert stats.mean_with_interval([0.75] * 4) == (0.75, *stats.wilson(3, 4))


def test_the_interval_of_shares_stays_among_shares_and_that_of_costs_is_no_share():
    assert stats.mean_with_interval([1.0] * 15 + [0.875])[2] == 1.0 and stats.mean_with_interval([0.0] * 15 + [0.125])[1] == 0.0
    assert stats.normal([1.0] * 16) == (1.0, 1.0, 1.0)
    half = 1.959964 * math.sqrt(2 / 1) / math.sqrt(2)  # 3 and 5: deviations of 1 from 4
    assert stats.normal([3, 5]) == pytest.approx((4.0, 4 - half, 4 + half))


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4, 7]), (8, [1, 2, 4, 8])])
def test_counts_double_up_to_all_samples(samples, ks):
    assert stats.counts(samples) == ks


def test_reached_within_a_bound():
    correct, costs = [True, True, False, True], [10.0, 20.0, 5.0, 30.0]
    assert [stats.reached_within(correct, costs, bound)[0] for bound in (9, 10, 25, 30)] == [0, 0.25, 0.5, 0.75]
    assert stats.reached_within(correct, costs, 20, samples=2)[0] == 0.5  # both of the first problem's


def test_a_paired_difference_by_hand():
    first, second = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    value, low, high = stats.paired(first, second)
    half = 1.959964 * math.sqrt((0.75**2 + 0.25**2 + 0.75**2 + 1.25**2) / 3 / 4)  # differences 1, 0, 1, -1
    assert (value, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    with pytest.raises(ValueError):
        stats.paired([1.0], [1.0, 0.0])


def test_adherence_counts_those_inside():
    assert stats.adherence([4, 5, 5, 7], 5, 6) == {"asked": [5, 6], "used": 5.25, "within": 0.5}


def test_resampling_takes_the_first_sample_that_is_short_enough():
    """Three problems of three samples: the second fits and is right, the first fits and is wrong, none fits."""
    correct = [True, True, False, False, True, True, True, True, True]
    costs = [90, 40, 10, 50, 10, 10, 60, 70, 80]
    (value, low, high), tokens = stats.resampled(correct, costs, 50, 3)
    assert value == pytest.approx(1 / 3) and (low, high) == stats.wilson(1, 3)
    assert tokens == (40 + 50) / 2
    assert stats.resampled(correct, costs, 5, 3) == (stats.mean_with_interval([0.0] * 3), 0)
    assert stats.resampled(correct, costs, 1000, 3)[0][0] == pytest.approx(2 / 3)


def test_scaling_is_the_mean_slope_of_all_pairs():
    slope = (0.2 / 100 + 0.3 / 300 + 0.1 / 200) / 3
    assert stats.scaling([(100, 0.5), (200, 0.7), (400, 0.8)]) == pytest.approx(slope)
    assert stats.scaling([(400, 0.8), (100, 0.5), (200, 0.7)]) == pytest.approx(slope)
    with pytest.raises(ValueError, match="two budgets"):
        stats.scaling([(100, 0.5), (100, 0.6)])

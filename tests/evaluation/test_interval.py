"""Intervals: known values, coverage, and the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.evaluation.interval import bootstrap, mean_interval, ratio_interval, wilson


def test_wilson_gives_published_values():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case):
    successes, count = case
    low, high = wilson(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    assert wilson(count - successes, count) == pytest.approx((1 - high, 1 - low))


def test_wilson_edges():
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="between 0 and 3, got 4"):
        wilson(4, 3)


def test_ratio_interval_covers_the_true_ratio_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        bottom = rng.integers(20, 60, size=60)
        top = rng.poisson(1.5 * bottom)
        low, high = ratio_interval(top, bottom, seed=trial, resamples=300)
        hits += low <= 1.5 <= high
    assert 178 <= hits <= 199


def test_an_interval_of_equal_rows_is_a_point():
    assert ratio_interval([3, 3, 3], [2, 2, 2]) == (1.5, 1.5)


def test_rows_are_drawn_whole():
    """Every row has the ratio 2, so every draw has; columns drawn apart would not."""
    assert ratio_interval([2, 20, 200], [1, 10, 100]) == (2.0, 2.0)


def test_the_seed_decides():
    top, bottom = [1, 5, 9, 2], [1, 2, 3, 4]
    assert ratio_interval(top, bottom, seed=1) == ratio_interval(top, bottom, seed=1)
    assert ratio_interval(top, bottom, seed=1, resamples=20) != ratio_interval(top, bottom, seed=2, resamples=20)


def test_no_interval_where_there_is_nothing_to_draw_or_divide():
    assert ratio_interval([1], [1]) is None
    assert ratio_interval([], []) is None
    assert ratio_interval([0, 0], [0, 0]) is None
    assert bootstrap([[1.0, 2.0]], lambda sums: sums[0] * np.inf) is None


def test_mean_interval_takes_wilson_for_yes_and_no():
    assert mean_interval([True, False, True, True])[1] < 1
    low, high = mean_interval([0.25, 0.5, 0.75])
    assert 0.25 <= low < 0.5 < high <= 0.75


def test_samples_of_one_problem_are_not_taken_as_independent():
    """40 problems, 8 samples each: most problems are nearly always or nearly never solved."""
    rng = np.random.default_rng(2)
    problems = np.repeat(np.arange(40), 8).tolist()
    hits = {"shares": 0, "ratios": 0, "independent": 0}
    for trial in range(200):
        chances = np.repeat(rng.beta(0.3, 0.3, size=40), 8)
        right = (rng.random(320) < chances).astype(float).tolist()
        half = [score / 2 for score in right]
        hits["shares"] += covers(0.5, mean_interval(right, problems=problems))
        hits["independent"] += covers(0.5, mean_interval(right))
        hits["ratios"] += covers(0.25, ratio_interval(half, [1.0] * 320, problems=problems, seed=trial, resamples=200))
    assert 180 <= hits["shares"] <= 199 and 180 <= hits["ratios"] <= 199
    assert hits["independent"] < 140


def covers(value, interval):
    return interval[0] <= value <= interval[1]


def test_an_interval_by_problem_of_one_sample_each_is_the_plain_one():
    scores, names = [1, 0, 1, 1, 0, 1, 1], list("abcdefg")
    assert mean_interval(scores, problems=names) == pytest.approx(mean_interval(scores))
    assert ratio_interval(scores, [2.0] * 7, problems=names) == ratio_interval(scores, [2.0] * 7)


def test_copies_of_a_sample_tell_nothing_new():
    once = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1]
    names = [name for name in "abcdefghij" for _ in range(5)]
    copies = [score for score in once for _ in range(5)]
    assert mean_interval(copies, problems=names) == pytest.approx(mean_interval(once, problems=list("abcdefghij")))
    assert mean_interval([1] * 50, problems=names) == wilson(10, 10)


def test_by_problem_without_scores_or_with_one_problem():
    assert mean_interval([], problems=[]) is None
    low, high = mean_interval([1, 0, 1, 1], problems=["a"] * 4)
    assert high - low > 0.6
    assert ratio_interval([1, 2], [1, 1], problems=["a", "a"]) is None

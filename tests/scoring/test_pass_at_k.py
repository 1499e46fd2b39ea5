"""cllm.scoring.pass_at_k: the estimator matches its definition, and means leave out what cannot be estimated."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.scoring.pass_at_k import mean_pass_at_k, pass_at_k


@given(st.data())
def test_is_the_share_of_k_subsets_with_a_pass(data: Any) -> None:
    samples = data.draw(st.integers(1, 8))
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_known_values() -> None:
    assert pass_at_k(200, 37, 1) == pytest.approx(37 / 200)
    assert pass_at_k(5, 1, 5) == 1
    assert pass_at_k(10, 0, 10) == 0
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001)


@pytest.mark.parametrize("wrong", [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1), (0, 0, 1)])
def test_invalid_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be between"):
        pass_at_k(*wrong)


def test_the_mean_leaves_out_k_above_the_fewest_samples() -> None:
    assert mean_pass_at_k([(2, 1), (3, 0)], (1, 2, 3)) == {1: 0.25, 2: 0.5}
    assert mean_pass_at_k([], (1, 2)) == {}

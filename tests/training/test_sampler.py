"""Length-grouped order: every example once, little padding, the same order for the same seed and epoch."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cllm.training.sampler import LengthGroupedSampler


class Lengths(list):
    def length(self, index: int) -> int:
        return self[index]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_every_example_comes_once_in_a_repeatable_order(lengths: list[int], size: int, seed: int) -> None:
    order = LengthGroupedSampler(Lengths(lengths), size, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert list(order) == list(order)


def test_batches_hold_examples_of_similar_length() -> None:
    draw = random.Random(0)
    lengths = Lengths(draw.randint(1, 100) for _ in range(1000))

    def padded(indices: list[int]) -> int:
        batches = [indices[at : at + 8] for at in range(0, 1000, 8)]
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    order = LengthGroupedSampler(lengths, 8, 0)
    first = list(order)
    assert padded(first) < 1.08 * sum(lengths) < 1.5 * sum(lengths) < padded(list(range(1000)))
    order.epoch = 1
    assert list(order) != first
    means = [sum(lengths[i] for i in first[at : at + 8]) for at in range(0, 960, 8)]
    assert means != sorted(means) and means != sorted(means, reverse=True)

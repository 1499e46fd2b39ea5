"""cllm.scoring.sql_result: results are equal under some order of columns, and of rows where their order is free."""

import random
import time
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.scoring.sql_result import same_result

VALUES = st.sampled_from([None, 0, 1, 2.5, "1", "a", "", b"a"])
RESULTS = st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[VALUES] * width), max_size=5))


def by_trying_all(gold: list, other: list, ordered: bool) -> bool:
    if not gold or not other or len(gold[0]) != len(other[0]):
        return not gold and not other
    for order in permutations(range(len(gold[0]))):
        moved = [tuple(row[at] for at in order) for row in other]
        if gold == moved if ordered else sorted(map(repr, gold)) == sorted(map(repr, moved)):
            return True
    return False


@given(RESULTS, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_same_as_trying_all_orders(gold: list, rng: random.Random, ordered: bool, change: bool) -> None:
    order = list(range(len(gold[0]))) if gold else []
    rng.shuffle(order)
    other = [tuple(row[at] for at in order) for row in gold]
    if not ordered:
        rng.shuffle(other)
    assert same_result(gold, other, ordered)
    if change and other:
        rng.shuffle(other)
        other[0] = tuple(rng.choice([None, 1, "a"]) for _ in other[0])
    assert same_result(gold, other, ordered) == by_trying_all(gold, other, ordered)


@pytest.mark.parametrize(
    ("gold", "other", "unordered", "ordered"),
    [
        ([], [], True, True),
        ([], [(1,)], False, False),
        ([(1,)], [(1, 1)], False, False),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], True, True),
        ([(1, "a"), (2, "b")], [("b", 1), ("a", 2)], False, False),
        ([(1, 2), (3, 4)], [(1, 2), (4, 3)], False, False),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(None,)], [(None,)], True, True),
        ([(None,)], [(0,)], False, False),
    ],
)
def test_cases(gold: list, other: list, unordered: bool, ordered: bool) -> None:
    assert same_result(gold, other, ordered=False) is unordered
    assert same_result(gold, other, ordered=True) is ordered


def test_many_columns_are_fast() -> None:
    rng = random.Random(0)
    gold = [tuple(rng.randrange(2) for _ in range(40)) for _ in range(300)]
    order = rng.sample(range(40), 40)
    other = [tuple(row[at] for at in order) for row in rng.sample(gold, 300)]
    equal = [(0,) * 200] * 50
    start = time.process_time()
    assert same_result(gold, other, ordered=False)
    assert same_result(equal, equal, ordered=False)
    assert time.process_time() - start < 20

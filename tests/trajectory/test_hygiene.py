import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.trajectory.hygiene import Seen, augment, cut_at_eos, degenerate, repetition

few_tokens = st.lists(st.integers(0, 3), max_size=40)


@pytest.mark.parametrize(
    ("ids", "eos_ids", "expected"),
    [
        ([5, 2, 6, 2], [2], [5, 2]),
        ([5, 6, 7], {6, 7}, [5, 6]),
        ([5, 6], [2], [5, 6]),
        ([2], [2], [2]),
        ([], [2], []),
        ([2, 3], [], [2, 3]),
    ],
)
def test_cut_at_eos(ids: list[int], eos_ids: list[int], expected: list[int]) -> None:
    assert cut_at_eos(ids, eos_ids) == expected


def repetition_by_definition(ids: list[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    inside = {i + k for i, gram in enumerate(grams) if grams.count(gram) > 1 for k in range(n)}
    return len(inside) / len(ids) if ids else 0.0


@given(few_tokens, st.integers(1, 6))
def test_repetition_matches_its_definition(ids: list[int], n: int) -> None:
    assert repetition(ids, n) == repetition_by_definition(ids, n)


def test_repetition_values() -> None:
    assert repetition([]) == repetition([1, 2]) == repetition(list(range(100))) == 0.0
    assert repetition([7] * 9) == 1.0
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4, 8]) == 0.8
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        repetition([1], 0)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], None),
        (list(range(500)), None),
        ([1] * 9 + [2], None),
        ([0, *[1] * 10, 2], "repeated token"),
        ([*range(100), *[1, 2, 3] * 14], "loop"),  # 42 tokens
        ([1, 2, 3] * 13, None),  # 39 tokens
        ([*range(100), *[1, 2, 3] * 14, 99], None),  # leaves the loop
        ([*range(100), *list(range(32)) * 3], "loop"),
        ([*range(50, 90), *list(range(32)) * 2], None),  # two periods
        (list(range(33)) * 5, None),  # longer cycle
        ([1, 2] * 19 + [1, 2, 1], "loop"),  # a partial period counts: 41 tokens
    ],
)
def test_degenerate(ids: list[int], reason: str | None) -> None:
    assert degenerate(ids) == reason


@given(st.lists(st.integers(0, 1), max_size=160), st.lists(st.integers(0, 4), min_size=1, max_size=34), st.integers(0, 6))
def test_degenerate_matches_its_definition(head: list[int], cycle: list[int], times: int) -> None:
    ids = head + cycle * times
    run = any(len(set(ids[i : i + 10])) == 1 for i in range(len(ids) - 9))
    loop = any(
        length <= len(ids) and all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1))
        for period in range(1, 33)
        for length in [max(40, 3 * period)]
    )
    assert degenerate(ids) == ("repeated token" if run else "loop" if loop else None)


@pytest.mark.parametrize("check", [repetition, degenerate])
@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5] * 4, list(range(20)), [1, 2] * 10], ids=["loop", "distinct", "pair"])
def test_time_is_linear(check: Callable[[list[int]], object], ids: list[int]) -> None:
    def seconds(times: int) -> float:
        longer = ids * times
        runs = []
        for _ in range(3):
            start = time.process_time()
            check(longer)
            runs.append(time.process_time() - start)
        return min(runs)

    assert seconds(16_000) < 16 * 5 * max(seconds(1_000), 1e-4)  # 256 times if quadratic


@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=6), st.integers())
def test_augment_corrects_half_of_the_wrong_positions(states: list[list[int]], seed: int) -> None:
    before = [list(state) for state in states]
    extra = augment(states, random.Random(seed))
    assert states == before
    wrong = [[i for i in range(8) if state[i] != states[-1][i]] for state in states]
    sources = [j for j in range(len(states) - 2) if len(wrong[j]) >= 2]
    assert len(extra) == len(sources)
    for copy, j in zip(extra, sources, strict=True):
        changed = [i for i in range(8) if copy[i] != states[j][i]]
        assert len(changed) == len(wrong[j]) // 2
        assert all(copy[i] == states[-1][i] for i in changed)


def test_augment_is_reproducible() -> None:
    states = [[0] * 16, [0] * 15 + [1], [1] * 16]
    draws = [augment(states, random.Random(seed)) for seed in range(20)]
    assert draws == [augment(states, random.Random(seed)) for seed in range(20)]
    assert len({str(draw) for draw in draws}) > 10
    assert augment(states[1:], random.Random(0)) == []


def test_seen() -> None:
    seen = Seen()
    assert seen.add([1, 2]) and seen.add([2, 1]) and seen.add([12]) and seen.add([])
    assert not seen.add([1, 2])
    assert [1, 2] in seen and [1] not in seen
    assert len(seen) == 4

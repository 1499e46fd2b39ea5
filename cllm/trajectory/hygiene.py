"""Which responses are worth keeping: pure functions on lists of token ids, all in linear time."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Collection, Sequence

EQUAL_RUN = 10  # equal tokens in a row; the paper's post-processing drops a text with such a run
LONGEST_CYCLE = 32  # tokens
LOOP_TOKENS = 40  # tokens at the end of a response that a loop must cover
LOOP_PERIODS = 3  # periods that a loop must have


def cut_at_eos(ids: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """The ids up to and including the first EOS, or all of them if there is none. Pass the response only, without the prompt."""
    for position, token in enumerate(ids):
        if token in eos_ids:
            return list(ids[: position + 1])
    return list(ids)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share (0 .. 1) of tokens inside an n-gram that occurs at least twice in ``ids``.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    grams = list(zip(*(ids[shift:] for shift in range(n)), strict=False))
    counts = Counter(grams)
    inside, covered_to = 0, 0
    for start, gram in enumerate(grams):
        if counts[gram] > 1:
            inside += start + n - max(start, covered_to)
            covered_to = start + n
    return inside / len(ids) if ids else 0.0


def degenerate(ids: Sequence[int]) -> str | None:
    """Why a response is not worth learning from, or None.

    "repeated token": a run of at least 10 equal tokens anywhere (the paper's rule). "loop": the response ends in at least
    three periods of a cycle of at most 32 tokens, together at least 40 tokens.
    """
    run = 0
    for position, token in enumerate(ids):
        run = run + 1 if position and token == ids[position - 1] else 1
        if run >= EQUAL_RUN:
            return "repeated token"
    for period in range(1, LONGEST_CYCLE + 1):
        if _loop_length(ids, period) >= max(LOOP_TOKENS, LOOP_PERIODS * period):
            return "loop"
    return None


def _loop_length(ids: Sequence[int], period: int) -> int:
    """The number of tokens at the end of ``ids`` that repeat with this period, the first period included."""
    position = len(ids) - 1
    while position >= period and ids[position] == ids[position - period]:
        position -= 1
    return len(ids) - 1 - position + period


def augment(states: Sequence[Sequence[int]], rng: random.Random) -> list[list[int]]:
    """The extra states of the paper's ``--use_aug`` for one trajectory, whose last state is the fixed point.

    Each state but the last two gives a copy in which a random half (rounded down) of the wrong positions is corrected. States
    with fewer than two wrong positions give none.
    """
    extra = []
    for state in states[:-2]:
        wrong = [position for position, token in enumerate(state) if token != states[-1][position]]
        if len(wrong) < 2:
            continue
        copy = list(state)
        for position in rng.sample(wrong, len(wrong) // 2):
            copy[position] = states[-1][position]
        extra.append(copy)
    return extra


class Seen:
    """A set of token sequences, kept as 16-byte digests, for detecting duplicates."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, ids: Sequence[int]) -> bool:
        """Add ``ids``; returns whether they are new."""
        digest = self._digest(ids)
        if digest in self._digests:
            return False
        self._digests.add(digest)
        return True

    def __contains__(self, ids: Sequence[int]) -> bool:
        return self._digest(ids) in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    @staticmethod
    def _digest(ids: Sequence[int]) -> bytes:
        return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()

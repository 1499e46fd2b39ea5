"""What decoding gives: iterations as they happen, and the response of each row that they add up to.

Shapes: B rows, W window width, F numbers that an iteration tells of each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch

Stop = Literal["eos", "length", "context"]
SINGLE = 6  # columns of facts_BF in front of the window and the choices


@dataclass(frozen=True)
class Iteration:
    """One forward pass, seen by whoever drives the loop, as one int64 tensor on the model's device."""

    facts_BF: torch.Tensor  # the single numbers in the order of the properties below, then W window tokens and W choices
    reused: Mapping[int, int] = field(default_factory=dict)  # of a prefill: tokens of each row's prompt not computed for it

    @staticmethod
    def facts(*singles_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.stack(singles_B, dim=1), window_BW, choices_BW], dim=1)

    @property
    def rows_B(self) -> torch.Tensor:
        """Which prompt each row belongs to, counted in the order they were fed."""
        return self.facts_BF[:, 0]

    @property
    def start_B(self) -> torch.Tensor:
        """Position of the window's first token, which is verified."""
        return self.facts_BF[:, 1]

    @property
    def emitted_B(self) -> torch.Tensor:
        """How many leading choices joined the output."""
        return self.facts_BF[:, 2]

    @property
    def fast_forwarded_B(self) -> torch.Tensor:
        """Tokens verified beyond the one that AR would have gained."""
        return self.facts_BF[:, 3]

    @property
    def stationary_B(self) -> torch.Tensor:
        """Of those, guesses that had stood right behind a wrong one."""
        return self.facts_BF[:, 4]

    @property
    def running_B(self) -> torch.Tensor:
        """False for rows that were finished before, and for places that no row has."""
        return self.facts_BF[:, 5].bool()

    @property
    def window_BW(self) -> torch.Tensor:
        """The state that went in."""
        return self.facts_BF[:, SINGLE:].chunk(2, dim=1)[0]

    @property
    def choices_BW(self) -> torch.Tensor:
        """The model's choice for the position after each window token."""
        return self.facts_BF[:, SINGLE:].chunk(2, dim=1)[1]


@dataclass
class RowResult:
    """The response to one prompt and what it cost."""

    token_ids: list[int] = field(default_factory=list)  # the end-of-sequence token included where one was reached
    accepted: list[int] = field(default_factory=list)  # tokens gained by each forward; sums to len(token_ids)
    fast_forwarded: int = 0
    stationary: int = 0
    stop: Stop = "length"
    reused: int = field(default=0, compare=False)  # tokens of the prompt that had been computed before, or for another row

    @property
    def forwards(self) -> int:
        """The prefill counts as one, in however many pieces a long prompt goes through the model."""
        return len(self.accepted)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / self.forwards if self.forwards else 0.0

    def behind(self, tokens: int) -> list[list[int]]:
        """The token ids behind the first ``tokens``, apart by the forwards that brought them."""
        steps, end = [], len(self.token_ids)
        for count in reversed(self.accepted):
            if end <= tokens:
                break
            steps.append(self.token_ids[max(tokens, end - count) : end])
            end -= count
        return steps[::-1]

    def gain(self, token_ids: list[int], fast_forwarded: int, stationary: int) -> None:
        """Add what one forward brought."""
        self.token_ids += token_ids
        self.accepted.append(len(token_ids))
        self.fast_forwarded += fast_forwarded
        self.stationary += stationary


class Tally:
    """Adds iterations up to results, row by row. Tensors are fetched from the device only when a result is taken."""

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos = set(eos_ids)
        self._history: list[Iteration] = []
        self._rows: dict[int, RowResult] = {}

    def add(self, iteration: Iteration) -> None:
        self._history.append(iteration)
        for row, tokens in iteration.reused.items():
            self._rows.setdefault(row, RowResult(reused=tokens))

    def so_far(self, row: int) -> RowResult:
        """What a row has by now; how it stops is said by :meth:`take` alone."""
        self._fetch()
        return self._rows.setdefault(row, RowResult())

    def take(self, row: int, max_new_tokens: int) -> RowResult:
        """The result of a finished row, which is forgotten here."""
        result = self.so_far(row)
        del self._rows[row]
        result.stop = "length" if len(result.token_ids) == max_new_tokens else "context"
        if result.token_ids and result.token_ids[-1] in self._eos:
            result.stop = "eos"
        return result

    def _fetch(self) -> None:
        for _, alike in groupby(self._history, key=lambda iteration: iteration.facts_BF.shape):
            for facts in torch.cat([iteration.facts_BF for iteration in alike]).tolist():
                row, _, emitted, fast, stationary, running = facts[:SINGLE]
                if running:
                    choices = facts[(SINGLE + len(facts)) // 2 :]
                    self._rows.setdefault(row, RowResult()).gain(choices[:emitted], fast, stationary)
        self._history.clear()

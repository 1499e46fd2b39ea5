"""The output of decoding: iterations as they happen, and each row's response, which they add up to.

Shapes: B rows, W window width, F numbers per row of an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch

Stop = Literal["eos", "length", "context"]
SCALARS = 6  # columns of fields_BF before the window and the choices


@dataclass(frozen=True)
class Iteration:
    """One forward pass as the caller of the loop sees it: one int64 tensor on the model's device."""

    fields_BF: torch.Tensor  # SCALARS columns in the order of the properties below, then W window tokens and W choices
    reused: Mapping[int, int] = field(default_factory=dict)  # in a prefill: row -> tokens of its prompt that were reused

    @staticmethod
    def pack(*scalars_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> torch.Tensor:
        """``fields_BF`` from its columns."""
        return torch.cat([torch.stack(scalars_B, dim=1), window_BW, choices_BW], dim=1)

    @property
    def rows_B(self) -> torch.Tensor:
        """The number of each row's request, counted in the order they were fed."""
        return self.fields_BF[:, 0]

    @property
    def start_B(self) -> torch.Tensor:
        """Position of the window's first token, which is verified."""
        return self.fields_BF[:, 1]

    @property
    def emitted_B(self) -> torch.Tensor:
        """How many leading choices joined the output."""
        return self.fields_BF[:, 2]

    @property
    def fast_forwarded_B(self) -> torch.Tensor:
        """Fast-forwarded tokens: those verified beyond the one that AR decoding would have gained."""
        return self.fields_BF[:, 3]

    @property
    def stationary_B(self) -> torch.Tensor:
        """Stationary tokens: fast-forwarded tokens whose guess was already right one iteration ago, after a wrong one."""
        return self.fields_BF[:, 4]

    @property
    def running_B(self) -> torch.Tensor:
        """False for rows that had finished before this iteration, and for free places."""
        return self.fields_BF[:, 5].bool()

    @property
    def window_BW(self) -> torch.Tensor:
        """The state before the iteration."""
        return self.fields_BF[:, SCALARS:].chunk(2, dim=1)[0]

    @property
    def choices_BW(self) -> torch.Tensor:
        """The model's choice for the position after each window token."""
        return self.fields_BF[:, SCALARS:].chunk(2, dim=1)[1]


@dataclass
class RowResult:
    """The response to one prompt, with its forward passes and statistics."""

    token_ids: list[int] = field(default_factory=list)  # including the end-of-sequence token, if any
    accepted: list[int] = field(default_factory=list)  # tokens gained by each forward; sums to len(token_ids)
    fast_forwarded: int = 0
    stationary: int = 0
    stop: Stop = "length"
    reused: int = field(default=0, compare=False)  # tokens of the prompt taken from the prefix cache or another row

    @property
    def forwards(self) -> int:
        """The number of forward passes. The prefill counts as one, even when a long prompt is computed in chunks."""
        return len(self.accepted)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / self.forwards if self.forwards else 0.0

    def steps_after(self, tokens: int) -> list[list[int]]:
        """The token ids after the first ``tokens``, one list per forward."""
        steps, end = [], len(self.token_ids)
        for count in reversed(self.accepted):
            if end <= tokens:
                break
            steps.append(self.token_ids[max(tokens, end - count) : end])
            end -= count
        return steps[::-1]

    def gain(self, token_ids: list[int], fast_forwarded: int, stationary: int) -> None:
        """Add the outcome of one forward."""
        self.token_ids += token_ids
        self.accepted.append(len(token_ids))
        self.fast_forwarded += fast_forwarded
        self.stationary += stationary


class Tally:
    """Collects iterations into results. Copies tensors from the device only when a result is asked for."""

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos = set(eos_ids)
        self._history: list[Iteration] = []
        self._rows: dict[int, RowResult] = {}

    def add(self, iteration: Iteration) -> None:
        self._history.append(iteration)
        for row, tokens in iteration.reused.items():
            self._rows.setdefault(row, RowResult(reused=tokens))

    def so_far(self, row: int) -> RowResult:
        """The result of an unfinished row; only :meth:`take` sets ``stop``."""
        self._fetch()
        return self._rows.setdefault(row, RowResult())

    def take(self, row: int, max_new_tokens: int) -> RowResult:
        """Remove and return the result of a finished row."""
        result = self.so_far(row)
        del self._rows[row]
        result.stop = "length" if len(result.token_ids) == max_new_tokens else "context"
        if result.token_ids and result.token_ids[-1] in self._eos:
            result.stop = "eos"
        return result

    def _fetch(self) -> None:
        for _, same_shape in groupby(self._history, key=lambda iteration: iteration.fields_BF.shape):
            for fields in torch.cat([iteration.fields_BF for iteration in same_shape]).tolist():
                row, _, emitted, fast, stationary, running = fields[:SCALARS]
                if running:
                    choices = fields[(SCALARS + len(fields)) // 2 :]
                    self._rows.setdefault(row, RowResult()).gain(choices[:emitted], fast, stationary)
        self._history.clear()

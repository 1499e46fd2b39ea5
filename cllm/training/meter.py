"""How many tokens a training run forwards, and how fast."""

from __future__ import annotations

import time

import torch


class Meter:
    """Tokens that the model in training has forwarded, and the seconds of its steps, since the last reading.

    A step lasts from the wait for its data to the end of the optimizer's; evaluation, checks and checkpoints are no part.
    """

    _useful: torch.Tensor

    def __init__(self) -> None:
        self._clear()

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """A step ends. The clock is the host's: where the step will be logged, wait for the device before."""
        self._seconds += time.perf_counter() - self._began

    def count(self, tokens: int, useful: torch.Tensor) -> None:
        """Tokens of one forward, padding included, and how many of them are none (stays on its device until the reading)."""
        self._tokens += tokens
        self._useful = self._useful + useful.detach()

    def read(self, processes: int) -> dict[str, float]:
        """``tokens_per_second`` of all processes, padding included, as if each were as fast as this one, and
        ``useful_tokens``, the share that is not padding."""
        result = {
            "tokens_per_second": round(self._tokens * processes / max(self._seconds, 1e-9), 1),
            "useful_tokens": round(float(self._useful) / max(self._tokens, 1), 4),
        }
        self._clear()
        return result

    def _clear(self) -> None:
        self._seconds, self._tokens = 0.0, 0
        self._useful = torch.zeros((), dtype=torch.long)

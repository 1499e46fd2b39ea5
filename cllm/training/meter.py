"""Throughput of a training run."""

from __future__ import annotations

import time

import torch


class Meter:
    """Tokens forwarded by the model in training, and seconds spent in its steps, since the last reading.

    A step lasts from waiting for its data to the end of the optimizer step. Evaluation, probes and checkpoints do not count.
    """

    _useful: torch.Tensor

    def __init__(self) -> None:
        self._clear()

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End a step. The clock is the host's, so synchronize the device before ending the last step of a reading."""
        self._seconds += time.perf_counter() - self._started

    def count(self, tokens: int, useful: torch.Tensor) -> None:
        """Count the tokens of one forward, padding included; ``useful`` [] is the number without padding, kept on its device."""
        self._tokens += tokens
        self._useful = self._useful + useful.detach()

    def read(self, processes: int) -> dict[str, float]:
        """``tokens_per_second``, padding included, of all processes if each is as fast as this one, and ``useful_tokens``,
        the share that is not padding. Starts a new reading."""
        result = {
            "tokens_per_second": round(self._tokens * processes / max(self._seconds, 1e-9), 1),
            "useful_tokens": round(float(self._useful) / max(self._tokens, 1), 4),
        }
        self._clear()
        return result

    def _clear(self) -> None:
        self._seconds, self._tokens = 0.0, 0
        self._useful = torch.zeros((), dtype=torch.long)

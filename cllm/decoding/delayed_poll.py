"""Noticing one iteration late that rows have finished, so that a GPU never waits for the host.

Shapes: B rows.
"""

from __future__ import annotations

import torch


class DelayedPoll:
    """Counts finished rows one iteration late: the host reads the count of an iteration while the device computes the next.

    On a CPU counts are there at once, and are still given one iteration late.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._counts = torch.zeros(2, dtype=torch.long, pin_memory=on_gpu)  # of the last two iterations, in turn
        self._read = self._counts.numpy()
        self._events = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # a count has arrived
        self._iterations = 0

    def restart(self) -> None:
        """What was counted so far is about other rows."""
        self._iterations = 0

    def finished(self, done_B: torch.Tensor) -> int:
        """How many rows were finished after the last iteration but one; 0 where there was one only.

        ``done_B``: which rows are finished after the last iteration, which the device may not have computed yet.
        """
        new, old = self._iterations % 2, (self._iterations + 1) % 2
        self._counts[new : new + 1].copy_(done_B.sum(dim=0, keepdim=True), non_blocking=True)
        if self._events:
            self._events[new].record()
        self._iterations += 1
        if self._iterations == 1:
            return 0
        if self._events:
            self._events[old].synchronize()
        return int(self._read[old])

"""Fresh guesses: what stands in a position that no iteration has refined yet. They decide speed, never the output.

Shapes: B rows, S positions of the text, K positions to fill.
"""

from __future__ import annotations

from typing import Protocol

import torch


class FreshGuess(Protocol):
    """A strategy for fresh guesses."""

    def __call__(
        self, text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor
    ) -> torch.Tensor:
        """Token ids [B, K] for ``positions_BK``, given that the first ``known_B`` tokens of ``text_BS`` are verified."""
        ...


def context_tokens(
    text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor
) -> torch.Tensor:
    """Random tokens of the context (paper, Algorithm 1).

    The draw is a hash of seed and position, so it needs no generator state and does not depend on the batch.
    """
    mixed = (positions_BK * 0x9E3779B1 + seed_B[:, None] * 0x85EBCA77) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    return text_BS.gather(1, (mixed ^ (mixed >> 15)) % known_B[:, None])

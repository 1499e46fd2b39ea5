"""Gumbel noise as a pure function of seed, position and token: without state, a position has the same noise in every window.

Shapes: B rows, W window width, V vocabulary.
"""

from __future__ import annotations

import torch

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), in signed 64-bit words.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
BELOW_ONE = 1 - 2**-24  # the largest float32 under 1


def gumbel_noise(seed_B: torch.Tensor, positions_BW: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise [B, W, V], float32, for int64 seeds and absolute positions.

    Each (seed, position) keys a SplitMix64 stream, in which the token id is the counter. The uniform numbers have 32 bits and
    the finest resolution near 0: that end becomes the upper tail of the noise, which decides between many unlikely tokens.
    """
    stream_BW = _mix(_mix((seed_B + 1) * GAMMA)[:, None] + positions_BW * GAMMA)
    counter_V = torch.arange(vocabulary, device=seed_B.device) * GAMMA
    bits_BWV = (_mix(stream_BW[:, :, None] + counter_V) >> 32) & 0xFFFFFFFF
    uniform_BWV = ((bits_BWV.float() + 0.5) * 2**-32).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform_BWV))


def _mix(word: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function. ``>>`` on int64 is arithmetic, so the sign bits that it shifts in are masked off."""
    word = (word ^ ((word >> 30) & (1 << 34) - 1)) * FIRST
    word = (word ^ ((word >> 27) & (1 << 37) - 1)) * SECOND
    return word ^ ((word >> 31) & (1 << 33) - 1)

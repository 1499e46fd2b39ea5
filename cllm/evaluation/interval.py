"""Confidence intervals: Wilson for shares, the bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Interval = tuple[float, float]
Z_95 = 1.959963984540054  # the normal quantile that leaves 2.5% on either side


def wilson(successes: int, count: int) -> Interval | None:
    """95% interval of a share (Wilson 1927, without continuity correction); None without observations.

    Raises ValueError unless 0 <= successes <= count.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"successes must be between 0 and {count}, got {successes}")
    if count == 0:
        return None
    share, z2 = successes / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return (middle - half if successes else 0.0), (middle + half if successes < count else 1.0)


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval | None:
    """95% percentile interval of a function of column sums, when the rows are drawn again with replacement.

    ``columns``: C columns of N numbers, one row per prompt. ``statistic`` maps sums [C, R] of R draws to R values.
    None with fewer than two rows, or where no draw gives a finite value.
    """
    table_CN = np.asarray(columns, dtype=float)
    N = table_CN.shape[1]
    if N < 2:
        return None
    rng = np.random.default_rng(seed)
    share = np.full(N, 1 / N)
    sums_CR = np.stack([table_CN @ rng.multinomial(N, share) for _ in range(resamples)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = statistic(sums_CR)
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R):
        return None
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(
    top: Sequence[float], bottom: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> Interval | None:
    """95% bootstrap interval of ``sum(top) / sum(bottom)``, both given per prompt."""
    return bootstrap([top, bottom], lambda sums: sums[0] / sums[1], seed=seed, resamples=resamples)

"""Confidence intervals: Wilson for shares, the bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Interval = tuple[float, float]
Z_95 = 1.959963984540054  # the normal quantile that leaves 2.5% on either side


def wilson(successes: float, count: float) -> Interval | None:
    """95% interval of a share (Wilson 1927, without continuity correction); None without observations.

    Both may be fractions, where observations count for less than one. Raises ValueError unless 0 <= successes <= count.
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
    top: Sequence[float],
    bottom: Sequence[float],
    *,
    problems: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval | None:
    """95% bootstrap interval of ``sum(top) / sum(bottom)``, both given per response.

    ``problems``: what each responds to. Responses to one problem are alike, so problems are drawn, not responses.
    """
    columns = [top, bottom] if problems is None else sums_by([top, bottom], problems)
    return bootstrap(columns, lambda sums: sums[0] / sums[1], seed=seed, resamples=resamples)


def mean_interval(scores: Sequence[bool | float], *, problems: Sequence[Hashable] | None = None, seed: int = 0) -> Interval | None:
    """95% interval of a mean: Wilson's where every score is 0 or 1, otherwise by bootstrap.

    ``problems`` as for :func:`ratio_interval`; Wilson's interval then counts as many scores as say the same independently.
    """
    if not all(score in (0, 1) for score in scores):
        return ratio_interval(scores, [1.0] * len(scores), problems=problems, seed=seed)
    count = float(len(scores)) if problems is None else _effective_count(scores, problems)
    return wilson(sum(scores) / len(scores) * count if scores else 0, count)


def sums_by(columns: Sequence[Sequence[float]], problems: Sequence[Hashable]) -> list[list[float]]:
    """Columns of N numbers summed up by problem: columns of P."""
    numbers = {problem: number for number, problem in enumerate(dict.fromkeys(problems))}
    place_N = [numbers[problem] for problem in problems]
    return [np.bincount(place_N, weights=column, minlength=len(numbers)).tolist() for column in columns]


def _effective_count(scores: Sequence[bool | float], problems: Sequence[Hashable]) -> float:
    """How many independent scores of 0 or 1 would say as much about the mean.

    From the variance of the mean between problems (Korn and Graubard 1998); the number of problems if there is one problem or all
    scores are equal.
    """
    right_P, count_P = map(np.array, sums_by([scores, [1.0] * len(scores)], problems))
    N, P = len(scores), len(count_P)
    share = sum(scores) / N if N else 0.0
    if P < 2 or not 0 < share < 1:
        return float(P)
    variance = float(((right_P - share * count_P) ** 2).sum()) / N**2
    return min(max(share * (1 - share) / variance, 1.0), N) if variance else float(N)

"""pass@k: the probability that one of k samples passes (Chen et al. 2021, "Evaluating Large Language Models Trained on Code")."""

from collections.abc import Iterable, Sequence
from math import comb

__all__ = ["mean_pass_at_k", "pass_at_k"]

USUAL_K = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate for one problem: 1 - C(samples - passed, k) / C(samples, k).

    The plug-in estimate 1 - (1 - passed / samples) ** k is too low.

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= passed <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the number of samples ({samples}), got {k}")
    if not 0 <= passed <= samples:
        raise ValueError(f"passed must be between 0 and the number of samples ({samples}), got {passed}")
    return 1 - comb(samples - passed, k) / comb(samples, k)


def mean_pass_at_k(counts: Iterable[tuple[int, int]], ks: Sequence[int] = USUAL_K) -> dict[int, float]:
    """Mean pass@k over problems, given as (samples, passed), for each k up to the smallest number of samples."""
    counts = list(counts)
    fewest = min((samples for samples, _ in counts), default=0)
    return {k: sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in sorted(set(ks)) if 1 <= k <= fewest}

"""The consistency and AR objectives as pure functions of hidden states.

Paper: arXiv 2403.00835, equations 1 (global), 2 (local) and 4 (AR). Both are sums over tokens here; whoever calls divides by
the number of tokens of the global batch, so that no split of the batch changes the gradient.

Shapes: M tokens that a loss is taken at, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [M, H] -> float32 logits [M, V]
CHUNK = 256  # tokens whose logits exist at the same time


def kl_divergence(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of two sets of logits, per token [M]. Nothing flows back into the teacher."""
    teacher, student = log_softmax(teacher_MV.detach(), dim=-1), log_softmax(student_MV, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def distillation_sum(
    student_MH: torch.Tensor,
    student_head: Head,
    teacher_MH: torch.Tensor,
    teacher_head: Head,
    weight_M: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of KL(teacher || student) over tokens, logits computed CHUNK tokens at a time and again in backward."""

    def part(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return (kl_divergence(teacher_logits, student_head(student)) * weight).sum()

    return _chunked(part, student_MH, teacher_MH.detach(), weight_M)


def cross_entropy_sum(hidden_MH: torch.Tensor, head: Head, target_M: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the negative log-likelihood of ``target_M``, in chunks like :func:`distillation_sum`."""

    def part(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(hidden), target, reduction="sum")

    return _chunked(part, hidden_MH, target_M)


def _chunked(part: Callable[..., torch.Tensor], hidden_MH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    total = hidden_MH.new_zeros((), dtype=torch.float32)
    for pieces in zip(*(tensor.split(CHUNK) for tensor in (hidden_MH, *others))):
        total = total + checkpoint(part, *pieces, use_reentrant=False)
    return total + hidden_MH.sum() * 0.0  # keeps the graph whole where no token takes part

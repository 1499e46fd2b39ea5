"""The consistency and AR objectives as pure functions of hidden states.

Paper: arXiv 2403.00835, equations 1 (global), 2 (local) and 4 (AR). Both are sums over tokens here; whoever calls divides by
the number of tokens of the global batch, so that no split of the batch changes the gradient.

Shapes: M tokens that a loss is taken at, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax

CHUNK = 256  # tokens whose logits exist at the same time

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of teacher and student logits [M, V], per token [M]


class Head(Protocol):
    """The output layer: hidden states [M, H] -> float32 logits [M, V]."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All that the logits depend on beside the hidden states."""
        ...

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...

    def whole(self, work: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, /) -> torch.Tensor:
        """``work(hidden)`` where all of the parameters are there."""
        ...


def kl_divergence(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of two sets of logits, per token [M]. Nothing flows back into the teacher."""
    teacher, student = log_softmax(teacher_MV.detach(), dim=-1), log_softmax(student_MV, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) per token [M]: the student may leave out what the teacher holds likely, never add to it."""
    teacher, student = log_softmax(teacher_MV.detach(), dim=-1), log_softmax(student_MV, dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1)


def hard_targets(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the teacher's likeliest token, per token [M]."""
    return cross_entropy(student_MV, teacher_MV.argmax(dim=-1), reduction="none")


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl,
    "hard": hard_targets,
}


def distillation_sum(
    student_MH: torch.Tensor,
    student_head: Head,
    teacher_MH: torch.Tensor,
    teacher_head: Head,
    weight_M: torch.Tensor,
    divergence: Divergence = kl_divergence,
) -> torch.Tensor:
    """Weighted sum over tokens of the student's divergence from the teacher, logits computed CHUNK tokens at a time."""

    def part(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return (divergence(teacher_logits, student_head(student)) * weight).sum()

    return _in_chunks(part, student_head, student_MH, teacher_MH.detach(), weight_M)


def cross_entropy_sum(hidden_MH: torch.Tensor, head: Head, target_M: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over tokens of the negative log-likelihood of ``target_M``, in chunks like :func:`distillation_sum`.

    ``smoothing``: share of every target that is spread evenly over the vocabulary.
    """

    def part(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(hidden), target, reduction="sum", label_smoothing=smoothing)

    return _in_chunks(part, head, hidden_MH, target_M)


def _in_chunks(part: Callable[..., torch.Tensor], head: Head, hidden_MH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Sum of ``part`` over chunks of tokens, 0 for no token; the hidden states go through ``head``."""
    learned = [parameter for parameter in head.parameters if parameter.requires_grad]
    graph = torch.is_grad_enabled()  # which a forward of autograd cannot see
    return head.whole(lambda hidden: _ChunkedSum.apply(part, learned, others, graph, hidden, *learned), hidden_MH)


class _ChunkedSum(torch.autograd.Function):
    """The gradients are taken chunk by chunk in the forward already: no chunk's logits are kept, and none computed twice.

    Those of the parameters are summed up in float32, as many small steps vanish in a bfloat16 sum.
    """

    @staticmethod
    def forward(ctx: Any, part, learned, others, graph, hidden_MH: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        total = hidden_MH.new_zeros((), dtype=torch.float32)
        wanted = graph and any(ctx.needs_input_grad)
        grads = [torch.zeros_like(hidden_MH), *(torch.zeros_like(p, dtype=torch.float32) for p in learned)] if wanted else []
        for start in range(0, len(hidden_MH), CHUNK):
            place = slice(start, start + CHUNK)
            with torch.set_grad_enabled(wanted):
                hidden = hidden_MH[place].detach().requires_grad_(wanted)
                loss = part(hidden, *(tensor[place] for tensor in others))
            total += loss.detach()
            if wanted:
                grads[0][place], *steps = torch.autograd.grad(loss, [hidden, *learned])
                for grad, step in zip(grads[1:], steps, strict=True):
                    grad += step
        ctx.save_for_backward(*(grad.to(tensor.dtype) for grad, tensor in zip(grads, (hidden_MH, *learned))))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *up: torch.Tensor):
        return None, None, None, None, *(grad * up[0] for grad in ctx.saved_tensors)

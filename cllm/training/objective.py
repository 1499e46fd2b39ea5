"""The consistency and AR objectives as pure functions of hidden states.

Paper: arXiv 2403.00835, equations 1 (global), 2 (local) and 4 (AR). Losses are sums over tokens; the caller divides by the
token count of the global batch, so that no split of the batch changes the gradient.

Shapes: M tokens in a loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax

CHUNK = 256  # tokens whose logits exist at a time

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (teacher, student) logits [M, V] -> per token [M]


class Head(Protocol):
    """The output layer: hidden states [M, H] -> float32 logits [M, V]."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What the logits depend on, apart from the hidden states."""
        ...

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...

    def with_full_weights(self, work: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, /) -> torch.Tensor:
        """``work(hidden)`` with all parameters unsharded."""
        ...


def kl_divergence(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits [M, V], per token [M], in nats. The teacher gets no gradient."""
    teacher, student = log_softmax(teacher_MV.detach(), dim=-1), log_softmax(student_MV, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of logits [M, V], per token [M], in nats: penalises tokens that only the student finds likely."""
    teacher, student = log_softmax(teacher_MV.detach(), dim=-1), log_softmax(student_MV, dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1)


def hard_targets(teacher_MV: torch.Tensor, student_MV: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of student logits [M, V] against the teacher's likeliest tokens, per token [M], in nats."""
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
    teacher_row_M: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum over tokens of the student's divergence from the teacher: [].

    ``weight_M`` weighs the tokens. ``teacher_row_M`` is the row of ``teacher_MH`` that each token learns from, by default its
    own; tokens of one chunk that learn from the same row share its logits. Logits are computed CHUNK tokens at a time.
    """

    def shared(teacher_row: torch.Tensor) -> torch.Tensor:
        rows, inverse = teacher_row.unique(return_inverse=True)
        return teacher_head(teacher_MH[rows])[inverse]

    logits, teacher = (teacher_head, teacher_MH.detach()) if teacher_row_M is None else (shared, teacher_row_M)

    def part(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = logits(teacher)
        return (divergence(teacher_logits, student_head(student)) * weight).sum()

    return _in_chunks(part, student_head, student_MH, teacher, weight_M)


def cross_entropy_sum(hidden_MH: torch.Tensor, head: Head, target_M: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over tokens of the negative log-likelihood of ``target_M``, in nats: []. Chunked as :func:`distillation_sum` is.

    ``smoothing`` is the share of each target's probability spread evenly over the vocabulary (label smoothing).
    """

    def part(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(hidden), target, reduction="sum", label_smoothing=smoothing)

    return _in_chunks(part, head, hidden_MH, target_M)


def _in_chunks(part: Callable[..., torch.Tensor], head: Head, hidden_MH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Sum of ``part`` over chunks of tokens, 0 without tokens. ``part`` maps hidden states to a loss by ``head``."""
    learned = [parameter for parameter in head.parameters if parameter.requires_grad]
    graph = torch.is_grad_enabled()  # always off inside autograd.Function.forward
    return head.with_full_weights(lambda hidden: _ChunkedSum.apply(part, learned, others, graph, hidden, *learned), hidden_MH)


class _ChunkedSum(torch.autograd.Function):
    """Computes gradients chunk by chunk in the forward, so that logits are neither kept nor computed twice.

    Parameter gradients accumulate in float32, since many small terms would vanish in a bfloat16 sum.
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

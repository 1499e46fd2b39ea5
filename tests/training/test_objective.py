"""The objective's mathematics, on plain tensors."""

import pytest
import torch

from cllm.training.objective import CHUNK, cross_entropy_sum, distillation_sum, kl_divergence


def head(weight: torch.Tensor):
    return lambda hidden: hidden @ weight


def test_kl_is_zero_for_equal_logits_and_positive_otherwise():
    logits = torch.randn(5, 11)
    assert torch.allclose(kl_divergence(logits, logits + 3.0), torch.zeros(5), atol=1e-6)
    assert (kl_divergence(logits, torch.randn(5, 11)) > 0).all()


def test_kl_matches_torch():
    teacher, student = torch.randn(7, 13), torch.randn(7, 13)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(kl_divergence(teacher, student), expected, atol=1e-6)


def test_nothing_flows_into_the_teacher():
    teacher, student = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 9, requires_grad=True)
    teacher_weight = torch.randn(4, 9, requires_grad=True)
    distillation_sum(student, head(weight), teacher, head(teacher_weight), torch.ones(3)).backward()
    assert teacher.grad is None and teacher_weight.grad is None
    assert student.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
def test_chunks_change_nothing(count):
    torch.manual_seed(count)
    hidden, teacher = torch.randn(count, 6, requires_grad=True), torch.randn(count, 6)
    weight, target = torch.randn(6, 17), torch.randint(0, 17, (count,))
    scale = torch.rand(count)
    loss = distillation_sum(hidden, head(weight), teacher, head(weight), scale)
    loss = loss + cross_entropy_sum(hidden, head(weight), target)
    (chunked,) = torch.autograd.grad(loss, hidden)
    plain = (kl_divergence(teacher @ weight, hidden @ weight) * scale).sum()
    plain = plain + torch.nn.functional.cross_entropy(hidden @ weight, target, reduction="sum")
    (expected,) = torch.autograd.grad(plain, hidden)
    assert torch.allclose(loss, plain, rtol=1e-4)
    assert torch.allclose(chunked, expected, atol=1e-5)


def test_no_tokens_give_zero_with_a_graph():
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = cross_entropy_sum(hidden, head(torch.randn(4, 5)), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0

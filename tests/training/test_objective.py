"""The objective's mathematics, on plain tensors."""

import pytest
import torch

from cllm.training.objective import (
    CHUNK,
    DIVERGENCES,
    cross_entropy_sum,
    distillation_sum,
    hard_targets,
    kl_divergence,
    reverse_kl,
)


class Linear:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.parameters = weight, [weight]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight

    def with_full_weights(self, work, hidden: torch.Tensor) -> torch.Tensor:
        return work(hidden)


def test_kl_is_zero_for_equal_logits_and_positive_otherwise():
    logits = torch.randn(5, 11)
    assert torch.allclose(kl_divergence(logits, logits + 3.0), torch.zeros(5), atol=1e-6)
    assert (kl_divergence(logits, torch.randn(5, 11)) > 0).all()


def test_kl_matches_torch():
    teacher, student = torch.randn(7, 13), torch.randn(7, 13)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(teacher, student), expected, atol=1e-6)


def test_reverse_kl_is_kl_the_other_way_round_and_the_student_learns_from_it():
    teacher, student = torch.randn(7, 13), torch.randn(7, 13, requires_grad=True)
    torch.testing.assert_close(reverse_kl(teacher, student), kl_divergence(student, teacher))
    reverse_kl(teacher, student).sum().backward()
    assert (student.grad.abs().sum(dim=-1) > 0).all()


def test_sharing_teacher_rows_does_not_change_the_gradient():
    count, head = 2 * CHUNK + 5, Linear(torch.randn(8, 17))
    student, teacher, weight = torch.randn(count, 8, requires_grad=True), torch.randn(40, 8), torch.rand(count)
    teacher_row = torch.randint(40, (count,))
    sums = [distillation_sum(student, head, teacher[teacher_row], head, weight)]
    sums.append(distillation_sum(student, head, teacher, head, weight, teacher_row_M=teacher_row))
    gradients = [torch.autograd.grad(loss, student)[0] for loss in sums]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(*gradients)


def test_hard_targets_are_cross_entropy_on_the_teachers_choice():
    teacher, student = torch.randn(7, 13), torch.randn(7, 13)
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(dim=-1), reduction="none")
    assert torch.equal(hard_targets(teacher, student), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_the_teacher_gets_no_gradient(divergence):
    teacher, student = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 9, requires_grad=True)
    teacher_weight = torch.randn(4, 9, requires_grad=True)
    distillation_sum(student, Linear(weight), teacher, Linear(teacher_weight), torch.ones(3), divergence).backward()
    assert teacher.grad is None and teacher_weight.grad is None
    assert student.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunking_does_not_change_loss_or_gradient(count, divergence, smoothing):
    torch.manual_seed(count)
    hidden, teacher = torch.randn(count, 6, requires_grad=True), torch.randn(count, 6)
    weight, target = torch.randn(6, 17, requires_grad=True), torch.randint(0, 17, (count,))
    scale = torch.rand(count)
    loss = distillation_sum(hidden, Linear(weight), teacher, Linear(weight), scale, divergence)
    loss = loss + cross_entropy_sum(hidden, Linear(weight), target, smoothing)
    chunked = torch.autograd.grad(3 * loss, [hidden, weight])
    plain = (divergence(teacher @ weight.detach(), hidden @ weight) * scale).sum()
    plain = plain + torch.nn.functional.cross_entropy(hidden @ weight, target, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    assert torch.allclose(loss, plain, rtol=1e-4)
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=1e-4)


def test_without_gradients_the_sum_is_the_same():
    weight, hidden, target = torch.randn(4, 9, requires_grad=True), torch.randn(CHUNK + 5, 4), torch.arange(CHUNK + 5) % 9
    with torch.no_grad():
        quiet = cross_entropy_sum(hidden, Linear(weight), target)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, cross_entropy_sum(hidden, Linear(weight), target).detach())


class GraphRecorder(Linear):
    """Records whether an autograd graph was built."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(hidden)
        self.graph = logits.requires_grad
        return logits


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_graph_is_built(mode):
    hidden, head = torch.randn(CHUNK + 3, 4, requires_grad=True), GraphRecorder(torch.randn(4, 9, requires_grad=True))
    target = torch.randint(9, (CHUNK + 3,))
    expected = cross_entropy_sum(hidden, head, target)
    assert head.graph
    with mode():
        total = cross_entropy_sum(hidden, head, target)
    assert not head.graph and not total.requires_grad
    assert torch.equal(total, expected)


def test_a_second_derivative_is_refused():
    hidden, head = torch.randn(5, 4, requires_grad=True), Linear(torch.randn(4, 9, requires_grad=True))
    squared = cross_entropy_sum(hidden, head, torch.arange(5)) ** 2  # whose gradient depends on the sum itself
    (grad,) = torch.autograd.grad(squared, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.pow(2).sum().backward()


def test_the_sum_over_no_tokens_is_zero_and_differentiable():
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = cross_entropy_sum(hidden, Linear(torch.randn(4, 5)), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


def test_many_small_gradients_of_bfloat16_weights_add_up():
    hidden, target = torch.randn(64 * CHUNK, 4), torch.randint(5, (64 * CHUNK,))
    exact, rounded = (torch.ones(4, 5, dtype=dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16))
    for weight in (exact, rounded):
        cross_entropy_sum(hidden.to(weight.dtype), Linear(weight), target).backward()
    assert (rounded.grad - exact.grad).norm() < 0.005 * exact.grad.norm()

"""Training on a CUDA device gives the gradients of a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from training import test_lossless, test_trainer
from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIDES = {
    "all weights": (test_trainer.make_trainer, lambda: tiny_model(vocab_size=97), {"max_row_tokens": 150}),
    "lossless": (test_lossless.make_trainer, test_lossless.draft_model, {}),
}


@pytest.mark.parametrize("side", SIDES)
def test_the_gradient_is_that_of_a_cpu(tmp_path: Path, side: str) -> None:
    make_trainer, make_model, options = SIDES[side]
    found, expected = (change(make_trainer, make_model(), tmp_path, use_cpu=cpu, **options) for cpu in (False, True))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def change(make_trainer: Callable, model: PreTrainedModel, folder: Path, **options) -> torch.Tensor:
    """Of all weights, by one optimizer step over all rows."""
    before = [weight.detach().clone() for weight in model.parameters()]
    make_trainer(folder, model, per_device_train_batch_size=8, **options).train()
    return torch.cat([(weight.detach().cpu() - old).flatten() for weight, old in zip(model.parameters(), before, strict=True)])

"""``cllm`` with a model that fails whenever a request with the seed FAULT joins a batch, and so fails the whole batch.

python scripts/benchmarks/faulty.py serve MODEL
"""

from __future__ import annotations

import torch

from cllm.cli.main import main
from cllm.decoding.rows import Rows
from cllm.decoding.step import Step

FAULT = 2**63 - 1
MESSAGE = "a fault on purpose"


class FaultyStep(Step):
    """Where tokens are accepted, after the forward, so that the others have lost its work."""

    def advance(self, rows: Rows, choices_BK: torch.Tensor, refined_BR: torch.Tensor) -> torch.Tensor:
        if bool((~rows.done_B & (rows.noise_seed_B == FAULT)).any()):
            raise RuntimeError(MESSAGE)
        return super().advance(rows, choices_BK, refined_BR)


if __name__ == "__main__":
    from cllm.decoding import engine

    engine.Step = FaultyStep  # type: ignore[misc]
    main()

"""``cllm`` with a model whose step fails for the whole batch as soon as a request with the seed FAULT joins it.

python scripts/benchmarks/faulty.py serve MODEL
"""

from __future__ import annotations

import torch

from cllm.cli.main import main
from cllm.decoding.rows import Rows
from cllm.decoding.step import Step

FAULT = 2**63 - 1
MESSAGE = "an injected fault"


class FaultyStep(Step):
    """Fails after the forward, where tokens are accepted, so that the other rows lose its work."""

    def advance(self, rows: Rows, choices_BK: torch.Tensor, refined_BR: torch.Tensor) -> torch.Tensor:
        if bool((~rows.done_B & (rows.noise_seed_B == FAULT)).any()):
            raise RuntimeError(MESSAGE)
        return super().advance(rows, choices_BK, refined_BR)


if __name__ == "__main__":
    from cllm.decoding import engine

    engine.Step = FaultyStep  # type: ignore[attr-defined, misc]
    main()

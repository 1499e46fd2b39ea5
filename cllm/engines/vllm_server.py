"""The ``vllm serve`` command that decodes a model by Jacobi iteration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.engines.vllm import GUESS, OPTIONS, check_record, vllm_guess
from cllm.errors import UsageError

PROPOSER = "cllm.engines.vllm.JacobiProposer"
LARGEST_WIDTH = 129  # vLLM verifies 128 drafts of a request at most


def serve_command(model: str, record: Mapping[str, Any], width: int, *, guess: str | None, more: Sequence[str] = ()) -> list[str]:
    """``vllm serve`` of ``model`` with windows of ``width`` tokens, of which one is verified; 1 is AR decoding.

    ``guess``: fresh guesses other than the checkpoint's. Raises UsageError for a model with a lossless adapter, for guesses that
    vLLM cannot make and for a width that it cannot verify.
    """
    if guess:
        vllm_guess(guess)
    check_record(record, model)
    if not 1 <= width <= LARGEST_WIDTH:
        raise UsageError(f"vLLM takes widths (--block_size) of 1 to {LARGEST_WIDTH}, got {width}")
    command = ["vllm", "serve", model, *more]
    if width > 1:
        command += ["--speculative-config", json.dumps({"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": width - 1})]
        command += ["--additional-config", json.dumps({OPTIONS: {GUESS: guess}})] if guess else []
    return command

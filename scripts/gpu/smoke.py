"""Stage `environment`: device and versions, and whether captured iterations are those that run as they are."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import stage
import torch
from tiny import tiny_model

from cllm.decoding import JacobiDecoder

PACKAGES = ("accelerate", "peft", "numpy", "triton", "datasets", "math-verify")
ITERATIONS = 12


def main() -> None:
    args = stage.options(__doc__).parse_args()
    where = stage.device(args)
    start = time.perf_counter()
    model = tiny_model(vocab_size=97, eos_token_id=None).to(where)
    captured = stage.captured(args, model, 4)
    equal = fields(captured) == fields(JacobiDecoder(model, 4, compile="off"))
    kept = captured.runner._kept.captured.values()  # type: ignore[attr-defined]
    result = {
        "captured iterations equal": equal,
        "captured": sum(map(callable, kept)),
        "seconds": time.perf_counter() - start,
        "packages": {name: installed(name) for name in PACKAGES},
    }
    stage.publish(args, "environment", result | card(where))
    assert equal and result["captured"], "captured iterations differ, or none was captured"


def fields(decoder: JacobiDecoder) -> list[Any]:
    """What iterations say of two rows."""
    iterations = decoder.iterate([[1, 2, 3], [4]], max_new_tokens=100)
    return [next(iterations).fields_BF.tolist() for _ in range(ITERATIONS)]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def card(where: str) -> dict[str, Any]:
    if where == "cpu":
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "memory, GiB": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "compute capability": f"{found.major}.{found.minor}",
    }


if __name__ == "__main__":
    main()

"""Consistency large language models. ``model.generate(..., custom_generate=cllm.jacobi)``: Jacobi decoding of any model."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["jacobi"]


def __getattr__(name: str) -> Any:
    """:func:`cllm.custom_generate.jacobi`, loaded when it is asked for: torch takes seconds to import."""
    if name in __all__:
        return getattr(importlib.import_module("cllm.custom_generate"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

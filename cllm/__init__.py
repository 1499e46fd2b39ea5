"""Consistency large language models.

``cllm.make(model, prompts, output)`` makes a model faster; ``model.generate(..., custom_generate=cllm.jacobi)`` decodes any
model by Jacobi iteration.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_WHERE = {"jacobi": "cllm.custom_generate", "make": "cllm.making.make"}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """What is in __all__, loaded when it is asked for: torch takes seconds to import."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

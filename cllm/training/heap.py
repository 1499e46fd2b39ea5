"""Memory that training on a CPU has freed, given back to the system every few steps.

Tensors of many sizes come and go between others that stay, which leaves holes in glibc's heap. It rarely finds a use for them, so the
process grows from step to step although it uses no more than before.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from transformers import TrainerCallback

STEPS = 8  # from one release to the next; released memory costs time when the next step asks for it again


class HeapCallback(TrainerCallback):
    """Gives freed memory back at the end of every STEPS steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cpu" and state.global_step % STEPS == 0:
            give_back()


def give_back() -> None:
    """Give back all memory that is free; does nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

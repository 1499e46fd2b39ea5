"""The CPU that this process runs on."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    return _field("model name") or platform.processor() or platform.machine()


def is_intel() -> bool:
    return "GenuineIntel" in (_field("vendor_id") or platform.processor())


def has_amx() -> bool:
    """Whether there are matrix units for bfloat16, which multiply several times faster than float32 units."""
    return "amx_bf16" in _field("flags").split()


def has_bfloat16_products() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 numbers, which make mixed-precision training faster."""
    return has_amx() or "avx512_bf16" in _field("flags").split()


@cache
def _field(name: str) -> str:
    """What Linux says of the first CPU; empty elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name), "")

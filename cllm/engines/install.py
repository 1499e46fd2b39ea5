"""Whether vLLM is here."""

from __future__ import annotations

from importlib.util import find_spec

from cllm.errors import UsageError


def check_installed() -> None:
    """Raise UsageError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UsageError("this needs vLLM: pip install -e .[vllm], or on a CPU what scripts/vllm_check.sh installs")

"""Errors caused by input, as opposed to bugs."""

from collections.abc import Mapping

LARGEST = 2**31 - 1  # the largest count or length accepted from users; nothing overflows on it


class UsageError(ValueError):
    """Invalid input. The message says what was given and what is allowed.

    Commands print the message without a traceback and exit with status 2 (:func:`cllm.cli.main.run`).
    """


class UnsupportedModelError(UsageError):
    """A model whose cache cannot be rolled back, or whose attention does not take the masks that decoding needs."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host ran out of memory; for the host, torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def check_minimums(options: object, minimums: Mapping[str, float]) -> None:
    """Raise UsageError if an attribute of ``options`` is below its minimum; None means that the option was not given."""
    for name, minimum in minimums.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UsageError(f"{name} must be >= {minimum}, got {value}")

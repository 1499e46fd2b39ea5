"""The errors that a user can cause, told apart from defects of the program."""

from collections.abc import Mapping

LARGEST = 2**31 - 1  # of the counts and lengths that a user may ask for: no tensor or loop overflows on it


class UsageError(ValueError):
    """Input that cannot be worked with. The message says what was got and what is allowed.

    Commands print the message without a traceback and exit with status 2 (:func:`cllm.cli.main.run`).
    """


class UnsupportedModelError(UsageError):
    """A model whose cache cannot be rolled back, or whose attention cannot take the masks that decoding needs."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or on the host, which torch says in a plain RuntimeError."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def check_least(options: object, least: Mapping[str, float]) -> None:
    """Raise UsageError where one of ``options`` is below the least that it may be; None is an option not given."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UsageError(f"{name} must be >= {bound}, got {value}")

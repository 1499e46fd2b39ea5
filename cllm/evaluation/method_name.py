"""Names of the ways to decode, as they stand in the files of ``speedup``."""

JACOBI, AR, GENERATE, PROMPT_LOOKUP = "jacobi", "ar", "generate", "prompt_lookup"
NO_ADAPTER = "no_adapter"  # Jacobi decoding of a target model without its consistency adapter
BASELINES = (AR, NO_ADAPTER, GENERATE, PROMPT_LOOKUP)


def is_jacobi(method: str) -> bool:
    """Whether a method of this name is our engine with a window of guesses."""
    return method.split(":")[0] == JACOBI

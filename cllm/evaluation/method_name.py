"""Names of the decoding methods, as the files of ``speedup`` have them."""

from typing import Final, Literal, get_args

Baseline = Literal["ar", "no_adapter", "generate", "prompt_lookup"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
JACOBI, AR, GENERATE, PROMPT_LOOKUP = "jacobi", "ar", "generate", "prompt_lookup"
NO_ADAPTER: Final = "no_adapter"  # Jacobi decoding of a target model without its consistency adapter


def is_jacobi(method: str) -> bool:
    """Whether a method of this name is our engine with a window of guesses."""
    return method.split(":")[0] == JACOBI

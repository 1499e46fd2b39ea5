"""Jacobi decoding: from token ids to token ids and statistics."""

from cllm.decoding.engine import JacobiDecoder, Request
from cllm.decoding.guess import FreshGuess, context_tokens, make_guess
from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow
from cllm.decoding.queue import Queue
from cllm.decoding.result import Iteration, RowResult
from cllm.decoding.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "PartialWindow",
    "FreshGuess",
    "GuessStrategy",
    "Iteration",
    "JacobiDecoder",
    "Queue",
    "Request",
    "RowResult",
    "Sampling",
    "context_tokens",
    "make_guess",
]

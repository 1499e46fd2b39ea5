"""Jacobi decoding: token ids in, token ids and statistics out."""

from cllm.decoding.draft import Draft, Guess
from cllm.decoding.engine import JacobiDecoder, Request
from cllm.decoding.guess import FreshGuess, context_tokens, make_guess
from cllm.decoding.queue import Queue
from cllm.decoding.result import Iteration, RowResult
from cllm.decoding.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "Draft",
    "FreshGuess",
    "Guess",
    "Iteration",
    "JacobiDecoder",
    "Queue",
    "Request",
    "RowResult",
    "Sampling",
    "context_tokens",
    "make_guess",
]

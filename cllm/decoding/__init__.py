"""Jacobi decoding: token ids in, token ids and statistics out."""

from cllm.decoding.engine import Iteration, JacobiDecoder, Request, RowResult
from cllm.decoding.guess import FreshGuess, context_tokens
from cllm.decoding.queue import Queue
from cllm.decoding.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY", "FreshGuess", "Iteration", "JacobiDecoder", "Queue", "Request", "RowResult", "Sampling", "context_tokens"
]  # fmt: skip

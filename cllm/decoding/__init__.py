"""Jacobi decoding: token ids in, token ids and statistics out."""

from cllm.decoding.engine import Iteration, JacobiDecoder, RowResult
from cllm.decoding.guess import FreshGuess, context_tokens

__all__ = ["FreshGuess", "Iteration", "JacobiDecoder", "RowResult", "context_tokens"]

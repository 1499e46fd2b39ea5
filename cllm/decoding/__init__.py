"""Jacobi decoding: token ids in, token ids and statistics out."""

from cllm.decoding.draft import Draft, Guess
from cllm.decoding.engine import Iteration, JacobiDecoder, RowResult
from cllm.decoding.guess import FreshGuess, context_tokens, make_guess

__all__ = ["Draft", "FreshGuess", "Guess", "Iteration", "JacobiDecoder", "RowResult", "context_tokens", "make_guess"]

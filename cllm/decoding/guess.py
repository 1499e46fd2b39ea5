"""Fresh guesses for positions that no iteration has refined yet. They affect speed, never the output.

Shapes: B rows, W window width, S positions of the text, K positions to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow
from cllm.decoding.ngram_pool import NgramPool
from cllm.decoding.prompt_lookup import PromptLookup
from cllm.errors import UsageError

FILLER_ID = 0


class FreshGuess(Protocol):
    """A function that guesses each position independently of the other guesses."""

    def __call__(self, text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        """Token ids [B, K] for ``positions_BK``; the first ``known_B`` tokens of ``text_BS`` are verified."""
        ...


def context_tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """Random tokens of the context (paper, Algorithm 1)."""
    return text_BS.gather(1, _hash(positions_BK, seed_B) % known_B[:, None])


def uniform_tokens(vocabulary: int) -> FreshGuess:
    """Random tokens of the whole vocabulary."""

    def tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        return _hash(positions_BK, seed_B) % vocabulary

    return tokens


def filler_tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """The token FILLER_ID everywhere."""
    return torch.full_like(positions_BK, FILLER_ID)


def _hash(positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """A 32-bit hash of seed and position [B, K]: random numbers without state, the same in every batch."""
    mixed = (positions_BK * 0x9E3779B1 + seed_B[:, None] * 0x85EBCA77) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


STARTS: dict[str, Callable[[int], FreshGuess]] = {  # what trajectories can start from, as functions of the vocabulary size
    "context": lambda _: context_tokens,
    "uniform": uniform_tokens,
    "filler": lambda _: filler_tokens,
}


class PositionwiseGuess(GuessStrategy):
    """Fills every empty position with a :class:`FreshGuess` and replaces nothing.

    ``make_tokens`` maps the vocabulary size to the FreshGuess.
    """

    fills_all = True

    def __init__(self, make_tokens: Callable[[int], FreshGuess], name: str) -> None:
        self.make_tokens, self.name = make_tokens, name

    def fill(self, memory_BM: torch.Tensor, partial: PartialWindow) -> PartialWindow:
        tokens = self.make_tokens(partial.vocabulary)
        fresh_BW = tokens(partial.text_BS, partial.start_B + 1, partial.positions_BW, partial.seed_B)
        full_B = torch.full_like(partial.filled_B, partial.window_BW.shape[1])
        window_BW = torch.where(partial.order_W < partial.filled_B[:, None], partial.window_BW, fresh_BW)
        return replace(partial, window_BW=window_BW, firm_B=full_B, filled_B=full_B)


class GuessChain(GuessStrategy):
    """Applies strategies in order: each sees what the earlier ones wrote and fills what they left empty."""

    def __init__(self, parts: Sequence[GuessStrategy]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.sizes = [part.memory_size for part in parts]
        self.memory_size = sum(self.sizes)
        self.fills_all = any(part.fills_all for part in parts)
        self.narrows = all(part.narrows for part in parts)

    def learn(self, memory_BM: torch.Tensor, before_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> None:
        for part, own_BM in zip(self.parts, memory_BM.split(self.sizes, dim=1)):
            part.learn(own_BM, before_B, window_BW, choices_BW)

    def fill(self, memory_BM: torch.Tensor, partial: PartialWindow) -> PartialWindow:
        for part, own_BM in zip(self.parts, memory_BM.split(self.sizes, dim=1)):
            partial = part.fill(own_BM, partial)
        return partial


STRATEGIES: dict[str, GuessStrategy] = {
    strategy.name: strategy
    for strategy in (*(PositionwiseGuess(make_tokens, name) for name, make_tokens in STARTS.items()), PromptLookup(), NgramPool())
}
CONTEXT = STRATEGIES["context"]


def make_guess(guess: str | GuessStrategy | FreshGuess) -> GuessStrategy:
    """A strategy that fills every window, from a strategy, a function, or names such as ``prompt_lookup+pool+filler``.

    Named parts are applied in order. Random tokens of the context fill what they leave empty; unlike those of a part named
    ``context``, which a CLLM may have been trained with, they do not count as worth computing.

    Raises UsageError for an unknown name, and for a part after one that leaves nothing empty.
    """
    if isinstance(guess, str):
        guess = _parse(guess)
    elif not isinstance(guess, GuessStrategy):
        tokens = guess
        guess = PositionwiseGuess(lambda _: tokens, getattr(tokens, "__name__", type(tokens).__name__))
    if guess.fills_all:
        return guess
    filled = GuessChain([guess, CONTEXT])
    filled.name, filled.narrows = guess.name, guess.narrows
    return filled


def _parse(text: str) -> GuessStrategy:
    names = text.split("+")
    for name in names:
        if name not in STRATEGIES:
            raise UsageError(f"unknown guess {name!r}; choose from {', '.join(STRATEGIES)}, or several joined by +")
    parts = [STRATEGIES[name] for name in names]
    for part in parts[:-1]:
        if part.fills_all:
            raise UsageError(f"guess {text!r}: {part.name} leaves nothing to the parts after it; put it last")
    return parts[0] if len(parts) == 1 else GuessChain(parts)

"""Fresh guesses: what stands in a position that no iteration has refined yet. They decide speed, never the output.

Shapes: B rows, W window width, S positions of the text, K positions to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from cllm.decoding.draft import Draft, Guess
from cllm.decoding.ngram_pool import NgramPool
from cllm.decoding.prompt_lookup import PromptLookup
from cllm.errors import UsageError

FILLER_ID = 0


class FreshGuess(Protocol):
    """A guess for each position by itself."""

    def __call__(self, text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        """Token ids [B, K] for ``positions_BK``, given that the first ``known_B`` tokens of ``text_BS`` are verified."""
        ...


def context_tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """Random tokens of the context (paper, Algorithm 1)."""
    return text_BS.gather(1, _hash(positions_BK, seed_B) % known_B[:, None])


def uniform_tokens(vocabulary: int) -> FreshGuess:
    """Random tokens out of all that there are."""

    def tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        return _hash(positions_BK, seed_B) % vocabulary

    return tokens


def filler_tokens(text_BS: torch.Tensor, known_B: torch.Tensor, positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """The same token everywhere."""
    return torch.full_like(positions_BK, FILLER_ID)


def _hash(positions_BK: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
    """A random number of 32 bits for every seed and position: no generator state, and the same in every batch."""
    mixed = (positions_BK * 0x9E3779B1 + seed_B[:, None] * 0x85EBCA77) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


STARTS: dict[str, Callable[[int], FreshGuess]] = {  # what trajectories can start from, given the size of the vocabulary
    "context": lambda _: context_tokens,
    "uniform": uniform_tokens,
    "filler": lambda _: filler_tokens,
}


class EachPosition(Guess):
    """Fills every empty position by a :class:`FreshGuess` (one for each size of vocabulary), and replaces nothing."""

    fills_all = True

    def __init__(self, tokens_of: Callable[[int], FreshGuess], name: str) -> None:
        self.tokens_of, self.name = tokens_of, name

    def fill(self, memory_BM: torch.Tensor, draft: Draft) -> Draft:
        tokens = self.tokens_of(draft.vocabulary)
        fresh_BW = tokens(draft.text_BS, draft.start_B + 1, draft.positions_BW, draft.seed_B)
        full_B = torch.full_like(draft.filled_B, draft.window_BW.shape[1])
        window_BW = torch.where(draft.order_W < draft.filled_B[:, None], draft.window_BW, fresh_BW)
        return replace(draft, window_BW=window_BW, firm_B=full_B, filled_B=full_B)


class Combination(Guess):
    """Strategies in turn: each sees what those before it wrote, and fills what they left empty."""

    def __init__(self, parts: Sequence[Guess]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.sizes = [part.memory_size for part in parts]
        self.memory_size = sum(self.sizes)
        self.fills_all = any(part.fills_all for part in parts)
        self.narrows = all(part.narrows for part in parts)

    def learn(self, memory_BM: torch.Tensor, before_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> None:
        for part, own_BM in zip(self.parts, memory_BM.split(self.sizes, dim=1)):
            part.learn(own_BM, before_B, window_BW, choices_BW)

    def fill(self, memory_BM: torch.Tensor, draft: Draft) -> Draft:
        for part, own_BM in zip(self.parts, memory_BM.split(self.sizes, dim=1)):
            draft = part.fill(own_BM, draft)
        return draft


STRATEGIES: dict[str, Guess] = {
    strategy.name: strategy
    for strategy in (*(EachPosition(tokens_of, name) for name, tokens_of in STARTS.items()), PromptLookup(), NgramPool())
}
CONTEXT = STRATEGIES["context"]


def make_guess(guess: str | Guess | FreshGuess) -> Guess:
    """A strategy that fills every window: one as it is, or by the names of its parts, as in ``prompt_lookup+pool+filler``.

    The parts are tried in that order. Random tokens of the context fill what all of them leave empty; unlike those of a
    part named ``context``, as a CLLM was trained with, they are worth no forward of their own.

    Raises UsageError for an unknown name, and for parts behind one that leaves nothing empty.
    """
    if isinstance(guess, str):
        guess = _parse(guess)
    elif not isinstance(guess, Guess):
        tokens = guess
        guess = EachPosition(lambda _: tokens, getattr(tokens, "__name__", type(tokens).__name__))
    if guess.fills_all:
        return guess
    filled = Combination([guess, CONTEXT])
    filled.name, filled.narrows = guess.name, guess.narrows
    return filled


def _parse(text: str) -> Guess:
    names = text.split("+")
    for name in names:
        if name not in STRATEGIES:
            raise UsageError(f"unknown guess {name!r}; choose from {', '.join(STRATEGIES)}, or several joined by +")
    parts = [STRATEGIES[name] for name in names]
    for part in parts[:-1]:
        if part.fills_all:
            raise UsageError(f"guess {text!r}: {part.name} leaves nothing for those behind it; put it last")
    return parts[0] if len(parts) == 1 else Combination(parts)

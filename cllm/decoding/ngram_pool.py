"""Guesses from an n-gram pool: what the model chose after the same tokens in earlier iterations, accepted or not.

Sources: lookahead decoding, arXiv 2402.02057, section 3 (a pool of n-grams from past iterations); token recycling, arXiv
2408.08696 (chains of successors of single tokens).
Shapes: B rows, W window width, E entries, M slots of a row's memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow

SLOTS = 1 << 12  # entries per row
TOKEN_BITS = 21  # three tokens fit into an int64
TOKEN_MASK = (1 << TOKEN_BITS) - 1
NO_TOKEN = TOKEN_MASK  # the first token of a one-token key


class NgramPool(GuessStrategy):
    """Remembers the model's latest choice after each token and after each pair of tokens.

    Windows are filled from left to right. A choice remembered for the last two tokens replaces a guess or fills an empty
    position; one remembered for the last token only fills empty positions. Choices after pairs are worth computing as long
    as they form an unbroken run from the window's first token on.

    The memory is a hash table: each slot holds the key's two tokens and the choice, and a new entry overwrites the old one.
    The last slot receives the entries that are discarded.
    """

    name = "pool"
    narrows = True
    memory_size = SLOTS + 1

    def learn(self, memory_BM: torch.Tensor, before_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> None:
        first_BW = torch.cat([before_B[:, None], window_BW[:, :-1]], dim=1)
        keys_BE = torch.cat([(NO_TOKEN << TOKEN_BITS) | window_BW, (first_BW << TOKEN_BITS) | window_BW], dim=1)
        entries_BE = (keys_BE << TOKEN_BITS) | choices_BW.repeat(1, 2)
        memory_BM.scatter_(1, _newest(slot_of(keys_BE)), entries_BE)

    def fill(self, memory_BM: torch.Tensor, partial: PartialWindow) -> PartialWindow:
        tokens = list(partial.window_BW.unbind(dim=1))
        firm_B, filled_B, useful_B = partial.firm_B, partial.filled_B, partial.useful_B
        for at in range(1, len(tokens)):
            first_B = tokens[at - 2] if at > 1 else partial.before_B
            single_B, double_B, guess_B = _recall(memory_BM, first_B, tokens[at - 1])
            empty_B = filled_B == at
            written_B = (empty_B & single_B) | (double_B & (firm_B <= at) & (at <= filled_B))
            tokens[at] = torch.where(written_B, guess_B, tokens[at])
            firm_B = torch.where(written_B, at + 1, firm_B)
            filled_B = filled_B + (empty_B & written_B)
            useful_B = useful_B + (written_B & double_B & (useful_B == at))
        window_BW = torch.stack(tokens, dim=1)
        return replace(partial, window_BW=window_BW, firm_B=firm_B, filled_B=filled_B, useful_B=useful_B)


def _recall(memory_BM: torch.Tensor, first_B: torch.Tensor, second_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether a choice after the second token is known, whether one after both is, and the choice, the pair's first; all [B]."""
    keys_B2 = torch.stack([torch.full_like(first_B, NO_TOKEN), first_B], dim=1) << TOKEN_BITS | second_B[:, None]
    entries_B2 = memory_BM.gather(1, slot_of(keys_B2))
    single_B, double_B = (entries_B2 >> TOKEN_BITS == keys_B2).unbind(dim=1)
    after_one_B, after_two_B = (entries_B2 & TOKEN_MASK).unbind(dim=1)
    return single_B, double_B, torch.where(double_B, after_two_B, after_one_B)


def slot_of(keys: torch.Tensor) -> torch.Tensor:
    """The slots of entries with these keys: a hash, 0 .. SLOTS - 1."""
    return ((keys ^ (keys >> TOKEN_BITS)) * 0x9E3779B1 >> 15) & (SLOTS - 1)


def _newest(slots_BE: torch.Tensor) -> torch.Tensor:
    """The same slots, but SLOTS (discard) for entries whose slot a later entry also takes, so that scatter is deterministic."""
    same_BEE = slots_BE[:, :, None] == slots_BE[:, None, :]
    return torch.where(same_BEE.triu(diagonal=1).any(dim=2), SLOTS, slots_BE)

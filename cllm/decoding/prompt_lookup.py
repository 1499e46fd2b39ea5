"""Guesses copied from the text: what followed an earlier occurrence of the last tokens.

Source: Saxena 2023, "Prompt lookup decoding" (github.com/apoorvumang/prompt-lookup-decoding).
Shapes: B rows, W window width, S positions of the text, N tokens to match.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow

LONGEST = 3  # longest match, in tokens
TRUSTED = 2  # a match of at least this many tokens replaces existing guesses
HINTED = 7  # tokens worth computing after a one-token match: on a CPU, 2 to 8 tokens cost about the same


class PromptLookup(GuessStrategy):
    """Finds the last three, two or one tokens in the verified text and copies what followed them.

    The tokens before the replaceable guesses are looked up first; a match of TRUSTED tokens or more replaces those guesses.
    Otherwise the guesses stay, and the tokens before the empty positions are looked up. Of several matches the longest wins,
    then the latest. Tokens copied after a match of TRUSTED or more are worth computing. Where refined guesses are not
    (``PartialWindow.narrows``), a match of one token replaces them, and HINTED tokens after it are worth computing.
    """

    name = "prompt_lookup"
    narrows = True

    def fill(self, memory_BM: torch.Tensor, partial: PartialWindow) -> PartialWindow:
        order_W, W = partial.order_W, partial.window_BW.shape[1]
        text_BS = partial.text_BS.scatter(1, partial.positions_BW, partial.window_BW)
        firm_end_B, filled_end_B = partial.start_B + partial.firm_B - 1, partial.start_B + partial.filled_B - 1
        twice = torch.cat([text_BS, text_BS]), torch.cat([firm_end_B, filled_end_B]), torch.cat([partial.start_B] * 2)
        (firm_match_B, filled_match_B), (length_B, _) = (found.chunk(2) for found in latest_match(*twice))
        hinted_B = (length_B == 1) & (partial.firm_B == 1) & partial.narrows
        replacing_B = ((length_B >= TRUSTED) | hinted_B) & (partial.firm_B < W)
        match_B = torch.where(replacing_B, firm_match_B, filled_match_B)
        from_B = torch.where(replacing_B, partial.firm_B, partial.filled_B)
        found_B = (match_B >= 0) & (from_B < W)
        worth_B = torch.where(hinted_B, min(1 + HINTED, W), W)

        copied_BW = continuation(text_BS, match_B, partial.start_B + from_B - 1, partial.positions_BW)
        return replace(
            partial,
            window_BW=torch.where(found_B[:, None] & (order_W >= from_B[:, None]), copied_BW, partial.window_BW),
            firm_B=torch.where(found_B & ~hinted_B, W, partial.firm_B),
            filled_B=torch.where(found_B, W, partial.filled_B),
            useful_B=torch.where(replacing_B & (partial.useful_B == partial.firm_B), worth_B, partial.useful_B),
        )


def latest_match(text_BS: torch.Tensor, end_B: torch.Tensor, limit_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the longest match of the tokens up to ``end_B`` ends, the last such position before ``limit_B`` (<= ``end_B``) or
    -1, and how many tokens match, at most LONGEST; both [B].
    """
    S = text_BS.shape[1]
    at_S, back_N = torch.arange(S, device=text_BS.device), torch.arange(LONGEST, device=text_BS.device)
    wanted_BN = text_BS.gather(1, (end_B[:, None] - back_N).clamp(min=0))
    padded = pad(text_BS, (LONGEST - 1, 0), value=-1)
    same_BS, length_BS = at_S < limit_B[:, None], torch.zeros_like(text_BS, dtype=torch.int32)
    for back in range(LONGEST):
        at = LONGEST - 1 - back
        same_BS = same_BS & (padded[:, at : at + S] == wanted_BN[:, back : back + 1])
        length_BS = length_BS + same_BS
    best_B = torch.where(length_BS > 0, length_BS * S + at_S, -1).amax(dim=1)
    return torch.where(best_B < 0, -1, best_B % S), (best_B // S).clamp(min=0)


def continuation(text_BS: torch.Tensor, match_B: torch.Tensor, end_B: torch.Tensor, positions_BW: torch.Tensor) -> torch.Tensor:
    """The tokens at ``positions_BW`` if the text continues after ``end_B`` as it did after ``match_B``: [B, W].

    A copy that reaches ``end_B`` continues with its own tokens, so it repeats with period ``end_B - match_B``.
    """
    ahead_BW = positions_BW - end_B[:, None] - 1
    return text_BS.gather(1, (match_B[:, None] + 1 + ahead_BW % (end_B - match_B)[:, None]).clamp(min=0))

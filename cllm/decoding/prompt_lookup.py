"""Guesses copied from the text: what followed the last tokens when they stood there before.

Source: Saxena 2023, "Prompt lookup decoding" (github.com/apoorvumang/prompt-lookup-decoding).
Shapes: B rows, W window width, S positions of the text, N tokens looked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from cllm.decoding.draft import Draft, Guess

LONGEST = 3  # tokens that are looked for at most
TRUSTED = 2  # as many tokens of verified text, found again, speak louder than guesses that are there
HINTED = 7  # tokens behind a match of one that are worth a forward: on a CPU, 2 to 8 tokens cost about the same


class PromptLookup(Guess):
    """Looks for the last three, two or one tokens in the verified text, and copies what followed them there.

    The tokens in front of the replaceable guesses are looked for first: a match of two or more replaces those guesses. Else
    the guesses stay, and the tokens in front of the empty positions are looked for. Longer matches come before later ones.
    What was copied behind a match of two or more is worth a forward. Where refined guesses are not, a match of one replaces
    them too, and the first HINTED tokens behind it are.
    """

    name = "prompt_lookup"
    narrows = True

    def fill(self, memory_BM: torch.Tensor, draft: Draft) -> Draft:
        order_W, W = draft.order_W, draft.window_BW.shape[1]
        text_BS = draft.text_BS.scatter(1, draft.positions_BW, draft.window_BW)
        firm_end_B, filled_end_B = draft.start_B + draft.firm_B - 1, draft.start_B + draft.filled_B - 1
        twice = torch.cat([text_BS, text_BS]), torch.cat([firm_end_B, filled_end_B]), torch.cat([draft.start_B] * 2)
        (firm_match_B, filled_match_B), (length_B, _) = (found.chunk(2) for found in latest_match(*twice))
        hinted_B = (length_B == 1) & (draft.firm_B == 1) & draft.narrows
        replacing_B = ((length_B >= TRUSTED) | hinted_B) & (draft.firm_B < W)
        match_B = torch.where(replacing_B, firm_match_B, filled_match_B)
        from_B = torch.where(replacing_B, draft.firm_B, draft.filled_B)
        found_B = (match_B >= 0) & (from_B < W)
        worth_B = torch.where(hinted_B, min(1 + HINTED, W), W)

        copied_BW = continuation(text_BS, match_B, draft.start_B + from_B - 1, draft.positions_BW)
        return replace(
            draft,
            window_BW=torch.where(found_B[:, None] & (order_W >= from_B[:, None]), copied_BW, draft.window_BW),
            firm_B=torch.where(found_B & ~hinted_B, W, draft.firm_B),
            filled_B=torch.where(found_B, W, draft.filled_B),
            useful_B=torch.where(replacing_B & (draft.useful_B == draft.firm_B), worth_B, draft.useful_B),
        )


def latest_match(text_BS: torch.Tensor, end_B: torch.Tensor, limit_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position before ``limit_B`` (<= ``end_B``) where the tokens that end at ``end_B`` end too, -1 for none, and how
    many tokens match, at most LONGEST: both [B]. The longest match counts.
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
    """What stands at ``positions_BW`` if the text goes on behind ``end_B`` as it did behind ``match_B``: [B, W].

    A copy that reaches ``end_B`` goes on with what it has put there itself, so the text repeats with that period.
    """
    ahead_BW = positions_BW - end_B[:, None] - 1
    return text_BS.gather(1, (match_B[:, None] + 1 + ahead_BW % (end_B - match_B)[:, None]).clamp(min=0))

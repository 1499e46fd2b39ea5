"""One iteration of decoding as a function of tensors: forward, choose, accept, shift, fill.

Its shapes depend on the number of rows, the width and the length of the cache that is looked at, never on values, and no value
leaves the device. So it can be run as it is, compiled, or captured once and replayed (:mod:`cllm.decoding.runner`).
Paper: arXiv 2403.00835, section 3.1 and Algorithm 1.
Shapes: B rows, W window width, T tokens of a forward, L slots of the cache, V vocabulary, F numbers of an iteration.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from cllm.attention import model_mask
from cllm.decoding.cache import RowCache
from cllm.decoding.draft import Draft, Guess, token_before
from cllm.decoding.result import Iteration
from cllm.decoding.rows import Rows
from cllm.decoding.sampling import Chooser

LENGTHS = 32  # attention sees a multiple of this many slots, so shapes repeat


class Step:
    """``sliding`` or the paper's blocks of ``block_size`` tokens, see :class:`cllm.decoding.engine.JacobiDecoder`."""

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int,
        *,
        sliding: bool,
        guess: Guess,
        eos_ids: torch.Tensor,
        context: int | None,
    ) -> None:
        self.model, self.block_size, self.sliding = model, block_size, sliding
        self.guess, self.eos_ids, self.context = guess, eos_ids, context
        self.width = block_size + (not sliding)
        self.order_W = torch.arange(self.width, device=eos_ids.device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int) -> torch.Tensor:
        """One iteration of ``rows``, which changes them and the cache in place: the facts of its :class:`Iteration`, [B, F].

        ``length``: slots of the cache that attention looks at; no window ends beyond them.
        """
        positions_BW = rows.start_B[:, None] + self.order_W
        logits_BWV = self.forward(rows.window_BW, positions_BW, cache, length)
        return self.advance(rows, self.choose(rows, chooser, logits_BWV))

    def forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, cache: RowCache, length: int) -> torch.Tensor:
        """The logits [B, W, V] behind the last W tokens. Position -1 marks padding."""
        cache.place(positions_BT, length)
        seen_BT = positions_BT.clamp(min=0)
        slots_1L = torch.arange(length, device=tokens_BT.device)[None]
        visible_BTL = slots_1L[:, None, :] <= seen_BT[:, :, None]
        keep = {"logits_to_keep": self.width} if self._keeps_logits else {}
        output = self.model(
            input_ids=tokens_BT,
            attention_mask=model_mask(self.model.config, visible_BTL, seen_BT, slots_1L, self.model.dtype),
            position_ids=seen_BT if self.context is None else seen_BT.clamp(max=self.context - 1),
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        return output.logits[:, -self.width :]

    def choose(self, rows: Rows, chooser: Chooser, logits_BWV: torch.Tensor) -> torch.Tensor:
        """The model's choices [B, W] behind each token of the windows."""
        return chooser.choose(logits_BWV, rows.text_BS, rows.window_BW, rows.start_B, rows.options_BO, rows.noise_seed_B)

    def advance(self, rows: Rows, choices_BW: torch.Tensor) -> torch.Tensor:
        """Accept what the forward verified, move the windows on, fill them up; returns the facts [B, F]."""
        right = rows.window_BW[:, 1:] == choices_BW[:, :-1]
        matched_B = right.long().cumprod(dim=1).sum(dim=1)
        verified_B, advance_B, ends_B = self._accept(rows, choices_BW, matched_B)
        gained_B = verified_B - rows.held_B
        newly_BW = (self.order_W > rows.held_B[:, None]) & (self.order_W < verified_B[:, None])
        facts_BF = Iteration.facts(
            rows.ids_B,
            rows.start_B,
            advance_B,
            (gained_B - 1).clamp(min=0),
            (newly_BW & rows.stayed_BW).sum(dim=1),
            (~rows.done_B).long(),
            window_BW=rows.window_BW,
            choices_BW=choices_BW,
        )
        self.guess.learn(rows.memory_BM, token_before(rows.text_BS, rows.start_B), rows.window_BW, choices_BW)
        # The text gets all choices; those not verified are overwritten later, like stale cache entries.
        rows.text_BS.scatter_(1, rows.start_B[:, None] + 1 + self.order_W, choices_BW)
        rows.start_B += advance_B
        rows.done_B |= ends_B
        if not self.sliding:
            rows.held_B.copy_(verified_B * (advance_B == 0))
        self._shift(rows, choices_BW, advance_B, right)
        return facts_BF

    def fill(self, rows: Rows, kept_B: torch.Tensor) -> None:
        """Put guesses into the rows' windows behind the ``kept_B`` (>= 1) leading tokens; a sliding one may change more."""
        if self.width == 1:
            return
        firm_B = torch.ones_like(kept_B) if self.sliding else kept_B
        draft = Draft(rows.text_BS, rows.start_B, rows.window_BW, firm_B, kept_B, rows.seed_B)
        rows.window_BW.copy_(self.guess.fill(rows.memory_BM, draft).window_BW)

    def _shift(self, rows: Rows, choices_BW: torch.Tensor, advance_B: torch.Tensor, right: torch.Tensor) -> None:
        source_BW = (advance_B[:, None] + self.order_W).clamp(max=self.width)
        shifted_BW = torch.cat([rows.window_BW[:, :1], choices_BW], dim=1).gather(1, source_BW)
        rows.window_BW.copy_(shifted_BW)
        kept = self.width + self.sliding  # block mode starts every block from fresh guesses only
        self.fill(rows, (kept - advance_B).clamp(max=self.width))
        stood = torch.nn.functional.pad(right, (1, 1)).gather(1, source_BW)
        rows.stayed_BW.copy_(stood & (rows.window_BW == shifted_BW))

    def _accept(
        self, rows: Rows, choices_BW: torch.Tensor, matched_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many choices are verified, how many join the output, and whether the row ends with them."""
        room_B = rows.end_B - rows.start_B - 1
        eos_BW = (choices_BW[:, :, None] == self.eos_ids).any(dim=2)
        first_eos_B = torch.where(eos_BW, self.order_W, self.width).amin(dim=1)
        last_B = torch.minimum(room_B, first_eos_B + 1)  # no more choices than this belong to the row
        verified_B = (matched_B + 1).clamp(max=self.block_size)
        if self.sliding:
            advance_B = torch.minimum(verified_B, last_B)
        else:
            fixed = matched_B == self.block_size
            advance_B = torch.minimum(torch.where(fixed, self.block_size, 0), last_B)
        verified_B = torch.minimum(verified_B, last_B)
        running = ~rows.done_B
        ends_B = running & (advance_B > 0) & (advance_B == last_B)
        return verified_B * running, advance_B * running, ends_B


def round_up(slots: int, unit: int = LENGTHS) -> int:
    return -(-slots // unit) * unit

"""One iteration of decoding as a function of tensors: forward, choose, accept, shift, fill.

Its shapes depend on the number of rows, the width and the length of the cache that is looked at, never on values, and no value
leaves the device. So it can be run as it is, compiled, or captured once and replayed (:mod:`cllm.decoding.runner`).
Paper: arXiv 2403.00835, section 3.1 and Algorithm 1.
Shapes: B rows, W window width, T tokens of a forward, L slots of the cache, V vocabulary, F numbers of an iteration.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.attention import model_mask
from cllm.decoding.cache import RowCache
from cllm.decoding.draft import Draft, Guess, token_before
from cllm.decoding.grouped_attention import GroupedAttention
from cllm.decoding.linear import Linears
from cllm.decoding.result import Iteration
from cllm.decoding.rows import Rows
from cllm.decoding.sampling import Chooser, Windows

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
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.narrows = sliding and guess.narrows
        self.order_W = torch.arange(self.width, device=eos_ids.device)
        self.linears, self.attention = Linears.of(model), GroupedAttention.of(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int, width: int) -> torch.Tensor:
        """One iteration of ``rows``, which changes them and the cache in place: the facts of its :class:`Iteration`, [B, F].

        ``length``: slots of the cache that attention looks at; no window ends beyond them.
        ``width`` K: how many leading tokens of the windows go through the model; all W unless ``narrows``.
        """
        positions_BK = rows.start_B[:, None] + self.order_W[:width]
        logits_BKV = self.forward(rows.window_BW[:, :width], positions_BK, cache, length, width)
        return self.advance(rows, self.choose(rows, chooser, logits_BKV))

    def forward(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, cache: RowCache, length: int, width: int
    ) -> torch.Tensor:
        """The logits [B, K, V] behind the last ``width`` (K) tokens. Position -1 marks padding."""
        cache.place(positions_BT, length)
        seen_BT = positions_BT.clamp(min=0)
        slots_1L = torch.arange(length, device=tokens_BT.device)[None]
        visible_BTL = slots_1L[:, None, :] <= seen_BT[:, :, None]
        keep = {"logits_to_keep": width} if self._keeps_logits else {}
        output = self._run_model(
            input_ids=tokens_BT,
            attention_mask=model_mask(self.model.config, visible_BTL, seen_BT, slots_1L, self.model.dtype),
            position_ids=seen_BT if self.context is None else seen_BT.clamp(max=self.context - 1),
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        return output.logits[:, -width:]

    def _run_model(self, **inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.model(**inputs)
        with self.linears, self.attention:
            return self.model(**inputs)

    def choose(self, rows: Rows, chooser: Chooser, logits_BKV: torch.Tensor) -> torch.Tensor:
        """The model's choices [B, K] behind each of the windows' leading tokens."""
        window_BK = rows.window_BW[:, : logits_BKV.shape[1]]
        at = Windows(logits_BKV, rows.text_BS, window_BK, rows.start_B, rows.options_BO, rows.noise_seed_B)
        return chooser.choose(at)

    def advance(self, rows: Rows, choices_BK: torch.Tensor) -> torch.Tensor:
        """Accept what the forward verified, move the windows on, fill them up; returns the facts [B, F]."""
        if self.width == 1:
            return self._advance_by_one(rows, choices_BK)
        K = choices_BK.shape[1]
        window_BK, order_K = rows.window_BW[:, :K], self.order_W[:K]
        right = window_BK[:, 1:] == choices_BK[:, :-1]
        matched_B = right.long().cumprod(dim=1).sum(dim=1)
        verified_B, advance_B, ends_B = self._accept(rows, choices_BK, matched_B)
        gained_B = verified_B - rows.held_B
        newly_BK = (order_K > rows.held_B[:, None]) & (order_K < verified_B[:, None])
        facts_BF = Iteration.facts(
            rows.ids_B,
            rows.start_B,
            advance_B,
            (gained_B - 1).clamp(min=0),
            (newly_BK & rows.stayed_BW[:, :K]).sum(dim=1),
            (~rows.done_B).long(),
            window_BW=window_BK,
            choices_BW=choices_BK,
        )
        if self.guess.memory_size:
            self.guess.learn(rows.memory_BM, token_before(rows.text_BS, rows.start_B), window_BK, choices_BK)
        self._move_on(rows, choices_BK, advance_B, ends_B)
        if not self.sliding:
            rows.held_B.copy_(verified_B * (advance_B == 0))
        self._shift(rows, choices_BK, advance_B, right)
        return facts_BF

    def _advance_by_one(self, rows: Rows, choices_B1: torch.Tensor) -> torch.Tensor:
        """The same where there is nothing but the verified token: AR decoding, whose steps should cost as little as can be."""
        running_B = ~rows.done_B
        advance_B, none_B = running_B.long(), torch.zeros_like(rows.start_B)
        full_B = rows.end_B - rows.start_B == 2
        ends_B = running_B & (full_B | (choices_B1 == self.eos_ids).any(dim=1))
        facts_BF = Iteration.facts(
            rows.ids_B, rows.start_B, advance_B, none_B, none_B, advance_B, window_BW=rows.window_BW, choices_BW=choices_B1
        )
        self._move_on(rows, choices_B1, advance_B, ends_B)
        rows.window_BW.copy_(torch.where(running_B[:, None], choices_B1, rows.window_BW))
        return facts_BF

    def _move_on(self, rows: Rows, choices_BK: torch.Tensor, advance_B: torch.Tensor, ends_B: torch.Tensor) -> None:
        # The text gets all choices; those not verified are overwritten later, like stale cache entries.
        rows.text_BS.scatter_(1, rows.start_B[:, None] + 1 + self.order_W[: choices_BK.shape[1]], choices_BK)
        rows.start_B += advance_B
        rows.done_B |= ends_B

    def fill(self, rows: Rows, kept_B: torch.Tensor) -> None:
        """Put guesses into the rows' windows behind the ``kept_B`` (>= 1) leading tokens; a sliding one may change more."""
        if self.width == 1:
            return
        firm_B = torch.ones_like(kept_B) if self.sliding else kept_B
        one_B = torch.ones_like(kept_B)
        draft = Draft(
            rows.text_BS,
            rows.start_B,
            rows.window_BW,
            firm_B,
            kept_B,
            one_B,
            rows.seed_B,
            vocabulary=self.vocabulary,
            narrows=self.narrows,
        )
        filled = self.guess.fill(rows.memory_BM, draft)
        rows.window_BW.copy_(filled.window_BW)
        rows.useful_B.copy_(filled.useful_B)

    def _shift(self, rows: Rows, choices_BK: torch.Tensor, advance_B: torch.Tensor, right: torch.Tensor) -> None:
        K = choices_BK.shape[1]
        source_BW = (advance_B[:, None] + self.order_W).clamp(max=K)
        shifted_BW = torch.cat([rows.window_BW[:, :1], choices_BK], dim=1).gather(1, source_BW)
        rows.window_BW.copy_(shifted_BW)
        kept = K + self.sliding  # block mode starts every block from fresh guesses only
        self.fill(rows, (kept - advance_B).clamp(max=self.width))
        stood = torch.nn.functional.pad(right, (1, 1)).gather(1, source_BW)
        rows.stayed_BW.copy_(stood & (rows.window_BW == shifted_BW))

    def _accept(
        self, rows: Rows, choices_BK: torch.Tensor, matched_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many choices are verified, how many join the output, and whether the row ends with them."""
        room_B = rows.end_B - rows.start_B - 1
        eos_BK = (choices_BK[:, :, None] == self.eos_ids).any(dim=2)
        first_eos_B = torch.where(eos_BK, self.order_W[: choices_BK.shape[1]], self.width).amin(dim=1)
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

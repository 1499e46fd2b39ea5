"""One iteration of decoding as a function of tensors: forward, choose, accept, shift, fill.

Its shapes depend on the number of rows, the width and the length of the cache that is looked at, never on values, and no value
leaves the device. So it can be run as it is, compiled, or captured once and replayed (:mod:`cllm.decoding.runner`).
Paper: arXiv 2403.00835, section 3.1 and Algorithm 1.
With a consistency adapter a forward carries the window twice: K *verify tokens* without the adapter, then D *draft tokens*
with it, which are the window's guesses again:

    tokens     x0 g1 .. gK-1 | g1 .. gD
    positions  p  ..  p+K-1  | p+1 .. p+D
    slots      p  ..  p+K-1  | p+K .. p+K+D-1
    sees       the text, and verify tokens up to itself | the text with x0, and draft tokens up to itself

The choices after verify tokens say what is accepted; those after draft tokens are the next window's guesses. The next window
overwrites the slots of draft tokens before any mask shows them.
Shapes: B rows, W window width, K verify and D draft tokens, R refined tokens, T tokens of a forward, L slots of the cache,
V vocabulary, F numbers of an iteration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.attention import model_mask
from cllm.decoding.cache import RowCache
from cllm.decoding.draft import Draft, Guess, token_before
from cllm.decoding.grouped_attention import GroupedAttention
from cllm.decoding.linear import Linears
from cllm.decoding.result import Iteration
from cllm.decoding.rotary import Rotary
from cllm.decoding.rows import Rows
from cllm.decoding.sampling import Chooser, Windows


class Step:
    """``sliding`` or the paper's blocks of ``block_size`` tokens, see :class:`cllm.decoding.engine.JacobiDecoder`.

    ``adapter``: the consistency adapter of ``drafts`` draft tokens; None, with 0 of them, without one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int,
        *,
        sliding: bool,
        guess: Guess,
        eos_ids: torch.Tensor,
        context: int | None,
        adapter: Adapter | None = None,
        drafts: int = 0,
    ) -> None:
        self.model, self.block_size, self.sliding = model, block_size, sliding
        self.guess, self.eos_ids, self.context = guess, eos_ids, context
        self.adapter, self.drafts = adapter, drafts
        self.verified = block_size + (not sliding)  # K
        self.width = max(self.verified, drafts + 1)  # W
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.narrows = sliding and guess.narrows and not drafts  # refined guesses are what a draft is for
        self.order_W = torch.arange(self.width, device=eos_ids.device)
        self.linears, self.attention, self.rotary = Linears.of(model), GroupedAttention.of(model), Rotary.of(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int, width: int) -> torch.Tensor:
        """One iteration of ``rows``, which changes them and the cache in place: the facts of its :class:`Iteration`, [B, F].

        ``length``: slots of the cache that attention looks at; no token stands beyond them.
        ``width``: how many leading tokens of the windows go through the model; W, or fewer where :attr:`narrows` or
        :attr:`drafts` allow it.
        """
        tokens_BT, positions_BT, drafts = self.ahead(rows, width)
        logits_BTV = self.forward(tokens_BT, positions_BT, cache, length, tokens_BT.shape[1], drafts)
        return self.advance(rows, *self.choose(rows, chooser, logits_BTV, drafts))

    @property
    def span(self) -> int:
        """How many slots one iteration may write, from its first verify token on."""
        return self.verified + self.drafts

    def split(self, width: int) -> tuple[int, int]:
        """How many verify and draft tokens stand for the leading ``width`` tokens of a window."""
        return min(self.verified, width), min(self.drafts, width - 1)

    def ahead(self, rows: Rows, width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens and positions [B, K + D] of an iteration, and D."""
        verified, drafts = self.split(width)
        order_W, window_BW = self.order_W, rows.window_BW
        if not drafts:
            return window_BW[:, :verified], rows.start_B[:, None] + order_W[:verified], 0
        tokens_BT = torch.cat([window_BW[:, :verified], window_BW[:, 1 : 1 + drafts]], dim=1)
        order_T = torch.cat([order_W[:verified], order_W[1 : 1 + drafts]])
        return tokens_BT, rows.start_B[:, None] + order_T, drafts

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: RowCache,
        length: int,
        width: int,
        drafts: int = 0,
        first: int = 0,
        reach_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits [B, width, V] after the last ``width`` tokens. Position -1 marks padding.

        The last ``drafts`` tokens are draft tokens, which stand after the first verify token and see no other one.
        ``first``: the cache's row of the first of these rows.
        ``reach_BT``: the longest position of the forward in which AR decoding computes each token, by default its own.
        """
        seen_BT = positions_BT.clamp(min=0)
        slots_BT, visible_BTL, keys_BL = self._visible(positions_BT, seen_BT, length, drafts)
        cache.place(slots_BT, length, first)
        keep = {"logits_to_keep": width} if self._keeps_logits else {}
        output = self._run_model(
            drafts,
            positions_BT if reach_BT is None else reach_BT,
            input_ids=tokens_BT,
            attention_mask=model_mask(self.model.config, visible_BTL, seen_BT, keys_BL, self.model.dtype),
            position_ids=seen_BT if self.context is None else seen_BT.clamp(max=self.context - 2),  # the last that leads on
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        return output.logits[:, -width:]

    def _visible(
        self, positions_BT: torch.Tensor, seen_BT: torch.Tensor, length: int, drafts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where tokens are written [B, T], which slots each sees [B, T, L], and the position of each slot's token [B, L]."""
        slots_1L = torch.arange(length, device=seen_BT.device)[None]
        if not drafts:
            return positions_BT, slots_1L[:, None, :] <= seen_BT[:, :, None], slots_1L
        verify_BT = positions_BT[:, :-drafts]
        last_B1, first_B1 = verify_BT[:, -1:], positions_BT[:, -drafts:][:, :1] - 1
        slots_BD = last_B1 + self.order_W[1 : 1 + drafts]
        text_BL, draft_BL = slots_1L <= first_B1, slots_1L > last_B1
        visible_BTL = torch.cat(
            [
                slots_1L[:, None, :] <= seen_BT[:, :-drafts, None],
                text_BL[:, None, :] | (draft_BL[:, None, :] & (slots_1L[:, None, :] <= slots_BD[:, :, None])),
            ],
            dim=1,
        )
        keys_BL = torch.where(draft_BL, slots_1L - last_B1 + first_B1, slots_1L)
        return torch.cat([verify_BT, slots_BD], dim=1), visible_BTL, keys_BL

    def _run_model(self, drafts: int, reach_BT: torch.Tensor, **inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.model(**inputs)
        drafting = self.linears.drafting(self.adapter, inputs["input_ids"].shape[1], drafts)
        with drafting, self.attention, self.rotary.reaching(reach_BT):
            return self.model(**inputs)

    @contextmanager
    def tracing(self, width: int) -> Iterator[None]:
        """Around a call of this step under torch.compile."""
        verified, drafts = self.split(width)
        if self.adapter is None or not drafts:
            yield
            return
        with self.linears.traced(self.adapter, verified + drafts, drafts):
            yield

    def choose(self, rows: Rows, chooser: Chooser, logits_BTV: torch.Tensor, drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The target model's choices [B, K] after each of the windows' leading tokens, and the refined guesses [B, R]: for
        each position after the first token's what draft tokens lead to, else what verify tokens do.
        """
        verified = logits_BTV.shape[1] - drafts
        options = rows.options_BO, rows.noise_seed_B
        at = Windows(logits_BTV[:, :verified], rows.text_BS, rows.window_BW[:, :verified], rows.start_B, *options)
        choices_BK = chooser.choose(at)
        if not drafts:
            return choices_BK, choices_BK
        guesses_BD = rows.window_BW[:, 1 : 1 + drafts]
        drafts_BD = chooser.guess(Windows(logits_BTV[:, verified:], rows.text_BS, guesses_BD, rows.start_B + 1, *options))
        return choices_BK, torch.cat([choices_BK[:, :1], drafts_BD, choices_BK[:, 1 + drafts :]], dim=1)

    def advance(self, rows: Rows, choices_BK: torch.Tensor, refined_BR: torch.Tensor) -> torch.Tensor:
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
        self._shift(rows, choices_BK, refined_BR, advance_B, right)
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
        if self.drafts:  # no token is worth a forward that stands where the row has ended
            rows.useful_B.copy_((rows.end_B - rows.start_B - 1).clamp(1, self.width))
        else:
            rows.useful_B.copy_(filled.useful_B)

    def _shift(
        self,
        rows: Rows,
        choices_BK: torch.Tensor,
        refined_BR: torch.Tensor,
        advance_B: torch.Tensor,
        right: torch.Tensor,
    ) -> None:
        first_B1, R = rows.window_BW[:, :1], refined_BR.shape[1]
        source_BW = (advance_B[:, None] + self.order_W).clamp(max=R)
        shifted_BW = torch.cat([first_B1, refined_BR], dim=1).gather(1, source_BW)
        if refined_BR is not choices_BK:  # the first token is the target model's
            shifted_BW[:, :1] = torch.cat([first_B1, choices_BK], dim=1).gather(1, advance_B[:, None])
        rows.window_BW.copy_(shifted_BW)
        kept = R + self.sliding  # block mode starts every block from fresh guesses only
        self.fill(rows, (kept - advance_B).clamp(max=self.width))
        stood = torch.nn.functional.pad(right, (1, R - right.shape[1])).gather(1, source_BW)
        rows.stayed_BW.copy_(stood & (rows.window_BW == shifted_BW))

    def _accept(self, rows: Rows, choices_BK: torch.Tensor, matched_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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

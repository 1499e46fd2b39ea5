"""One iteration of decoding as a function of tensors: forward, choose, accept, shift, fill.

Its shapes depend only on the number of rows, the width and the visible length of the cache, and no value leaves the device. So
it can run eagerly, compiled, or captured once and replayed (:mod:`cllm.decoding.runner`).
Paper: arXiv 2403.00835, section 3.1 and Algorithm 1.
With a consistency adapter, a forward computes the window twice: K *verify tokens* with the adapter off, then D *draft tokens*,
the window's guesses again, with it on:

    tokens     x0 g1 .. gK-1 | g1 .. gD
    positions  p  ..  p+K-1  | p+1 .. p+D
    slots      p  ..  p+K-1  | p+K .. p+K+D-1
    sees       the text, and verify tokens up to itself | the text with x0, and draft tokens up to itself

The choices after verify tokens decide what is accepted; those after draft tokens are the next window's guesses. The next window
overwrites the slots of draft tokens before any mask shows them.
Shapes: B rows, W window width, K verify and D draft tokens, R refined tokens, T tokens of a forward, L slots of the cache,
V vocabulary, F fields of an iteration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter
from cllm.attention import cache_argument, model_mask
from cllm.decoding.cache import RowCache
from cllm.decoding.grouped_attention import AttentionPatch
from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow, token_before
from cllm.decoding.linear import LinearPatch
from cllm.decoding.result import Iteration
from cllm.decoding.rotary import RotaryPatch
from cllm.decoding.rows import Rows
from cllm.decoding.sampling import Chooser, Windows


class Step:
    """``sliding``: a sliding window, else the paper's blocks; see :class:`cllm.decoding.engine.JacobiDecoder`.

    ``adapter``: the consistency adapter, on for ``drafts`` draft tokens; None if there are none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int,
        *,
        sliding: bool,
        guess: GuessStrategy,
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
        self.narrows = sliding and guess.narrows and not drafts  # with draft tokens, refined guesses are worth computing
        self.order_W = torch.arange(self.width, device=eos_ids.device)
        self.linears = LinearPatch.for_model(model)
        self.attention = AttentionPatch.for_model(model)
        self.rotary = RotaryPatch.for_model(model)
        self._cache = cache_argument(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int, width: int) -> torch.Tensor:
        """Run one iteration, changing ``rows`` and ``cache`` in place; returns the fields [B, F] of its :class:`Iteration`.

        ``length``: the number of cache slots that attention sees; all tokens must be within it.
        ``width``: how many leading tokens of the windows to compute: W, or fewer if :attr:`narrows` or :attr:`drafts` allow.
        """
        tokens_BT, positions_BT, drafts = self.inputs(rows, width)
        logits_BTV = self.forward(tokens_BT, positions_BT, cache, length, tokens_BT.shape[1], drafts)
        return self.advance(rows, *self.choose(rows, chooser, logits_BTV, drafts))

    @property
    def span(self) -> int:
        """How many slots one iteration writes at most, starting at its first verify token."""
        return self.verified + self.drafts

    def split(self, width: int) -> tuple[int, int]:
        """How many verify and draft tokens a forward has for the leading ``width`` tokens of each window."""
        return min(self.verified, width), min(self.drafts, width - 1)

    def inputs(self, rows: Rows, width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens and positions [B, K + D] of an iteration over the leading ``width`` window tokens, and D."""
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

        The last ``drafts`` tokens are draft tokens: they follow the first verify token and see no other verify token.
        ``first``: the cache row of the first of these rows.
        ``reach_BT``: the largest position in the forward in which AR decoding computes each token; by default its own.
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
            position_ids=seen_BT if self.context is None else seen_BT.clamp(max=self.context - 2),  # later choices are out of context
            **{self._cache: cache},
            use_cache=True,
            **keep,
        )
        return output.logits[:, -width:]

    def _visible(
        self, positions_BT: torch.Tensor, seen_BT: torch.Tensor, length: int, drafts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The slot of each token [B, T], the slots it sees [B, T, L], and the position of the token in each slot [B, L]."""
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
        """Enter for a call of this step under torch.compile."""
        verified, drafts = self.split(width)
        if self.adapter is None or not drafts:
            yield
            return
        with self.linears.traced(self.adapter, verified + drafts, drafts):
            yield

    def choose(self, rows: Rows, chooser: Chooser, logits_BTV: torch.Tensor, drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The target model's choices [B, K] after the verify tokens, and the refined guesses [B, R].

        A refined guess is the choice after a draft token where there is one, otherwise the target model's.
        """
        verified = logits_BTV.shape[1] - drafts
        options = rows.options_BO, rows.noise_seed_B
        choices_BK = chooser.choose(Windows(logits_BTV[:, :verified], rows.text_BS, rows.window_BW[:, :verified], rows.start_B, *options))
        if not drafts:
            return choices_BK, choices_BK
        guesses_BD = rows.window_BW[:, 1 : 1 + drafts]
        drafts_BD = chooser.guess(Windows(logits_BTV[:, verified:], rows.text_BS, guesses_BD, rows.start_B + 1, *options))
        return choices_BK, torch.cat([choices_BK[:, :1], drafts_BD, choices_BK[:, 1 + drafts :]], dim=1)

    def advance(self, rows: Rows, choices_BK: torch.Tensor, refined_BR: torch.Tensor) -> torch.Tensor:
        """Accept what the forward verified, slide the windows and fill them; returns the fields [B, F]."""
        if self.width == 1:
            return self._advance_by_one(rows, choices_BK)
        K = choices_BK.shape[1]
        window_BK, order_K = rows.window_BW[:, :K], self.order_W[:K]
        right = window_BK[:, 1:] == choices_BK[:, :-1]
        matched_B = right.long().cumprod(dim=1).sum(dim=1)
        verified_B, advance_B, ends_B = self._accept(rows, choices_BK, matched_B)
        gained_B = verified_B - rows.held_B
        newly_BK = (order_K > rows.held_B[:, None]) & (order_K < verified_B[:, None])
        fields_BF = Iteration.pack(
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
        self._append(rows, choices_BK, advance_B, ends_B)
        if not self.sliding:
            rows.held_B.copy_(verified_B * (advance_B == 0))
        self._shift(rows, choices_BK, refined_BR, advance_B, right)
        return fields_BF

    def _advance_by_one(self, rows: Rows, choices_B1: torch.Tensor) -> torch.Tensor:
        """:meth:`advance` for W = 1, which is AR decoding, with as few operations as possible."""
        running_B = ~rows.done_B
        advance_B, none_B = running_B.long(), torch.zeros_like(rows.start_B)
        full_B = rows.end_B - rows.start_B == 2
        ends_B = running_B & (full_B | (choices_B1 == self.eos_ids).any(dim=1))
        fields_BF = Iteration.pack(
            rows.ids_B, rows.start_B, advance_B, none_B, none_B, advance_B, window_BW=rows.window_BW, choices_BW=choices_B1
        )
        self._append(rows, choices_B1, advance_B, ends_B)
        rows.window_BW.copy_(torch.where(running_B[:, None], choices_B1, rows.window_BW))
        return fields_BF

    def _append(self, rows: Rows, choices_BK: torch.Tensor, advance_B: torch.Tensor, ends_B: torch.Tensor) -> None:
        # Write all choices to the text; those not verified are overwritten later, like stale cache entries.
        rows.text_BS.scatter_(1, rows.start_B[:, None] + 1 + self.order_W[: choices_BK.shape[1]], choices_BK)
        rows.start_B += advance_B
        rows.done_B |= ends_B

    def fill(self, rows: Rows, kept_B: torch.Tensor) -> None:
        """Put guesses into the windows after their ``kept_B`` (>= 1) leading tokens; a sliding window's guesses may change too."""
        if self.width == 1:
            return
        firm_B = torch.ones_like(kept_B) if self.sliding else kept_B
        one_B = torch.ones_like(kept_B)
        partial = PartialWindow(
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
        filled = self.guess.fill(rows.memory_BM, partial)
        rows.window_BW.copy_(filled.window_BW)
        if self.drafts:  # tokens at or beyond the end of the row are not worth computing
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
        if refined_BR is not choices_BK:  # the first token must be the target model's choice
            shifted_BW[:, :1] = torch.cat([first_B1, choices_BK], dim=1).gather(1, advance_B[:, None])
        rows.window_BW.copy_(shifted_BW)
        kept = R + self.sliding  # in block mode every block starts from fresh guesses only
        self.fill(rows, (kept - advance_B).clamp(max=self.width))
        stood = torch.nn.functional.pad(right, (1, R - right.shape[1])).gather(1, source_BW)
        rows.stayed_BW.copy_(stood & (rows.window_BW == shifted_BW))

    def _accept(self, rows: Rows, choices_BK: torch.Tensor, matched_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many choices are verified, how many join the output, and whether the row ends with them; all [B]."""
        room_B = rows.end_B - rows.start_B - 1
        eos_BK = (choices_BK[:, :, None] == self.eos_ids).any(dim=2)
        first_eos_B = torch.where(eos_BK, self.order_W[: choices_BK.shape[1]], self.width).amin(dim=1)
        last_B = torch.minimum(room_B, first_eos_B + 1)  # the most choices that the row can still take
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

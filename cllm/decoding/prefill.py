"""The first iteration of new rows: their prompts, except for cached prefixes, and their first window go through the model.

Shapes: B rows, T tokens of a forward, V vocabulary, F fields of an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from cllm.attention import round_up
from cllm.decoding.batch import Batch
from cllm.decoding.prefix_cache import PrefixCache, common_length
from cllm.decoding.sampling import Chooser
from cllm.decoding.step import Step
from cllm.processor import has_amx

if TYPE_CHECKING:
    from cllm.decoding.engine import Request

PROMPT_CHUNK, PROMPT_CHUNK_ON_CPU = 2048, 512
FORWARD, FORWARD_ON_CPU = 256, 32  # the fixed cost of a forward, in tokens
SAME_BITS = 32  # tokens; in bfloat16 a CPU with AMX gives a token the same bits in all forwards of so few
TAIL = 8  # last tokens of a prompt that are then computed with the window


class Prefill:
    """Computes prompts, skipping what ``prefixes`` has cached and computing once what prompts have in common.

    ``chunk``: the most tokens of a prompt in one forward.

    A prompt and its window in one forward would be a forward of another size at each width. In bfloat16 that changes bits of the
    prompt's keys and values, and so, at near-ties, the text. Where small forwards of all sizes give the same bits, a prompt but for its
    last tokens is computed alone, so that a window of any width has the text of width 1.
    """

    def __init__(self, step: Step, prefixes: PrefixCache, device: torch.device, chunk: int | None) -> None:
        on_cpu = device.type == "cpu"
        self.step, self.prefixes, self.device = step, prefixes, device
        self.chunk = chunk or (PROMPT_CHUNK_ON_CPU if on_cpu else PROMPT_CHUNK)
        self.forward_tokens = FORWARD_ON_CPU if on_cpu else FORWARD
        self.tail = TAIL if on_cpu and step.model.dtype == torch.bfloat16 and has_amx() else 0

    def __call__(self, new: Batch, requests: Sequence[Request], width: int, unit: int) -> tuple[torch.Tensor, list[int]]:
        """The fields [B, F] of the iteration, and how many tokens of each prompt were reused.

        ``width``: how many leading tokens of the windows to compute. ``unit``: reserve a multiple of this many slots in the
        cache. Prompts are right-aligned before their windows; long ones are computed in chunks, the last with the windows.
        """
        rows, lengths = new.rows, [len(request.prompt) for request in requests]
        window_BT, after_BT, drafts = self.step.inputs(rows, width)
        first, width = max(lengths) - 1, window_BT.shape[1]  # where the last window begins
        length = round_up(first + width)
        new.cache.reserve(len(requests), round_up(length, unit))  # at once, or it would be copied with every chunk
        known, start = self._reuse(new, requests)
        ahead = max(tokens - 1 - at for tokens, at in zip(lengths, start))
        before_BT = rows.start_B[:, None] + torch.arange(-ahead, 0, device=self.device)
        before_BT = before_BT.where(before_BT >= torch.tensor(start, device=self.device)[:, None], -1)
        positions_BT = torch.cat([before_BT, after_BT], dim=1)
        tokens_BT = torch.cat([rows.text_BS.gather(1, before_BT.clamp(min=0)), window_BT], dim=1)
        reach_BT = torch.maximum(positions_BT, rows.start_B[:, None])  # AR decoding computes a prompt in one forward
        tail = self.tail if len(requests) * (self.tail + width) <= SAME_BITS else 0
        done, alone = 0, max(ahead - tail, 0) if tail else (ahead - 1) // self.chunk * self.chunk
        while done < alone:
            chunk = slice(done, done := min(done + self.chunk, alone))
            at = tokens_BT[:, chunk], positions_BT[:, chunk]
            self.step.forward(*at, new.cache, round_up(first - ahead + done), 1, reach_BT=reach_BT[:, chunk])
        at = tokens_BT[:, done:], positions_BT[:, done:]
        logits_BTV = self.step.forward(*at, new.cache, length, width, drafts, reach_BT=reach_BT[:, done:])
        for row, request in enumerate(requests):
            self.prefixes.store(new.cache, row, request.scope, request.prompt)
        chooser = Chooser([request.sampling for request in requests])
        return self.step.advance(rows, *self.step.choose(rows, chooser, logits_BTV, drafts)), known

    def _reuse(self, new: Batch, requests: Sequence[Request]) -> tuple[list[int], list[int]]:
        """How many tokens of each prompt were reused, and how many the cache has now; the last token is never among them.

        In sorted order, prompts have their longest common prefixes with their neighbours. If only a few prompts have much left
        to compute, they are computed here, so that the others need not be padded to their length.
        """
        rows = range(len(requests))
        prompts = [np.asarray(request.prompt)[:-1] for request in requests]
        if not self.prefixes.budget:
            return [0 for _ in rows], [0 for _ in rows]
        known = [self.prefixes.load(new.cache, row, requests[row].scope, prompts[row]) for row in rows]
        start = [*known]
        order = sorted(rows, key=lambda row: (requests[row].scope or "", prompts[row].tolist()))
        for row, other in pairwise(order):
            same_scope = requests[row].scope == requests[other].scope is not None
            shared = common_length(prompts[row], prompts[other]) if same_scope else 0
            if shared - max(start[row], start[other]) >= self.forward_tokens:
                self._compute(new, row, start[row], shared)
                start[row] = shared
            if (shared := min(shared, start[row])) > start[other]:
                new.cache.copy(row, other, start[other], shared)
                known[other] = start[other] = shared
        if any(known):
            left = [len(prompt) - at for prompt, at in zip(prompts, start)]
            last = self._tokens_together(left)
            for row in rows:
                if left[row] > last:
                    self._compute(new, row, start[row], len(prompts[row]) - last)
                    start[row] = len(prompts[row]) - last
        return known, start

    def _tokens_together(self, left: list[int]) -> int:
        """How many last tokens of each prompt to compute in one padded forward at the least total cost.

        ``left``: how many tokens of each prompt remain. What a prompt has beyond the result is computed alone before.
        """

        def cost(last: int) -> int:
            alone = [count - last + self.forward_tokens for count in left if count > last]
            return len(left) * last + sum(alone)

        return min(left, key=cost)

    def _compute(self, new: Batch, row: int, start: int, end: int) -> None:
        """Compute keys and values of tokens start .. end - 1 of one row."""
        for at in range(start, end, self.chunk):
            stop = min(at + self.chunk, end)
            tokens_1T = new.rows.text_BS[row : row + 1, at:stop]
            positions_1T = torch.arange(at, stop, device=self.device)[None]
            self.step.forward(tokens_1T, positions_1T, new.cache, round_up(stop), 1, first=row)

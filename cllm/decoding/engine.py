"""Jacobi decoding: several tokens per forward pass, the same tokens as autoregressive (AR) decoding.

Paper: arXiv 2403.00835, section 3.1 and Algorithm 1. The engine knows tokens, not text.
Shapes: B rows, W window width, P longest prompt, T tokens of a forward, S positions of the text, V vocabulary,
O sampling options of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from cllm.attention import check_model, model_mask
from cllm.decoding.cache import RowCache, put_rows
from cllm.decoding.draft import Draft, Guess, token_before
from cllm.decoding.guess import FreshGuess, make_guess
from cllm.decoding.sampling import GREEDY, OPTIONS, Chooser, Sampling, per_prompt
from cllm.errors import UsageError
from cllm.models import context_length, embedding_device

Window = Literal["sliding", "block"]
Stop = Literal["eos", "length", "context"]
Prompts = Sequence[Sequence[int]]
SLOT_BUCKET = 32  # attention sees a multiple of this many slots, so shapes repeat
CUDA_SYNC_INTERVAL = 8  # iterations between two looks of the host at a GPU's state


class Streamer(Protocol):
    """What ``transformers.TextStreamer`` offers; ``put`` gets one or more token ids at a time."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """One prompt (token ids), how many tokens its response may have, and how they are chosen."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY


Feed = Callable[[list[int]], Sequence[Request]]  # numbers of the rows still running -> requests that join them, maybe none


@dataclass(frozen=True)
class Iteration:
    """One forward pass, seen by whoever drives the loop. All tensors live on the model's device."""

    rows_B: torch.Tensor  # which prompt each row belongs to, counted in the order they were fed
    start_B: torch.Tensor  # position of the window's first token, which is verified
    window_BW: torch.Tensor  # the state that went in
    choices_BW: torch.Tensor  # the model's choice for the position after each window token
    emitted_B: torch.Tensor  # how many leading choices joined the output
    fast_forwarded_B: torch.Tensor  # tokens verified beyond the one that AR would have gained
    stationary_B: torch.Tensor  # of those, guesses that had stood right behind a wrong one
    running_B: torch.Tensor  # False for rows that were finished before


@dataclass
class RowResult:
    """The response to one prompt and what it cost."""

    token_ids: list[int] = field(default_factory=list)  # the end-of-sequence token included where one was reached
    accepted: list[int] = field(default_factory=list)  # tokens gained by each forward; sums to len(token_ids)
    fast_forwarded: int = 0
    stationary: int = 0
    stop: Stop = "length"

    @property
    def forwards(self) -> int:
        """The prefill counts as one."""
        return len(self.accepted)

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / self.forwards if self.forwards else 0.0

    def gain(self, token_ids: list[int], fast_forwarded: int, stationary: int) -> None:
        """Add what one forward brought."""
        self.token_ids += token_ids
        self.accepted.append(len(token_ids))
        self.fast_forwarded += fast_forwarded
        self.stationary += stationary


@dataclass
class _Rows:
    """The state of the rows still in the batch."""

    ids_B: torch.Tensor
    seed_B: torch.Tensor  # of the fresh guesses
    options_BO: torch.Tensor  # see Sampling.options
    noise_seed_B: torch.Tensor
    text_BS: torch.Tensor
    start_B: torch.Tensor
    end_B: torch.Tensor  # first position that the row may not fill
    window_BW: torch.Tensor
    stayed_BW: torch.Tensor  # the guess was there, unchanged, one iteration ago
    held_B: torch.Tensor  # tokens of the present block verified so far (block mode)
    memory_BM: torch.Tensor  # what the strategy for fresh guesses remembers
    done_B: torch.Tensor

    def select(self, rows: torch.Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])

    def put(self, other: _Rows, free: torch.Tensor) -> None:
        """Take in the rows of ``other``: in the place of the free ones first (int64 indices), then behind the last."""
        for name, value in vars(self).items():
            setattr(self, name, put_rows(value.clone(), vars(other)[name], free))  # iterations hold on to the old ones


class JacobiDecoder:
    """Jacobi decoding of any causal language model with full or sliding-window attention.

    ``block_size`` n: with ``window="sliding"`` the window holds the last verified token and n - 1 guesses, and slides on by
    what each iteration verifies; with ``window="block"`` (the paper's procedure) n guesses behind the verified text are
    iterated until nothing changes, then the next n follow. ``block_size=1`` with a sliding window is AR decoding.
    ``guess``: how new positions of the window are filled, see :func:`cllm.decoding.guess.make_guess`.

    Raises UsageError for a block size below 1 or beyond the model's context and for an unknown guess, UnsupportedModelError
    for models whose cache cannot be rolled back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int = 16,
        *,
        eos_token_ids: Sequence[int] = (),
        window: Window = "sliding",
        guess: str | Guess | FreshGuess = "context",
        seed: int = 0,
    ) -> None:
        check_model(model)
        self.context = context_length(model.config)
        if not 1 <= block_size <= (self.context or block_size):
            raise UsageError(f"block_size must be between 1 and the context length {self.context}, got {block_size}")
        if window not in ("sliding", "block"):
            raise UsageError(f"window must be 'sliding' or 'block', got {window!r}")
        self.model, self.block_size, self.window, self.seed = model, block_size, window, seed
        self.guess = make_guess(guess)
        self.width = block_size + (window == "block")
        self.device = embedding_device(model)
        self.eos_ids = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=self.device)
        self.sync_interval = 1 if self.device.type == "cpu" else CUDA_SYNC_INTERVAL
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    # ---------------------------------------------------------------- public

    def generate(
        self,
        input_ids: torch.Tensor | Prompts,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        streamer: Streamer | None = None,
    ) -> list[RowResult]:
        """Decode a batch; the results are in the order of the prompts.

        ``input_ids``: a list of prompts, or [B, P] padded on either side with its ``attention_mask``.
        ``max_new_tokens``: per row; a row also stops at an end-of-sequence id or at the end of the model's context.
        ``sampling``: of all rows, or one for each prompt. What a row draws depends on its prompt and its options alone.
        """
        prompts = unpad(input_ids, attention_mask)
        tally = Tally(self.eos_ids.tolist())
        if streamer is not None:
            if len(prompts) != 1:
                raise UsageError(f"a streamer takes one prompt at a time, got {len(prompts)}")
            streamer.put(torch.tensor(prompts[0]))
        for iteration in self.iterate(prompts, max_new_tokens=max_new_tokens, sampling=sampling):
            tally.add(iteration)
            if streamer is not None and (emitted := int(iteration.emitted_B[0])):
                streamer.put(iteration.choices_BW[0, :emitted].cpu())
        if streamer is not None:
            streamer.end()
        return [tally.take(row, max_new_tokens) for row in range(len(prompts))]

    def iterate(
        self, prompts: Prompts, *, max_new_tokens: int, sampling: Sampling | Sequence[Sampling] = GREEDY
    ) -> Iterator[Iteration]:
        """One :class:`Iteration` per forward, until every row of this one batch is finished.

        Raises UsageError for an empty prompt, one that leaves no room in the model's context, or a sampling too few.
        """
        samplings = per_prompt(sampling, len(prompts))
        waiting = [Request(prompt, max_new_tokens, of) for prompt, of in zip(prompts, samplings, strict=True)]

        def feed(running: list[int]) -> list[Request]:
            batch, waiting[:] = waiting[:], []
            return batch

        return self.flow(feed)

    @torch.inference_mode()
    def flow(self, feed: Feed) -> Iterator[Iteration]:
        """The loop itself, with rows that come and go: one :class:`Iteration` per forward, until no row is left.

        Whenever the host looks at the rows (after every iteration on a CPU, every few on a GPU), ``feed`` is asked for
        requests to take in. Those are prefilled together, as an iteration of their own, and then join the others.
        Raises UsageError for an empty prompt, or one that leaves no room in the model's context.
        """
        training = self.model.training
        self.model.eval()
        try:
            yield from self._loop(feed)
        finally:
            self.model.train(training)

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raise UsageError, calling the prompt ``name``, where a request cannot be decoded."""
        length = len(request.prompt)
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be >= 1, got {request.max_new_tokens}")
        if length == 0:
            raise UsageError(f"{name} is empty; decoding needs at least one token to start from")
        if self.context is not None and length >= self.context:
            raise UsageError(
                f"{name} has {length} tokens, which leaves no room in the model's context of {self.context}"
            )

    # ------------------------------------------------------------- internals

    def _loop(self, feed: Feed) -> Iterator[Iteration]:
        rows, cache = self._start([], 0)[0], RowCache()
        samplings: dict[int, Sampling] = {}
        fed = step = reach = 0
        while True:
            if step % self.sync_interval == 0:
                running = (~rows.done_B).nonzero().flatten()
                inside = rows.ids_B[running].tolist()
                samplings = {row: samplings[row] for row in inside}
                if requests := feed(inside):
                    for number, request in enumerate(requests, fed):
                        self.check(request, f"prompt {number}")
                    new, prefix_BT = self._start(requests, fed)
                    own = RowCache()
                    chooser = Chooser([request.sampling for request in requests])
                    yield self._advance(new, self._prefill(new, chooser, prefix_BT, own))
                    samplings |= {row: request.sampling for row, request in enumerate(requests, fed)}
                    fed += len(requests)
                    free = rows.done_B.nonzero().flatten()
                    rows.put(new, free)
                    cache.put(own, free)
                    continue
                if len(running) < len(rows.ids_B):
                    rows.select(running)
                    cache.select(running)
                if not len(running):
                    return
                chooser = Chooser(list(samplings.values()))
                reach = int(rows.start_B.max()) + self.width  # no row's window ends beyond this
            positions = rows.start_B[:, None] + torch.arange(self.width, device=self.device)
            yield self._advance(rows, self._choose(rows, chooser, rows.window_BW, positions, cache, reach))
            step += 1
            reach += self.width

    def _prefill(self, rows: _Rows, chooser: Chooser, prefix_BT: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """The first iteration of new rows: their prompts stand in front of the windows."""
        ahead = torch.arange(-prefix_BT.shape[1], self.width, device=self.device)
        positions = (rows.start_B[:, None] + ahead).clamp(min=-1)
        return self._choose(rows, chooser, torch.cat([prefix_BT, rows.window_BW], dim=1), positions, cache, len(ahead))

    def _start(self, requests: Sequence[Request], first: int) -> tuple[_Rows, torch.Tensor]:
        """Rows ``first``, ... before their first forward, and what precedes the windows: [B, P - 1], padded on the left."""
        B, longest = len(requests), max((len(r.prompt) for r in requests), default=0)
        most = max((r.max_new_tokens for r in requests), default=0)
        text = torch.zeros(B, longest + most + 2 * self.width, dtype=torch.long)
        prefix = torch.zeros(B, max(longest - 1, 0), dtype=torch.long)
        for row, request in enumerate(requests):
            ids = torch.as_tensor(request.prompt, dtype=torch.long)
            text[row, : len(ids)] = ids
            prefix[row, longest - len(ids) :] = ids[:-1]
        text = text.to(self.device)
        length = torch.tensor([len(r.prompt) for r in requests], dtype=torch.long, device=self.device)
        seed = torch.full_like(length, self.seed)
        end = length + torch.tensor([r.max_new_tokens for r in requests], dtype=torch.long, device=self.device)
        if self.context is not None:
            end = end.clamp(max=self.context)
        rows = _Rows(
            ids_B=torch.arange(first, first + B, device=self.device),
            seed_B=seed,
            options_BO=torch.tensor([r.sampling.options() for r in requests], device=self.device).view(B, OPTIONS),
            noise_seed_B=torch.tensor([r.sampling.seed for r in requests], dtype=torch.long, device=self.device),
            text_BS=text,
            start_B=length - 1,
            end_B=end,
            window_BW=torch.zeros(B, self.width, dtype=torch.long, device=self.device),
            stayed_BW=torch.zeros(B, self.width, dtype=torch.bool, device=self.device),
            held_B=torch.zeros_like(length),
            memory_BM=torch.full((B, self.guess.memory_size), -1, device=self.device),
            done_B=torch.zeros(B, dtype=torch.bool, device=self.device),
        )
        if B:
            rows.window_BW[:, :1] = text.gather(1, rows.start_B[:, None])
            self._fill(rows, torch.ones_like(length))
        return rows, prefix.to(self.device)

    def _fill(self, rows: _Rows, kept_B: torch.Tensor) -> None:
        """Put guesses into the rows' windows behind the ``kept_B`` (>= 1) leading tokens; a sliding one may change more."""
        firm_B = kept_B if self.window == "block" else torch.ones_like(kept_B)
        draft = Draft(rows.text_BS, rows.start_B, rows.window_BW, firm_B, kept_B, rows.seed_B)
        rows.window_BW = self.guess.fill(rows.memory_BM, draft).window_BW

    def _choose(
        self,
        rows: _Rows,
        chooser: Chooser,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: RowCache,
        reach: int,
    ) -> torch.Tensor:
        """One forward; the model's choices [B, W] behind the last W tokens. Position -1 marks padding."""
        length = -(-reach // SLOT_BUCKET) * SLOT_BUCKET
        cache.place(positions_BT, length)
        seen_BT = positions_BT.clamp(min=0)
        slots_1L = torch.arange(length, device=self.device)[None]
        visible_BTL = slots_1L[:, None, :] <= seen_BT[:, :, None]
        position_ids = seen_BT if self.context is None else seen_BT.clamp(max=self.context - 1)
        keep = {"logits_to_keep": self.width} if self._keeps_logits else {}
        output = self.model(
            input_ids=tokens_BT,
            attention_mask=model_mask(self.model.config, visible_BTL, seen_BT, slots_1L, self.model.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **keep,
        )
        logits_BWV = output.logits[:, -self.width :]
        return chooser.choose(logits_BWV, rows.text_BS, rows.window_BW, rows.start_B, rows.options_BO, rows.noise_seed_B)

    def _advance(self, rows: _Rows, choices_BW: torch.Tensor) -> Iteration:
        """Accept what the forward verified, move the windows on, fill them up. No value leaves the device."""
        W, window = self.width, rows.window_BW
        right = window[:, 1:] == choices_BW[:, :-1]
        matched_B = right.long().cumprod(dim=1).sum(dim=1)
        verified_B, advance_B, ends_B = self._accept(rows, choices_BW, matched_B)

        gained_B = verified_B - rows.held_B
        order_W = torch.arange(W, device=self.device)
        newly_BW = (order_W > rows.held_B[:, None]) & (order_W < verified_B[:, None])
        iteration = Iteration(
            rows_B=rows.ids_B,
            start_B=rows.start_B,
            window_BW=window,
            choices_BW=choices_BW,
            emitted_B=advance_B,
            fast_forwarded_B=(gained_B - 1).clamp(min=0),
            stationary_B=(newly_BW & rows.stayed_BW).sum(dim=1),
            running_B=~rows.done_B,
        )
        self.guess.learn(rows.memory_BM, token_before(rows.text_BS, rows.start_B), window, choices_BW)
        # The text gets all choices; those not verified are overwritten later, like stale cache entries.
        rows.text_BS.scatter_(1, rows.start_B[:, None] + 1 + order_W, choices_BW)
        rows.start_B = rows.start_B + advance_B
        moved_B = advance_B > 0
        rows.held_B = torch.zeros_like(rows.held_B) if self.window == "sliding" else verified_B * ~moved_B
        rows.done_B = rows.done_B | ends_B

        source_BW = (advance_B[:, None] + order_W).clamp(max=W)
        rows.window_BW = shifted = torch.cat([window[:, :1], choices_BW], dim=1).gather(1, source_BW)
        kept = W + (self.window == "sliding")  # block mode starts every block from fresh guesses only
        self._fill(rows, (kept - advance_B).clamp(max=W))
        stood = torch.nn.functional.pad(right, (1, 1)).gather(1, source_BW)
        rows.stayed_BW = stood & (rows.window_BW == shifted)
        return iteration

    def _accept(
        self, rows: _Rows, choices_BW: torch.Tensor, matched_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many choices are verified, how many join the output, and whether the row ends with them."""
        room_B = rows.end_B - rows.start_B - 1
        order_W = torch.arange(self.width, device=self.device)
        eos_BW = torch.isin(choices_BW, self.eos_ids)
        first_eos_B = torch.where(eos_BW, order_W, self.width).amin(dim=1)
        last_B = torch.minimum(room_B, first_eos_B + 1)  # no more choices than this belong to the row
        verified_B = (matched_B + 1).clamp(max=self.block_size)
        if self.window == "block":
            fixed = matched_B == self.block_size
            advance_B = torch.minimum(torch.where(fixed, self.block_size, 0), last_B)
        else:
            advance_B = torch.minimum(verified_B, last_B)
        verified_B = torch.minimum(verified_B, last_B)
        running = ~rows.done_B
        ends_B = running & (advance_B > 0) & (advance_B == last_B)
        return verified_B * running, advance_B * running, ends_B


class Tally:
    """Adds iterations up to results, row by row. Tensors are fetched from the device only when a result is taken."""

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos = set(eos_ids)
        self._history: list[Iteration] = []
        self._rows: dict[int, RowResult] = {}

    def add(self, iteration: Iteration) -> None:
        self._history.append(iteration)

    def take(self, row: int, max_new_tokens: int) -> RowResult:
        """The result of a finished row, which is forgotten here."""
        self._fetch()
        result = self._rows.pop(row)
        result.stop = "length" if len(result.token_ids) == max_new_tokens else "context"
        if result.token_ids and result.token_ids[-1] in self._eos:
            result.stop = "eos"
        return result

    def _fetch(self) -> None:
        for it in self._history:
            columns = (it.rows_B, it.emitted_B, it.fast_forwarded_B, it.stationary_B, it.running_B)
            choices = it.choices_BW.tolist()
            for index, (row, emitted, fast, stationary, running) in enumerate(torch.stack(columns, dim=1).tolist()):
                if running:
                    self._rows.setdefault(row, RowResult()).gain(choices[index][:emitted], fast, stationary)
        self._history.clear()


def unpad(input_ids: torch.Tensor | Prompts, attention_mask: torch.Tensor | None = None) -> list[list[int]]:
    """A batch as plain lists of token ids, whichever side it was padded on."""
    if not isinstance(input_ids, torch.Tensor):
        return [[int(token) for token in prompt] for prompt in input_ids]
    if input_ids.dim() != 2:
        raise UsageError(f"input_ids must have shape [B, P], got {list(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise UsageError(f"attention_mask {list(attention_mask.shape)} does not fit input_ids {list(input_ids.shape)}")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, attention_mask.bool())]

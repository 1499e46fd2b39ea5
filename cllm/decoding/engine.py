"""Jacobi decoding: several tokens per forward pass, the same tokens as autoregressive (AR) decoding.

Paper: arXiv 2403.00835, section 3.1 and Algorithm 1. The engine knows tokens, not text.
Shapes: B rows, W window width, P longest prompt, T tokens of a forward, S positions of the text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from cllm.adapter import Adapter, attached
from cllm.attention import LENGTHS, check_model
from cllm.decoding.batch import Batch
from cllm.decoding.cache import GROWTH
from cllm.decoding.delayed_poll import DelayedPoll
from cllm.decoding.guess import FreshGuess, make_guess
from cllm.decoding.guess_strategy import GuessStrategy
from cllm.decoding.prefill import Prefill
from cllm.decoding.prefix_cache import DEFAULT_BYTES, PrefixCache
from cllm.decoding.result import Iteration, RowResult, Tally
from cllm.decoding.rows import Rows
from cllm.decoding.runner import Mode, make_runner
from cllm.decoding.sampling import GREEDY, OPTIONS, Chooser, Sampling, per_prompt
from cllm.decoding.self_test import self_test
from cllm.decoding.step import Step
from cllm.errors import LARGEST, UsageError
from cllm.models import (
    context_length,
    default_drafts,
    default_guess,
    default_width,
    embedding_count,
    embedding_device,
    read_record,
    reread_length,
)
from cllm.modes import evaluating

Window = Literal["sliding", "block"]
Prompts = Sequence[Sequence[int]]
CUDA_SYNC_INTERVAL = 8  # iterations between synchronisations with a GPU, while few rows finish


class Streamer(Protocol):
    """The interface of ``transformers.TextStreamer``; ``put`` gets one or more token ids at a time."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """One prompt (token ids), the most tokens its response may have, and how they are chosen.

    Requests reuse keys and values only of requests with the same ``scope``; with None, of none.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    scope: str | None = ""


Feed = Callable[[list[int]], Sequence[Request]]  # from the numbers of the running rows to requests that join them, if any


class JacobiDecoder:
    """Jacobi decoding of any causal language model with full or sliding-window attention.

    ``block_size`` n: with ``window="sliding"`` the window holds the last verified token and n - 1 guesses, and slides by what
    each iteration verifies; with ``window="block"`` (the paper's procedure) the n guesses after the verified text are iterated
    to their fixed point before the next block starts. ``block_size=1`` with a sliding window is AR decoding.
    ``guess``: fills new positions of the window, see :func:`cllm.decoding.guess.make_guess`. On a CPU without ``compile``,
    where each token of a forward costs time, a forward covers only the leading tokens that the guess finds worth computing.
    Both default to what ``cllm tune`` stored in the checkpoint, then to what it was trained with, then to 16 and ``context``.
    ``adapter``: the consistency adapter that refines guesses, by default the one attached to the model
    (:func:`cllm.adapter.attach`); None for none. It affects speed, never the text. ``drafts``: how many guesses it refines in
    each forward, by default what ``cllm tune`` stored for the width, then all guesses of the window; 0 disables it. There may
    be more drafts than the block_size - 1 guesses that the model verifies.
    ``compile``: how iterations are run, see :func:`cllm.decoding.runner.make_runner`. Captured iterations keep the addresses
    of the model's weights, so use a new decoder after moving the model.
    ``prefill_chunk``: the most tokens of a prompt in one forward, which bounds memory; by default 512 on a CPU, else 2,048. The
    forwards of a long prompt count as one.
    ``prefix_cache``: bytes of keys and values to keep for later prompts, by default 1 GiB. Prompts are then computed only from
    where they differ from earlier texts or from each other; 0 computes every prompt whole. See
    :mod:`cllm.decoding.prefix_cache`.

    During decoding, oneDNN computes linear layers on x86 CPUs (:class:`cllm.decoding.linear.LinearPatch`), attention does not
    repeat the cache per query head (:func:`cllm.decoding.grouped_attention.grouped_attention`), and with longrope each token
    has the frequencies of AR decoding (:class:`cllm.decoding.rotary.RotaryPatch`).

    Raises UsageError for a block size below 1 or beyond the model's context, an unknown guess or an unknown compile mode;
    UnsupportedModelError for models that :func:`cllm.attention.check_model` or :func:`cllm.decoding.self_test.self_test`
    refuse.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        window: Window = "sliding",
        guess: str | GuessStrategy | FreshGuess | None = None,
        adapter: Adapter | Literal["attached"] | None = "attached",
        drafts: int | None = None,
        seed: int = 0,
        compile: Mode = "auto",
        prefill_chunk: int | None = None,
        prefix_cache: int = DEFAULT_BYTES,
    ) -> None:
        check_model(model)
        record = read_record(model.config)
        block_size = default_width(record) if block_size is None else block_size
        self.context, self.vocabulary = context_length(model.config), embedding_count(model)
        self.reread_length = reread_length(model.config)
        if not 1 <= block_size <= (self.context or block_size):
            raise UsageError(f"block_size must be between 1 and the context length {self.context}, got {block_size}")
        if window not in ("sliding", "block"):
            raise UsageError(f"window must be 'sliding' or 'block', got {window!r}")
        adapter = attached(model) if adapter == "attached" else adapter
        drafts = (default_drafts(record, block_size) if drafts is None else drafts) if adapter else drafts or 0
        self._check_drafts(drafts, adapter, block_size, window)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise UsageError(f"prefill_chunk must be >= 1, got {prefill_chunk}")
        self.model, self.block_size, self.window, self.seed = model, block_size, window, seed
        self.guess = make_guess(default_guess(record) if guess is None else guess)
        self.device = embedding_device(model)
        self.eos_ids = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=self.device)
        self.step = Step(
            model,
            block_size,
            sliding=window == "sliding",
            guess=self.guess,
            eos_ids=self.eos_ids,
            context=self.context,
            adapter=adapter if drafts else None,
            drafts=drafts,
        )
        self_test(self.step)
        self.prefixes = PrefixCache(0 if self.step.rotary else prefix_cache)  # with longrope, keys depend on the whole prompt
        self.prefill = Prefill(self.step, self.prefixes, self.device, prefill_chunk)
        self.width = self.step.width
        self.compile: Mode = compile
        self.runner = make_runner(self.step, compile)
        self.sync_interval = 1 if self.device.type == "cpu" else CUDA_SYNC_INTERVAL

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
        """Decode a batch; results are in the order of the prompts.

        ``input_ids``: a list of prompts, or [B, P] padded on either side, with ``attention_mask`` [B, P].
        ``max_new_tokens``: per row; a row also stops at an end-of-sequence id or at the end of the model's context.
        ``sampling``: one for all rows, or one per prompt. What a row samples depends only on its prompt and its options.
        ``streamer``: gets the tokens of a single prompt as they are verified.

        Raises UsageError for what :meth:`iterate` refuses, and for a streamer with several prompts.
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
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        scope: str | None = "",
    ) -> Iterator[Iteration]:
        """One :class:`Iteration` per forward until every row of the batch is finished. ``scope``: see :class:`Request`.

        Raises UsageError for a prompt that :meth:`check` refuses, or if there is not one sampling per prompt.
        """
        samplings = per_prompt(sampling, len(prompts))
        waiting = [Request(prompt, max_new_tokens, own, scope) for prompt, own in zip(prompts, samplings, strict=True)]

        def feed(running: list[int]) -> list[Request]:
            batch, waiting[:] = waiting[:], []
            return batch

        return self.flow(feed)

    @torch.inference_mode()
    def flow(self, feed: Feed, cancelled: Collection[int] = ()) -> Iterator[Iteration]:
        """Continuous batching: one :class:`Iteration` per forward, while rows join and leave, until no row is left.

        Whenever the host synchronises with the rows (after every iteration on a CPU; on a GPU every CUDA_SYNC_INTERVAL, or one
        iteration after an eighth of the rows finished), it calls ``feed`` for new requests. They are prefilled together, in an
        iteration of their own, and then join the running rows. Before that, rows whose numbers are in ``cancelled`` end; the
        caller may change it at any time.
        Raises UsageError for a request that :meth:`check` refuses.
        """
        with evaluating(self.model):
            self.step.linears.refresh(self.step.adapter)
            self.prefixes.check_weights(self.model, self.step.linears.changes)
            with self.runner.batch(self._new_batch([], []).rows) as batch:
                yield from self._loop(feed, cancelled, batch)

    def narrower(self) -> JacobiDecoder:
        """A decoder with half the window and half the draft tokens: the same texts, in less memory."""
        return JacobiDecoder(
            self.model,
            max(1, self.block_size // 2),
            eos_token_ids=self.eos_ids.tolist(),
            window=self.window,
            guess=self.guess,
            adapter=self.step.adapter,
            drafts=self.step.drafts // 2,
            seed=self.seed,
            compile=self.compile,
            prefill_chunk=self.prefill.chunk,
            prefix_cache=self.prefixes.budget,
        )

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raise UsageError if ``request`` cannot be decoded; the message calls its prompt ``name``."""
        length = len(request.prompt)
        if not 1 <= request.max_new_tokens <= LARGEST:
            raise UsageError(f"max_new_tokens must be between 1 and {LARGEST}, got {request.max_new_tokens}")
        if length == 0:
            raise UsageError(f"{name} is empty; decoding needs at least one token to start from")
        if self.context is not None and length >= self.context:
            raise UsageError(f"{name} has {length} tokens, which leaves no room in the model's context of {self.context}")
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < self.vocabulary:
                raise UsageError(f"token ids must be between 0 and {self.vocabulary - 1}, and {name} has {token}")

    # ------------------------------------------------------------- internals

    def _loop(self, feed: Feed, cancelled: Collection[int], batch: Batch) -> Iterator[Iteration]:
        inside: dict[int, Request] = {}  # by row number
        fed = step = reach = limit = 0
        poll, due = DelayedPoll(self.device), False
        while True:
            if step % self.sync_interval == 0 or due:
                if cancelled:
                    batch.cancel(cancelled)
                running, places = batch.poll()
                ended = {row: (inside[row], *places[row]) for row in inside.keys() & places.keys()}
                for text in ended.values():
                    self._store_prefix(batch, *text)
                joining = self._to_reread(batch, {row: text for row, text in ended.items() if row not in cancelled})
                inside = {row: inside[row] for row in running}
                if not joining:
                    joining = dict(enumerate(feed(list(inside)), fed))
                    fed += len(joining)
                if joining:
                    requests = list(joining.values())
                    for number, request in joining.items():
                        self.check(request, f"prompt {number}")
                    new = self._new_batch(requests, list(joining))
                    unit = LENGTHS if running or self.runner.fixed else GROWTH  # if nothing runs, its cache becomes the batch's
                    fields_BF, known = self.prefill(new, requests, self._width(new), unit)
                    yield Iteration(fields_BF, dict(zip(joining, known, strict=True)))
                    inside |= joining
                    limit = max(map(self._end, inside.values())) + self.step.span
                    batch.merge(new, running, self.runner.length(limit), self.runner.fixed)
                    batch.resize(self.runner.size(batch.size, len(batch.rows)))
                    continue
                if not running:
                    return
                if (size := self.runner.size(len(running), len(batch.rows))) < batch.size:
                    batch.compact(running)
                    batch.resize(size)
                    running = {row: (place, start) for place, (row, (_, start)) in enumerate(running.items())}
                chooser = Chooser([request.sampling for request in inside.values()], [place for place, _ in running.values()])
                reach = max(start for _, start in running.values()) + self.step.drafts
                poll.restart()
            step += 1
            reach = min(reach + self.step.verified, limit)  # no token has a slot beyond this
            iteration = Iteration(self.runner.run(batch, chooser, self.runner.length(reach), self._width(batch)))
            if self.sync_interval > 1:
                finished = poll.finished(batch.live.done_B) - (batch.size - len(running))
                due = finished * self.sync_interval >= batch.size  # in a large batch, several rows are replaced together
            yield iteration

    def _to_reread(self, batch: Batch, ended: Mapping[int, tuple[Request, int, int]]) -> dict[int, Request]:
        """The rows that only ended because their text must be recomputed (longrope), as requests for the rest.

        ``ended``: the request of each row, its place in the batch and where its window begins.
        """
        unfinished: dict[int, Request] = {}
        for row, (request, place, start) in ended.items():
            if start + 1 == self._end(request) < self._final_length(request):
                text_S = batch.rows.text_BS[place, : start + 1]
                if not bool(torch.isin(text_S[-1], self.eos_ids)):
                    left = len(request.prompt) + request.max_new_tokens - len(text_S)
                    unfinished[row] = replace(request, prompt=text_S.tolist(), max_new_tokens=left)
        return unfinished

    def _new_batch(self, requests: Sequence[Request], numbers: Sequence[int]) -> Batch:
        """The rows of new requests before their first forward; ``numbers``: their row numbers."""
        B = len(requests)
        prompts = [torch.as_tensor(request.prompt, dtype=torch.long) for request in requests]
        length = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long, device=self.device)
        end = torch.tensor([self._end(request) for request in requests], dtype=torch.long, device=self.device)
        text = torch.zeros(B, max(map(self._end, requests), default=0) + self.width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            text[row, : len(prompt)] = prompt
        rows = Rows(
            ids_B=torch.tensor(numbers, dtype=torch.long, device=self.device),
            seed_B=torch.full_like(length, self.seed),
            options_BO=torch.tensor([r.sampling.options() for r in requests], device=self.device).view(B, OPTIONS),
            noise_seed_B=torch.tensor([r.sampling.seed for r in requests], dtype=torch.long, device=self.device),
            text_BS=text.to(self.device),
            start_B=length - 1,
            end_B=end,
            window_BW=torch.zeros(B, self.width, dtype=torch.long, device=self.device),
            useful_B=torch.full_like(length, self.width),
            stayed_BW=torch.zeros(B, self.width, dtype=torch.bool, device=self.device),
            held_B=torch.zeros_like(length),
            memory_BM=torch.full((B, self.guess.memory_size), -1, device=self.device),
            done_B=torch.zeros(B, dtype=torch.bool, device=self.device),
        )
        if B:
            rows.window_BW[:, :1] = rows.text_BS.gather(1, rows.start_B[:, None])
            self.step.fill(rows, torch.ones_like(length))
        return Batch(rows)

    def _width(self, batch: Batch) -> int:
        """How many leading tokens of the windows the next forward computes."""
        return batch.useful() if self.runner.narrows and self.sync_interval == 1 else self.width

    def _final_length(self, request: Request) -> int:
        """The greatest length of the request's text, prompt included."""
        end = len(request.prompt) + request.max_new_tokens
        return end if self.context is None else min(end, self.context)

    def _end(self, request: Request) -> int:
        """The first position that the request's row may not fill, at least not before its text is recomputed."""
        last, reread = self._final_length(request), self.reread_length
        return last if reread is None or len(request.prompt) >= reread else min(last, reread)

    def _store_prefix(self, batch: Batch, request: Request, place: int, start: int) -> None:
        """Put the text of a finished row, up to its window, into the prefix cache."""
        if self.prefixes.budget:
            self.prefixes.store(batch.cache, place, request.scope, batch.rows.text_BS[place, :start].tolist())

    def _check_drafts(self, drafts: int, adapter: Adapter | None, block_size: int, window: str) -> None:
        """Raise UsageError for an invalid number of draft tokens."""
        if not 0 <= drafts < (self.context or drafts + 1):
            raise UsageError(f"drafts must be between 0 and the context length {self.context} - 1, got {drafts}")
        if drafts and adapter is None:
            raise UsageError(f"drafts need an adapter, but the model has none; got drafts={drafts}")
        if drafts and window != "sliding":
            raise UsageError(f"window must be 'sliding' with a consistency adapter, got {window!r}")


def unpad(input_ids: torch.Tensor | Prompts, attention_mask: torch.Tensor | None = None) -> list[list[int]]:
    """A batch, padded on either side, as lists of token ids. Raises UsageError for tensors of the wrong shape."""
    if not isinstance(input_ids, torch.Tensor):
        return [[int(token) for token in prompt] for prompt in input_ids]
    if input_ids.dim() != 2:
        raise UsageError(f"input_ids must have shape [B, P], got {list(input_ids.shape)}")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise UsageError(f"attention_mask {list(attention_mask.shape)} does not fit input_ids {list(input_ids.shape)}")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, attention_mask.bool())]

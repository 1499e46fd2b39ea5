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
from cllm.decoding.draft import Guess
from cllm.decoding.guess import FreshGuess, make_guess
from cllm.decoding.prefill import Prefill
from cllm.decoding.prefixes import DEFAULT_BYTES, Prefixes
from cllm.decoding.result import Iteration, RowResult, Tally
from cllm.decoding.rows import Rows
from cllm.decoding.runner import Mode, make_runner
from cllm.decoding.sampling import GREEDY, OPTIONS, Chooser, Sampling, per_prompt
from cllm.decoding.step import Step
from cllm.decoding.trial import try_out
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
CUDA_SYNC_INTERVAL = 8  # iterations between two looks of the host at a GPU's state


class Streamer(Protocol):
    """What ``transformers.TextStreamer`` offers; ``put`` gets one or more token ids at a time."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """One prompt (token ids), how many tokens its response may have, and how they are chosen.

    Keys and values are reused among requests of one ``scope`` only; None: not at all.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    scope: str | None = ""


Feed = Callable[[list[int]], Sequence[Request]]  # numbers of the rows still running -> requests that join them, maybe none


class JacobiDecoder:
    """Jacobi decoding of any causal language model with full or sliding-window attention.

    ``block_size`` n: with ``window="sliding"`` the window holds the last verified token and n - 1 guesses, and slides on by
    what each iteration verifies; with ``window="block"`` (the paper's procedure) n guesses behind the verified text are
    iterated until nothing changes, then the next n follow. ``block_size=1`` with a sliding window is AR decoding.
    ``guess``: how new positions of the window are filled, see :func:`cllm.decoding.guess.make_guess`. Where every token of a
    forward costs time (CPU, not compiled), one covers only the part of the window that the guess holds to be worth it.
    By default both are what ``cllm tune`` stored in the checkpoint, else what it was trained with, else 16 and ``context``.
    ``adapter``: the consistency adapter that refines guesses, by default the one that is attached to the model
    (:func:`cllm.adapter.attach`); None for none. The text is the model's own, whatever the adapter says. It works on
    ``drafts`` guesses in each forward, by default as many as ``cllm tune`` stored for the width, else all of the window's; 0
    leaves it out. There may be more of them than the block_size - 1 guesses that the model verifies.
    ``compile``: how iterations are run, see :func:`cllm.decoding.runner.make_runner`. Captured ones point at the model's
    weights where they are now, so use a new decoder for a model that was moved.
    On an x86 CPU the model's linear layers are meanwhile computed by oneDNN, see :class:`cllm.decoding.linear.Linears`, and
    attention makes no copies of the cache, see :func:`cllm.decoding.grouped_attention.grouped_attention`.
    Where rotary frequencies depend on the length of a text, each token has those of AR decoding, see
    :class:`cllm.decoding.rotary.Rotary`.
    ``prefill_chunk``: how many tokens of each prompt go through the model together, to bound the memory and what a mask hides
    in vain; by default 512 on a CPU, else 2,048. The forwards of a long prompt count as one.
    ``prefix_cache``: how many bytes of keys and values are kept beside those of the rows being decoded, by default 1 GiB. A
    prompt that starts like an earlier one, or like that one with its response, is computed from where the two part; so are
    prompts that are prefilled together. 0: every prompt is computed as a whole. See :mod:`cllm.decoding.prefixes`.

    Raises UsageError for a block size below 1 or beyond the model's context, for an unknown guess and for a way of compiling
    that there is not, UnsupportedModelError for models that :func:`cllm.attention.check_model` or
    :func:`cllm.decoding.trial.try_out` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        window: Window = "sliding",
        guess: str | Guess | FreshGuess | None = None,
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
        try_out(self.step)
        self.prefixes = Prefixes(0 if self.step.rotary else prefix_cache)  # there, keys depend on the rest of the prompt
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
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        scope: str | None = "",
    ) -> Iterator[Iteration]:
        """One :class:`Iteration` per forward, until every row of this one batch is finished. ``scope``: see :class:`Request`.

        Raises UsageError for an empty prompt, one that leaves no room in the model's context, or a sampling too few.
        """
        samplings = per_prompt(sampling, len(prompts))
        waiting = [Request(prompt, max_new_tokens, of, scope) for prompt, of in zip(prompts, samplings, strict=True)]

        def feed(running: list[int]) -> list[Request]:
            batch, waiting[:] = waiting[:], []
            return batch

        return self.flow(feed)

    @torch.inference_mode()
    def flow(self, feed: Feed, unwanted: Collection[int] = ()) -> Iterator[Iteration]:
        """The loop itself, with rows that come and go: one :class:`Iteration` per forward, until no row is left.

        Whenever the host looks at the rows (after every iteration on a CPU, every few on a GPU), ``feed`` is asked for
        requests to take in. Those are prefilled together, as an iteration of their own, and then join the others. Rows
        whose numbers stand in ``unwanted``, which the caller may fill meanwhile, end before ``feed`` is asked.
        Raises UsageError for an empty prompt, or one that leaves no room in the model's context.
        """
        with evaluating(self.model):
            self.step.linears.refresh(self.step.adapter)
            self.prefixes.expect(self.model, self.step.linears.changes)
            with self.runner.batch(self._start([], []).rows) as batch:
                yield from self._loop(feed, unwanted, batch)

    def narrower(self) -> JacobiDecoder:
        """A decoder that writes the same texts with half the window and half the draft tokens, in less memory."""
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
        """Raise UsageError, calling the prompt ``name``, where a request cannot be decoded."""
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

    def _loop(self, feed: Feed, unwanted: Collection[int], batch: Batch) -> Iterator[Iteration]:
        inside: dict[int, Request] = {}  # by their rows
        fed = step = reach = most = 0
        while True:
            if step % self.sync_interval == 0:
                if unwanted:
                    batch.drop(unwanted)
                running, places = batch.look()
                ended = {row: (inside[row], *places[row]) for row in inside.keys() & places.keys()}
                for text in ended.values():
                    self._keep(batch, *text)
                joining = self._reread(batch, {row: text for row, text in ended.items() if row not in unwanted})
                inside = {row: inside[row] for row in running}
                if not joining:
                    joining = dict(enumerate(feed(list(inside)), fed))
                    fed += len(joining)
                if joining:
                    requests = list(joining.values())
                    for number, request in joining.items():
                        self.check(request, f"prompt {number}")
                    new = self._start(requests, list(joining))
                    unit = LENGTHS if running or self.runner.fixed else GROWTH  # where nothing runs, its cache is the batch's
                    facts_BF, known = self.prefill(new, requests, self._width(new), unit)
                    yield Iteration(facts_BF, dict(zip(joining, known, strict=True)))
                    inside |= joining
                    most = max(map(self._end, inside.values())) + self.step.span
                    batch.put(new, running, self.runner.length(most), self.runner.fixed)
                    batch.resize(self.runner.size(batch.size, len(batch.rows)))
                    continue
                if not running:
                    return
                if (size := self.runner.size(len(running), len(batch.rows))) < batch.size:
                    batch.keep(running)
                    batch.resize(size)
                    running = {row: (place, start) for place, (row, (_, start)) in enumerate(running.items())}
                chooser = Chooser([request.sampling for request in inside.values()], [place for place, _ in running.values()])
                reach = max(start for _, start in running.values()) + self.step.drafts
            step += 1
            reach = min(reach + self.step.verified, most)  # no row's tokens stand beyond this
            yield Iteration(self.runner.run(batch, chooser, self.runner.length(reach), self._width(batch)))

    def _reread(self, batch: Batch, ended: Mapping[int, tuple[Request, int, int]]) -> dict[int, Request]:
        """Of the rows that have ended, those that go on after the model has read their text again, with what is left to do.

        ``ended``: the request of each row, its place in the batch and where its window begins.
        """
        going_on: dict[int, Request] = {}
        for row, (request, place, start) in ended.items():
            if start + 1 == self._end(request) < self._last(request):
                text_S = batch.rows.text_BS[place, : start + 1]
                if not bool(torch.isin(text_S[-1], self.eos_ids)):
                    left = len(request.prompt) + request.max_new_tokens - len(text_S)
                    going_on[row] = replace(request, prompt=text_S.tolist(), max_new_tokens=left)
        return going_on

    def _start(self, requests: Sequence[Request], numbers: Sequence[int]) -> Batch:
        """Rows of these numbers before their first forward."""
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
        """How many tokens of each window go through the model."""
        return batch.useful() if self.runner.narrows and self.sync_interval == 1 else self.width

    def _last(self, request: Request) -> int:
        """How long the text of a request may become."""
        end = len(request.prompt) + request.max_new_tokens
        return end if self.context is None else min(end, self.context)

    def _end(self, request: Request) -> int:
        """The first position that a request's row may not fill, or not before its text is read again."""
        last, reread = self._last(request), self.reread_length
        return last if reread is None or len(request.prompt) >= reread else min(last, reread)

    def _keep(self, batch: Batch, request: Request, place: int, start: int) -> None:
        """Let later prompts start from the text of a row that has ended, up to where its window begins."""
        if self.prefixes.budget:
            self.prefixes.store(batch.cache, place, request.scope, batch.rows.text_BS[place, :start].tolist())

    def _check_drafts(self, drafts: int, adapter: Adapter | None, block_size: int, window: str) -> None:
        """Raise UsageError for a number of draft tokens that cannot be."""
        if not 0 <= drafts < (self.context or drafts + 1):
            raise UsageError(f"drafts must be between 0 and the context length {self.context} - 1, got {drafts}")
        if drafts and adapter is None:
            raise UsageError(f"drafts need an adapter, and the model has none, got drafts={drafts}")
        if drafts and window != "sliding":
            raise UsageError(f"window must be 'sliding' with a consistency adapter, got {window!r}")


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

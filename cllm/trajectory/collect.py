"""Collecting trajectories: prompts in, stored rows out, each of them whole or not there at all.

Which rows exist and what they hold depends on the settings and the prompts only, never on interruptions or on how many
processes share the work: the examples are dealt out to them one by one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding import JacobiDecoder, Queue, Request
from cllm.decoding.guess import STARTS
from cllm.decoding.prefix_cache import DEFAULT_BYTES
from cllm.errors import UsageError
from cllm.models import DEFAULT_GUESS, packed_length, stop_token_ids
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.trajectory.hygiene import Seen, augment, degenerate
from cllm.trajectory.record import Dropped, TrajectoryRow
from cllm.trajectory.states import States, block_starts, jacobi_states
from cllm.trajectory.store import TrajectoryWriter

STATE_TOKENS = 1024  # response tokens whose states are iterated together; bounds the logits


@dataclass(frozen=True)
class CollectionSettings:
    """What the stored rows depend on. Stored beside them, and compared when a collection is resumed."""

    model: str
    task: str
    prompt_template: str
    block_size: int
    max_new_seq_len: int
    guess: str = DEFAULT_GUESS  # what trajectories start from
    use_aug: bool = False
    use_labels: bool = False
    responses_only: bool = False  # each trajectory holds its fixed point only
    aligned: bool = False  # every first block starts at 0, as in the published form; otherwise its start is drawn per row
    seed: int = 0
    dtype: str = "float32"
    vocab_size: int = 0
    vocabulary: str = ""  # cllm.models.vocabulary_stamp of the tokenizer
    weights: str | None = None  # cllm.models.weights_stamp of the model
    source: str = ""  # name of the data's file or folder, since row ids are of one file only; "" for the hub dataset
    source_rows: str | None = None  # fingerprint of the rows in it; None for the hub dataset
    task_options: Mapping[str, Any] = field(default_factory=dict)  # what Task.settings says of the task's own options

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block size (--max_new_tokens) must be >= 1, got {self.block_size}")
        if self.guess not in STARTS:
            raise UsageError(f"unknown starting guess {self.guess!r}; choose from {', '.join(STARTS)}")
        if self.responses_only and self.use_aug:
            raise UsageError("use_aug adds to the states of trajectories, and responses_only stores none; leave out one")
        if self.max_new_seq_len < self.block_size:
            raise UsageError(f"max_new_seq_len must be at least the block size {self.block_size}, got {self.max_new_seq_len}")

    def as_dict(self) -> dict[str, Any]:
        """JSON values. Options that older collections did not have are there only where they are used."""
        later = {"task_options": {}, "guess": DEFAULT_GUESS, "responses_only": False}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class Prompt:
    """An example as tokens."""

    row_id: str
    ids: list[int]
    label_ids: list[int] | None


Response = tuple[Prompt, list[int]]  # with the token ids of the response


class Collector:
    """Turns prompts into trajectory rows with one model. ``prefix_cache``: of its decoder.

    Raises UsageError for a block size beyond the model's context, UnsupportedModelError for a model that cannot be decoded
    by Jacobi iteration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: CollectionSettings,
        prefix_cache: int = DEFAULT_BYTES,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = PromptTemplate(settings.prompt_template)
        context = packed_length(model.config)
        if context is not None and settings.block_size >= context:
            raise UsageError(f"block size must be below the model's context of {context}, got {settings.block_size}")
        self.context = context
        # AR decoding of a batch: an untrained model accepts too few guesses to pay for a wider window.
        stops = stop_token_ids(model, tokenizer, self.template)
        self.decoder = JacobiDecoder(model, block_size=1, eos_token_ids=stops, prefix_cache=prefix_cache)

    def run(
        self,
        examples: Iterable[Example],
        writer: TrajectoryWriter,
        *,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> Iterator[int]:
        """Collect this process's share, storing as responses finish; yields how many examples each step covered."""
        dropped: list[Dropped] = []
        done = 0

        def prompts() -> Iterator[Prompt]:
            nonlocal done
            seen = Seen()
            for number, example in enumerate(examples):
                item = self._encode(example, seen)
                if number % processes != rank:
                    continue
                if item.row_id in writer.done_ids:
                    done += 1
                elif isinstance(item, Prompt):
                    yield item
                else:
                    dropped.append(item)

        for responses in self.respond(prompts(), batch_size):
            rows, poor = self.rows(responses)
            writer.write(rows, dropped + poor)
            yield done + len(dropped) + len(responses)
            done = 0
            dropped.clear()
        writer.write([], dropped)
        yield done + len(dropped)

    def respond(self, prompts: Iterable[Prompt], batch_size: int) -> Iterator[list[Response]]:
        """Fixed points: the model's greedy responses, by continuous batching, in lists of ``batch_size`` as they finish."""
        asked: dict[int, Prompt] = {}

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                asked[number] = prompt
                yield Request(prompt.ids, self.settings.max_new_seq_len)

        finished: list[Response] = []
        for number, result in Queue(self.decoder, batch_size).run(requests()):
            finished.append((asked.pop(number), result.token_ids))
            if len(finished) == batch_size:
                yield finished
                finished = []
        if finished:
            yield finished

    def rows(self, responses: list[Response]) -> tuple[list[TrajectoryRow], list[Dropped]]:
        """Hygiene, then the states of all blocks, or with ``responses_only`` the last ones."""
        good, dropped = [], []
        for prompt, ids in responses:
            reason = "empty response" if len(ids) < 2 else degenerate(ids)
            if self.context is not None and len(prompt.ids) + len(ids) > self.context:
                reason = "longer than what can be packed"
            if reason:
                dropped.append(Dropped(prompt.row_id, reason))
            else:
                good.append((prompt, ids))
        rows = []
        for part in _parts(good):
            rows += self._with_states(part)
        return rows, dropped

    def _with_states(self, part: list[Response]) -> list[TrajectoryRow]:
        settings = self.settings
        starts = []
        for prompt, response in part:
            first = 0 if settings.aligned else draw(settings.seed, prompt.row_id, "start") % settings.block_size
            starts.append(block_starts(len(response), settings.block_size, first))
        states = _fixed_points(part, starts) if settings.responses_only else self._states(part, starts)
        rows = []
        for (prompt, response), offsets, blocks in zip(part, starts, states):
            rng = random.Random(draw(settings.seed, prompt.row_id, "augment"))
            augmented = [augment(block, rng) for block in blocks] if settings.use_aug else []
            rows.append(TrajectoryRow(prompt.row_id, prompt.ids, response, offsets, blocks, augmented, prompt.label_ids))
        return rows

    def _states(self, part: list[Response], starts: list[list[int]]) -> list[list[States]]:
        return jacobi_states(
            self.model,
            [prompt.ids for prompt, _ in part],
            [response for _, response in part],
            starts,
            seeds=[draw(self.settings.seed, prompt.row_id, "guess") for prompt, _ in part],
            guess=STARTS[self.settings.guess](self.model.config.get_text_config(decoder=True).vocab_size),
        )

    def _encode(self, example: Example, seen: Seen) -> Prompt | Dropped:
        try:
            ids = self.template.encode(example.messages, self.tokenizer)
        except UsageError:
            return Dropped(example.id, "refused by the chat template")
        if not ids:
            return Dropped(example.id, "empty prompt")
        if self.context is not None and len(ids) >= self.context:
            return Dropped(example.id, "prompt longer than the context")
        if not seen.add(ids):
            return Dropped(example.id, "duplicate prompt")
        labels = None
        if self.settings.use_labels:
            if example.reference is None:
                return Dropped(example.id, "no reference answer")
            labels = self.tokenizer(example.reference, add_special_tokens=False).input_ids
            labels = [*labels, self.template.end_id(self.tokenizer)]
        return Prompt(example.id, ids, labels)


def _fixed_points(part: list[Response], starts: list[list[int]]) -> list[list[States]]:
    """Of every block the last state alone."""
    return [
        [[response[start:end]] for start, end in pairwise([*offsets, len(response)])]
        for (_, response), offsets in zip(part, starts, strict=True)
    ]


def _parts(good: list[Response]) -> Iterator[list[Response]]:
    """Cut into parts of at most STATE_TOKENS response tokens (or one response), similar lengths together."""
    part: list[Response] = []
    for item in sorted(good, key=lambda item: len(item[1]), reverse=True):
        if part and (len(part) + 1) * len(part[0][1]) > STATE_TOKENS:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def draw(seed: int, row_id: str, use: str) -> int:
    """A number that depends on nothing but its arguments."""
    return zlib.crc32(f"{seed} {use} {row_id}".encode())

"""Collecting trajectories: prompts in, stored rows out, in batches that are each finished or not there at all.

Which rows exist and what they hold depends on the settings and the prompts only, never on interruptions or on how many
processes share the work: batches are cut from the whole stream in a fixed order and each goes to one process.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.models import context_length, stop_token_ids
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.trajectory.hygiene import Seen, augment, degenerate
from cllm.trajectory.record import Dropped, TrajectoryRow
from cllm.trajectory.states import block_starts, jacobi_states
from cllm.trajectory.store import TrajectoryWriter

BUFFER_BATCHES = 32  # batches whose prompts are sorted by length together; bounds memory
STATE_TOKENS = 1024  # response tokens whose states are iterated together; bounds the logits


@dataclass(frozen=True)
class CollectionSettings:
    """What the stored rows depend on. Stored beside them, and compared when a collection is resumed."""

    model: str
    task: str
    prompt_template: str
    block_size: int
    max_new_seq_len: int
    use_aug: bool = False
    use_labels: bool = False
    aligned: bool = False  # every first block starts at 0, as in the published form; otherwise its start is drawn per row
    seed: int = 0
    dtype: str = "float32"
    vocab_size: int = 0
    source: str = ""  # name of the data's file or folder, since row ids are of one file only; "" for the hub dataset
    task_options: Mapping[str, Any] = field(default_factory=dict)  # what Task.settings says of the task's own options

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block size (--max_new_tokens) must be >= 1, got {self.block_size}")
        if self.max_new_seq_len < self.block_size:
            raise UsageError(
                f"max_new_seq_len must be at least the block size {self.block_size}, got {self.max_new_seq_len}"
            )

    def as_dict(self) -> dict[str, Any]:
        settings = asdict(self)
        if not self.task_options:
            del settings["task_options"]
        return settings


@dataclass(frozen=True)
class Prompt:
    """An example as tokens."""

    row_id: str
    ids: list[int]
    label_ids: list[int] | None


@dataclass
class Batch:
    """What one step stores: rows to be made, and examples that give none."""

    prompts: list[Prompt] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


class Collector:
    """Turns prompts into trajectory rows with one model.

    Raises UsageError for a block size beyond the model's context, UnsupportedModelError for a model that cannot be decoded
    by Jacobi iteration.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: CollectionSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = PromptTemplate(settings.prompt_template)
        context = context_length(model.config)
        if context is not None and settings.block_size >= context:
            raise UsageError(f"block size must be below the model's context of {context}, got {settings.block_size}")
        self.context = context
        # AR decoding of a batch: an untrained model accepts too few guesses to pay for a wider window.
        self.decoder = JacobiDecoder(model, block_size=1, eos_token_ids=stop_token_ids(model, tokenizer, self.template))

    def run(
        self,
        examples: Iterable[Example],
        writer: TrajectoryWriter,
        *,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> Iterator[int]:
        """Collect this process's share, storing batch after batch; yields how many examples each batch covered."""
        for number, batch in enumerate(self.batches(examples, batch_size)):
            if number % processes != rank:
                continue
            size = len(batch.prompts) + len(batch.dropped)
            prompts = [p for p in batch.prompts if p.row_id not in writer.done_ids]
            dropped = [d for d in batch.dropped if d.row_id not in writer.done_ids]
            rows, poor = self.rows(prompts) if prompts else ([], [])
            writer.write(rows, dropped + poor)
            yield size

    def batches(self, examples: Iterable[Example], batch_size: int) -> Iterator[Batch]:
        """Batches of prompts of similar length, in an order that depends on the examples only."""
        stream, seen = iter(examples), Seen()
        while buffer := list(islice(stream, batch_size * BUFFER_BATCHES)):
            prompts: list[Prompt] = []
            dropped: list[Dropped] = []
            for example in buffer:
                item = self._encode(example, seen)
                if isinstance(item, Prompt):
                    prompts.append(item)
                else:
                    dropped.append(item)
            prompts.sort(key=lambda prompt: len(prompt.ids))
            yield from (Batch(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size))
            if dropped:
                yield Batch(dropped=dropped)

    def rows(self, prompts: list[Prompt]) -> tuple[list[TrajectoryRow], list[Dropped]]:
        """Fixed points by greedy decoding, hygiene, then the states of all blocks."""
        results = self.decoder.generate([p.ids for p in prompts], max_new_tokens=self.settings.max_new_seq_len)
        good, dropped = [], []
        for prompt, result in zip(prompts, results):
            reason = "empty response" if len(result.token_ids) < 2 else degenerate(result.token_ids)
            if reason:
                dropped.append(Dropped(prompt.row_id, reason))
            else:
                good.append((prompt, result.token_ids))
        rows = []
        for part in _parts(good):
            rows += self._with_states(part)
        return rows, dropped

    def _with_states(self, part: list[tuple[Prompt, list[int]]]) -> list[TrajectoryRow]:
        settings = self.settings
        starts = []
        for prompt, response in part:
            first = 0 if settings.aligned else draw(settings.seed, prompt.row_id, "start") % settings.block_size
            starts.append(block_starts(len(response), settings.block_size, first))
        states = jacobi_states(
            self.model,
            [prompt.ids for prompt, _ in part],
            [response for _, response in part],
            starts,
            seeds=[draw(settings.seed, prompt.row_id, "guess") for prompt, _ in part],
        )
        rows = []
        for (prompt, response), offsets, blocks in zip(part, starts, states):
            rng = random.Random(draw(settings.seed, prompt.row_id, "augment"))
            augmented = [augment(block, rng) for block in blocks] if settings.use_aug else []
            rows.append(
                TrajectoryRow(prompt.row_id, prompt.ids, response, offsets, blocks, augmented, prompt.label_ids)
            )
        return rows

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
            labels = [*labels, self.tokenizer.eos_token_id]
        return Prompt(example.id, ids, labels)


def _parts(good: list[tuple[Prompt, list[int]]]) -> Iterator[list[tuple[Prompt, list[int]]]]:
    """Cut into parts of at most STATE_TOKENS response tokens (or one response), similar lengths together."""
    part: list[tuple[Prompt, list[int]]] = []
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

"""Collecting trajectories: prompts in, stored rows out.

The rows depend only on the settings and the prompts, never on interruptions or the number of processes, which take the
examples round-robin.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding import JacobiDecoder, Queue, Request
from cllm.decoding.guess import STARTS
from cllm.decoding.prefix_cache import DEFAULT_BYTES
from cllm.errors import UsageError
from cllm.models import DEFAULT_GUESS, embedding_count, packed_length, stop_token_ids
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.trajectory.departures import Departure, departures
from cllm.trajectory.hygiene import Seen, augment, cut_at_eos, degenerate
from cllm.trajectory.record import Dropped, TrajectoryRow
from cllm.trajectory.states import States, block_starts, jacobi_states
from cllm.trajectory.store import TrajectoryWriter

T = TypeVar("T")
STATE_TOKENS = 1024  # response tokens iterated together; bounds the memory for logits


@dataclass(frozen=True)
class CollectionSettings:
    """What the rows depend on. Stored with them, and compared when a collection resumes.

    ``block_size`` and ``max_new_seq_len`` are in tokens. Raises UsageError for values that are not allowed or do not fit
    together.
    """

    model: str
    task: str
    prompt_template: str
    block_size: int
    max_new_seq_len: int
    guess: str = DEFAULT_GUESS  # the strategy that draws the starts of trajectories
    use_aug: bool = False  # store augmented states, see cllm.trajectory.hygiene.augment
    use_labels: bool = False  # store the dataset's answers
    responses_only: bool = False  # store only the fixed point of each trajectory
    aligned: bool = False  # blocks start at multiples of the block size, as in the published form; else at a random offset per row
    seed: int = 0
    dtype: str = "float32"
    vocab_size: int = 0
    vocabulary: str = ""  # cllm.models.vocabulary_stamp of the tokenizer
    weights: str | None = None  # cllm.models.weights_stamp of the model
    responses: str = ""  # whose they are: "" for our engine's, "vllm", "server", or the name of their file
    source: str = ""  # name of the data's file or folder, since row ids are unique only within it; "" for the hub dataset
    source_rows: str | None = None  # fingerprint of its rows; None for the hub dataset
    task_options: Mapping[str, Any] = field(default_factory=dict)  # Task.settings: the task's own options

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block size (--max_new_tokens) must be >= 1, got {self.block_size}")
        if self.guess not in STARTS:
            raise UsageError(f"unknown starting guess {self.guess!r}; choose from {', '.join(STARTS)}")
        if self.responses_only and self.use_aug:
            raise UsageError("use_aug augments states, and responses_only stores none; leave out one of them")
        if self.max_new_seq_len < self.block_size:
            raise UsageError(f"max_new_seq_len must be at least the block size {self.block_size}, got {self.max_new_seq_len}")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values. Options that older collections lack appear only with a value other than the default."""
        later = {"task_options": {}, "guess": DEFAULT_GUESS, "responses_only": False, "responses": ""}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class Prompt:
    """An example as tokens."""

    row_id: str
    ids: list[int]
    label_ids: list[int] | None


Response = tuple[Prompt, list[int]]  # a prompt and the token ids of its response


class Source(Protocol):
    """Whatever answers prompts: our engine, another one, a server, a file."""

    def respond(self, prompts: Iterable[Prompt], together: int) -> Iterator[Response | Dropped]:
        """The model's greedy responses in any order, as many prompts being answered together. Prompts are read as needed."""
        ...


class OwnEngine:
    """The responses of a model here, by AR decoding and continuous batching: an untrained model accepts too few guesses to
    pay for a wider window. ``prefix_cache``: of the decoder."""

    def __init__(self, model: PreTrainedModel, stops: Sequence[int], max_new_tokens: int, prefix_cache: int = DEFAULT_BYTES) -> None:
        self.max_new_tokens = max_new_tokens
        self.decoder = JacobiDecoder(model, block_size=1, eos_token_ids=stops, prefix_cache=prefix_cache)

    def respond(self, prompts: Iterable[Prompt], together: int) -> Iterator[Response | Dropped]:
        asked: dict[int, Prompt] = {}

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                asked[number] = prompt
                yield Request(prompt.ids, self.max_new_tokens)

        for number, result in Queue(self.decoder, together).run(requests()):
            yield asked.pop(number), result.token_ids


class Collector:
    """Turns prompts into trajectory rows with one model.

    ``prefix_cache`` is the decoder's budget for prefix reuse, in bytes. ``source``: where the responses come from, by default
    the model itself. Those of another source are cut where the model would have stopped, and compared with what it would have
    written: :attr:`compared`, :attr:`departures`.

    Raises UsageError for a block size beyond the model's context, UnsupportedModelError for a model that cannot decode by
    Jacobi iteration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: CollectionSettings,
        prefix_cache: int = DEFAULT_BYTES,
        source: Source | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = PromptTemplate(settings.prompt_template)
        context = packed_length(model.config)
        if context is not None and settings.block_size >= context:
            raise UsageError(f"block size must be below the model's context of {context}, got {settings.block_size}")
        self.context = context
        self.stops = stop_token_ids(model, tokenizer, self.template)
        self.foreign = source is not None
        self.source = source or OwnEngine(model, self.stops, settings.max_new_seq_len, prefix_cache)
        self.vocabulary = embedding_count(model)
        self.compared = 0  # responses of another source
        self.departures: dict[str, Departure] = {}  # those that are not the model's greedy ones, by row id

    def run(
        self,
        examples: Iterable[Example],
        writer: TrajectoryWriter,
        *,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> Iterator[int]:
        """Collect this process's share of ``examples`` and store rows as responses finish.

        Yields, step by step, the number of examples done, including dropped and already stored ones.
        """
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

        for answers in batched(self.source.respond(prompts(), batch_size), batch_size):
            rows, rejected = self.rows([answer for answer in answers if not isinstance(answer, Dropped)])
            dropped += [answer for answer in answers if isinstance(answer, Dropped)]
            writer.write(rows, dropped + rejected)
            yield done + len(dropped) + len(rows) + len(rejected)
            done = 0
            dropped.clear()
        writer.write([], dropped)
        yield done + len(dropped)

    def rows(self, responses: list[Response]) -> tuple[list[TrajectoryRow], list[Dropped]]:
        """The rows of responses worth keeping, with the states of all their blocks, and the responses dropped."""
        good, dropped = [], []
        for prompt, ids in responses:
            if self.foreign:
                ids = cut_at_eos(ids, self.stops)[: self.settings.max_new_seq_len]
            reason = "empty response" if len(ids) < 2 else degenerate(ids)
            if not all(0 <= token < self.vocabulary for token in ids):
                reason = "tokens that the model does not have"
            if self.context is not None and len(prompt.ids) + len(ids) > self.context:
                reason = "too long to pack"
            if reason:
                dropped.append(Dropped(prompt.row_id, reason))
            else:
                good.append((prompt, ids))
        rows = []
        for part in _token_batches(good):
            if self.foreign:
                self._compare(part)
            rows += self._with_states(part)
        return rows, dropped

    def _compare(self, part: list[Response]) -> None:
        found = departures(self.model, [prompt.ids for prompt, _ in part], [response for _, response in part])
        self.compared += len(part)
        self.departures |= {prompt.row_id: departure for (prompt, _), departure in zip(part, found) if departure is not None}

    def _with_states(self, part: list[Response]) -> list[TrajectoryRow]:
        settings = self.settings
        starts = []
        for prompt, response in part:
            first = 0 if settings.aligned else derived_seed(settings.seed, prompt.row_id, "start") % settings.block_size
            starts.append(block_starts(len(response), settings.block_size, first))
        states = _fixed_points(part, starts) if settings.responses_only else self._states(part, starts)
        rows = []
        for (prompt, response), offsets, blocks in zip(part, starts, states):
            rng = random.Random(derived_seed(settings.seed, prompt.row_id, "augment"))
            augmented = [augment(block, rng) for block in blocks] if settings.use_aug else []
            rows.append(TrajectoryRow(prompt.row_id, prompt.ids, response, offsets, blocks, augmented, prompt.label_ids))
        return rows

    def _states(self, part: list[Response], starts: list[list[int]]) -> list[list[States]]:
        return jacobi_states(
            self.model,
            [prompt.ids for prompt, _ in part],
            [response for _, response in part],
            starts,
            seeds=[derived_seed(self.settings.seed, prompt.row_id, "guess") for prompt, _ in part],
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
    """Trajectories that hold only the fixed point of each block."""
    return [
        [[response[start:end]] for start, end in pairwise([*offsets, len(response)])]
        for (_, response), offsets in zip(part, starts, strict=True)
    ]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, and of what is left at the end."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _token_batches(good: list[Response]) -> Iterator[list[Response]]:
    """Batches of similar length with at most STATE_TOKENS padded response tokens, or one response."""
    batch: list[Response] = []
    for item in sorted(good, key=lambda item: len(item[1]), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0][1]) > STATE_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def derived_seed(seed: int, row_id: str, use: str) -> int:
    """A 32-bit seed for one use of a row's randomness; a pure function of its arguments."""
    return zlib.crc32(f"{seed} {use} {row_id}".encode())

"""Training examples for a consistency adapter: clean texts and the blocks it learns to draft from.

Shapes: B texts, C longest clean text, T longest run of blocks, M tokens in the loss, D distinct teacher tokens; the clean texts
in G rows of L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cllm.attention import LENGTHS, round_up
from cllm.decoding.guess import FreshGuess
from cllm.packing import Block, PackedRow, Place, pack, pack_alike
from cllm.training.examples import ExampleDataset, StateSampling, first_wrong, layout_fields
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryDataset

CLEAN_TEXT = "clean_"  # the names of the clean texts' fields in a batch begin with this


@dataclass(frozen=True)
class DraftExample:
    """Clean text and whole blocks: as in decoding, the leading right guesses are draft tokens as well."""

    row: PackedRow
    first_wrong: list[int]  # per block, the offset of its first wrong guess


class DraftDataset(ExampleDataset):
    """Draft examples over stored responses. What is drawn depends only on seed, ``epoch`` and row.

    A response is cut ``states_per_block`` times into blocks of random lengths up to ``block_size``, which ``guess`` fills. Stored
    states are not read: they make no faster adapter (docs/training.md).
    """

    def __init__(
        self,
        rows: TrajectoryDataset | Sequence[TrajectoryRow],
        block_size: int,
        states_per_block: int,
        guess: FreshGuess,
        seed: int = 0,
        context: int | None = None,
    ) -> None:
        super().__init__(rows, StateSampling(states_per_block=states_per_block), seed, context)
        self.block_size, self.guess = block_size, guess

    def build(self, row: TrajectoryRow, rng: random.Random) -> DraftExample:
        """Cut the response but for its last token, which predicts nothing. Blocks that hold right guesses alone are left out."""
        text, blocks, wrong = [*row.prompt_ids, *row.response_ids[:-1]], [], []
        for block in self._cut(text, len(row.prompt_ids), rng):
            offset = first_wrong(block.tokens, text[block.start : block.start + len(block.tokens)])
            if offset < len(block.tokens):
                blocks.append(block)
                wrong.append(offset)
        if not blocks:  # nothing to learn; one right guess keeps the batch's shape valid
            blocks, wrong = [Block(len(row.prompt_ids), row.response_ids[:1])], [1]
        return DraftExample(PackedRow(text, blocks), wrong)

    def _cut(self, text: list[int], first: int, rng: random.Random) -> Iterator[Block]:
        """Blocks of guesses for the text from position ``first`` on, which they cover once for each state."""
        text_S = torch.tensor(text)
        for _ in range(self.sampling.states_per_block):
            end = first
            while end < len(text):
                start, end = end, min(len(text), end + rng.randint(1, self.block_size))
                seed = rng.getrandbits(32)
                tokens_BK = self.guess(text_S[None], torch.tensor([start]), torch.arange(start, end)[None], torch.tensor([seed]))
                yield Block(start, tokens_BK[0].tolist())


@dataclass(frozen=True)
class DraftCollator:
    """Collates examples for :class:`cllm.training.lossless.LosslessTrainer`."""

    pad_token_id: int

    def __call__(self, examples: Sequence[DraftExample]) -> dict[str, torch.Tensor]:
        """Two packed batches with the fields of :func:`cllm.training.examples.layout_fields`.

        The clean texts [G, L] share beginnings that they have in common; their fields begin with CLEAN_TEXT, and ``clean_place``
        [B, C, 2] has the row and column of each text's tokens. The blocks are ``input_ids`` [B, T]. Their layout [B, C + T] has
        C columns more, since they see each text's keys and values before their own.

        The loss reads ``student`` [M, 2], row and column of ``input_ids``, block by block in order. ``distance`` [M]: tokens
        from the block's first wrong guess. ``teacher`` [D, 2]: row and column of the clean tokens to learn from, without
        duplicates; ``teacher_row`` [M] says which of them each student token learns from.
        """
        texts = [example.row.clean for example in examples]
        clean_ids, clean_layout, clean_places = pack_alike(texts, self.pad_token_id, LENGTHS)
        C = round_up(max(map(len, texts)))
        places = [
            Place(index, [*range(len(row.clean)), *range(C, C + len(row) - len(row.clean))])
            for index, row in enumerate(example.row for example in examples)
        ]
        ids, layout = pack([example.row for example in examples], self.pad_token_id, places, LENGTHS)
        student, distance, teacher_row = [], [], []
        teacher: dict[tuple[int, int], int] = {}
        for index, (example, clean) in enumerate(zip(examples, clean_places, strict=True)):
            first = len(example.row.clean)
            for block, offset, wrong in zip(example.row.blocks, example.row.offsets(), example.first_wrong, strict=True):
                for order in range(wrong, len(block.tokens)):
                    student.append((index, offset - first + order))
                    distance.append(order - wrong)
                    read = (clean.row, clean.columns[block.start + order])
                    teacher_row.append(teacher.setdefault(read, len(teacher)))
        return {
            **layout_fields(ids[:, C:], layout),
            **layout_fields(clean_ids, clean_layout, CLEAN_TEXT),
            "clean_place": _integers([_padded(place, C) for place in clean_places]),
            "student": _integers(student).reshape(-1, 2),
            "distance": _integers(distance),
            "teacher": _integers(list(teacher)).reshape(-1, 2),
            "teacher_row": _integers(teacher_row),
        }


def _padded(place: Place, length: int) -> list[tuple[int, int]]:
    """Row and column of each token of a text, the last one repeated up to ``length``."""
    return [(place.row, place.columns[min(at, len(place.columns) - 1)]) for at in range(length)]


def _integers(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)

"""From stored responses to the blocks that a consistency adapter learns to draft from.

Shapes: B texts, C longest clean text, T longest run of blocks, M tokens that the loss is taken at, D teacher's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cllm.attention import LENGTHS, round_up
from cllm.decoding.guess import FreshGuess
from cllm.packing import Block, PackedRow, Place, pack
from cllm.training.examples import ExampleDataset, Sampling, State, draw_states, first_wrong, laid_out
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryDataset


@dataclass(frozen=True)
class DraftExample:
    """Clean text and blocks, the right guesses at their front included, as draft tokens have them in decoding."""

    row: PackedRow
    wrong: list[int]  # of every block, the place of its first wrong guess


class DraftDataset(ExampleDataset):
    """Blocks over stored responses. What is drawn depends on seed, ``epoch`` and row only.

    ``guess``: what a block starts from whose trajectory holds its fixed point only.
    """

    def __init__(
        self, rows: TrajectoryDataset, states_per_block: int, guess: FreshGuess, seed: int = 0, context: int | None = None
    ) -> None:
        super().__init__(rows, Sampling(states_per_block=states_per_block), seed, context)
        self.guess = guess

    def build(self, row: TrajectoryRow, rng: random.Random) -> DraftExample:
        """Draw states of every block. The response's last token predicts nothing and is left out."""
        prompt, last = row.prompt_ids, len(row.response_ids) - 1
        blocks, wrong = [], []
        for start, state, _, fixed in draw_states(self._started(row, rng), rng, self.sampling):
            tokens, place = state[: last - start], first_wrong(state, fixed)
            if place < len(tokens):
                blocks.append(Block(len(prompt) + start, tokens))
                wrong.append(place)
        if not blocks:  # nothing to learn; a right guess gives the forward something to do
            blocks, wrong = [Block(len(prompt), row.response_ids[:1])], [1]
        return DraftExample(PackedRow([*prompt, *row.response_ids[:last]], blocks), wrong)

    def _started(self, row: TrajectoryRow, rng: random.Random) -> TrajectoryRow:
        """The row with random starts where a trajectory holds its fixed point only."""
        trajectories = []
        for (start, end), states in zip(row.spans(), row.trajectories, strict=True):
            missing = self.sampling.states_per_block if len(states) == 1 else 0
            trajectories.append([*(self._start(row, start, end, rng) for _ in range(missing)), *states])
        return replace(row, trajectories=trajectories)

    def _start(self, row: TrajectoryRow, start: int, end: int, rng: random.Random) -> State:
        known, seed = len(row.prompt_ids) + start, rng.getrandbits(32)
        text, positions = torch.tensor(row.prompt_ids + row.response_ids), torch.arange(known, known + end - start)
        return self.guess(text[None], torch.tensor([known]), positions[None], torch.tensor([seed]))[0].tolist()


@dataclass(frozen=True)
class DraftCollator:
    """Lays examples into the tensors that :class:`cllm.training.lossless.LosslessTrainer` takes."""

    pad_token_id: int

    def __call__(self, examples: Sequence[DraftExample]) -> dict[str, torch.Tensor]:
        """``input_ids`` and layout [B, C + T]: clean text in the first C columns, blocks in the others.

        The loss is taken at ``student`` [M, 2], (row, column) among the T, each block's tokens in order, ``distance`` [M] from
        the first wrong guess. ``teacher`` [D, 2]: the clean tokens that they learn from, each once; ``goal`` [M]: which one.
        """
        C = round_up(max(len(example.row.clean) for example in examples))
        places = [
            Place(index, [*range(len(row.clean)), *range(C, C + len(row) - len(row.clean))])
            for index, row in enumerate(example.row for example in examples)
        ]
        student, distance, goal = [], [], []
        teacher: dict[tuple[int, int], int] = {}
        for index, example in enumerate(examples):
            first = len(example.row.clean)
            for block, offset, wrong in zip(example.row.blocks, example.row.offsets(), example.wrong, strict=True):
                for order in range(wrong, len(block.tokens)):
                    student.append((index, offset - first + order))
                    distance.append(order - wrong)
                    goal.append(teacher.setdefault((index, block.start + order), len(teacher)))
        return {
            **laid_out(*pack([example.row for example in examples], self.pad_token_id, places, LENGTHS)),
            "student": _integers(student).reshape(-1, 2),
            "distance": _integers(distance),
            "teacher": _integers(list(teacher)).reshape(-1, 2),
            "goal": _integers(goal),
        }


def _integers(values: Sequence[int] | Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)

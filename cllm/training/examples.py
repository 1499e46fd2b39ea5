"""Packed training examples from stored trajectories: which states of each block, and what each token learns.

Shapes: B rows, T packed tokens, M consistency tokens, A AR tokens. Indices count the tokens of one example: its clean text,
then its blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from cllm.attention import LENGTHS, round_up
from cllm.errors import UsageError
from cllm.packing import CLEAN, Block, Layout, PackedRow, Place, arrange, pack
from cllm.trajectory.record import TrajectoryRow
from cllm.trajectory.store import TrajectoryDataset

Consistency = Literal["global", "local"]
StateChoice = Literal["uniform", "noise"]
State = list[int]

NOISE_WINDOW = 16  # blocks over which the noise ratio rises from 0 to 1


@dataclass(frozen=True)
class TrainingExample:
    """One packed row and the token indices of its losses: [M] for consistency, [A] for AR."""

    row: PackedRow
    student: list[int]  # tokens of a state
    teacher: list[int]  # for each of them, the token whose distribution it learns
    distance: list[int]  # tokens from the state's first wrong guess
    ar_index: list[int]  # tokens whose predictions the AR loss reads
    ar_target: list[int]  # what they should predict


@dataclass
class _RowBuilder:
    """Collects the blocks of a packed row and keeps track of columns."""

    clean: list[int]
    blocks: list[Block]
    width: int

    def add(self, start: int, tokens: Sequence[int]) -> int:
        """Append a block that starts at position ``start``; returns its first column."""
        column = self.width
        self.blocks.append(Block(start, tokens))
        self.width += len(tokens)
        return column


@dataclass(frozen=True)
class StateSampling:
    """How states are drawn from trajectories."""

    consistency: Consistency = "global"
    states_per_block: int = 1  # states of one response share the cost of its clean text
    use_labels: bool = False  # AR loss on the dataset's answer instead of the response
    choice: StateChoice = "uniform"
    random_block_size: bool = False  # truncate the blocks of each response to a random width


def build_example(row: TrajectoryRow, rng: random.Random, sampling: StateSampling) -> TrainingExample:
    """Draw states of every block and pack each from its first wrong guess on.

    What precedes the first wrong guess equals the clean text, so it is not repeated. The loss reads exactly the packed tokens,
    whose predictions are those strictly after the first wrong guess (paper, section 3.2). A state at its fixed point packs
    nothing.
    """
    prompt, response = row.prompt_ids, row.response_ids
    builder = _RowBuilder([*prompt, *response], [], len(prompt) + len(response))
    student: list[int] = []
    teacher: list[int] = []
    distance: list[int] = []
    for start, state, goal, fixed in draw_states(row, rng, sampling):
        last = len(response) - 1 - start  # the response's final token predicts nothing
        wrong = first_wrong(state, fixed)
        tokens = state[wrong:last]
        if not tokens:
            continue
        at = len(prompt) + start
        column = builder.add(at + wrong, tokens)
        student += range(column, column + len(tokens))
        distance += range(len(tokens))
        clean = range(at + wrong, at + wrong + len(tokens))
        if sampling.consistency == "global":
            teacher += clean
        else:
            goal_wrong = first_wrong(goal, fixed)
            column = builder.add(at + goal_wrong, goal[goal_wrong:last])
            teacher += [c if c < at + goal_wrong else column + c - at - goal_wrong for c in clean]
    ar_index = list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
    ar_target = list(response)
    if sampling.use_labels:
        ar_target = row.label_ids or []  # published files may lack labels of some rows
        column = builder.add(len(prompt), ar_target[:-1])
        ar_index = [len(prompt) - 1, *range(column, column + len(ar_target) - 1)][: len(ar_target)]
    return TrainingExample(PackedRow(builder.clean, builder.blocks), student, teacher, distance, ar_index, ar_target)


def draw_states(row: TrajectoryRow, rng: random.Random, sampling: StateSampling) -> Iterator[tuple[int, State, State, State]]:
    """For each state drawn of each block: (block start, state, goal, fixed point), where the goal is what the state learns.

    ``random_block_size`` truncates all blocks to one width. Since no token sees later ones, the result is a trajectory of the
    narrower block (a test checks it), which may reach its fixed point sooner. Choice ``noise`` takes the noise ratios that
    rise over a window of blocks from Hu et al. 2025, "Jacobi Forcing" (arXiv 2512.14681).
    """
    width = rng.randint(1, max((end - start for start, end in row.spans()), default=1)) if sampling.random_block_size else None
    phase = rng.random() if sampling.choice == "noise" else 0.0
    for block, (start, _) in enumerate(row.spans()):
        states = [state[:width] for state in row.trajectories[block]]
        fixed, extra = states[-1], [state[:width] for state in row.extra_states(block)]
        if sampling.consistency == "global":
            pairs = [(state, fixed) for state in states[:-1] + extra]
        else:
            pairs = list(zip(states, states[1:]))
        if width is not None:
            pairs = [pair for pair in pairs if pair[0] != fixed]
        count = min(sampling.states_per_block, len(pairs))
        if sampling.choice == "uniform":
            drawn = rng.sample(pairs, count)
        else:
            ratios = [(phase + block / NOISE_WINDOW + number / count) % 1 for number in range(count)]
            drawn = _nearest(pairs, fixed, ratios)
        yield from ((start, state, goal, fixed) for state, goal in drawn)


def _nearest(pairs: list[tuple[State, State]], fixed: State, ratios: Sequence[float]) -> list[tuple[State, State]]:
    """For each noise ratio, the remaining pair whose state has the nearest share of wrong guesses."""
    remaining, taken = list(pairs), []
    for ratio in ratios:
        taken.append(min(remaining, key=lambda pair: abs(_wrong_share(pair[0], fixed) - ratio)))
        remaining.remove(taken[-1])
    return taken


def _wrong_share(state: State, fixed: State) -> float:
    return sum(a != b for a, b in zip(state, fixed)) / len(fixed)


def first_wrong(state: Sequence[int], fixed: Sequence[int]) -> int:
    """Offset of the first guess that differs from the fixed point; the length where none does."""
    return next((i for i, (a, b) in enumerate(zip(state, fixed)) if a != b), len(fixed))


class ExampleDataset(Dataset):
    """Training examples over stored trajectories. Which states are drawn depends only on seed, ``epoch`` and row.

    ``context`` is the model's maximum number of positions; rows are truncated to it.

    Raises UsageError where ``sampling`` asks for labels and no row has any.
    """

    def __init__(
        self, rows: TrajectoryDataset | Sequence[TrajectoryRow], sampling: StateSampling, seed: int = 0, context: int | None = None
    ) -> None:
        if sampling.use_labels and all(row.label_ids is None for row in rows):
            raise UsageError("use_gt_labels needs the dataset's answers; collect the trajectories with --use_labels")
        self.rows, self.sampling, self.seed, self.context, self.epoch = rows, sampling, seed, context, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index] if self.context is None else self.rows[index].truncated(self.context)
        return self.build(row, random.Random(f"{self.seed} {self.epoch} {index}"))

    def build(self, row: TrajectoryRow, rng: random.Random) -> Any:
        """The example of one row."""
        return build_example(row, rng, self.sampling)

    def length(self, index: int) -> int:
        """Roughly the number of tokens of a packed row, for grouping by length."""
        row = self.rows[index]
        return len(row.prompt_ids) + (1 + self.sampling.states_per_block) * len(row.response_ids)


@dataclass(frozen=True)
class Collator:
    """Collates examples for :class:`cllm.training.trainer.CllmTrainer`."""

    pad_token_id: int
    distance_decay: float = 1.0  # a token's weight is distance_decay**distance
    max_row_tokens: int = 0  # examples share rows of at most this many tokens; 0: one row each

    def __call__(self, examples: Sequence[TrainingExample]) -> dict[str, torch.Tensor]:
        """``input_ids`` and layout [B, T]; ``student`` and ``teacher`` [M, 2] as (row, column), ``weight`` [M]; ``ar_index``
        [A, 2], ``ar_target`` [A]."""
        rows = [e.row for e in examples]
        places = arrange(rows, self.max_row_tokens)
        input_ids, layout = pack(rows, self.pad_token_id, places, LENGTHS)
        distance = torch.tensor([d for e in examples for d in e.distance], dtype=torch.float32)
        return {
            **layout_fields(input_ids, layout),
            "student": index_pairs(places, [e.student for e in examples]),
            "teacher": index_pairs(places, [e.teacher for e in examples]),
            "weight": self.distance_decay**distance,
            "ar_index": index_pairs(places, [e.ar_index for e in examples]),
            "ar_target": torch.tensor([t for e in examples for t in e.ar_target], dtype=torch.long),
        }


def index_pairs(places: Sequence[Place], indices: Sequence[Sequence[int]]) -> torch.Tensor:
    """(row, column) pairs [M, 2] of tokens given by their index in each text."""
    pairs = [(place.row, place.columns[i]) for place, tokens in zip(places, indices, strict=True) for i in tokens]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def layout_fields(input_ids: torch.Tensor, layout: Layout, prefix: str = "") -> dict[str, torch.Tensor]:
    """``input_ids`` and the layout, [B, T] each, as fields of a batch; :func:`batch_layout` reads the layout back."""
    return {
        prefix + "input_ids": input_ids,
        prefix + "position": layout.position_BT,
        prefix + "horizon": layout.horizon_BT,
        prefix + "block": layout.block_BT,
        prefix + "document": layout.document_BT,
    }


def batch_layout(batch: dict[str, torch.Tensor], prefix: str = "") -> Layout:
    """The layout of a collated batch."""
    return Layout(*(batch[prefix + name] for name in ("position", "horizon", "block", "document")))


def clean_columns(batch: dict[str, torch.Tensor]) -> int:
    """The number of leading columns that hold the clean text of a collated batch; a multiple of LENGTHS, like the batch's own."""
    return round_up(int((batch["block"] == CLEAN).sum(dim=1).max()))

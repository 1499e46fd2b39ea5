"""From stored trajectories to packed training examples: which state of each block, and what is learned where.

Shapes: N response tokens. Indices count the tokens of one example: its clean text, then its blocks.
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
class Example:
    """One packed row and its losses. The three lists of consistency have equal length, and so do the two of AR."""

    row: PackedRow
    student: list[int]  # where the model looks at a state ...
    teacher: list[int]  # ... and where it looks at what that state should have led to
    distance: list[int]  # how far behind the first wrong guess
    ar_index: list[int]  # tokens whose prediction the AR loss is taken of
    ar_target: list[int]


@dataclass
class _Builder:
    """Collects the blocks of a row and remembers their columns."""

    clean: list[int]
    blocks: list[Block]
    width: int

    def add(self, start: int, tokens: Sequence[int]) -> int:
        column = self.width
        self.blocks.append(Block(start, tokens))
        self.width += len(tokens)
        return column


@dataclass(frozen=True)
class Sampling:
    """How states are drawn from trajectories."""

    consistency: Consistency = "global"
    states_per_block: int = 1  # more of them share the cost of the clean text
    use_labels: bool = False
    choice: StateChoice = "uniform"
    random_block_size: bool = False


def build_example(row: TrajectoryRow, rng: random.Random, sampling: Sampling) -> Example:
    """Draw states of every block, drop the part of each that is right, and pack the rest behind the clean text.

    Everything before a state's first wrong guess equals the clean text, so it is not repeated: what is packed is exactly what
    the loss is taken at (strictly behind the first wrong guess; paper, section 3.2). A state at its fixed point packs nothing.
    """
    prompt, response = row.prompt_ids, row.response_ids
    builder = _Builder([*prompt, *response], [], len(prompt) + len(response))
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
            behind = first_wrong(goal, fixed)
            column = builder.add(at + behind, goal[behind:last])
            teacher += [c if c < at + behind else column + c - at - behind for c in clean]
    ar_index = list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
    ar_target = list(response)
    if sampling.use_labels:
        ar_target = row.label_ids or []  # a published file may lack some
        column = builder.add(len(prompt), ar_target[:-1])
        ar_index = [len(prompt) - 1, *range(column, column + len(ar_target) - 1)][: len(ar_target)]
    return Example(PackedRow(builder.clean, builder.blocks), student, teacher, distance, ar_index, ar_target)


def draw_states(row: TrajectoryRow, rng: random.Random, sampling: Sampling) -> Iterator[tuple[int, State, State, State]]:
    """Of every block: its start, and for each state drawn the state, what it should lead to, and the fixed point.

    With ``random_block_size`` the blocks are cut to one width for all of them. Since no token looks ahead, what is left is a
    trajectory of the narrower block (a test says so), which may reach its fixed point sooner. The noise ratios that rise
    over a window of blocks are those of Hu et al. 2025, "Jacobi Forcing" (arXiv 2512.14681).
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
    """For each noise ratio the state, of those not yet taken, whose share of wrong guesses is nearest to it."""
    left, taken = list(pairs), []
    for ratio in ratios:
        taken.append(min(left, key=lambda pair: abs(_wrong_share(pair[0], fixed) - ratio)))
        left.remove(taken[-1])
    return taken


def _wrong_share(state: State, fixed: State) -> float:
    return sum(a != b for a, b in zip(state, fixed)) / len(fixed)


def first_wrong(state: Sequence[int], fixed: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(state, fixed)) if a != b), len(fixed))


class ExampleDataset(Dataset):
    """Training examples over stored trajectories. The choice of states depends on seed, ``epoch`` and row only.

    ``context``: of the model in training; what lies beyond it is cut off.
    """

    def __init__(self, rows: TrajectoryDataset, sampling: Sampling, seed: int = 0, context: int | None = None) -> None:
        if sampling.use_labels and all(row.label_ids is None for row in rows):
            raise UsageError("use_gt_labels needs the dataset's answers; collect the trajectories with --use_labels")
        self.rows, self.sampling, self.seed, self.context, self.epoch = rows, sampling, seed, context, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index] if self.context is None else self.rows[index].within(self.context)
        return self.build(row, random.Random(f"{self.seed} {self.epoch} {index}"))

    def build(self, row: TrajectoryRow, rng: random.Random) -> Any:
        return build_example(row, rng, self.sampling)

    def length(self, index: int) -> int:
        """About how long a packed row will be, as a measure to compare."""
        row = self.rows[index]
        return len(row.prompt_ids) + (1 + self.sampling.states_per_block) * len(row.response_ids)


@dataclass(frozen=True)
class Collator:
    """Lays examples into the tensors that :class:`cllm.training.trainer.CllmTrainer` takes."""

    pad_token_id: int
    distance_decay: float = 1.0  # a token's weight is this to the power of its distance
    max_row_tokens: int = 0  # examples share rows of at most so many tokens; 0: one row each

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids and layout [B, T]; index pairs (row, column) [M, 2] with weights [M]; AR pairs [A, 2], targets [A]."""
        rows = [e.row for e in examples]
        places = arrange(rows, self.max_row_tokens)
        input_ids, layout = pack(rows, self.pad_token_id, places, LENGTHS)
        distance = torch.tensor([d for e in examples for d in e.distance], dtype=torch.float32)
        return {
            **laid_out(input_ids, layout),
            "student": pairs(places, [e.student for e in examples]),
            "teacher": pairs(places, [e.teacher for e in examples]),
            "weight": self.distance_decay**distance,
            "ar_index": pairs(places, [e.ar_index for e in examples]),
            "ar_target": torch.tensor([t for e in examples for t in e.ar_target], dtype=torch.long),
        }


def pairs(places: Sequence[Place], indices: Sequence[Sequence[int]]) -> torch.Tensor:
    """(row, column) [M, 2] of tokens that are given by their index in each text."""
    found = [(place.row, place.columns[i]) for place, tokens in zip(places, indices, strict=True) for i in tokens]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def laid_out(input_ids: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The part of a collated batch that :func:`batch_layout` reads."""
    return {
        "input_ids": input_ids,
        "position": layout.position_BT,
        "horizon": layout.horizon_BT,
        "block": layout.block_BT,
        "document": layout.document_BT,
    }


def batch_layout(batch: dict[str, torch.Tensor]) -> Layout:
    """The layout of a collated batch."""
    return Layout(batch["position"], batch["horizon"], batch["block"], batch["document"])


def clean_columns(batch: dict[str, torch.Tensor]) -> int:
    """How many columns hold the clean text of a collated batch, which comes first; a multiple of LENGTHS, like the batch's own."""
    return round_up(int((batch["block"] == CLEAN).sum(dim=1).max()))

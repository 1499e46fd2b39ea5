"""What is known of the rows that are decoded together.

Shapes: B rows, W window width, S positions of the text, O sampling options of a row, M numbers that a strategy remembers of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cllm.decoding.cache import enlarge


@dataclass
class Rows:
    """The state of B rows. A step changes it in place, so that it can be captured once and replayed."""

    ids_B: torch.Tensor  # counted in the order they were fed; -1 where no row has been
    seed_B: torch.Tensor  # of the fresh guesses
    options_BO: torch.Tensor  # see Sampling.options
    noise_seed_B: torch.Tensor
    text_BS: torch.Tensor
    start_B: torch.Tensor  # where the window begins, with a verified token
    end_B: torch.Tensor  # first position that the row may not fill
    window_BW: torch.Tensor
    useful_B: torch.Tensor  # leading tokens of the window that are worth a forward
    stayed_BW: torch.Tensor  # the guess was there, unchanged, one iteration ago
    held_B: torch.Tensor  # tokens of the present block verified so far (block mode)
    memory_BM: torch.Tensor  # what the strategy for fresh guesses remembers
    done_B: torch.Tensor  # finished; such a row's place is free

    def __len__(self) -> int:
        return len(self.ids_B)

    def head(self, count: int) -> Rows:
        """The first rows, as views."""
        return Rows(**{name: value[:count] for name, value in vars(self).items()})

    def reserve(self, rows: int, positions: int) -> bool:
        """Make room for so many rows and positions of text; True if anything had to move."""
        missing, old = rows - len(self), self.text_BS
        self.text_BS = enlarge(old, rows, positions)
        if missing > 0:
            for name, value in vars(self).items():
                setattr(self, name, enlarge(value, rows))
            self.free(len(self) - missing)
        return self.text_BS is not old

    def put(self, other: Rows, places: torch.Tensor) -> None:
        """Write ``other`` to these places (int64 indices); there is room for its text."""
        for name, value in vars(self).items():
            theirs = vars(other)[name]
            (value if value.dim() == 1 else value[:, : theirs.shape[1]]).index_copy_(0, places, theirs)

    def keep(self, rows: torch.Tensor) -> None:
        """Move these rows (int64 indices) to the front, in that order; the places behind them are free."""
        for value in vars(self).values():
            value[: len(rows)] = value[rows]
        self.free(len(rows))

    def free(self, first: int) -> None:
        """Places from ``first`` on have no row."""
        self.done_B[first:] = True
        self.ids_B[first:] = -1

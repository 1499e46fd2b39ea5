"""The state of the rows that are decoded together.

Shapes: B rows, W window width, S positions of the text, O sampling options per row, M numbers that a guess strategy remembers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cllm.decoding.cache import enlarge


@dataclass
class Rows:
    """The state of B rows. Steps change it in place, so that a captured step can be replayed."""

    ids_B: torch.Tensor  # number of the request, in the order they were fed; -1 in a free place
    seed_B: torch.Tensor  # of the fresh guesses
    options_BO: torch.Tensor  # see Sampling.options
    noise_seed_B: torch.Tensor
    text_BS: torch.Tensor
    start_B: torch.Tensor  # position of the window's first token, which is verified
    end_B: torch.Tensor  # first position that the row may not fill
    window_BW: torch.Tensor
    useful_B: torch.Tensor  # leading tokens of the window worth computing
    stayed_BW: torch.Tensor  # whether the same guess was there one iteration ago
    held_B: torch.Tensor  # verified tokens of the current block (block mode)
    memory_BM: torch.Tensor  # the guess strategy's memory
    done_B: torch.Tensor  # the row has finished, or the place is free

    def __len__(self) -> int:
        return len(self.ids_B)

    def head(self, count: int) -> Rows:
        """The first ``count`` rows, as views."""
        return Rows(**{name: value[:count] for name, value in vars(self).items()})

    def reserve(self, rows: int, positions: int) -> bool:
        """Grow to at least ``rows`` rows and ``positions`` positions of text; True if the tensors were reallocated."""
        missing, old = rows - len(self), self.text_BS
        self.text_BS = enlarge(old, rows, positions)
        if missing > 0:
            for name, value in vars(self).items():
                setattr(self, name, enlarge(value, rows))
            self.free(len(self) - missing)
        return self.text_BS is not old

    def write(self, other: Rows, places: torch.Tensor) -> None:
        """Copy ``other``, whose text must fit, to these places (int64 indices)."""
        for name, value in vars(self).items():
            theirs = vars(other)[name]
            (value if value.dim() == 1 else value[:, : theirs.shape[1]]).index_copy_(0, places, theirs)

    def compact(self, rows: torch.Tensor) -> None:
        """Move these rows (int64 indices) to the front, in that order, and free the places after them."""
        for value in vars(self).values():
            value[: len(rows)] = value[rows]
        self.free(len(rows))

    def free(self, first: int) -> None:
        """Mark the places from ``first`` on as free."""
        self.done_B[first:] = True
        self.ids_B[first:] = -1

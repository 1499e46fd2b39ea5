"""The window of the next iteration while strategies for fresh guesses fill it.

Shapes: B rows, W window width, S positions of the text, M numbers that a strategy remembers of each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draft:
    """A window that has slid on: firm tokens first, then guesses that may be replaced, then empty positions.

    The window's first token is verified and stands at ``start_B`` of the text. Behind it the text holds what wrong guesses
    left there, which no strategy may read.
    """

    text_BS: torch.Tensor
    start_B: torch.Tensor
    window_BW: torch.Tensor
    firm_B: torch.Tensor  # leading tokens that must stay, at least 1
    filled_B: torch.Tensor  # leading tokens that are no empty positions, at least firm_B
    useful_B: torch.Tensor  # leading tokens that are worth a forward where every token of it costs time, at least 1
    seed_B: torch.Tensor
    vocabulary: int  # tokens that there are
    narrows: bool = False  # does the strategy say what is worth a forward (Guess.narrows)? Refined guesses then are not

    @property
    def order_W(self) -> torch.Tensor:
        return torch.arange(self.window_BW.shape[1], device=self.window_BW.device)

    @property
    def positions_BW(self) -> torch.Tensor:
        return self.start_B[:, None] + self.order_W

    @property
    def before_B(self) -> torch.Tensor:
        """The token in front of the window; for a window at the start of the text its own first one."""
        return token_before(self.text_BS, self.start_B)


def token_before(text_BS: torch.Tensor, start_B: torch.Tensor) -> torch.Tensor:
    return text_BS.gather(1, (start_B - 1).clamp(min=0)[:, None])[:, 0]


class Guess(ABC):
    """A strategy for fresh guesses. A wrong guess costs speed, never correctness.

    A strategy keeps what it remembers of a row in that row of ``memory_BM`` (int64, all -1 at the start), so that rows can
    leave and join a batch. Everything stays on the device, in shapes that do not depend on values.
    """

    name: str
    memory_size = 0  # M
    fills_all = False  # leaves no position empty
    narrows = False  # says how many leading tokens are worth a forward (Draft.useful_B); else all of them are

    def learn(self, memory_BM: torch.Tensor, before_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> None:
        """Remember, in place, what the model chose behind each token of a window; ``before_B`` stands in front of it."""

    @abstractmethod
    def fill(self, memory_BM: torch.Tensor, draft: Draft) -> Draft:
        """Fill empty positions from the left, as far as there is something to put there; replace guesses that are not firm.

        What is written is firm in the draft returned, and so is what stands in front of it.
        """

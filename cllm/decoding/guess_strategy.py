"""What a strategy for fresh guesses implements, and the partly filled window that it works on.

Shapes: B rows, W window width, S positions of the text, M numbers that a strategy remembers per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PartialWindow:
    """A window that has just slid on: firm tokens first, then replaceable guesses, then empty positions.

    The window's first token is verified and has position ``start_B`` in the text. The text after it is left over from wrong
    guesses, and no strategy may read it.
    """

    text_BS: torch.Tensor
    start_B: torch.Tensor
    window_BW: torch.Tensor
    firm_B: torch.Tensor  # leading tokens that must stay, at least 1
    filled_B: torch.Tensor  # leading positions that are not empty, at least firm_B
    useful_B: torch.Tensor  # leading tokens worth computing where each token of a forward costs time, at least 1
    seed_B: torch.Tensor
    vocabulary: int  # number of token ids
    narrows: bool = False  # GuessStrategy.narrows; if set, refined guesses alone are not worth computing

    @property
    def order_W(self) -> torch.Tensor:
        return torch.arange(self.window_BW.shape[1], device=self.window_BW.device)

    @property
    def positions_BW(self) -> torch.Tensor:
        return self.start_B[:, None] + self.order_W

    @property
    def before_B(self) -> torch.Tensor:
        """The token before the window [B]; for a window at the start of the text, its own first token."""
        return token_before(self.text_BS, self.start_B)


def token_before(text_BS: torch.Tensor, start_B: torch.Tensor) -> torch.Tensor:
    return text_BS.gather(1, (start_B - 1).clamp(min=0)[:, None])[:, 0]


class GuessStrategy(ABC):
    """A strategy for fresh guesses. A wrong guess costs speed, never correctness.

    All that a strategy remembers about a row is in that row of ``memory_BM`` (int64, initially -1), so rows can join and
    leave a batch. Implementations must not synchronise with the device, and their shapes must not depend on values.
    """

    name: str
    memory_size = 0  # M
    fills_all = False  # it leaves no position empty
    narrows = False  # it sets PartialWindow.useful_B; otherwise all tokens are worth computing

    def learn(self, memory_BM: torch.Tensor, before_B: torch.Tensor, window_BW: torch.Tensor, choices_BW: torch.Tensor) -> None:
        """Record in ``memory_BM`` what the model chose after each token of a window; ``before_B``: the token before it."""

    @abstractmethod
    def fill(self, memory_BM: torch.Tensor, partial: PartialWindow) -> PartialWindow:
        """Fill empty positions from the left, as far as the strategy has guesses, and replace guesses that are not firm.

        In the result, every token written is firm, and so are those before it.
        """

"""The packed layout: clean text first, then blocks, in one row; collection and training both stand on it.

    [ prompt | response | block_0 | block_1 | ... ]

A clean token sees the clean tokens up to itself. A block token sees the clean tokens before its block's start and its own
block up to itself, never another block. So one forward gives the AR logits of the clean text and, for every block, what one
Jacobi iteration conditioned on the true prefix gives (paper, section 3.2: the conditioning of equations 2 and 3).

Shapes: B rows, T tokens of a packed row, L key tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from cllm.attention import model_mask

PADDING, CLEAN = -1, 0  # block numbers; blocks count from 1


@dataclass(frozen=True)
class Block:
    """Tokens that stand in for the clean text from position ``start`` on (counted from the start of the prompt)."""

    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class PackedRow:
    """Clean text and the blocks that hang on it."""

    clean: Sequence[int]
    blocks: Sequence[Block] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.clean) + sum(len(block.tokens) for block in self.blocks)

    def offsets(self) -> list[int]:
        """Index in the row of each block's first token."""
        offsets, at = [], len(self.clean)
        for block in self.blocks:
            offsets.append(at)
            at += len(block.tokens)
        return offsets


@dataclass(frozen=True)
class Layout:
    """Where tokens stand and what they may see."""

    position_BT: torch.Tensor  # in the text that the token belongs to
    horizon_BT: torch.Tensor  # clean tokens at positions below this are seen
    block_BT: torch.Tensor  # PADDING, CLEAN or the block's number

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.position_BT.to(device), self.horizon_BT.to(device), self.block_BT.to(device))


def visibility(queries: Layout, keys: Layout) -> torch.Tensor:
    """Boolean [B, T, L]: may query t look at key l? Padding looks at the first clean token, so no row is empty."""
    block_BT1, block_B1L = queries.block_BT[:, :, None], keys.block_BT[:, None, :]
    position_B1L = keys.position_BT[:, None, :]
    sees_clean = (block_B1L == CLEAN) & (position_B1L < queries.horizon_BT[:, :, None])
    sees_own = (block_BT1 > CLEAN) & (block_BT1 == block_B1L) & (position_B1L <= queries.position_BT[:, :, None])
    return sees_clean | sees_own


def packed_mask(
    config: PretrainedConfig, queries: Layout, keys: Layout, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The ``attention_mask`` argument for a packed forward of a model with this configuration."""
    return model_mask(config, visibility(queries, keys), queries.position_BT, keys.position_BT, dtype)


def pack(rows: Sequence[PackedRow], pad_token_id: int) -> tuple[torch.Tensor, Layout]:
    """Token ids [B, T], padded on the right, and their layout."""
    B, T = len(rows), max(map(len, rows))
    ids = torch.full((B, T), pad_token_id, dtype=torch.long)
    position, horizon = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
    number = torch.full((B, T), PADDING, dtype=torch.long)
    for b, row in enumerate(rows):
        clean = torch.arange(len(row.clean))
        ids[b, : len(clean)] = torch.as_tensor(row.clean, dtype=torch.long)
        position[b, : len(clean)], horizon[b, : len(clean)], number[b, : len(clean)] = clean, clean + 1, CLEAN
        for index, (block, at) in enumerate(zip(row.blocks, row.offsets()), start=1):
            place = slice(at, at + len(block.tokens))
            ids[b, place] = torch.as_tensor(block.tokens, dtype=torch.long)
            position[b, place] = block.start + torch.arange(len(block.tokens))
            horizon[b, place], number[b, place] = block.start, index
    return ids, Layout(position, horizon, number)

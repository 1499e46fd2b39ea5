"""The packed layout, clean text and then blocks in one row, on which collection and training are built.

    [ prompt | response | block_0 | block_1 | ... ]

A clean token sees the clean tokens up to itself. A block token sees the clean tokens before its block's start and its own
block up to itself, never another block. So one forward computes the AR logits of the clean text and, for every block, one
Jacobi iteration conditioned on the true prefix (paper, section 3.2: the conditioning of equations 2 and 3).

Several texts may share a row: first the clean text of all, then the blocks of all. No text sees another. Texts that begin alike
may also share that beginning: it becomes the clean text, and each text's rest a block after it.

Shapes: B rows, T tokens of a packed row, L key tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from cllm.attention import FLEX, ModelMask, flex_mask, model_mask, round_up
from cllm.errors import UsageError
from cllm.models import rotary_switch

PADDING, CLEAN = -1, 0  # block numbers; blocks count from 1
LEAST_SHARED = 16  # tokens; a shorter common beginning is not worth a block


@dataclass(frozen=True)
class Block:
    """Tokens for the positions from ``start`` on, counted from the start of the prompt."""

    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class PackedRow:
    """A clean text and its blocks."""

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
    """Positions of the tokens of packed rows, and what determines which of them see each other."""

    position_BT: torch.Tensor  # in the token's own text
    horizon_BT: torch.Tensor  # the token sees clean tokens at positions below this
    block_BT: torch.Tensor  # PADDING, CLEAN or the block's number in its text
    document_BT: torch.Tensor  # identifies the text, by the column where it begins

    def to(self, device: torch.device | str) -> Layout:
        return Layout(*(tensor.to(device) for tensor in self._tensors))

    def columns(self, columns: slice) -> Layout:
        """The layout of some columns only."""
        return Layout(*(tensor[:, columns] for tensor in self._tensors))

    def followed_by(self, other: Layout) -> Layout:
        """A layout of the columns of this one followed by those of ``other``."""
        return Layout(*(torch.cat(pair, dim=1) for pair in zip(self._tensors, other._tensors, strict=True)))

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.position_BT, self.horizon_BT, self.block_BT, self.document_BT


def sees(queries: Layout, keys: Layout, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether token ``query`` of ``row`` sees token ``key``, for three index tensors that broadcast to one shape.

    Padding sees the row's first clean token, so that no query is without a key.
    """
    block, key_block, key_position = queries.block_BT[row, query], keys.block_BT[row, key], keys.position_BT[row, key]
    clean = (key_block == CLEAN) & (key_position < queries.horizon_BT[row, query])
    own = (block > CLEAN) & (block == key_block) & (key_position <= queries.position_BT[row, query])
    return (clean | own) & (queries.document_BT[row, query] == keys.document_BT[row, key])


def visibility(queries: Layout, keys: Layout) -> torch.Tensor:
    """:func:`sees` for all pairs: boolean [B, T, L]."""
    (B, T), L = queries.block_BT.shape, keys.block_BT.shape[1]
    row, query, key = (torch.arange(size, device=queries.block_BT.device) for size in (B, T, L))
    return sees(queries, keys, row[:, None, None], query[:, None], key)


def packed_mask(config: PretrainedConfig, queries: Layout, keys: Layout, dtype: torch.dtype) -> ModelMask:
    """The ``attention_mask`` argument for a packed forward of a model with this configuration.

    Raises UsageError for a text so long that longrope would switch the frequencies of the whole forward.
    """
    switch = rotary_switch(config)
    if switch is not None and (length := int(queries.position_BT.max()) + 1) > switch:
        raise UsageError(
            f"packed texts of {config.model_type} must have at most {switch} tokens, because its rotary frequencies (longrope) "
            f"change beyond that; got {length}"
        )
    if config._attn_implementation == FLEX:
        return flex_mask(config, partial(sees, queries, keys), queries.position_BT, keys.position_BT)
    return model_mask(config, visibility(queries, keys), queries.position_BT, keys.position_BT, dtype)


class Place(NamedTuple):
    """The place of a text in a batch."""

    row: int
    columns: Sequence[int]  # of the clean text's tokens, then of the blocks'


def arrange(texts: Sequence[PackedRow], budget: int = 0) -> list[Place]:
    """A place for every text, several of them sharing a row of at most ``budget`` tokens (first-fit decreasing).

    A text longer than the budget has a row of its own; with budget 0 every text does.
    """
    places = {}
    for row, members in enumerate(sorted(_first_fit([len(text) for text in texts], budget))):
        clean, block = 0, sum(len(texts[index].clean) for index in members)
        for index in members:
            clean_end, block_end = clean + len(texts[index].clean), block + len(texts[index]) - len(texts[index].clean)
            places[index] = Place(row, [*range(clean, clean_end), *range(block, block_end)])
            clean, block = clean_end, block_end
    return [places[index] for index in range(len(texts))]


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The indices of the lengths that share each row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row in rows if sum(lengths[i] for i in row) + lengths[index] <= budget)
        row = next(fitting, None)
        if row is None:
            rows.append(row := [])
        row.append(index)
    return rows


def pack(
    texts: Sequence[PackedRow], pad_token_id: int, places: Sequence[Place] | None = None, unit: int = 1
) -> tuple[torch.Tensor, Layout]:
    """Token ids [B, T], padded on the right to a multiple of ``unit``, and their layout.

    ``places``: from :func:`arrange`; by default every text has a row of its own.
    """
    places = arrange(texts) if places is None else places
    B, T = 1 + max(place.row for place in places), round_up(1 + max(max(place.columns) for place in places), unit)
    ids = torch.full((B, T), pad_token_id)
    position, horizon, document = torch.zeros(B, T).long(), torch.ones(B, T).long(), torch.zeros(B, T).long()
    number = torch.full((B, T), PADDING)
    for text, (row, columns) in zip(texts, places, strict=True):
        at = torch.tensor(columns)
        for tensor, values in zip((ids, position, horizon, number), _tokens(text).T, strict=True):
            tensor[row, at] = values
        document[row, at] = columns[0]
    return ids, Layout(position, horizon, number, document)


def pack_alike(texts: Sequence[Sequence[int]], pad_token_id: int, unit: int = 1) -> tuple[torch.Tensor, Layout, list[Place]]:
    """Pack plain texts, and a beginning that several have in common only once where that saves time.

    Returns token ids [B, T] and their layout as :func:`pack` does, and for each text the place of its tokens.
    """
    groups = list(_groups(texts))
    rows = [_share([texts[index] for index in group]) for group in groups]
    rooms = arrange(rows, max(map(len, rows)))
    places = {}
    for group, row, room in zip(groups, rows, rooms, strict=True):
        for index, start in zip(group, row.offsets() or [len(row.clean)], strict=True):
            own = len(texts[index]) - len(row.clean)
            places[index] = Place(room.row, [*room.columns[: len(row.clean)], *room.columns[start : start + own]])
    return *pack(rows, pad_token_id, rooms, unit), [places[index] for index in range(len(texts))]


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The indices of the texts that share a row; texts that begin alike are neighbours once all are sorted."""
    group: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: list(texts[index])):
        if group and not _pays([texts[other] for other in (*group, index)]):
            yield group
            group = []
        group.append(index)
    yield group


def _pays(texts: Sequence[Sequence[int]]) -> bool:
    """Whether a shared beginning saves tokens at no cost in attention, which grows with the square of a row's length."""
    shared = _shared(texts)
    row = shared + sum(len(text) - shared for text in texts)
    return shared >= LEAST_SHARED and row**2 <= sum(len(text) ** 2 for text in texts)


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with alike; each keeps at least one of its own."""
    equal = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts))
    return min(sum(1 for _ in equal), min(map(len, texts)) - 1)


def _share(texts: Sequence[Sequence[int]]) -> PackedRow:
    """A row whose clean text is the texts' common beginning, with their rests as its blocks; a single text is all clean."""
    if len(texts) == 1:
        return PackedRow(texts[0])
    shared = _shared(texts)
    return PackedRow(texts[0][:shared], [Block(shared, text[shared:]) for text in texts])


def _tokens(text: PackedRow) -> torch.Tensor:
    """Id, position, horizon and block number of each token [T, 4]: clean tokens first, then the blocks'."""
    tokens = [(token, at, at + 1, CLEAN) for at, token in enumerate(text.clean)]
    for number, block in enumerate(text.blocks, start=1):
        tokens += [(token, at, block.start, number) for at, token in enumerate(block.tokens, block.start)]
    return torch.tensor(tokens)

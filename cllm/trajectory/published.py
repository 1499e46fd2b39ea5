"""The published JSON form of trajectories (Kou et al. 2024, "CLLMs: Consistency Large Language Models").

A list with one item per block:

    data_id                      "data_3": the response; the items of one response share it
    jacobian_itr_id              "itr_0", "itr_1", ...: which block of n tokens
    prompt_ids                   [[prompt and the blocks before this one]]
    prompt_ids_len               [its length] (some published files have the length of the prompt alone; not read)
    answer_trajectory_ids        [state][n]: augmented states, then the trajectory; the last one is the fixed point
    labels_ids                   prompt and the dataset's own answer (optional)
    teacher_output_ids           [[prompt .. this block]] (not read)
    complete_teacher_output_ids  [prompt .. last block]

Id lists may be nested in lists of length one. Our own key ``augmented_len``, the number of augmented states, is written only
where `_count_augmented` would infer another number, so that every row survives a round trip.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from cllm.errors import UsageError
from cllm.files import open_text
from cllm.trajectory.record import MAX_TOKEN_ID, TrajectoryRow

logger = logging.getLogger(__name__)

FIELDS = ("data_id", "jacobian_itr_id", "prompt_ids", "answer_trajectory_ids")  # required when reading
CHUNK = 1 << 20  # characters read at a time
SLACK = 1 << 12  # characters; a JSON error this far before the end of the buffer cannot come from a truncated item


def read_published(path: str | Path, eos_ids: Collection[int] = ()) -> Iterator[TrajectoryRow]:
    """The rows of a published JSON file (a list, or JSON lines; optionally .gz), in order of first appearance.

    Responses and their states are truncated after the first EOS if ``eos_ids`` are given. Blocks after a gap (a missing item)
    are dropped. The file is read in chunks; its tokens stay in memory as int32 until the last row.

    Raises:
        UsageError: the file cannot be read or is empty, or an item is malformed; the message names it.
    """
    responses: dict[str, _Response] = {}
    number = 0
    with open_text(path) as stream:
        for number, item in enumerate(_items(stream, path), start=1):
            try:
                _check_fields(item)
                responses.setdefault(str(item["data_id"]), _Response()).add(item)
            except ValueError as error:
                raise UsageError(f"{path}: item {number}: {error}") from None
    if not number:
        raise UsageError(f"{path} holds no trajectories")
    yield from _rows(responses, eos_ids, path)


def write_published(path: str | Path, rows: Iterable[TrajectoryRow], block_size: int, pad_id: int) -> int:
    """Write rows as a published JSON list, streaming and atomically. Returns the number of items.

    Short blocks are padded with ``pad_id`` to ``block_size``. ``complete_teacher_output_ids`` is not padded, which tells a
    reader where the padding starts.

    Raises:
        UsageError: the blocks of a row do not start at multiples of ``block_size``, or the file cannot be written.
    """
    path, count = Path(path), 0
    with atomic_write(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as stream:
        for row in rows:
            for item in published_items(row, block_size, pad_id):
                text = json.dumps(item, separators=(",", ":"))
                stream.write((",\n" if count else "[").encode() + text.encode())
                count += 1
        stream.write(b"]\n" if count else b"[]\n")
    return count


@contextmanager
def atomic_write(target: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Write ``temporary``, which replaces ``target`` once it is complete on disk and is removed on any error.

    Raises:
        UsageError: the file cannot be written (disk full, no permission); the message gives the system's reason.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ----


@dataclass
class _Response:
    """The items of one data_id. Arrays are int32."""

    states: dict[int, np.ndarray] = field(default_factory=dict)  # block number -> [state, n]
    extra: dict[int, int] = field(default_factory=dict)  # block number -> number of augmented states, which come first
    first: int = -1  # lowest block number
    size: int = 0  # n
    before: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # the prompt and the blocks before ``first``
    labels: np.ndarray | None = None  # prompt and answer
    complete_len: int = 0  # length of complete_teacher_output_ids

    def add(self, item: dict[str, Any]) -> None:
        number, states = _block_number(item["jacobian_itr_id"]), _state_array(item["answer_trajectory_ids"])
        if number in self.states:
            raise ValueError(f"{item['data_id']} has {item['jacobian_itr_id']} twice")
        if self.size and states.shape[1] != self.size:
            raise ValueError(f"{item['data_id']} has blocks of {self.size} and of {states.shape[1]} tokens")
        before = _token_array("prompt_ids", item["prompt_ids"])
        if len(before) <= number * states.shape[1]:
            raise ValueError(f"{len(before)} prompt_ids leave no prompt before block {number} of {states.shape[1]} tokens")
        self.size, self.states[number] = states.shape[1], states
        self.extra[number] = _augmented_len(item, states)
        self.complete_len = len(_token_array("complete_teacher_output_ids", item.get("complete_teacher_output_ids") or []))
        if self.first < 0 or number < self.first:
            self.first, self.before = number, before
            self.labels = _token_array("labels_ids", item["labels_ids"]) if item.get("labels_ids") else None

    @property
    def prompt(self) -> np.ndarray:
        return self.before[: len(self.before) - self.first * self.size]

    def label_ids(self) -> list[int] | None:
        """The dataset's answer; None where there are no labels or they do not begin with the prompt."""
        length = len(self.prompt)
        if self.labels is None or len(self.labels) <= length or (self.labels[:length] != self.prompt).any():
            return None
        return self.labels[length:].tolist()

    def contiguous(self) -> list[int]:
        """Block numbers from the first up to a gap."""
        last = self.first
        while last + 1 in self.states:
            last += 1
        return list(range(self.first, last + 1))

    def response(self, eos_ids: Collection[int]) -> tuple[np.ndarray, bool]:
        """The response's tokens, and whether an EOS truncated it. A shorter complete_teacher_output_ids ends it as well."""
        tokens = np.concatenate([self.before[len(self.prompt) :], *(self.states[number][-1] for number in self.contiguous())])
        if self.complete_len > len(self.before):
            tokens = tokens[: self.complete_len - len(self.prompt)]
        eos = np.flatnonzero(np.isin(tokens, list(eos_ids)))
        end = int(eos[0]) + 1 if len(eos) else len(tokens)
        return tokens[:end], end < len(tokens)

    def row(self, row_id: str, eos_ids: Collection[int]) -> TrajectoryRow | None:
        """The row; None if the response ends before its first block."""
        tokens, cut = self.response(eos_ids)
        starts, trajectories, augmented = [], [], []
        for number in self.contiguous():
            start = number * self.size
            if start >= len(tokens):
                break
            states = self.states[number][:, : len(tokens) - start].tolist()
            extra, states = states[: self.extra[number]], states[self.extra[number] :]
            starts.append(start)
            augmented.append(extra)
            trajectories.append([state for state, _ in groupby(states)] if cut else states)  # truncation can make neighbours equal
        if not starts:
            return None
        return TrajectoryRow(
            row_id=row_id,
            prompt_ids=self.prompt.tolist(),
            response_ids=tokens.tolist(),
            block_starts=starts,
            trajectories=trajectories,
            augmented=augmented if any(augmented) else [],
            label_ids=self.label_ids(),
        )


def _rows(responses: dict[str, _Response], eos_ids: Collection[int], path: str | Path) -> Iterator[TrajectoryRow]:
    """The rows of ``responses``, removing each response as it is read. Logs what was dropped."""
    ended = unlabelled = gaps = 0
    for data_id in list(responses):
        response = responses.pop(data_id)
        row = response.row(data_id, eos_ids)
        gaps += len(response.contiguous()) < len(response.states)
        ended += row is None
        if row is not None:
            unlabelled += response.labels is not None and row.label_ids is None
            yield row
    for count, what in (
        (gaps, "responses lack a block: dropped the blocks after it"),
        (ended, "responses end before their first block: dropped"),
        (unlabelled, "responses have labels that do not begin with the prompt: read without labels"),
    ):
        if count:
            logger.warning("%s: %d %s", path, count, what)


def _augmented_len(item: dict[str, Any], states: np.ndarray) -> int:
    count = item.get("augmented_len", _count_augmented(states))
    if not isinstance(count, int) or not 0 <= count < len(states):
        raise ValueError(f"augmented_len must be 0 .. {len(states) - 1}, got {count!r}")
    return count


def _count_augmented(states: np.ndarray) -> int:
    """The number of augmented states, which come first, among ``states`` (int32 [state, n]).

    Under greedy decoding each iteration fixes at least one more leading token, so the trajectory is the longest suffix of
    states whose number of right leading tokens rises strictly. The augmented copy right before it has at least as many right
    leading tokens as some later state of the trajectory, hence more than the random start.
    """
    right = states == states[-1]
    leading = np.where(right.all(axis=1), states.shape[1], right.argmin(axis=1))
    falls = np.flatnonzero(leading[1:] <= leading[:-1])
    return int(falls[-1]) + 1 if len(falls) else 0


def _check_fields(item: Any) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"must be an object with the fields {', '.join(FIELDS)}, got {type(item).__name__}")
    missing = [name for name in FIELDS if name not in item]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; has {', '.join(map(str, item)) or 'no fields'}")


def _block_number(itr_id: Any) -> int:
    match = re.fullmatch(r"itr_(\d+)", str(itr_id))
    if not match:
        raise ValueError(f"jacobian_itr_id must be 'itr_0', 'itr_1', ..., got {itr_id!r}")
    return int(match[1])


def _token_array(name: str, value: Any) -> np.ndarray:
    """int32 [tokens] from a list of ids, optionally nested in lists of length one."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return _int32(name, value, dimensions=1)


def _state_array(value: Any) -> np.ndarray:
    """int32 [state, n] with at least one state and one token."""
    states = _int32("answer_trajectory_ids", value, dimensions=2)
    if not states.size:
        raise ValueError("answer_trajectory_ids is empty")
    return states


def _int32(name: str, value: Any, dimensions: int) -> np.ndarray:
    if value == []:
        return np.zeros((0,) * dimensions, np.int32)
    try:
        tokens = np.asarray(value)
    except ValueError:  # lists of different lengths
        tokens = np.zeros(0)
    if tokens.dtype.kind != "i" or tokens.ndim != dimensions:
        shape = "a list of token ids" if dimensions == 1 else "equally long lists of token ids"
        raise ValueError(f"{name} must be {shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= MAX_TOKEN_ID:
        raise ValueError(f"{name} must hold token ids from 0 to {MAX_TOKEN_ID}, got {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.int32)


def _items(stream: TextIO, path: str | Path) -> Iterator[Any]:
    """The values of a JSON list or of JSON lines, without reading the whole file into memory."""
    decoder, buffer, at_end, number = json.JSONDecoder(), "", False, 0
    while True:
        buffer = buffer.lstrip("[,]\ufeff \t\r\n")
        try:
            item, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            if at_end and not buffer:
                return
            if at_end or error.pos + SLACK < len(buffer):
                raise UsageError(f"{path}: item {number + 1} is not valid JSON: {error.msg}") from None
            more = stream.read(max(CHUNK, len(buffer)))
            at_end, buffer = not more, buffer + more
            continue
        number, buffer = number + 1, buffer[end:]
        yield item


# ---- writing ----


def published_items(row: TrajectoryRow, block_size: int, pad_id: int) -> Iterator[dict[str, Any]]:
    """The items of one row in the order of its blocks. Raises UsageError as `write_published` does."""
    first = row.block_starts[0]
    if first % block_size or row.block_starts != list(range(first, len(row.response_ids), block_size)):
        raise UsageError(
            f"row {row.row_id!r}: the published form needs blocks that start at multiples of {block_size}, got {row.block_starts}"
        )
    tokens = row.prompt_ids + row.response_ids
    for block, (start, end) in enumerate(row.spans()):
        fill = [pad_id] * (block_size - (end - start))
        extra = row.extra_states(block)
        states = [state + fill for state in (*extra, *row.trajectories[block])]
        before = tokens[: len(row.prompt_ids) + start]
        item: dict[str, Any] = {
            "data_id": row.row_id,
            "jacobian_itr_id": f"itr_{start // block_size}",
            "prompt_ids_len": [len(before)],
            "prompt_ids": [before],
            "answer_trajectory_ids": states,
            "teacher_output_ids": [before + states[-1]],
            "complete_teacher_output_ids": tokens,
        }
        if row.label_ids is not None:
            item["labels_ids"] = row.prompt_ids + row.label_ids
        if len(extra) != _count_augmented(np.asarray(states)):
            item["augmented_len"] = len(extra)
        yield item

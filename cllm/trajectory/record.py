"""One stored response: its tokens and the Jacobi trajectories of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

from cllm.errors import UsageError

MAX_TOKEN_ID = 2**31 - 1  # stored as int32


@dataclass(frozen=True)
class Dropped:
    """A prompt without a row, and the reason."""

    row_id: str
    reason: str


@dataclass
class TrajectoryRow:
    """A prompt, the target model's response, and the trajectory of each block of the response.

    row_id: unique within one collection.
    prompt_ids: the P tokens of the prompt.
    response_ids: the N tokens of the response, with EOS if it ends in one.
    block_starts: offsets into the response, strictly increasing. Block j spans ``start_j .. min(start_{j+1}, N)``;
        tokens before the first start belong to no block.
    trajectories: [block][state][token]; the first state is the random start and the last the fixed point, which is the
        block's slice of the response.
    augmented: [block][state][token], the extra states of ``--use_aug``; empty without it.
    label_ids: the dataset's own answer with EOS, without the prompt, or None.
    """

    row_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    block_starts: list[int]
    trajectories: list[list[list[int]]]
    augmented: list[list[list[int]]] = field(default_factory=list)
    label_ids: list[int] | None = None

    def spans(self) -> list[tuple[int, int]]:
        """Start and end (exclusive) of each block, as offsets into the response."""
        return list(pairwise([*self.block_starts, len(self.response_ids)]))

    def extra_states(self, block: int) -> list[list[int]]:
        """The augmented states of one block; [] in a row stored without any."""
        return self.augmented[block] if self.augmented else []

    def truncated(self, context: int) -> TrajectoryRow:
        """The row with response, blocks and labels truncated to a context of this many positions.

        Raises:
            UsageError: the prompt alone fills the context.
        """
        room = context - len(self.prompt_ids)
        if room < 1:
            raise UsageError(f"row {self.row_id!r}: a prompt of {len(self.prompt_ids)} tokens fills the context of {context}")
        labels = self.label_ids and self.label_ids[:room]
        if len(self.response_ids) <= room:
            return self if labels == self.label_ids else replace(self, label_ids=labels)
        starts = [start for start in self.block_starts if start < room]

        def cut(blocks: list[list[list[int]]]) -> list[list[list[int]]]:
            return [[state[: room - start] for state in states] for start, states in zip(starts, blocks)]

        return replace(
            self,
            response_ids=self.response_ids[:room],
            block_starts=starts,
            trajectories=cut(self.trajectories),
            augmented=cut(self.augmented),
            label_ids=labels,
        )

    def validate(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: some part does not; the message names the row, the block and the part.
        """
        self._check_tokens()
        self._check_starts()
        for block, (start, end) in enumerate(self.spans()):
            self._check_block(block, self.response_ids[start:end])

    def _fail(self, message: str) -> None:
        raise ValueError(f"row {self.row_id!r}: {message}")

    def _check_tokens(self) -> None:
        if not self.row_id:
            self._fail("row_id is empty")
        for name, ids in (("prompt_ids", self.prompt_ids), ("response_ids", self.response_ids)):
            if not ids:
                self._fail(f"{name} is empty")
            self._check_range(name, ids)
        if self.label_ids is not None:
            if not self.label_ids:
                self._fail("label_ids is empty; use None where there are no labels")
            self._check_range("label_ids", self.label_ids)

    def _check_range(self, name: str, ids: Iterable[int]) -> None:
        bad = next((token for token in ids if not 0 <= token <= MAX_TOKEN_ID), None)
        if bad is not None:
            self._fail(f"{name} must hold token ids from 0 to {MAX_TOKEN_ID}, got {bad}")

    def _check_starts(self) -> None:
        starts, length = self.block_starts, len(self.response_ids)
        if not starts:
            self._fail("block_starts is empty")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            self._fail(f"block_starts must increase strictly, got {starts}")
        if starts[0] < 0 or starts[-1] >= length:
            self._fail(f"block_starts must lie within the response of {length} tokens, got {starts}")
        if len(self.trajectories) != len(starts):
            self._fail(f"{len(starts)} blocks but {len(self.trajectories)} trajectories")
        if self.augmented and len(self.augmented) != len(starts):
            self._fail(f"{len(starts)} blocks but augmented states for {len(self.augmented)}")

    def _check_block(self, block: int, fixed_point: list[int]) -> None:
        states = self.trajectories[block]
        if not states:
            self._fail(f"block {block} has no states")
        for state in chain(states, self.extra_states(block)):
            if len(state) != len(fixed_point):
                self._fail(f"block {block} spans {len(fixed_point)} tokens but has a state of {len(state)}")
            self._check_range(f"block {block}", state)
        if list(states[-1]) != list(fixed_point):
            self._fail(f"the last state of block {block} is not its slice of the response")

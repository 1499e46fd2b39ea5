import re
from typing import Any

import pytest

from cllm.errors import UsageError
from cllm.trajectory.record import TrajectoryRow


def good_row(**changes: Any) -> TrajectoryRow:
    """Two blocks, of 2 and 3 tokens, after one token without a block."""
    values: dict[str, Any] = {
        "row_id": "x-1",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4, 5, 6, 7, 8],
        "block_starts": [1, 3],
        "trajectories": [[[9, 9], [4, 9], [4, 5]], [[6, 7, 8]]],
        "augmented": [[[9, 5]], []],
        "label_ids": [3, 4],
    }
    return TrajectoryRow(**{**values, **changes})


def test_valid_rows_pass() -> None:
    good_row().validate()
    good_row(augmented=[], label_ids=None).validate()


@pytest.mark.parametrize("context", range(4, 9))
def test_truncation_to_a_context(context: int) -> None:
    row = good_row().truncated(context)
    row.validate()
    whole = good_row()
    assert whole.prompt_ids + whole.response_ids[: context - 2] == row.prompt_ids + row.response_ids
    assert row.spans() == [(start, min(end, context - 2)) for start, end in whole.spans() if start < context - 2]
    for block, (start, end) in enumerate(row.spans()):
        assert row.trajectories[block] == [state[: end - start] for state in whole.trajectories[block]]
    assert row.label_ids == [3, 4] and (row == whole) == (context == 8)


def test_labels_alone_may_exceed_the_context() -> None:
    long = good_row(label_ids=list(range(20)))
    assert long.truncated(8) == good_row(label_ids=list(range(6)))
    assert good_row(label_ids=None).truncated(8) == good_row(label_ids=None)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    assert good_row().truncated(3).response_ids == [3] and good_row().truncated(3).block_starts == []
    with pytest.raises(UsageError, match="row 'x-1': a prompt of 2 tokens fills the context of 2"):
        good_row().truncated(2)


def test_spans_and_extra_states() -> None:
    assert good_row().spans() == [(1, 3), (3, 6)]
    assert good_row().extra_states(0) == [[9, 5]]
    assert good_row(augmented=[]).extra_states(1) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_id": ""}, "row_id is empty"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"response_ids": []}, "response_ids is empty"),
        ({"label_ids": []}, "label_ids is empty"),
        ({"prompt_ids": [-1]}, "got -1"),
        ({"prompt_ids": [2**31]}, "got 2147483648"),
        ({"label_ids": [-100]}, "got -100"),
        ({"block_starts": []}, "block_starts is empty"),
        ({"block_starts": [3, 3]}, "increase strictly"),
        ({"block_starts": [-1, 3]}, "within the response of 6 tokens"),
        ({"block_starts": [1, 6]}, "within the response of 6 tokens"),
        ({"block_starts": [1]}, "1 blocks but 2 trajectories"),
        ({"augmented": [[]]}, "2 blocks but augmented states for 1"),
        ({"trajectories": [[], [[6, 7, 8]]]}, "block 0 has no states"),
        ({"trajectories": [[[4, 5]], [[6, 7], [6, 7, 8]]]}, "block 1 spans 3 tokens but has a state of 2"),
        ({"augmented": [[], [[6, 7]]]}, "block 1 spans 3 tokens but has a state of 2"),
        ({"augmented": [[[-1, 5]], []]}, "got -1"),
        ({"trajectories": [[[4, 5], [4, 9]], [[6, 7, 8]]]}, "the last state of block 0 is not its slice of the response"),
    ],
)
def test_inconsistent_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        good_row(**changes).validate()
    assert str(caught.value).startswith(f"row {changes.get('row_id', 'x-1')!r}: ")

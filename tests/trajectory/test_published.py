import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.errors import UsageError
from cllm.trajectory import published
from cllm.trajectory.published import read_published, write_published
from cllm.trajectory.record import TrajectoryRow

EOS, PAD = 2, 0


def item(data_id: str, itr: int, prompt: list[int], before: list[int], states: list[list[int]], **more: Any) -> dict:
    """An item as the authors' script writes it."""
    return {
        "data_id": data_id,
        "jacobian_itr_id": f"itr_{itr}",
        "prompt_ids_len": [len(prompt)],
        "prompt_ids": [prompt + before],
        "answer_trajectory_ids": states,
        "teacher_output_ids": [prompt + before + states[-1]],
        **more,
    }


def two_blocks(**more: Any) -> list[dict]:
    complete = [7, 8, 2, 9, 11, 12, 13, 14, 2, 16]  # the prompt holds an EOS
    blocks = [
        item("data_3", 0, [7, 8, 2, 9], [], [[9, 9, 7], [11, 9, 9], [11, 12, 13]]),
        item("data_3", 1, [7, 8, 2, 9], [11, 12, 13], [[8, 8, 8], [14, 8, 8], [14, 2, 8], [14, 2, 16]]),
    ]
    return [{**block, "complete_teacher_output_ids": complete, **more} for block in blocks]


def save(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items))
    return path


def read(path: Path, eos_ids: tuple[int, ...] = ()) -> list[TrajectoryRow]:
    rows = list(read_published(path, eos_ids))
    for row in rows:
        row.validate()
    return rows


@st.composite
def row_and_size(draw: st.DrawFn) -> tuple[TrajectoryRow, int]:
    """Any row with aligned blocks, even one whose states no iteration would produce."""
    size = draw(st.integers(1, 5))
    token = st.integers(0, 4)
    response = draw(st.lists(token, min_size=1, max_size=17))
    first = draw(st.integers(0, (len(response) - 1) // size)) * size
    starts = list(range(first, len(response), size))
    states: list[list[list[list[int]]]] = [[], []]
    for start in starts:
        fixed = response[start : start + size]
        state = st.lists(token, min_size=len(fixed), max_size=len(fixed))
        states[0].append([*draw(st.lists(state, max_size=4)), fixed])
        states[1].append(draw(st.lists(state, max_size=3)))
    labels = draw(st.none() | st.lists(token, min_size=1, max_size=6))
    prompt = draw(st.lists(token, min_size=1, max_size=5))
    augmented = states[1] if any(states[1]) else []
    return TrajectoryRow("any id", prompt, response, starts, states[0], augmented, labels), size


@given(row_and_size(), st.integers(0, 4))
@settings(max_examples=200)
def test_every_aligned_row_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, drawn: Any, pad_id: int) -> None:
    row, size = drawn
    path = tmp_path_factory.mktemp("round") / "t.json"
    assert write_published(path, [row], size, pad_id) == len(row.block_starts)
    assert read(path) == [row]


def test_reading_the_authors_form(tmp_path: Path) -> None:
    (row,) = read(save(tmp_path / "t.json", two_blocks(labels_ids=[7, 8, 2, 9, 21, 22])))
    assert row == TrajectoryRow(
        row_id="data_3",
        prompt_ids=[7, 8, 2, 9],
        response_ids=[11, 12, 13, 14, 2, 16],
        block_starts=[0, 3],
        trajectories=[
            [[9, 9, 7], [11, 9, 9], [11, 12, 13]],
            [[8, 8, 8], [14, 8, 8], [14, 2, 8], [14, 2, 16]],
        ],
        label_ids=[21, 22],
    )


def test_the_first_eos_truncates_response_and_states(tmp_path: Path) -> None:
    (row,) = read(save(tmp_path / "t.json", two_blocks()), (EOS,))
    assert row.response_ids == [11, 12, 13, 14, 2]  # an EOS in the prompt does not count
    assert row.trajectories[1] == [[8, 8], [14, 8], [14, 2]]  # the last two differed only after the cut
    assert row.label_ids is None


def test_blocks_after_the_eos_are_dropped(tmp_path: Path) -> None:
    (row,) = read(save(tmp_path / "t.json", two_blocks()), (12,))
    assert (row.response_ids, row.block_starts) == ([11, 12], [0])


def test_nesting_order_lines_and_gzip(tmp_path: Path) -> None:
    expected = read(save(tmp_path / "t.json", two_blocks(labels_ids=[7, 8, 2, 9, 21])))
    items = two_blocks(labels_ids=[[7, 8, 2, 9, 21]])[::-1]  # nested, last block first
    for block in items:
        block["prompt_ids"] = [block["prompt_ids"]]
        block["teacher_output_ids"] = block["teacher_output_ids"][0]
    lines = tmp_path / "t.jsonl.gz"
    with gzip.open(lines, "wt") as file:
        file.writelines(json.dumps(block) + "\n" for block in items)
    assert read(lines) == expected
    assert read(save(tmp_path / "pretty.json", items)) == expected
    (tmp_path / "pretty.json").write_text(json.dumps(items, indent=2))
    assert read(tmp_path / "pretty.json") == expected


def test_items_of_several_responses_may_interleave(tmp_path: Path) -> None:
    first, second = two_blocks(), [{**block, "data_id": "data_4"} for block in two_blocks()]
    rows = read(save(tmp_path / "t.json", [first[0], second[1], second[0], first[1]]))
    assert [row.row_id for row in rows] == ["data_3", "data_4"]
    assert rows[0].trajectories == rows[1].trajectories


def test_missing_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    third = item("data_3", 2, [7, 8, 2, 9], [11, 12, 13, 14, 2, 16], [[17, 18, 19]])
    blocks = [*two_blocks(), third]
    (row,) = read(save(tmp_path / "t.json", blocks[1:]))  # the first is missing: its tokens are known, its trajectory is not
    assert (row.prompt_ids, row.block_starts) == ([7, 8, 2, 9], [3, 6])
    assert row.response_ids == [11, 12, 13, 14, 2, 16, 17, 18, 19]
    with caplog.at_level(logging.WARNING):
        (row,) = read(save(tmp_path / "t.json", [blocks[0], blocks[2]]))
    assert (row.response_ids, row.block_starts) == ([11, 12, 13], [0])
    assert "1 responses lack a block" in caplog.text


def test_a_response_that_ends_before_its_first_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(save(tmp_path / "t.json", two_blocks()[1:]), (12,)) == []
    assert "1 responses end before their first block" in caplog.text


def test_labels_that_do_not_begin_with_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (row,) = read(save(tmp_path / "t.json", two_blocks(labels_ids=[1, 2, 3, 4, 5])))
    assert row.label_ids is None
    assert "read without labels" in caplog.text


def jacobi_like(rng: random.Random, size: int) -> list[list[int]]:
    """A trajectory: each state has at least one more right leading token. Wrong tokens are 50 or above."""
    states, right = [], 0
    while right < size:
        states.append([*range(right), *(rng.choice([token, 50 + rng.randrange(9)]) for token in range(right, size))])
        if states[-1][right] == right:
            states[-1][right] = 50
        right += rng.randint(1, 3)
    return [*states, list(range(size))]


@pytest.mark.parametrize("seed", range(30))
def test_augmented_states_are_inferred_from_their_order(tmp_path: Path, seed: int) -> None:
    from cllm.trajectory.hygiene import augment

    rng = random.Random(seed)
    states = jacobi_like(rng, 16)
    extra = augment(states[2:], rng)[::-1]  # the authors' script skips the first two states and goes backwards
    block = item("data_0", 0, [1], [], [*extra, *states])
    (row,) = read(save(tmp_path / "t.json", [block]))
    assert row.trajectories == [states]
    assert row.extra_states(0) == extra


def test_written_items_have_the_published_form(tmp_path: Path) -> None:
    row = TrajectoryRow("data_0", [7, 8], [3, 4, 5, 2], [0, 3], [[[9, 9, 9], [3, 4, 5]], [[9], [2]]], [], [3, 2])
    write_published(tmp_path / "new" / "t.json", [row], 3, PAD)
    assert json.loads((tmp_path / "new" / "t.json").read_text()) == [
        {
            "data_id": "data_0",
            "jacobian_itr_id": "itr_0",
            "prompt_ids_len": [2],
            "prompt_ids": [[7, 8]],
            "answer_trajectory_ids": [[9, 9, 9], [3, 4, 5]],
            "teacher_output_ids": [[7, 8, 3, 4, 5]],
            "complete_teacher_output_ids": [7, 8, 3, 4, 5, 2],
            "labels_ids": [7, 8, 3, 2],
        },
        {
            "data_id": "data_0",
            "jacobian_itr_id": "itr_1",
            "prompt_ids_len": [5],
            "prompt_ids": [[7, 8, 3, 4, 5]],
            "answer_trajectory_ids": [[9, 0, 0], [2, 0, 0]],
            "teacher_output_ids": [[7, 8, 3, 4, 5, 2, 0, 0]],
            "complete_teacher_output_ids": [7, 8, 3, 4, 5, 2],
            "labels_ids": [7, 8, 3, 2],
        },
    ]


@pytest.mark.parametrize("starts", [[1, 4], [0, 2], [0]])
def test_unaligned_blocks_cannot_be_written(tmp_path: Path, starts: list[int]) -> None:
    response = [3, 4, 5, 6, 7]
    ends = [*starts[1:], 5]
    blocks = [[response[start:end]] for start, end in zip(starts, ends, strict=True)]
    path = tmp_path / "t.json"
    with pytest.raises(UsageError, match="row 'r': .* multiples of 3"):
        write_published(path, [TrajectoryRow("r", [1], response, starts, blocks)], 3, PAD)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("old")

    def rows() -> Any:
        yield TrajectoryRow("r", [1], [3], [0], [[[3]]])
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_published(path, rows(), 3, PAD)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match="cannot write"):
        write_published(path / "below", [], 3, PAD)


def changed(**changes: Any) -> list[dict]:
    return [two_blocks()[0], {**two_blocks()[1], **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no trajectories"),
        ("[1]", "item 1: must be an object with the fields data_id"),
        ('[{"question": "a", "answer": "b"}]', "item 1: lacks data_id.*has question, answer"),
        ('[{"data_id": ', "item 1 is not valid JSON"),
        (json.dumps(two_blocks())[:-9], "item 2 is not valid JSON"),
        ("[oops" + " " * (1 << 21), "item 1 is not valid JSON"),
        (changed(jacobian_itr_id="2"), "item 2: jacobian_itr_id must be 'itr_0'"),
        (changed(jacobian_itr_id="itr_0"), "item 2: data_3 has itr_0 twice"),
        (changed(answer_trajectory_ids=[]), "item 2: answer_trajectory_ids is empty"),
        (changed(answer_trajectory_ids=[[1, 2, 3], [1]]), "item 2: answer_trajectory_ids must be equally long lists"),
        (changed(answer_trajectory_ids=[[1, 2]]), "item 2: data_3 has blocks of 3 and of 2 tokens"),
        (changed(answer_trajectory_ids=[["a", "b", "c"]]), "item 2: answer_trajectory_ids must be"),
        (changed(answer_trajectory_ids=[[1, 2, 1.5]]), "item 2: answer_trajectory_ids must be"),
        (changed(prompt_ids=[[1, 2], [3, 4]]), "item 2: prompt_ids must be a list of token ids"),
        (changed(prompt_ids=[[1, 2, 3]]), "item 2: 3 prompt_ids leave no prompt before block 1 of 3 tokens"),
        (changed(prompt_ids=[[1, 2, 3, -100]]), r"item 2: prompt_ids must hold token ids from 0 to 2147483647, got -100"),
        (changed(prompt_ids="text"), "item 2: prompt_ids must be a list of token ids"),
        (changed(augmented_len=4), "item 2: augmented_len must be 0 .. 3, got 4"),
        (changed(augmented_len="x"), "item 2: augmented_len must be 0 .. 3, got 'x'"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=message) as caught:
        list(read_published(path))
    assert str(path) in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for name in ("missing.json", "empty.json"):
        with pytest.raises(UsageError, match=name):
            list(read_published(tmp_path / name))


def test_items_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(save(tmp_path / "t.json", two_blocks()))
    for chunk in (1, 7, 100):
        monkeypatch.setattr(published, "CHUNK", chunk)
        assert read(tmp_path / "t.json") == expected

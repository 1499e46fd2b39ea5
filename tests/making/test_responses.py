"""Who writes the responses that ``cllm make`` learns from."""

from pathlib import Path

import pytest
from commands import write_rows

from cllm.making.arguments import MakeArguments
from cllm.making.make import Making


@pytest.fixture
def making(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "1 + 1?"}])
    monkeypatch.setattr(Making, "_facts", lambda self: {"prompt_template": "chat"})
    return lambda **source: Making(
        MakeArguments(model=str(tiny_model_dir), prompts=[prompts], output=tmp_path / "out", device="cpu", **source)
    )


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"engine": "vllm", "tensor_parallel_size": 2},
        {"base_url": "http://127.0.0.1:8000/v1"},
        {"responses": "responses.jsonl"},
    ],
)
def test_options_go_on_to_collect(making, source) -> None:
    args = making(**source)._collecting(4, resume=True)
    expected = {"engine": "cllm", "base_url": None, "responses": None, "tensor_parallel_size": 1} | source
    assert {name: getattr(args, name) for name in expected} == expected


def test_another_engine_starts_anew_and_another_address_goes_on(making) -> None:
    def inputs(**source):
        return [stage.inputs for stage in making(**source).stages()]

    assert inputs(engine="vllm") != inputs() == inputs(base_url="http://a/v1") == inputs(base_url="http://b/v1")

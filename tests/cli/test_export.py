"""The export command: what it says, and pushing to a hub that stands in for the real one."""

from pathlib import Path
from typing import Any

import pytest
from commands import refused
from tiny import save_tiny_adapter

from cllm.cli import export
from cllm.serving import hub


class Hub:
    """Takes the place of ``HfApi``, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def create_repo(self, repository: str, exist_ok: bool) -> str:
        assert exist_ok
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    api = Hub()
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: api)
    return api


def test_export_and_push(tiny_model_dir: Path, tmp_path: Path, api: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my-cllm"
    export.main([str(tiny_model_dir), str(output)])
    assert capsys.readouterr().out == f"Checkpoint exported to {output}\n" and not api.calls
    export.main([str(tiny_model_dir), str(output), "--push"])
    assert "Pushed to https://hub/someone/my-cllm" in capsys.readouterr().out
    export.main([str(tiny_model_dir), str(output), "--push", "lab/model"])
    ((own, files), (named, _)) = api.calls
    assert (own, named) == ("someone/my-cllm", "lab/model") and {"custom_generate", "README.md"} <= set(files)


def test_an_adapter(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", tiny_model_dir)
    export.main([str(adapter), str(tmp_path / "whole")])
    export.main([str(adapter), str(tmp_path / "alone"), "--adapter_only"])
    assert "Checkpoint exported to" in (out := capsys.readouterr().out) and f"Adapter exported to {tmp_path / 'alone'}" in out
    message = refused(capsys, export.main, tiny_model_dir, tmp_path / "out", "--adapter_only")
    assert message.startswith("adapter_only needs a folder that") and not (tmp_path / "out").exists()


def test_a_hub_that_refuses(tiny_model_dir: Path, tmp_path: Path, api: Hub, capsys, monkeypatch) -> None:
    """Nothing is copied before somebody is logged in."""

    def offline() -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(api, "whoami", offline)
    message = refused(capsys, export.main, tiny_model_dir, tmp_path / "out", "--push")
    assert "cannot log in on the Hugging Face hub: no network" in message and "hf auth login" in message
    assert not (tmp_path / "out").exists()


def test_bad_input(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which is neither" in refused(capsys, export.main, "no/such/model", tmp_path / "out")
    assert "OUTPUT must differ from the folders of MODEL" in refused(capsys, export.main, tiny_model_dir, tiny_model_dir)
    assert "cannot read" in refused(capsys, export.main, tiny_model_dir, tmp_path / "out", "--results", tmp_path / "none.json")
    assert not (tmp_path / "out").exists()

"""Where a measurement ran."""

import subprocess

import pytest
import torch

from cllm.errors import UsageError
from cllm.evaluation.environment import check_writable, environment, git_revision


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_environment_names_versions_and_device():
    found = environment("cpu")
    assert set(found["versions"]) == {"python", "torch", "transformers", "cllm"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"] == "cpu" and found["device_name"] and found["threads"] == torch.get_num_threads()


def test_git_revision(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    assert git_revision(package) is None
    git(tmp_path, "init", "-q")
    assert git_revision(package) is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    commit = git_revision(package)
    assert commit is not None and len(commit) == 40
    (package / "a.py").write_text("2")
    assert git_revision(package) == commit + "-dirty"


def test_a_package_inside_another_projects_checkout_has_no_revision(tmp_path):
    package = tmp_path / "venv" / "lib" / "package"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    assert git_revision(package) is None


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new" / "file.json")
    assert not (tmp_path / "new" / "file.json").exists()
    with pytest.raises(UsageError, match="it is a folder"):
        check_writable(tmp_path)
    (tmp_path / "plain").write_text("kept")
    check_writable(tmp_path / "plain")
    assert (tmp_path / "plain").read_text() == "kept"
    with pytest.raises(UsageError, match="cannot write"):
        check_writable(tmp_path / "plain" / "below.json")

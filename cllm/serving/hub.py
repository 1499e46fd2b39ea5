"""Uploading a folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from cllm.errors import UsageError
from cllm.models import first_line


def account() -> str:
    """The name of the logged-in user. Raises UsageError if nobody is logged in or the hub cannot be reached."""
    with _refusals("log in"):
        return huggingface_hub.HfApi().whoami()["name"]


def push(folder: Path, repository: str) -> str:
    """Upload ``folder`` to the model repository ``owner/name``, creating it if necessary; returns its URL.

    Raises UsageError if the hub cannot be reached or refuses.
    """
    api = huggingface_hub.HfApi()
    with _refusals(f"push to {repository}"):
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Checkpoint exported by cllm")
    return str(address)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, hub and library errors have no common base
        raise UsageError(
            f"cannot {what} on the Hugging Face hub: {first_line(error)} "
            "(--push needs the network and a token: `hf auth login`, or HF_TOKEN)"
        ) from error

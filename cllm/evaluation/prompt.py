"""Examples as token ids, ready to decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example

LOCAL_FILES = ("test.jsonl", "test.jsonl.gz")  # looked for beside the paper's scripts when no --filename is given


@dataclass(frozen=True)
class Prompt:
    """One example and the token ids that ask for its reply."""

    example: Example
    ids: list[int]


def encode(
    examples: Iterable[Example], template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that leave room for a reply in a context of ``context`` tokens, and those that do not."""
    fitting: list[Prompt] = []
    too_long: list[Prompt] = []
    for example in examples:
        messages: Any = example.messages
        prompt = Prompt(example, template.encode(messages, tokenizer))
        (fitting if context is None or len(prompt.ids) < context else too_long).append(prompt)
    return fitting, too_long


def batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    return [list(prompts[at : at + size]) for at in range(0, len(prompts), size)]


def default_file(filename: str | None, folder: Path) -> str | None:
    """``filename``, else the test file that lies in ``folder``, else None for the hub."""
    if filename is not None:
        return filename
    return next((str(folder / name) for name in LOCAL_FILES if (folder / name).is_file()), None)

"""The checkpoints published with the paper, by their exact hub names, and the prompts they were trained with.

Source: the README of github.com/hao-ai-lab/Consistency_LLM. This table replaces the record that their config.json lacks. Names
must match exactly: a local folder whose path contains one is a different checkpoint.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """One published model; all have 7B parameters."""

    name: str  # on the hub
    task: str
    prompt_template: str  # a name of cllm.prompts.DIALOGUES
    target: str | None = None  # the target model's name, for a CLLM


PUBLISHED = (
    Checkpoint("GAIR/Abel-7B-001", "gsm8k", "abel"),
    Checkpoint("cllm/consistency-llm-7b-math", "gsm8k", "abel", "GAIR/Abel-7B-001"),
    Checkpoint("cllm/deepseekcoder-7b-instruct-spider", "spider", "deepseek-instruct"),
    Checkpoint("cllm/consistency-llm-7b-spider", "spider", "deepseek-instruct", "cllm/deepseekcoder-7b-instruct-spider"),
    Checkpoint("cllm/deepseekcoder_7b_codesearch_net_python", "code_search_net", "deepseek-instruct"),
    Checkpoint(
        "cllm/consistency-llm-7b-codesearchnet",
        "code_search_net",
        "deepseek-instruct",
        "cllm/deepseekcoder_7b_codesearch_net_python",
    ),
    Checkpoint("cllm/vicuna-7b-sharegpt-gpt4-48k", "sharegpt", "vicuna"),
    Checkpoint("cllm/consistency-llm-7b-sharegpt48k", "sharegpt", "vicuna", "cllm/vicuna-7b-sharegpt-gpt4-48k"),
)


def published_record(name: str | None) -> dict[str, Any]:
    """The record for the published checkpoint ``name``; {} for any other name."""
    for checkpoint in PUBLISHED:
        if checkpoint.name == name:
            target = {"target_model": checkpoint.target} if checkpoint.target else {}
            return {"prompt_template": checkpoint.prompt_template, "task": checkpoint.task} | target
    return {}


def published_for(task: str) -> list[Checkpoint]:
    """The published checkpoints of a task."""
    return [checkpoint for checkpoint in PUBLISHED if checkpoint.task == task]

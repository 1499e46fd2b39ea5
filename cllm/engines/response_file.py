"""Responses that were written anywhere, from a JSONL file.

A row has the prompt, as ``prompt_token_ids`` or as a file of prompts has it (:mod:`cllm.tasks.own_prompts`), and the response,
as ``token_ids`` or as text: ``response``, or a last message of the assistant. Text is a whole response unless
``finish_reason`` is ``length``.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.errors import UsageError
from cllm.files import BadRow, read_rows
from cllm.prompts import PromptTemplate
from cllm.tasks import OWN_PROMPTS, get_task
from cllm.tasks.base import BadField
from cllm.trajectory.collect import Prompt, Response
from cllm.trajectory.record import MAX_TOKEN_ID, Dropped

logger = logging.getLogger(__name__)


class ResponseFile:
    """The responses in ``path``, found by the tokens of their prompts.

    Raises UsageError for a file that cannot be read or has no usable row; rows that cannot be used are counted in a warning.
    """

    def __init__(self, path: str, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.responses: dict[bytes, array[int]] = {}
        bad: Counter[str] = Counter()
        for _, row in read_rows(Path(path)):
            try:
                if isinstance(row, BadRow):
                    raise BadField(row.reason)
                prompt, response = self._parse(row)
            except (BadField, UsageError) as error:
                bad[str(error)] += 1
            else:
                self.responses[_key(prompt)] = array("i", response)
        reasons = "; ".join(f"{count} rows skipped: {reason}" for reason, count in bad.items())
        if not self.responses:
            raise UsageError(f"no response can be read from {path}" + (f" ({reasons})" if reasons else ""))
        if bad:
            logger.warning("%s: %s", path, reasons)

    def respond(self, prompts: Iterable[Prompt], together: int) -> Iterator[Response | Dropped]:
        """In the order of the prompts."""
        for prompt in prompts:
            response = self.responses.get(_key(prompt.ids))
            yield Dropped(prompt.row_id, "no response in the file") if response is None else (prompt, response.tolist())

    def _parse(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Prompt and response as token ids. Raises BadField and UsageError for a row that lacks one of them."""
        prompt, response = row.get("prompt_token_ids"), row.get("token_ids")
        text = row.get("response")
        if prompt is None:
            example, *others = get_task(OWN_PROMPTS).read([(0, dict(row))], "train")
            if others:
                raise BadField("several prompts")
            if isinstance(example, BadRow):
                raise BadField(example.reason)
            prompt = self.template.encode(example.messages, self.tokenizer)
            text = example.reference if text is None else text
        if response is None:
            if not isinstance(text, str):
                raise BadField("no token_ids, and no response as text")
            response = self.tokenizer(text, add_special_tokens=False).input_ids
            if row.get("finish_reason") != "length":
                response.append(self.template.end_id(self.tokenizer))
        return _ids(prompt, "prompt_token_ids"), _ids(response, "token_ids")


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(token, int) and 0 <= token <= MAX_TOKEN_ID for token in value):
        raise BadField(f"field {name!r} is no list of token ids")
    return value


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()

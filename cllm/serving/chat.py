"""A conversation with a model, with streamed replies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase, TextStreamer

from cllm.decoding import GREEDY, JacobiDecoder, RowResult, Sampling
from cllm.errors import UsageError
from cllm.files import StrPath, write_json
from cllm.prompts import PromptTemplate


@dataclass(frozen=True)
class Reply:
    """One reply and its statistics."""

    text: str
    result: RowResult
    seconds: float
    sampling: Sampling = GREEDY

    def statistics(self) -> str:
        count = len(self.result.token_ids)
        return (
            f"{count} tokens, {self.result.forwards} forwards, {self.result.tokens_per_forward:.2f} tokens per forward, "
            f"{count / self.seconds:.1f} tokens/s, {self.result.fast_forwarded} fast-forwarded, "
            f"{self.result.stationary} stationary, stopped by {self.result.stop}"
        )

    def compared_with(self, other: Reply) -> str:
        """Where this reply first differs from ``other``, and how long both took."""
        ids, others = self.result.token_ids, other.result.token_ids
        same = next((at for at, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))
        text = "the same text" if ids == others else f"the texts differ from token {same} on, counted from 0"
        return f"{text}; {self.seconds:.2f} s, earlier {other.seconds:.2f} s"


@dataclass
class Conversation:
    """The turns so far; a reply that fails or is interrupted leaves them unchanged.

    Each reply is sampled with its own seed, so repeating a question gives another reply. ``decoder`` may be replaced between
    replies.
    """

    decoder: JacobiDecoder
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    max_new_tokens: int
    sampling: Sampling = GREEDY
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Reply | None = None

    def ask(self, question: str, show: Callable[[str], None]) -> Reply:
        """Reply to ``question``; ``show`` is called with each piece of text as soon as its words are complete.

        Raises UsageError if the conversation no longer fits into the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        self.sampling = self.sampling.derive("the next answer")
        self.last = self._answer(messages, self.sampling, show)
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        return self.last

    def answer_again(self, show: Callable[[str], None]) -> Reply:
        """Reply to the last question again, with the current decoder and the same seed; leaves the turns unchanged.

        Raises UsageError if there is no reply yet.
        """
        if self.last is None:
            raise UsageError("nothing has been answered yet")
        return self._answer(self.messages[:-1], self.last.sampling, show)

    def reset(self) -> None:
        self.messages, self.last = [], None

    def save(self, path: StrPath) -> None:
        """Write the turns as a JSON list of one row with ``messages``, which the task sharegpt can read.

        Raises UsageError if the file cannot be written.
        """
        write_json(path, [{"messages": self.messages}])

    def _answer(self, messages: list[dict[str, str]], sampling: Sampling, show: Callable[[str], None]) -> Reply:
        prompt = self.template.encode(messages, self.tokenizer)
        start = time.perf_counter()
        (result,) = self.decoder.generate(
            [prompt], max_new_tokens=self.max_new_tokens, sampling=sampling, streamer=_Printer(self.tokenizer, show)
        )
        seconds = time.perf_counter() - start
        text = str(self.tokenizer.decode(result.token_ids, skip_special_tokens=True)).strip()
        return Reply(text, result, seconds, sampling)


class _Printer(TextStreamer):
    """A streamer that passes whole words to a callback."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)

"""A conversation with a model: turns in, streamed replies out."""

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
    """One answer and what it cost."""

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
        """Where the tokens part from another answer's, and how long the two took."""
        ids, others = self.result.token_ids, other.result.token_ids
        same = next((at for at, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))
        text = "the same text" if ids == others else f"the texts part at token {same}, counted from 0"
        return f"{text}; {self.seconds:.2f} s, before {other.seconds:.2f} s"


@dataclass
class Conversation:
    """Keeps the turns so far; an answer that fails or is interrupted leaves them as they were.

    Every answer draws with a seed of its own, so a question that is asked again gets another answer. ``decoder`` may be
    changed between two answers.
    """

    decoder: JacobiDecoder
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    max_new_tokens: int
    sampling: Sampling = GREEDY
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Reply | None = None

    def ask(self, question: str, show: Callable[[str], None]) -> Reply:
        """Answer ``question``; ``show`` gets pieces of the text as soon as whole words are there.

        Raises UsageError when the conversation no longer fits into the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        self.sampling = self.sampling.of("the next answer")
        self.last = self._answer(messages, self.sampling, show)
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]
        return self.last

    def answer_again(self, show: Callable[[str], None]) -> Reply:
        """The last question's answer from the present decoder, with the same draws. The turns stay as they are.

        Raises UsageError where nothing has been answered yet.
        """
        if self.last is None:
            raise UsageError("nothing has been answered yet")
        return self._answer(self.messages[:-1], self.last.sampling, show)

    def reset(self) -> None:
        self.messages, self.last = [], None

    def save(self, path: StrPath) -> None:
        """Write the turns as a JSON list of one row in the ``messages`` form, which the task sharegpt reads.

        Raises UsageError where the file cannot be written.
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
    """Hands whole words to a callback."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)

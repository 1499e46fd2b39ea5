"""A conversation with a model: turns in, streamed replies out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase, TextStreamer

from cllm.decoding import GREEDY, JacobiDecoder, RowResult, Sampling
from cllm.prompts import PromptTemplate


@dataclass(frozen=True)
class Reply:
    """One answer and what it cost."""

    text: str
    result: RowResult
    seconds: float

    def statistics(self) -> str:
        count = len(self.result.token_ids)
        return (
            f"{count} tokens, {self.result.forwards} forwards, {self.result.tokens_per_forward:.2f} tokens per forward, "
            f"{count / self.seconds:.1f} tokens/s, {self.result.fast_forwarded} fast-forwarded, "
            f"{self.result.stationary} stationary, stopped by {self.result.stop}"
        )


@dataclass
class Conversation:
    """Keeps the turns so far; an answer that fails or is interrupted leaves them as they were.

    Every answer draws with the next seed, so a question that is asked again gets another answer.
    """

    decoder: JacobiDecoder
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    max_new_tokens: int
    sampling: Sampling = GREEDY
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, show: Callable[[str], None]) -> Reply:
        """Answer ``question``; ``show`` gets pieces of the text as soon as whole words are there.

        Raises UsageError when the conversation no longer fits into the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.template.encode(messages, self.tokenizer)
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        start = time.perf_counter()
        (result,) = self.decoder.generate(
            [prompt],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            streamer=_Printer(self.tokenizer, show),
        )
        seconds = time.perf_counter() - start
        text = str(self.tokenizer.decode(result.token_ids, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return Reply(text, result, seconds)

    def reset(self) -> None:
        self.messages = []


class _Printer(TextStreamer):
    """Hands whole words to a callback."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)

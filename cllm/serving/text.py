"""Text out of token ids that come bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class TextStream:
    """The text of one response as it grows, up to the first stop string, which is left out.

    What may turn out to be part of a character or of a stop string is held back. Special tokens are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []  # the last ids whose text is known, and those behind them
        self._known = 0
        self._held = ""
        self.stopped = False  # whether a stop string was met
        self.tokens = 0  # put in, up to the one that completed a stop string

    def put(self, token_ids: Sequence[int]) -> str:
        """The text that is sure now and was not before."""
        text = ""
        for some in [[token] for token in token_ids] if self._stops else [token_ids]:
            if self.stopped:
                break
            text += self._put(some)
            self.tokens += len(some)
        return text

    def _put(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if text.endswith(UNFINISHED) or text == before:  # behind special tokens alone, a word would lose its space
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return self._release(text[len(before) :])

    def end(self) -> str:
        """What was held back, once no more ids come."""
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        self._ids, self._known = [], 0
        sure = self._release(text[len(before) :])
        held, self._held = self._held, ""
        return sure if self.stopped else sure + held

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        unsure = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - unsure :]
        return text[: len(text) - unsure]

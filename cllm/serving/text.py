"""Incremental decoding of token ids to text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # how a tokenizer decodes an incomplete character


class TextStream:
    """The text of one response as it grows, up to but excluding the first stop string.

    Holds back text that may be part of an incomplete character or of a stop string. Skips special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []  # the latest ids: first those whose text has been decoded, then new ones
        self._known = 0  # how many of them have been decoded
        self._held = ""
        self.stopped = False  # whether a stop string was found
        self.tokens = 0  # number of ids put in, up to the one that completed a stop string

    def put(self, token_ids: Sequence[int]) -> str:
        """Add ids; returns the text that has become certain."""
        text = ""
        for piece in [[token] for token in token_ids] if self._stops else [token_ids]:
            if self.stopped:
                break
            text += self._put(piece)
            self.tokens += len(piece)
        return text

    def _put(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if text.endswith(UNFINISHED) or text == before:  # after nothing but special tokens, a word would lose its space
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return self._release(text[len(before) :])

    def end(self) -> str:
        """The text held back; to be called after the last id."""
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        self._ids, self._known = [], 0
        certain = self._release(text[len(before) :])
        held, self._held = self._held, ""
        return certain if self.stopped else certain + held

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
        uncertain = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - uncertain :]
        return text[: len(text) - uncertain]

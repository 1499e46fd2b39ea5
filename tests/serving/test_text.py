"""Incremental decoding gives the same text as decoding at once."""

import random

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cllm.serving.text import TextStream


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most non-ASCII characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def pieces(stream: TextStream, ids: list[int], draw: random.Random) -> list[str]:
    found = []
    while ids:
        size = draw.randint(1, 4)
        found.append(stream.put(ids[:size]))
        ids = ids[size:]
    return [*found, stream.end()]


TEXTS = ["plain", "naïve Grüße, 日本語 und 🙂🙃!", "  spaces \n and\tends  ", "", "broken " + "\ufffd"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    for seed in range(20):
        found = pieces(TextStream(tokenizer), tokenizer(text).input_ids, random.Random(seed))
        assert "".join(found) == text
        assert not any(piece.endswith("\ufffd") for piece in found[:-1])


def test_incomplete_character_at_the_end_is_shown() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🙂").input_ids[:-1]
    assert "".join(pieces(TextStream(tokenizer), ids, random.Random(0))) == tokenizer.decode(ids)


@pytest.mark.parametrize("stops", [["END"], ["ND", "D x"], ["never", "EN"], ["E"], ["two EN three", "N t"]])
def test_text_ends_before_a_stop_string(stops: list[str]) -> None:
    """The stop string completed first counts, however the tokens are split."""
    tokenizer, text = tiny_tokenizer(), "one E two EN three END x END"
    end, first = min((at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0)
    for seed in range(20):
        stream = TextStream(tokenizer, stops)
        found = pieces(stream, tokenizer(text).input_ids, random.Random(seed))
        assert stream.stopped and "".join(found) == text[:first] and stream.tokens == end


def test_partial_stop_string_is_text() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["END"])
    assert stream.put(tokenizer("the EN").input_ids) == "the "
    assert stream.end() == "EN" and not stream.stopped


def test_special_tokens_are_skipped() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)
    assert stream.put([*tokenizer("ab").input_ids, tokenizer.eos_token_id]) + stream.end() == "ab"


def test_special_token_within_the_text_removes_no_space() -> None:
    """Tokenizers like Llama 2's drop the space before the first word of their input."""
    words = {"\u2581one": 0, "\u2581two": 1, "<x>": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<x>"])
    for ids in ([0, 2, 1], [2, 0, 2, 2, 1, 0], [0, 1, 2]):
        stream = TextStream(tokenizer)
        assert "".join(stream.put([token]) for token in ids) + stream.end() == tokenizer.decode(ids, skip_special_tokens=True)

"""Compares an exported checkpoint's decoding with AR decoding, with torch and transformers only; see export_check.sh."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import takewhile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
from transformers.utils import logging

QUESTIONS = [
    "A camper van can be rented for a fee of $14 plus $18 an hour. A group of 5, Olive among them, rents it for 2 hours and "
    "splits the cost equally. How many dollars does each one pay?",
    "Pavel's book has 180 pages. He reads 19 pages every evening. How many pages are left after 7 evenings?",
    "At the school bazaar, Hana buys 8 candles for $10 each and 5 baskets for $6 each. How many dollars does she pay in total?",
    "What is 12 + 30?",
]
LENGTH = 64
failed = False


def main() -> None:
    logging.disable_progress_bar()
    path = sys.argv[1]
    packages = {found.metadata["Name"].lower(): found.version for found in distributions()}
    assert find_spec("cllm") is None
    print(f"{len(packages)} packages: torch {packages['torch']}, transformers {packages['transformers']}, and their dependencies")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    for size in (1, 4):
        inputs = encode(tokenizer, QUESTIONS[:size])
        output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, return_dict_in_generate=True)
        expected = plain.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        counts = [tokens(plain, row) for row in output.sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        forwards = output.forwards.tolist()
        shown = f"{', '.join(map(str, counts))} tokens in {', '.join(map(str, forwards))} forwards"
        compare(f"batch {size}: {shown}", torch.equal(output.sequences, expected), "the text without trust_remote_code (AR)")
    inputs = encode(tokenizer, QUESTIONS[:1])
    if getattr(model.config, "cllm", {}).get("lossless"):
        check_adapter(model, inputs)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    whole = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, streamer=streamer)
    pieces = list(filter(None, streamer))
    text = tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    compare(f"streamed: {len(pieces)} pieces", "".join(pieces) == text, "the whole text")
    print(f"\n{text}")
    sys.exit(failed)


def check_adapter(model, inputs) -> None:
    """Check that decoding with and without the consistency adapter gives the same text; print the numbers of forwards."""
    options = {"max_new_tokens": LENGTH, "do_sample": False, "return_dict_in_generate": True}
    drafted, plain = model.generate(**inputs, **options), model.generate(**inputs, **options, drafts=0)
    shown = f"{int(drafted.forwards)} forwards with the adapter, {int(plain.forwards)} without"
    compare(shown, torch.equal(drafted.sequences, plain.sequences), "each other")


def encode(tokenizer, questions: list[str]):
    """The questions as a left-padded batch."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    if not tokenizer.chat_template:
        return tokenizer(questions, return_tensors="pt", padding=True)
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)


def tokens(model, ids: list[int]) -> int:
    """The length of a response including the token that ends it."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return min(len(list(takewhile(lambda token: token not in ends, ids))) + 1, len(ids))


def compare(what: str, same: bool, other: str) -> None:
    """Print the outcome of a comparison, and remember a failure for the exit status."""
    global failed
    failed = failed or not same
    print(f"{what}, {'equal to' if same else 'DIFFERENT FROM'} {other}", flush=True)


if __name__ == "__main__":
    main()

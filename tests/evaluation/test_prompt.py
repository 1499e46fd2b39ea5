"""Examples as token ids."""

from tiny import tiny_tokenizer

from cllm.evaluation.prompt import batches, default_file, encode
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example, user_turn


def example(name: str, question: str) -> Example:
    return Example(user_turn(question), id=name)


def test_prompts_that_fill_the_context_are_set_apart():
    template, tokenizer = PromptTemplate("{question}"), tiny_tokenizer()
    examples = [example("a", "12345"), example("b", "1234"), example("c", "123456")]
    fitting, too_long = encode(examples, template, tokenizer, 5)
    assert [p.example.id for p in fitting] == ["b"] and [p.example.id for p in too_long] == ["a", "c"]
    assert tokenizer.decode(fitting[0].ids) == "1234"
    assert len(encode(examples, template, tokenizer, None)[0]) == 3


def test_batches_keep_order_and_the_last_is_short():
    prompts, _ = encode([example(str(i), "x") for i in range(5)], PromptTemplate("{question}"), tiny_tokenizer(), None)
    assert [[p.example.id for p in batch] for batch in batches(prompts, 2)] == [["0", "1"], ["2", "3"], ["4"]]


def test_default_file(tmp_path):
    assert default_file(None, tmp_path) is None
    (tmp_path / "test.jsonl.gz").write_text("")
    assert default_file(None, tmp_path) == str(tmp_path / "test.jsonl.gz")
    (tmp_path / "test.jsonl").write_text("")
    assert default_file(None, tmp_path) == str(tmp_path / "test.jsonl")
    assert default_file("mine.jsonl", tmp_path) == "mine.jsonl"

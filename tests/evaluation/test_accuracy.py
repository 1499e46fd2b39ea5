"""Answers: which are asked, kept, taken over and how they are summed up."""

import json
from dataclasses import replace

import pytest
from tiny import EOS_ID, tiny_model, tiny_tokenizer

from cllm.decoding import JacobiDecoder, Sampling
from cllm.errors import UsageError
from cllm.evaluation import accuracy
from cllm.evaluation.prompt import encode
from cllm.prompts import PromptTemplate
from cllm.result_file import read_settings
from cllm.tasks import get_task
from cllm.tasks.base import Example, user_turn

TASK = get_task("gsm8k")


def example(name="a", question="How many?", target="18", **tags):
    return Example(user_turn(question), None, target, tags, id=name)


def row(name="a", reply="#### 18", target="18", tokens=6, forwards=3, stop="eos", **tags):
    facts = {"tags": tags, "tokens": tokens, "forwards": forwards, "stop": stop}
    return {"id": name, "question": "How many?", "target": target, "reply": reply} | facts


def test_select_by_source_in_any_case():
    rows = [example("a", source="GSM8K"), example("b", source="math"), example("c", source="gsm8k")]

    def chosen(dev_set, limit=None):
        return [e.id for e in accuracy.select(rows, TASK, dev_set, limit)]

    assert chosen("gsm8k") == ["a", "c"] and chosen("Math") == ["b"] and chosen("all") == ["a", "b", "c"]
    assert chosen("gsm8k", 1) == ["a"]  # the limit counts what was chosen, not what was read
    assert chosen("math", 1) == ["b"]
    with pytest.raises(UsageError, match="no row has the source 'svamp'; choose from all, gsm8k, math"):
        chosen("svamp")


def test_rows_without_source_are_the_tasks_own():
    assert accuracy.select([example()], TASK, "gsm8k", None)
    with pytest.raises(UsageError, match="choose from all, gsm8k"):
        accuracy.select([example()], TASK, "math", None)


def test_answers_come_shortest_first_and_carry_their_ids():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    examples = [example("long", "x" * 30), example("short", "x"), example("middle", "x" * 9)]
    template = PromptTemplate("{question}")
    prompts, _ = encode(examples, template, tokenizer, None)
    decoder = JacobiDecoder(model, 5, eos_token_ids=[EOS_ID])
    batches = list(accuracy.answer(decoder, tokenizer, TASK, prompts, template, max_new_tokens=7, batch_size=2))
    assert [[r["id"] for r in batch] for batch in batches] == [["short", "middle"], ["long"]]
    for answer in (answer for batch in batches for answer in batch):
        ids = next(p.ids for p in prompts if p.example.id == answer["id"])
        alone = decoder.generate([ids], max_new_tokens=7)[0]
        assert answer["reply"] == tokenizer.decode(alone.token_ids, skip_special_tokens=True)
        assert (answer["tokens"], answer["prompt_tokens"]) == (len(alone.token_ids), len(ids))
        assert {"accuracy", "strict", "stop", "target", "question"} <= set(answer)
        json.dumps(answer)


def test_samples_have_ids_and_seeds_of_their_own():
    drawn = accuracy.samples([example("a"), example("b", "Why?")], 3)
    assert [sample.id for sample in drawn] == ["a", "a#2", "a#3", "b", "b#2", "b#3"]
    assert [sample.messages for sample in drawn[3:]] == [example("b", "Why?").messages] * 3
    seeds = [Sampling(seed=seed).derive(sample.id).seed for sample in drawn for seed in (0, 1)]
    assert len(set(seeds)) == 12 and Sampling().derive("a").seed == seeds[0]
    assert accuracy.samples([example("a")], 1) == [example("a")]


def test_resume_takes_answers_over(tmp_path):
    path, settings = tmp_path / "answers.jsonl", {"model": "m", "block_size": 4}
    accuracy.AnswerFile(path, settings).append([row("a"), row("b")])
    with open(path, "a") as file:
        file.write('{"id": "c", "repl')  # a killed writer's last line
    again = accuracy.AnswerFile(path, settings)
    assert set(again.rows) == {"a", "b"} and again.has(example("a")) and not again.has(example("c"))
    again.append([row("c")])
    assert set(accuracy.AnswerFile(path, settings).rows) == {"a", "b", "c"}


def test_resume_refuses_other_settings_by_name(tmp_path):
    path = tmp_path / "answers.jsonl"
    accuracy.AnswerFile(path, {"model": "m", "block_size": 4}).append([row()])
    with pytest.raises(UsageError, match="other settings: block_size was 4 and is 8"):
        accuracy.AnswerFile(path, {"model": "m", "block_size": 8})
    assert read_settings(path) == {"model": "m", "block_size": 4}
    assert accuracy.AnswerFile(path, {"model": "m", "block_size": 8}, resume=False).rows == {}
    assert not path.exists()


def test_resume_refuses_answers_of_unknown_origin(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    with pytest.raises(UsageError, match=r"answers.jsonl exists, but answers.jsonl.settings.json, which"):
        accuracy.AnswerFile(path, {})
    settings = tmp_path / "answers.jsonl.settings.json"
    settings.symlink_to(settings.name)  # there, but not to be read
    with pytest.raises(UsageError, match=r"cannot read .*answers.jsonl.settings.json: Too many levels of symbolic links"):
        accuracy.AnswerFile(path, {})


def test_resume_refuses_another_question_under_the_same_id(tmp_path):
    answers = accuracy.AnswerFile(tmp_path / "answers.jsonl", {})
    answers.append([row()])
    assert answers.has(example())
    for other in (example(question="How few?"), replace(example(), target="19")):
        with pytest.raises(UsageError, match="another question as a"):
            answers.has(other)


def test_rows_that_are_no_answers_are_refused():
    with pytest.raises(UsageError, match="x.jsonl is not a file of answers: a row has no question, target, reply"):
        accuracy.checked_answers([{"id": 1}], "x.jsonl")


@pytest.mark.parametrize("field", ["id", "question", "reply"])
def test_answers_are_text(field):
    with pytest.raises(UsageError, match=rf"x.jsonl is not a file of answers: {field} of row .* is not text"):
        accuracy.checked_answers([row() | {field: None}], "x.jsonl")


def test_summary_of_hand_made_rows():
    rows = [
        row("a", "#### 18", tokens=8, forwards=4),
        row("b", "it is 18", tokens=4, forwards=2, stop="length"),
        row("c", "#### 19", tokens=6, forwards=3),
        row("d", "", tokens=0, forwards=0, stop=accuracy.TOO_LONG),
    ]
    summary = accuracy.summarise(TASK, accuracy.rescore(TASK, rows))
    assert list(summary["scores"]) == ["accuracy", "strict"]
    assert (summary["scores"]["accuracy"]["mean"], summary["scores"]["strict"]["mean"]) == (0.5, 0.25)
    assert summary["scores"]["accuracy"]["interval"] == pytest.approx((0.15, 0.85), abs=1e-3)
    assert (summary["answers"], summary["too_long"], summary["unfinished"]) == (4, ["d"], 1)
    assert (summary["tokens_per_forward"], summary["mean_tokens"]) == (2.0, 6.0)
    assert summary["groups"] == {}


def test_intervals_are_over_problems_not_samples():
    once = [row(name, reply, tokens=tokens) for name, reply, tokens in (("a", "18", 9), ("b", "7", 6), ("c#2", "18", 3))]
    again = [{**answer, "id": f"{answer['id']}#{number}"} for answer in once for number in range(2, 9)]
    alone, together = (accuracy.summarise(TASK, accuracy.rescore(TASK, rows)) for rows in (once, [*once, *again]))
    assert together["scores"]["accuracy"]["interval"] == pytest.approx(alone["scores"]["accuracy"]["interval"])
    assert together["tokens_per_forward_interval"] == alone["tokens_per_forward_interval"]
    assert accuracy.problems(once) == ["a", "b", "c#2"]


def test_groups_are_those_that_divide():
    rows = [row(str(i), source="gsm8k", level=str(i % 2), number=str(i)) for i in range(30)]
    assert {name: len(group) for name, group in accuracy.groups(rows).items()} == {"level=0": 15, "level=1": 15}


def test_rescoring_ignores_the_scores_in_the_file():
    stale = row(reply="#### 18") | {"accuracy": False, "strict": False}
    assert accuracy.rescore(TASK, [stale])[0]["accuracy"] is True


def test_a_prompt_that_is_too_long_is_a_wrong_answer():
    _, too_long = encode([example()], PromptTemplate("{question}"), tiny_tokenizer(), 3)
    found = accuracy.too_long_rows(TASK, too_long)[0]
    assert (found["accuracy"], found["tokens"], found["stop"]) == (False, 0, accuracy.TOO_LONG)

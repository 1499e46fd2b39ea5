"""Grading against a real HTTP server that speaks the OpenAI protocol and fails as servers do."""

import json
import sys
import time
from argparse import ArgumentParser
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import fault, sequence, serving

from cllm.errors import UsageError
from cllm.scoring.endpoint import Endpoint, Refused
from cllm.scoring.judge import (
    Case,
    Judge,
    add_options,
    configured,
    own_prompts,
    prompt_name,
    read_prompts,
    read_references,
)
from cllm.scoring.score import parse_score


def reply(text):
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def endpoint(server, key=None, **options):
    return Endpoint(server.url, "judge-1", key, **({"timeout": 5} | options))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds between two tries, which nobody waits for."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


ASK = [{"role": "user", "content": "Grade this."}]


# ------------------------------------------------------------------ endpoint


def test_the_request():
    with serving(sequence(reply("Rating: [[8]]"))) as server:
        assert endpoint(server, key="secret").complete(ASK) == "Rating: [[8]]"
        ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer secret"
    assert body == {"model": "judge-1", "messages": ASK, "temperature": 0, "max_tokens": 2048}


FAULTS = {
    "too many requests": fault(429, "slow down"),
    "server error": fault(500),
    "bad gateway as html": (502, {}, "<html>"),
    "overloaded": fault(529),
    "dropped": "drop",
    "garbage": (200, {}, "{oops"),
    "no json at all": (200, {}, ""),
    "no choices": (200, {}, json.dumps({"choices": []})),
    "null content": (200, {}, json.dumps({"choices": [{"message": {"content": None}}]})),
    "a list": (200, {}, "[1]"),
    "cut short": (200, {"X-Short": "yes"}, json.dumps({"choices": [{"message": {"content": "x"}}]})[:-5]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_transient_errors_are_retried(name):
    with serving(sequence(FAULTS[name], FAULTS[name], reply("done"))) as server:
        assert endpoint(server).complete(ASK) == "done"
        assert len(server.seen) == 3


def test_parts_are_joined():
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "Rating: "}, {"type": "text", "text": "7"}]}}]}
    with serving(sequence((200, {}, json.dumps(parts)))) as server:
        assert endpoint(server).complete(ASK) == "Rating: 7"


def test_tries_are_limited_and_the_last_fault_is_named():
    with serving(sequence(fault(503, "busy"))) as server, pytest.raises(UsageError, match=r"4 tries.*HTTP 503.*busy.*run again to go on"):
        endpoint(server, retries=3).complete(ASK)
    assert len(server.seen) == 4


def test_an_unreachable_server():
    with pytest.raises(UsageError, match=r"no answer in 2 tries.*refused"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1).complete(ASK)


def test_back_off_grows_and_retry_after_is_obeyed(pauses):
    with serving(sequence(fault(500), fault(500), fault(429, **{"Retry-After": "2.5"}), reply("x"))) as server:
        endpoint(server).complete(ASK)
    assert 0 < pauses[0] < pauses[1] and pauses[2] == 2.5


def test_replies_without_text_are_limited():
    with serving(sequence(FAULTS["garbage"])) as server, pytest.raises(UsageError, match="gave 3 replies that are no chat completions"):
        endpoint(server, retries=2).complete(ASK)
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_errors_are_not_retried(status):
    with (
        serving(sequence(fault(status, "bad key"))) as server,
        pytest.raises(UsageError, match=f"HTTP {status}.*bad key"),
    ):
        endpoint(server, key="secret").complete(ASK)
    assert len(server.seen) == 1


def test_an_empty_account_is_named():
    spent = (429, {}, json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}}))
    with serving(sequence(spent)) as server, pytest.raises(UsageError, match="insufficient_quota"):
        endpoint(server).complete(ASK)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match="pip install openai"):
        Endpoint("http://127.0.0.1:9/v1", "m")


def test_a_redirect_never_gets_the_key():
    with serving(sequence(reply("stolen"))) as other, serving(sequence((302, {"Location": other.url}, ""))) as server:
        with pytest.raises(UsageError, match="redirects to"):
            endpoint(server, key="secret").complete(ASK)
        assert other.seen == []


def test_one_refused_request():
    with (
        serving(sequence(fault(400, "context length exceeded"))) as server,
        pytest.raises(Refused, match="context length"),
    ):
        endpoint(server).complete(ASK)


def test_unsupported_parameters_are_left_out():
    def script(number, body):
        if "max_tokens" in body:
            return fault(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return fault(400, "'temperature' does not support 0 with this model")
        return reply("fine")

    with serving(script) as server:
        judge = endpoint(server)
        assert judge.complete(ASK) == "fine" and judge.complete(ASK) == "fine"
        assert [set(body) - {"model", "messages"} for _, _, body in server.seen] == [
            {"temperature", "max_tokens"},
            {"temperature", "max_completion_tokens"},
            {"max_completion_tokens"},
            {"max_completion_tokens"},
        ]


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "localhost:8000", "ftp://x/v1", "", "http://[::1/v1", "http://h:abc/v1", "http://h/v 1",
     "http://h/v\u00f6", "http://:80/v1"],
)  # fmt: skip
def test_only_http(url):
    with pytest.raises(UsageError, match="must look like http"):
        Endpoint(url, "m")


# -------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good answer. Rating: [[8]]", 8),
        ("[[8.5]]", 8.5),
        ("Rating: 8", 8),
        ("8/10", 8),
        ("I would give it 8 / 10.", 8),
        ("**Rating:** [[7/10]]", 7),
        ("**Rating: 7**", 7),
        ("Rating: [7]", 7),
        ("[[ Rating: 9 ]]", 9),
        ("[[8,5]]", 8.5),
        ("[[eight]]", 8),
        ("An eight out of 10", 8),
        ("Final rating is **9**/10", 9),
        ('{"score": 4, "why": "2 faults"}', 4),
        ("Rating:\n\n6", 6),
        ("Score \u2013 3", 3),
        ("10", 10),
        ("On a scale of 1 to 10, I rate it 7/10.", 7),
        ("First turn [[3]], second turn [[9]]", 9),
        ("As [1] says. Rating: 7", 7),
        ("It lists [12] things; 6 out of 10", 6),
        ("Rating: [[11]]. I mean 9/10", 9),
        ("8 of 10", 8),
        ("Rating: 8 of 10", 8),
        ("8 out of 10", 8),
        ("Fine, see [2] and [3]. [8].", 8),
        ("It adds nums[0] and then nums[1], which is an off-by-one error. It", None),
        ("It should be nums[1]", None),
        ("See [1] and [2] for more", None),
        ("Rating: 3 of 5", None),
        ("Rating: 80/100", None),
        ("Rating: 85%", None),
        ("Rating: [[rating]]", None),
        ("I rate it on a scale of 1 to 10.", None),
        ("score: -3", None),
        ("3 apples and 4 pears", None),
        ("", None),
        ("[[1000]]", None),
    ],
)
def test_scores_in_odd_forms(text, score):
    assert parse_score(text) == score


@settings(deadline=None)
@given(
    st.integers(0, 100).map(lambda n: n / 10),
    st.text(alphabet="ab .\n", max_size=20),
    st.text(alphabet="ab .\n", max_size=9),
)
def test_a_bracketed_score_is_always_found(score, before, after):
    assert parse_score(f"{before}[[{score}]]{after}") == score


@settings(deadline=None)
@given(st.text(alphabet="[]0123456789./, ratingscore:ofut-%\n", max_size=60))
def test_the_parser_accepts_any_text(text):
    score = parse_score(text)
    assert score is None or 0 <= score <= 10


def test_long_texts_are_parsed_quickly():
    start = time.perf_counter()
    for text in ("rating " * 5000, "[" * 20000, "1 " * 20000, "score:" + " " * 20000, "9" * 20000):
        parse_score(text)
    assert time.perf_counter() - start < 5


# ------------------------------------------------------------------- judging

CASES = [
    Case(81, "writing", ("write", "again"), ("w1", "w2")),
    Case(111, "math", ("1+1?", "and 2+2?"), ("2", "5"), ("two", "four")),
    Case(121, "coding", ("code", "more"), ("c1", "c2"), ("ref", "")),  # no reference for the second turn
]
SCORES = {"w1": "[[8.5]]", "w2": "8/10", "2": "**Rating:** 10", "5": "[[one]]", "c1": "no idea", "c2": "Rating: [[4]]"}


def grade(number, body):
    """A score derived from the last answer in the request, in odd forms."""
    text = body["messages"][-1]["content"]
    found = max(SCORES, key=lambda answer: text.rfind(f"\n{answer}\n"))
    return reply(f"Well. {SCORES[found]}")


def judge(server, **options):
    return Judge(endpoint(server), parallel=options.pop("parallel", 2), **options)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_by_category_and_turn(tmp_path):
    with serving(grade) as server:
        review = judge(server).review(CASES, "mine", tmp_path / "j.jsonl")
        assert len(server.seen) == 6
    assert review["judge: all"] == {"turn 1": 9.25, "turn 2": 13 / 3, "mean": 31.5 / 5, "judged": 5, "no score": 1}
    assert review["math"] == {"turn 1": 10, "turn 2": 1, "mean": 5.5, "judged": 2, "no score": 0}
    assert review["coding"] == {"turn 1": None, "turn 2": 4, "mean": 4, "judged": 1, "no score": 1}
    rows = rows_of(tmp_path / "j.jsonl")
    assert {(row["question_id"], row["turn"]) for row in rows} == {(c.question_id, t) for c in CASES for t in (1, 2)}
    by_key = {(row["question_id"], row["turn"]): row for row in rows}
    assert by_key[121, 1]["score"] == -1 and by_key[81, 1]["score"] == 8.5 and by_key[81, 1]["model"] == "mine"
    names = {key: row["judge"] for key, row in by_key.items()}
    assert names[81, 1] == ["judge-1", "single-v1"] and names[81, 2] == ["judge-1", "single-v1-multi-turn"]
    assert names[111, 1] == ["judge-1", "single-math-v1"] and names[111, 2] == ["judge-1", "single-math-v1-multi-turn"]
    assert names[121, 1][1] == "single-math-v1" and names[121, 2][1] == "single-v1-multi-turn"


def test_an_unreliable_server_gives_the_same_scores(tmp_path):
    """A third of all requests fail, in every possible way."""
    kinds = list(FAULTS.values())

    def script(number, body):
        return kinds[number // 3 % len(kinds)] if number % 3 == 1 else grade(number, body)

    with serving(grade) as server:
        steady = judge(server).review(CASES, "mine", tmp_path / "a.jsonl")
    with serving(script) as server:
        assert judge(server, parallel=4).review(CASES, "mine", tmp_path / "b.jsonl") == steady
        assert len(server.seen) > 6


def test_resuming_requests_only_missing_scores(tmp_path):
    path = tmp_path / "j.jsonl"
    with serving(lambda n, body: grade(n, body) if n < 3 else fault(401, "key expired")) as server:
        with pytest.raises(UsageError, match="key expired"):
            judge(server, parallel=1).review(CASES, "mine", path)
    kept = rows_of(path)
    assert len(kept) == 3
    with open(path, "a") as file:
        file.write('{"question_id": 81, "tur')  # a killed writer's last line
    with serving(grade) as server:
        review = judge(server).review(CASES, "mine", path)
        assert len(server.seen) == 3 + sum(row["score"] == -1 for row in kept)
    with serving(grade) as server:
        assert judge(server).review(CASES, "mine", path) == review
        assert len(server.seen) == 1  # the judgment without a score is requested again
    assert Counter((row["question_id"], row["turn"]) for row in rows_of(path) if row["score"] != -1).most_common(1)[0][1] == 1


def test_a_new_answer_or_judge_is_judged_again(tmp_path):
    path = tmp_path / "j.jsonl"
    with serving(grade) as server:
        judge(server).review(CASES[:1], "mine", path)
        judge(server).review([Case(81, "writing", ("write", "again"), ("w1", "5"))], "mine", path)
        assert len(server.seen) == 3  # the first turn is the same
        other = Judge(Endpoint(server.url, "judge-2"))
        other.review(CASES[:1], "mine", path)
        assert len(server.seen) == 5


def test_a_refused_request_does_not_stop_the_others(tmp_path):
    def script(number, body):
        return fault(400, "too long") if "w2" in body["messages"][-1]["content"] else grade(number, body)

    with serving(script) as server:
        review = judge(server).review(CASES[:2], "mine", tmp_path / "j.jsonl")
    assert review["judge: all"]["no score"] == 1 and review["writing"]["turn 2"] is None


def test_given_references_replace_the_default_ones(tmp_path):
    with serving(grade) as server:
        given_ones = judge(server, references={"81": ("r1", "r2")})
        named = {(r.case.question_id, r.turn): r.prompt.name for case in CASES for r in given_ones.requests(case)}
    assert named[81, 1] == "single-math-v1" and named[111, 1] == "single-v1"


# ------------------------------------------------------------------- prompts


def test_built_in_prompts_hold_everything():
    prompts = own_prompts()
    assert set(prompts) == {prompt_name(turn, ref) for turn in (1, 2) for ref in (False, True)}
    with serving(grade) as server:
        second = list(judge(server).requests(CASES[1]))[1]
    for part in ("1+1?", "and 2+2?", "two", "four", "\n5\n", "second one"):
        assert part in second.text + second.prompt.system
    assert "[[n]]" in second.prompt.system


def test_braces_in_an_answer_are_kept():
    case = Case(1, "", ("q {answer}",), ("{question} {0} {{x}}",))
    with serving(grade) as server:
        (request,) = judge(server).requests(case)
    assert "q {answer}" in request.text and "{question} {0} {{x}}" in request.text


def test_fastchats_own_prompts_and_references(shared_data):
    prompts = read_prompts(str(shared_data / "mt_bench" / "judge_prompts.jsonl"))
    assert len(prompts) == 4 and "[[rating]]" in prompts["single-v1"].template
    references = read_references(str(shared_data / "mt_bench" / "reference_answer" / "gpt-4.jsonl"))
    assert len(references) == 30 and all(len(turns) == 2 for turns in references.values())
    with serving(grade) as server:
        request = list(judge(server, prompts=prompts, references=references).requests(Case(101, "", ("a", "b"), ("c", "d"))))[1]
    assert request.prompt.name == "single-math-v1-multi-turn" and references["101"][1] in request.text
    assert "{" not in request.text.replace(references["101"][0], "").replace(references["101"][1], "")


def test_malformed_prompt_and_reference_files(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="no prompt called single-v1; found none"):
        read_prompts(str(path))
    with pytest.raises(UsageError, match="has no answers"):
        read_references(str(path))
    rows = [{"name": prompt_name(t, r), "prompt_template": "{question_3}"} for t in (1, 2) for r in (False, True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="unknown placeholders: question_3; known are"):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge_base_url", "http://x/v1"], "--judge_base_url needs --judge_model"),
        (["--judge_model", "m"], "needs a key; set OPENAI_API_KEY"),
        (["--judge_model", "m", "--judge_base_url", "x"], "must look like http"),
        (["--judge_model", "m", "--judge_base_url", "http://x", "--judge_parallel", "0"], "must be >= 1, got 0"),
        (["--judge_model", "m", "--judge_base_url", "http://x", "--judge_prompts", "no.jsonl"], "cannot read no.jsonl"),
    ],
)
def test_invalid_options(words, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = ArgumentParser()
    add_options(options)
    with pytest.raises(UsageError, match=message):
        configured(options.parse_args(words))


@pytest.mark.parametrize("key", ["sec\nret", "s\u00e9cret", "\u2713"])
def test_a_key_that_is_not_a_valid_header_is_refused(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    options = ArgumentParser()
    add_options(options)
    with pytest.raises(UsageError, match="OPENAI_API_KEY must be printable ASCII"):
        configured(options.parse_args(["--judge_model", "m"]))


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    options = ArgumentParser()
    add_options(options)
    assert configured(options.parse_args([])) is None
    with serving(grade) as server:
        found = configured(options.parse_args(["--judge_model", "m", "--judge_base_url", server.url]))
        found.endpoint.complete(ASK)
        assert server.seen[0][1]["authorization"] == "Bearer secret"

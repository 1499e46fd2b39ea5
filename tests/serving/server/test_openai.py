"""The real ``openai`` client against the server; greedy answers are those of the decoder alone."""

import asyncio
import json
import subprocess

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import completion_create_params as legacy_params
from openai.types.chat import completion_create_params
from tiny import surround

from cllm.serving.server.protocol import ChatRequest, CompletionRequest
from cllm.serving.server.service import Limits

SPEED = {"temperature": 0, "max_tokens": 24}


def messages(text: str) -> list:
    return [{"role": "user", "content": text}]


def alone(running, ids: list[int], length: int = 24) -> str:
    """What the decoder writes behind a prompt that nobody shares a batch with."""
    (result,) = running.service.queue.decoder.generate([ids], max_new_tokens=length)
    return running.service.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def chat_ids(running, text: str) -> list[int]:
    return running.service.template.encode(messages(text), running.service.tokenizer)


def test_models(server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"


def test_chat_is_the_greedy_answer(server) -> None:
    answer = server.client.chat.completions.create(model="tiny", messages=messages("hello"), **SPEED)
    assert answer.choices[0].message.content == alone(server, chat_ids(server, "hello"))
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_ids(server, "hello")), 24)
    (result,) = server.service.queue.decoder.generate([chat_ids(server, "hello")], max_new_tokens=24)
    cost = {"forwards": result.forwards, "fast_forwarded": result.fast_forwarded}
    assert usage.cllm == cost | {"tokens_per_forward": pytest.approx(24 / result.forwards, abs=1e-4)}


def test_what_is_reused_is_told_and_stays_with_its_key(start) -> None:
    with start(Limits(), context=1024, api_keys=["one", "two"]) as running:

        def cached(key: str, text: str, **options) -> int:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
                answer = client.chat.completions.create(model="tiny", messages=messages(text), **SPEED, **options)
            assert {choice.message.content for choice in answer.choices} == {alone(running, chat_ids(running, text))}
            return answer.usage.prompt_tokens_details.cached_tokens

        ids = chat_ids(running, "hello" * 20)
        assert cached("one", "hello" * 20, n=3) == 0  # the three compute it once
        assert cached("one", "hello" * 20) == len(ids) - 1
        assert cached("two", "hello" * 20) == 0
        assert 0 < cached("two", "hello" * 10) < len(ids)
        assert running.metric("cllm_cached_prompt_tokens_total") > len(ids)
        assert 0 < running.metric("cllm_prefix_cache_bytes") < running.metric("cllm_prefix_cache_budget_bytes") == 1 << 30


def test_parts_and_the_developer_role(server) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    asked = [{"role": "developer", "content": "short"}, {"role": "user", "content": parts}]
    answer = server.client.chat.completions.create(model="tiny", messages=asked, **SPEED)
    plain = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    ids = server.service.template.encode(plain, server.service.tokenizer)
    assert answer.choices[0].message.content == alone(server, ids)


def test_an_answer_may_be_sent_back_as_it_came(server) -> None:
    first = server.client.chat.completions.create(model="tiny", messages=messages("hello"), **SPEED).choices[0].message
    asked = [*messages("hello"), first.model_dump(), *messages("and?")]  # with fields that are null
    answer = server.client.chat.completions.create(model="tiny", messages=asked, **SPEED)
    plain = [*messages("hello"), {"role": "assistant", "content": first.content}, *messages("and?")]
    ids = server.service.template.encode(plain, server.service.tokenizer)
    assert answer.choices[0].message.content == alone(server, ids)


def test_a_stream_has_the_same_text(server) -> None:
    whole = server.client.chat.completions.create(model="tiny", messages=messages("hello"), **SPEED)
    stream = server.client.chat.completions.create(
        model="tiny", messages=messages("hello"), stream=True, stream_options={"include_usage": True}, **SPEED
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    told, of_whole = (usage.model_copy(update={"prompt_tokens_details": None}) for usage in (chunks[-1].usage, whole.usage))
    assert told == of_whole  # but for the cached tokens: the second request finds those of the first


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_which_chunks_say_what_was_used(server, kind: str) -> None:
    """Asked for, the last one does, and all others say null; unasked, none speaks of it."""
    asks = {"chat": ("/chat/completions", {"messages": messages("hello")}), "completion": ("/completions", {"prompt": "ab"})}
    path, body = asks[kind]
    for options in ({"include_usage": True}, {"include_usage": False}, None):
        asked = {"model": "tiny", "stream": True, "stream_options": options, "n": 2} | body | SPEED
        lines = httpx.post(f"{server.url}/v1{path}", json=asked, timeout=60).text.splitlines()
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        if options and options["include_usage"]:
            assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
            assert last["usage"]["completion_tokens"] == 48 and last["choices"] == []
        else:
            assert not any("usage" in chunk for chunk in [*chunks, last])


def test_every_field_of_the_protocol_is_known(server) -> None:
    """Null says nothing, so it is taken for each of them; what is no field of the protocol's is an error."""
    fields = {
        ChatRequest: completion_create_params.CompletionCreateParamsBase,
        CompletionRequest: legacy_params.CompletionCreateParamsBase,
    }
    for kind, params in fields.items():
        assert set(params.__annotations__) <= set(kind.model_fields)
        optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
        body = {"messages": messages("x")} if kind is ChatRequest else {"prompt": "x"}
        kind.model_validate({"model": "tiny"} | body | dict.fromkeys(optional))


IGNORED = {
    "prompt_cache_retention": "24h",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "user": "u",
    "metadata": {"a": "b"},
    "verbosity": "low",
    "parallel_tool_calls": True,
}


def test_fields_that_change_no_answer(server) -> None:
    plain = server.client.chat.completions.create(model="tiny", messages=messages("hello"), **SPEED)
    for more in ({name: value} for name, value in IGNORED.items()):
        answer = server.client.chat.completions.create(model="tiny", messages=messages("hello"), extra_body=more, **SPEED)
        assert answer.choices == plain.choices
    parts = [{"type": "text", "text": "hello", "prompt_cache_breakpoint": {"mode": "explicit"}}]
    answer = server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], **SPEED)
    assert answer.choices == plain.choices


def test_a_template_that_loops_over_parts_gets_them(start) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }})"
        "{% endif %}{% endfor %}{% endfor %}[assistant]"
    )
    with start(Limits(), chat_template=template) as running:
        create = running.client.chat.completions.create
        for content, written in (
            ("hello", "(hello)"),
            ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "(hel)(lo)"),
        ):
            answer = create(model="tiny", messages=[{"role": "user", "content": content}], **SPEED)
            ids = running.service.tokenizer(f"[user]{written}[assistant]").input_ids
            assert answer.usage.prompt_tokens == len(ids)
            assert answer.choices[0].message.content == alone(running, ids)


def test_completions_of_texts_and_of_ids(server) -> None:
    texts = ["ab", "cde", "f"]
    ids = [server.service.tokenizer(text).input_ids for text in texts]
    for prompt in (texts, ids):
        answer = server.client.completions.create(model="tiny", prompt=prompt, **SPEED)
        assert [choice.text for choice in answer.choices] == [alone(server, one) for one in ids]
    assert server.client.completions.create(model="tiny", prompt=ids[1], **SPEED).choices[0].text == alone(server, ids[1])
    assert server.client.completions.create(model="tiny", prompt="ab").usage.completion_tokens == 16
    stream = server.client.completions.create(model="tiny", prompt="ab", stream=True, **SPEED)
    assert "".join(chunk.choices[0].text for chunk in stream) == alone(server, ids[0])


def test_a_completion_goes_on_where_the_tokenizer_would_end(start) -> None:
    with start(Limits()) as running:
        surround(running.service.tokenizer, "$A <eos>")
        answer = running.client.completions.create(model="tiny", prompt="ab", **SPEED)
        assert answer.usage.prompt_tokens == 2
        assert answer.choices[0].text == alone(running, running.service.tokenizer("ab", add_special_tokens=False).input_ids)


def test_seeds(server) -> None:
    def draw(**options) -> list[str]:
        options = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24} | options
        answer = server.client.chat.completions.create(model="tiny", messages=messages("x"), **options)
        return [choice.message.content for choice in answer.choices]

    assert draw(seed=7) == draw(seed=7) == draw(seed=7, n=3)[:1]
    assert len(set(draw(seed=7, n=3))) == 3
    assert draw() != draw()
    assert draw(temperature=0) == draw(seed=3, extra_body={"top_k": 1}) == [alone(server, chat_ids(server, "x"))]


def test_stop_strings(server) -> None:
    full = alone(server, chat_ids(server, "stop"), 40)
    for stop in (full[7:9], [full[20:22], full[12:15]]):
        first = min(full.find(one) for one in ([stop] if isinstance(stop, str) else stop))
        for stream in (False, True):
            asked = dict(model="tiny", messages=messages("stop"), stop=stop, max_completion_tokens=40, temperature=0)
            answer = server.client.chat.completions.create(stream=stream, **asked)
            if stream:
                choices = [chunk.choices[0] for chunk in answer]
                text, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (text, reason) == (full[:first], "stop")


def test_what_a_stop_string_costs(server) -> None:
    """The tokens up to the one that completes it, and the forwards that brought them; in company as alone."""
    tokenizer, ids = server.service.tokenizer, chat_ids(server, "stop")
    (result,) = server.service.queue.decoder.generate([ids], max_new_tokens=60)
    stop = tokenizer.decode(result.token_ids, skip_special_tokens=True)[20:22]
    tokens = next(n for n in range(60) if stop in tokenizer.decode(result.token_ids[:n], skip_special_tokens=True))
    forwards = next(n for n in range(60) if sum(result.accepted[:n]) >= tokens)
    asked = dict(model="tiny", max_tokens=60, temperature=0)

    async def ask(others: int) -> list:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            company = [create(messages=messages(f"other {n}"), **asked) for n in range(others)]
            answers = await asyncio.gather(*company, *(create(messages=messages("stop"), stop=stop, **asked) for _ in range(4)))
            return [answer.usage for answer in answers[others:]]

    for usage in asyncio.run(ask(0)) + asyncio.run(ask(12)):
        cost = usage.completion_tokens, usage.cllm["forwards"], usage.cllm["fast_forwarded"]
        assert cost == (tokens, forwards, tokens - forwards)


def test_the_end_of_the_text(start) -> None:
    with start(Limits(), eos=range(0, 98, 2)) as running:
        answer = running.client.chat.completions.create(model="tiny", messages=messages("hello"), temperature=0)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == alone(running, chat_ids(running, "hello"))


def test_thirty_two_at_once(server) -> None:
    texts = [f"question {number} {'x' * (number % 7)}" for number in range(32)]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(model="tiny", messages=messages(text), **SPEED) for text in texts]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [alone(server, chat_ids(server, text)) for text in texts]


def test_refusals_are_the_clients_exceptions(server) -> None:
    ask = server.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist; this server has 'tiny'"):
        ask(model="gpt", messages=messages("x"))
    with pytest.raises(openai.BadRequestError, match="logprobs: .*not supported"):
        ask(model="tiny", messages=messages("x"), logprobs=True)
    with pytest.raises(openai.BadRequestError, match="tools: .*not supported"):
        ask(model="tiny", messages=messages("x"), tools=[{"type": "function", "function": {"name": "f"}}])


def test_curl(server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "ab", **SPEED})
    output = subprocess.run(["curl", "-sS", f"{server.url}/v1/completions", "--json", body], check=True, capture_output=True, timeout=60)
    ids = server.service.tokenizer("ab").input_ids
    assert json.loads(output.stdout)["choices"][0]["text"] == alone(server, ids)


def test_metrics_and_health(server) -> None:
    before = {name: server.metric(name) for name in ("cllm_generated_tokens_total", "cllm_requests_total")}
    server.client.chat.completions.create(model="tiny", messages=messages("hello"), **SPEED)
    assert server.metric("cllm_generated_tokens_total") == before["cllm_generated_tokens_total"] + 24
    assert server.metric("cllm_requests_total") == before["cllm_requests_total"] + 1
    for path in ("health", "metrics"):
        subprocess.run(["curl", "-sSf", f"{server.url}/{path}"], check=True, capture_output=True, timeout=60)

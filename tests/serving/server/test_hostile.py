"""Clients that mean harm, or are broken: they get 4xx, trouble nobody else, and leave nothing behind."""

import json
import socket
import struct
import time
from contextlib import suppress

import httpx
import pytest
from servers import until_empty

from cllm.serving.server import guard, run
from cllm.serving.server.service import Limits

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "x"}]
LONG = {"model": "tiny", "prompt": "ab", "max_tokens": 200, "temperature": 0}


def post(running, path: str, body, headers: dict | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(running.url + path, content=content, timeout=60, headers=JSON | (headers or {}))


def chat(**changes) -> dict:
    return {"model": "tiny", "messages": USER} | changes


def complete(**changes) -> dict:
    return {"model": "tiny", "prompt": "x"} | changes


def says(*parts, role: str = "user") -> dict:
    """A chat whose only message has these parts as its content."""
    return chat(messages=[{"role": role, "content": list(parts)}])


def draws(**changes) -> dict:
    return complete(temperature=1.0, max_tokens=4) | changes


BIG = 10**400  # too large for any float, and for the integers of a tensor


BAD = [
    (CHAT, b""),
    (CHAT, b"null"),
    (CHAT, b"{"),
    (CHAT, b"[" * 15_000),
    (CHAT, b"\xff\xfe\x00"),
    (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\xc3\x28"}]}'),
    (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    (CHAT, {}),
    (CHAT, chat(model=None)),
    (CHAT, chat(model="other")),
    (CHAT, chat(messages=[])),
    (CHAT, chat(messages="x")),
    (CHAT, chat(messages=[{"role": "robot", "content": "x"}])),
    (CHAT, chat(messages=[{"role": "user", "content": None}])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}])),  # beyond the context
    (CHAT, chat(messages=[{"role": "user", "content": "x", "bogus": 1}])),
    (CHAT, chat(bogus=1)),
    (CHAT, chat(tools=[{}])),
    (CHAT, chat(response_format={"type": "json_object"})),
    (COMPLETE, complete(prompt="")),
    (COMPLETE, complete(prompt=[])),
    (COMPLETE, complete(prompt=[[]])),
    (COMPLETE, complete(prompt=[1, "x"])),
    (COMPLETE, complete(prompt=[-1])),
    (COMPLETE, complete(prompt=[10**6])),
    (COMPLETE, complete(prompt=[10**30])),
    (COMPLETE, complete(prompt=["x"] * 101)),
    (COMPLETE, complete(prompt=[1] * 300)),
    (COMPLETE, complete(max_tokens=0)),
    (COMPLETE, complete(max_tokens=-5)),
    (COMPLETE, complete(max_tokens=201)),
    (COMPLETE, complete(max_tokens=10**30)),
    (COMPLETE, complete(max_tokens="5")),
    (COMPLETE, complete(max_tokens=5.5)),
    (COMPLETE, complete(n=-1)),
    (COMPLETE, complete(n=10**9)),
    (COMPLETE, complete(n=True)),
    (COMPLETE, complete(temperature=-0.5)),
    (COMPLETE, complete(temperature="hot")),
    (COMPLETE, b'{"model": "tiny", "prompt": "x", "temperature": NaN}'),
    (COMPLETE, b'{"model": "tiny", "prompt": "x", "temperature": 1e999}'),
    (COMPLETE, complete(top_p=2)),
    (COMPLETE, complete(top_k=-1)),
    (COMPLETE, complete(min_p=7)),
    (COMPLETE, complete(repetition_penalty=0)),
    (COMPLETE, complete(seed=2**63)),
    (COMPLETE, complete(stop="")),
    (COMPLETE, complete(stop=["x"] * 17)),
    (COMPLETE, complete(stop=[1])),
    (COMPLETE, complete(stream="yes")),
    (COMPLETE, complete(logprobs=0)),
    (COMPLETE, complete(logprobs=5)),
    (COMPLETE, complete(echo=True)),
    (COMPLETE, complete(best_of=3)),
    (COMPLETE, complete(logit_bias={"5": 100})),
    (COMPLETE, complete(presence_penalty=0.5)),
    # numbers that no tensor holds, and their neighbours
    (COMPLETE, draws(top_k=2**31)),
    (COMPLETE, draws(top_k=2**63)),
    (COMPLETE, draws(top_k=10**30)),
    (COMPLETE, draws(top_k=BIG)),
    (COMPLETE, draws(top_k=-BIG)),
    (COMPLETE, b'{"model": "tiny", "prompt": "x", "temperature": 1, "top_k": 1' + b"0" * 5000 + b"}"),
    (COMPLETE, draws(top_k=1.5)),
    (COMPLETE, draws(temperature=10**6)),
    (COMPLETE, draws(temperature=1e-9)),
    (COMPLETE, draws(temperature=BIG)),
    (COMPLETE, draws(temperature=True)),
    (COMPLETE, draws(top_p=-1e-300)),
    (COMPLETE, draws(top_p=1.0000001)),
    (COMPLETE, draws(top_p=BIG)),
    (COMPLETE, b'{"model": "tiny", "prompt": "x", "top_p": NaN}'),
    (COMPLETE, draws(min_p=-0.001)),
    (COMPLETE, draws(min_p=BIG)),
    (COMPLETE, draws(repetition_penalty=1e39)),
    (COMPLETE, draws(repetition_penalty=1e-39)),
    (COMPLETE, draws(repetition_penalty=-1)),
    (COMPLETE, draws(repetition_penalty=BIG)),
    (COMPLETE, draws(seed=-(2**63) - 1)),
    (COMPLETE, draws(seed=BIG)),
    (COMPLETE, draws(seed=0.5)),
    (COMPLETE, complete(max_tokens=2**31)),
    (COMPLETE, complete(max_tokens=2**63)),
    (COMPLETE, complete(max_tokens=BIG)),
    (CHAT, chat(max_completion_tokens=2**63)),
    (CHAT, chat(max_completion_tokens=0)),
    (COMPLETE, complete(n=2**31)),
    (COMPLETE, complete(n=BIG)),
    (COMPLETE, complete(n=60, prompt=["x", "y"])),
    (COMPLETE, complete(prompt=[99])),  # the first id that the model has not
    (COMPLETE, complete(prompt=[1, 2**31])),
    (COMPLETE, complete(prompt=[[1], [2**64]])),
    (COMPLETE, complete(prompt=[BIG])),
    (COMPLETE, complete(prompt=[True])),
    (COMPLETE, complete(prompt={"x": 1})),
    # what is long or deep
    (CHAT, chat(model="m" * 10_000)),
    (CHAT, chat(**{"k" * 10_000: 1})),
    (CHAT, chat(messages=[{"role": "r" * 10_000, "content": "x"}])),
    (CHAT, b'{"model": "tiny", "metadata": ' + b"[" * 9_000 + b"]" * 9_000 + b', "messages": []}'),
    (COMPLETE, complete(stop="s" * 257)),
    (COMPLETE, complete(prompt=["x"] * 3000)),
    # parts that are no text
    (CHAT, says({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}})),
    (CHAT, says({"type": "file", "file": {"file_id": "x"}})),
    (CHAT, says({"type": "refusal", "refusal": "no"}, role="assistant")),
    (CHAT, says({"type": "text", "text": "look:"}, {"type": "image_url", "image_url": {"url": "x"}})),
    (CHAT, says({"type": "t" * 10_000})),
    (CHAT, says({"type": ["text"], "text": "x"})),
    (CHAT, says({"type": {}, "text": "x"})),
    (CHAT, says({"type": None, "text": "x"})),
    (CHAT, says({"type": "text"})),
    (CHAT, says({"text": "x"})),
    (CHAT, says({"type": "text", "text": 5})),
    (CHAT, says({"type": "text", "text": "x", "bogus": 1})),
    (CHAT, says("x")),
    (CHAT, says(None)),
    (CHAT, says()),
    (CHAT, chat(messages=[{"role": "user", "content": {"type": "text", "text": "x"}}])),
    (CHAT, chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])),
    (CHAT, chat(messages=[None])),
    (CHAT, chat(response_format={"type": "json_schema", "json_schema": {}})),
    (CHAT, chat(stream_options={"include_usage": 1})),
    (CHAT, chat(moderation={"model": "x"})),
]


@pytest.mark.parametrize(("path", "body"), BAD, ids=range(len(BAD)))
def test_bad_requests(server, path: str, body) -> None:
    for stream in (False, True):
        if stream and isinstance(body, dict):
            body = {"stream": True} | body
        response = post(server, path, body)
        assert 400 <= response.status_code < 500, response.text
        message = response.json()["error"]["message"]
        assert message and "Traceback" not in message and len(message) < 300


GOOD = [
    draws(top_p=0),
    draws(top_p=1),
    draws(top_p=5e-324),
    draws(top_k=2**31 - 1),
    draws(top_k=0),
    draws(min_p=1),
    draws(min_p=5e-324),
    draws(temperature=2),
    draws(temperature=100_000),
    draws(repetition_penalty=2),
    draws(seed=-1),
    draws(seed=-(2**63)),
    draws(seed=2**63 - 1),
    draws(n=3, seed=-7),
    draws(prompt=[98]),
]


@pytest.mark.parametrize("body", GOOD, ids=range(len(GOOD)))
def test_what_is_in_range(server, body) -> None:
    for stream in (False, True):
        response = post(server, COMPLETE, body | {"stream": stream})
        assert response.status_code == 200 and '"error"' not in response.text, response.text


def test_top_p_0_is_the_likeliest_token(server) -> None:
    answers = [post(server, COMPLETE, draws(max_tokens=20) | more) for more in ({"temperature": 0}, {"top_p": 0}, {"top_k": 1})]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_a_part_that_is_no_text_is_named(server, kind: str) -> None:
    response = post(server, CHAT, says({"type": "text", "text": "what is this?"}, {"type": kind, kind: {"url": "x"}}))
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages.0.content"
    assert f"a part of type '{kind}' is not supported here, only text is" in response.json()["error"]["message"]


def test_the_shared_requests(server, shared_cases) -> None:
    rows = [json.loads(line) for line in (shared_cases / "requests.jsonl").read_text().splitlines()]
    answers = {row.pop("id"): post(server, CHAT, row) for row in rows}
    assert {name: answer.status_code for name, answer in answers.items()} == {"v08": 200, "v27": 200, "v59": 400}
    assert "image_url" in answers["v59"].json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", CHAT), ("DELETE", "/v1/models"), ("GET", "/v1/%00%ff"), ("POST", "/../x"), ("GET", "/" + "x" * 9000)],
)
def test_bad_routes(server, method: str, path: str) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code in (404, 405) and 0 < len(response.json()["error"]["message"]) < 300


def test_huge_bodies(server) -> None:
    assert post(server, CHAT, chat(messages=[{"role": "user", "content": "x" * 30_000}])).status_code == 413

    def endless():
        for _ in range(1000):
            yield b"x" * 1000

    try:
        assert httpx.post(server.url + CHAT, content=endless(), headers=JSON, timeout=60).status_code == 413
    except httpx.WriteError:  # it was cut off while it was writing
        pass


def talk(running, data: bytes, wait: float = 10.0) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=wait)
    connection.sendall(data)
    return connection


def raw(path: str, body: dict, length: int | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(content) if length is None else length}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + content


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(server, data: bytes) -> None:
    with talk(server, data) as connection:
        connection.shutdown(socket.SHUT_WR)
        try:
            reply = connection.recv(1000)
        except ConnectionResetError:
            reply = b""
        assert not reply or reply.startswith(b"HTTP/1.1 4"), reply


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["close", "reset", "half"])
def test_rows_of_clients_that_leave_are_free_again(server, stream: bool, way: str) -> None:
    for _ in range(6):  # more than the batch holds
        connection = talk(server, raw(COMPLETE, LONG | {"stream": stream}))
        if way == "half":
            connection.shutdown(socket.SHUT_WR)
        if way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until_empty(server, 60)
    assert post(server, COMPLETE, complete()).status_code == 200


def nobody_left(running) -> None:
    until = time.monotonic() + 10
    while running.server.server_state.connections:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_leaving_ends_the_row_early(start) -> None:
    with start(Limits(new_tokens=100_000), context=200_000) as running:
        with httpx.stream("POST", running.url + COMPLETE, json=LONG | {"max_tokens": 100_000, "stream": True}) as stream:
            next(stream.iter_lines())
            assert running.service.worker.running == 1
        until_empty(running)
        assert running.metric("cllm_cancelled_total") == 1


@pytest.mark.parametrize("patience", [0.5, 60.0], ids=["cut off", "at the deadline"])
def test_a_client_that_does_not_read(start, monkeypatch: pytest.MonkeyPatch, caplog, patience: float) -> None:
    """Its row leaves when it is cut off, or else at the deadline; meanwhile the others get their answers."""
    monkeypatch.setattr(run, "READ_SECONDS", patience)
    name = "tiny" * 500  # every event has it, so that the buffers are soon full, also on a slow machine
    limits = Limits(new_tokens=100_000, seconds=6.0)
    with start(limits, name=name, context=200_000, send_buffer=4096) as running, socket.socket() as slow:
        expected = post(running, COMPLETE, complete(model=name)).json()["choices"]
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", running.port))
        slow.sendall(raw(COMPLETE, LONG | {"model": name, "max_tokens": 100_000, "stream": True}))
        while not running.service.worker.running:
            time.sleep(0.01)
        for _ in range(3):
            assert post(running, COMPLETE, complete(model=name)).json()["choices"] == expected
        until_empty(running, 40)
        assert running.metric("cllm_cancelled_total") == 1
        if patience > 6:
            assert "a client did not read its answer in time" in caplog.text
            caplog.clear()  # uvicorn calls an answer that ends early an error
        else:
            nobody_left(running)


def test_a_client_that_never_asks(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.3)
    with start(Limits()) as running:
        for sent in (b"", b"POST /v1/comp"):
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as silent:
                silent.sendall(sent)
                with suppress(ConnectionResetError):
                    assert silent.recv(100) == b""
        nobody_left(running)
        with httpx.Client() as talking:  # a connection that has asked may rest, and ask again
            for _ in range(2):
                assert talking.get(running.url + "/health").status_code == 200
                time.sleep(0.5)


def test_too_many_wait(start) -> None:
    with start(Limits(new_tokens=1000, waiting=2), context=4000, batch_size=1) as running:
        body = LONG | {"max_tokens": 1000}
        busy = [talk(running, raw(COMPLETE, body))]
        until = time.monotonic() + 10
        while not running.service.worker.running and time.monotonic() < until:
            time.sleep(0.01)
        busy += [talk(running, raw(COMPLETE, body)) for _ in range(2)]
        while running.service.worker.waiting < 2 and time.monotonic() < until:
            time.sleep(0.01)
        response = post(running, COMPLETE, complete())
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        for connection in busy:
            connection.close()
        until_empty(running)


def test_time_outs(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with start(Limits(new_tokens=100_000, seconds=0.5), context=200_000) as running:
        long = LONG | {"max_tokens": 100_000}
        assert post(running, COMPLETE, long).status_code == 408
        streamed = post(running, COMPLETE, long | {"stream": True})
        assert streamed.status_code == 200 and "not complete after 0.5 seconds" in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        with talk(running, raw(COMPLETE, complete(), length=5000)) as connection:  # the rest never comes
            assert b" 408 " in connection.recv(100)
        until_empty(running)


def test_keys(start) -> None:
    with start(Limits(), api_keys=["sécret", "another"]) as running:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Bearer \xff"}):
            assert post(running, COMPLETE, complete(), headers=headers).status_code == 401
            assert httpx.get(running.url + "/metrics", headers=headers).status_code == 401
        other = {"authorization": "Bearer another"}
        assert post(running, COMPLETE, complete(), headers=other).status_code == 200
        right = {"authorization": "Bearer sécret".encode()}
        assert post(running, COMPLETE, complete(), headers=right).status_code == 200
        assert post(running, COMPLETE, complete(), headers=right | {"host": "a.name.of.ours"}).status_code == 200
        assert httpx.get(running.url + "/health").status_code == 200


OWN_NAMES = ["127.0.0.1", "localhost:80", "LocalHost:8000", "[::1]", "[::1]:8000"]
OTHER_NAMES = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2", "::1", ""]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_its_own_names(server, name: str) -> None:
    assert httpx.get(server.url + "/v1/models", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_page_whose_name_was_made_to_point_here(server, name: str) -> None:
    """DNS rebinding: the browser takes our answers for those of the page's own server."""
    for path in ("/v1/models", "/metrics", "/health", "/"):
        assert httpx.get(server.url + path, headers={"host": name}).status_code == 400


def test_where_every_name_is_welcome() -> None:
    with run.bind("0.0.0.0", 0) as everywhere, run.bind("localhost", 0) as here:
        assert run.own_names(everywhere, "0.0.0.0") is None
        assert run.own_names(here, "My.Host") == {"127.0.0.1", "localhost", "[::1]", "My.Host"}


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"])
def test_what_a_page_of_others_may_post_without_asking(server, kind: str | None) -> None:
    """Browsers ask the server first where the type is JSON, and then we say no; where it is one of these, they do not."""
    headers = {"content-type": kind} if kind else {}
    response = httpx.post(server.url + COMPLETE, content=json.dumps(complete()), headers=headers)
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = httpx.options(server.url + COMPLETE, headers=asked)
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers


BY_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('by turns!') }}{% endif %}"
    "{{ m.content }}{{ 1 / 0 if m.content == 'crash' }}{% endfor %}"
)


def test_conversations_that_the_chat_template_refuses(start) -> None:
    with start(Limits(), chat_template=BY_TURNS) as running:
        for stream in (False, True):
            for talk, reason in ((USER * 2, "by turns!"), ([USER[0] | {"content": "crash"}], "division by zero")):
                response = post(running, CHAT, chat(messages=talk, stream=stream))
                assert response.status_code == 400 and reason in response.json()["error"]["message"]
        system = [{"role": "system", "content": "s"}, *USER]  # is put in front of the question
        assert post(running, CHAT, chat(messages=system, max_tokens=4)).status_code == 200

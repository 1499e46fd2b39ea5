"""A fault at each point of a job's life: that job fails, all others get what they would have got alone, and nothing is left.

The job at fault is known by its seed, which decides nothing as all jobs are greedy.
"""

import asyncio
import json
import queue as queues
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice

import httpx
import pytest
from servers import answer_of, run_server, until_empty
from tiny import tiny_model

from cllm.decoding import JacobiDecoder, Queue, Request, RowResult, Sampling
from cllm.decoding.batch import Batch
from cllm.decoding.engine import Chooser
from cllm.decoding.prefill import Prefill
from cllm.decoding.prefix_cache import PrefixCache
from cllm.decoding.result import Tally
from cllm.decoding.step import Step
from cllm.prompts import PromptTemplate
from cllm.serving.server import app, protocol
from cllm.serving.server.service import Limits
from cllm.serving.server.worker import Closed, Failed, Progress, ReportingJob, Worker
from cllm.serving.text import TextStream

BAD = 666  # the seed of the job at fault
PROMPT, LENGTH = [7, 8, 9], 20  # of the job at fault; no other is as long


class Injected(Exception):
    """No error of ours, and no ValueError or RuntimeError that somebody might expect."""


def breaks(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, hits: Callable[..., bool]) -> None:
    """Let a method raise where ``hits`` says so of its arguments."""
    method = getattr(owner, name)

    def broken(*args, **kwargs):
        if hits(*args, **kwargs):
            raise Injected(f"in {name}")
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def bad(request: Request) -> bool:
    return request.sampling.seed == BAD


def at(rows, length: int) -> bool:
    """Whether the job at fault is running and has so many tokens, the prompt's included."""
    return bool(((rows.noise_seed_B == BAD) & ~rows.done_B & (rows.start_B >= length)).any())


POINTS: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "is there room": (Queue, "fits", lambda self, jobs: bad(jobs[-1].request)),
    "can it be decoded": (JacobiDecoder, "check", lambda self, request, *_: bad(request)),
    "its tensors": (JacobiDecoder, "_new_batch", lambda self, requests, first: any(map(bad, requests))),
    "its prefill": (Prefill, "__call__", lambda self, new, requests, *_: any(map(bad, requests))),
    "keeping its keys": (PrefixCache, "store", lambda self, cache, row, scope, ids: list(ids)[: len(PROMPT)] == PROMPT),
    "joining": (Batch, "merge", lambda self, other, *_: BAD in other.rows.noise_seed_B),
    "how tokens are chosen": (Chooser, "__init__", lambda self, samplings, *_: any(s.seed == BAD for s in samplings)),
    "its first forward in company": (Step, "__call__", lambda self, rows, *_: at(rows, 0)),
    "a later forward": (Step, "__call__", lambda self, rows, *_: at(rows, len(PROMPT) + 8)),
    "accepting": (Step, "advance", lambda self, rows, *_: at(rows, len(PROMPT) + 5)),
    "fetching its result": (Tally, "take", lambda self, row, most: most == LENGTH),
    "its result so far": (ReportingJob, "update", lambda self, result, stop=None: bad(self.request) and len(result.token_ids) > 3),
    "its result": (ReportingJob, "update", lambda self, result, stop=None: bad(self.request) and stop is not None),
    "its failure": (ReportingJob, "fail", lambda self, error: bad(self.request)),
}


@contextmanager
def working(batch_size: int = 4):
    worker = Worker(Queue(new_decoder(), batch_size), 100)
    try:
        yield worker
        assert worker.running == worker.waiting == 0 and worker.ready
    finally:
        worker.stop()


def submit(worker: Worker, *requests: Request) -> list["queues.Queue[Progress]"]:
    reports: list[queues.Queue[Progress]] = [queues.Queue() for _ in requests]
    worker.submit([ReportingJob(request, queue.put) for request, queue in zip(requests, reports, strict=True)])
    return reports


def others() -> list[Request]:
    """More than a batch of four holds, of different lengths."""
    return [Request([1 + n, 2, 3] + [4] * (n % 3), 6 + 2 * n) for n in range(7)]


def new_decoder() -> JacobiDecoder:
    return JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None, max_position_embeddings=100_000), 4)


@cache
def alone() -> list[RowResult]:
    """What they get in a batch of their own."""
    decoder = new_decoder()
    return [decoder.generate([request.prompt], max_new_tokens=request.max_new_tokens)[0] for request in others()]


def expect(reports, results: list[RowResult]) -> None:
    """Every answer is what its request gets alone, forward by forward, and nothing of it is said twice."""
    for queue, result in zip(reports, results, strict=True):
        steps, last = answer_of(queue)
        tokens = iter(result.token_ids)
        assert (steps, last.stop) == ([list(islice(tokens, count)) for count in result.accepted], result.stop)
        assert queue.empty()


@pytest.mark.parametrize("place", [0, 5], ids=["first", "joining others"])
@pytest.mark.parametrize("point", POINTS)
def test_that_job_fails_and_the_others_go_on(monkeypatch, caplog, one_thread, point: str, place: int) -> None:
    requests, results = others(), alone()
    requests.insert(place, Request(PROMPT, LENGTH, Sampling(seed=BAD)))
    breaks(monkeypatch, *POINTS[point])
    if point == "its failure":  # which comes after another
        breaks(monkeypatch, *POINTS["its prefill"])
    with working() as worker:
        reports = submit(worker, *requests)
        culprit = reports.pop(place)
        expect(reports, results)
        if point == "its failure":
            assert culprit.empty()
        elif point == "is there room" and place == 0:  # nobody asks for the first one
            assert answer_of(culprit)[1].stop
        else:
            error = answer_of(culprit)[1].error
            assert isinstance(error, Failed) and "the model failed on this request" in str(error) and culprit.empty()
            assert "Injected" in caplog.text
        expect(submit(worker, others()[0]), results[:1])  # those that come later get no less
    caplog.clear()


@pytest.mark.parametrize("when", ["steps", "stop"])
def test_a_job_that_cannot_be_told(caplog, one_thread, when: str) -> None:
    def report(progress: Progress) -> None:
        if getattr(progress, when):
            raise Injected("the client's loop is closed")

    requests, results = others(), alone()
    with working() as worker:
        worker.submit([ReportingJob(Request(PROMPT, LENGTH), report)])
        expect(submit(worker, *requests), results)
    caplog.clear()


def test_what_fails_once_is_done_again_and_nobody_fails(monkeypatch, caplog, one_thread) -> None:
    """A fault of nobody's, such as a hiccup of the device."""
    requests, results = others(), alone()
    calls = iter(range(1000))
    breaks(monkeypatch, Step, "__call__", lambda self, rows, *_: next(calls) in (3, 9))
    with working() as worker:
        expect(submit(worker, *requests), results)
    assert caplog.text.count("tried again in smaller groups") == 2
    caplog.clear()


def test_several_at_fault(monkeypatch, caplog, one_thread) -> None:
    requests, results = others(), alone()
    breaks(monkeypatch, *POINTS["a later forward"])
    with working() as worker:
        culprits = [Request([at, *PROMPT], LENGTH, Sampling(seed=BAD)) for at in range(3)]
        reports = submit(worker, *(one for pair in zip(requests, [*culprits, *requests[3:]]) for one in pair))
        expect(reports[0:6:2], results[:3])
        assert all(isinstance(answer_of(queue)[1].error, Failed) for queue in reports[1:6:2])
        expect(reports[6::2], results[3:])
        expect(reports[7::2], results[3:])
    caplog.clear()


def test_a_job_at_fault_whose_client_has_left(monkeypatch, caplog, one_thread) -> None:
    """Those beside it are not blamed."""
    bad_job = ReportingJob(Request(PROMPT, 90_000, Sampling(seed=BAD)), lambda progress: None)
    gone = []

    def leaves(self, rows, *_) -> bool:
        if at(rows, len(PROMPT) + 6) and not gone:
            gone.append(True)
            worker.cancel([bad_job])  # and before its row is dropped:
            return True
        return False

    request, results = others()[-1], alone()[-1:]
    breaks(monkeypatch, Step, "__call__", leaves)
    reports: queues.Queue[Progress] = queues.Queue()
    with working(2) as worker:
        worker.submit([bad_job, ReportingJob(request, reports.put)])
        expect([reports], results)
    assert gone
    caplog.clear()


def test_a_model_that_is_broken_for_all(monkeypatch, caplog, one_thread) -> None:
    """Everybody is told, whatever recovering itself does, and when the model works again, so does the worker."""
    with monkeypatch.context() as broken:
        breaks(broken, JacobiDecoder, "flow", lambda *_: True)
        breaks(broken, Queue, "shrink", lambda *_: True)
        broken.setattr("cllm.serving.server.worker.free_memory", None)
        with working() as busy:
            for reports in submit(busy, *others()):
                assert isinstance(answer_of(reports)[1].error, Failed)
            broken.undo()
            expect(submit(busy, others()[0]), alone()[:1])
    caplog.clear()


def test_stopping_tells_all_even_if_one_cannot_be_told(caplog) -> None:
    def report(progress: Progress) -> None:
        if progress.error:
            raise Injected

    worker = Worker(Queue(new_decoder(), 1), 10)
    worker.submit([ReportingJob(Request(PROMPT, 90_000), report)])
    (reports,) = submit(worker, Request(PROMPT, 90_000))
    worker.stop()
    assert isinstance(answer_of(reports)[1].error, Closed)
    caplog.clear()


# ------------------------------------------------------------------ on the side of the event loop

CHAT = "/v1/chat/completions"


def asked(text: str, **changes) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 40} | changes


def texts(running, bodies: list[dict]) -> list[str]:
    """The answers, asked for all at once."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: httpx.post(running.url + CHAT, json=body, timeout=120), bodies))
    assert [answer.status_code for answer in answers] == [200] * len(bodies), [answer.text for answer in answers]
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


HERE: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "encoding": (PromptTemplate, "encode", lambda self, messages, _: "culprit" in messages[-1]["content"]),
    "making the answer": (TextStream, "__init__", lambda self, tokenizer, stops: "culprit" in stops),
    "its text": (TextStream, "put", lambda self, ids: "culprit" in self._stops),
    "the end of its text": (TextStream, "end", lambda self: "culprit" in self._stops),
    "a forward": (Step, "__call__", lambda self, rows, *_: at(rows, 0)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("point", HERE)
def test_the_culprit_gets_500_and_the_others_their_answers(server, monkeypatch, caplog, point: str, stream: bool) -> None:
    bodies = [asked(f"question {number}") for number in range(6)]
    expected = [texts(server, [body])[0] for body in bodies]
    breaks(monkeypatch, *HERE[point])
    with ThreadPoolExecutor(1) as thread:
        others = thread.submit(texts, server, bodies)
        culprit = httpx.post(server.url + CHAT, json=asked("culprit", stop="culprit", seed=BAD, stream=stream), timeout=120)
        assert others.result() == expected
    if stream and culprit.status_code == 200:
        events = [line.removeprefix("data: ") for line in culprit.text.splitlines() if line]
        error = json.loads(events[-2])["error"]
        assert events[-1] == "[DONE]"
    else:
        assert culprit.status_code == 500
        error = culprit.json()["error"]
    assert error["type"] == "server_error" and "log says why" in error["message"] and "Injected" not in error["message"]
    assert "Injected" in caplog.text
    until_empty(server)
    caplog.clear()


def test_what_is_never_sent_is_never_decoded(server, monkeypatch, caplog) -> None:
    """A server may give up between the request and its response."""
    submitted: list[object] = []
    monkeypatch.setattr(Worker, "submit", lambda self, jobs: submitted.extend(jobs))
    breaks(monkeypatch, app.EventStream, "__call__", lambda *_: True)
    assert httpx.post(server.url + CHAT, json=asked("x", stream=True), timeout=60).status_code == 500
    assert not submitted
    while "Injected" not in caplog.text:  # the log may follow the answer
        time.sleep(0.01)
    caplog.clear()


def test_an_answer_that_nobody_enters(server) -> None:
    body = protocol.ChatRequest.model_validate(asked("x"))
    answer = asyncio.run(server.service.answer(body))
    assert answer.choices and server.service.worker.waiting == server.service.worker.running == 0


def test_the_demo(caplog, monkeypatch) -> None:
    with run_server(Limits(), question="1 + 1?") as running:
        wanted = {"prompt": "1 + 1?", "max_tokens": 8}
        with monkeypatch.context() as broken:
            breaks(broken, Step, "__call__", lambda *_: True)
            answer = httpx.post(running.url + "/demo/race", json=wanted, timeout=60)
            assert answer.status_code == 200 and "its log says why" in answer.text.splitlines()[-2]
        answer = httpx.post(running.url + "/demo/race", json=wanted, timeout=60)
        assert answer.text.count('"ended": true') == 2
    caplog.clear()


# ------------------------------------------------------------------ what once ended all others


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 10**30}, {"top_k": 10**400}, {"temperature": 10**300}, {"min_p": 1e-320}, {"top_p": 1e-320}, {"seed": -(2**63)}],
)
def test_extreme_numbers_do_no_harm_to_others(server, changes: dict) -> None:
    bodies = [asked(f"question {number}") for number in range(4)]
    expected = [texts(server, [body])[0] for body in bodies]
    with ThreadPoolExecutor(1) as thread:
        others = thread.submit(texts, server, bodies)
        answer = httpx.post(server.url + CHAT, json=asked("x", temperature=1.0) | changes, timeout=60)
        assert answer.status_code in (200, 400)
        assert others.result() == expected

"""The decoding thread: jobs in line, cancelled jobs, failures, the end."""

import queue as queues
import threading
from itertools import islice

import pytest
import torch
from servers import answer_of
from tiny import tiny_model

from cllm.decoding import JacobiDecoder, Queue, Request, RowResult
from cllm.serving.server.worker import Busy, Closed, Progress, ReportingJob, Worker


@pytest.fixture
def decoder() -> JacobiDecoder:
    return JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None, max_position_embeddings=100_000), 4)


def job(prompt: list[int], length: int) -> tuple[ReportingJob, "queues.Queue[Progress]"]:
    reports: queues.Queue[Progress] = queues.Queue()
    return ReportingJob(Request(prompt, length), reports.put), reports


def steps_of(result: RowResult) -> list[list[int]]:
    ids = iter(result.token_ids)
    return [list(islice(ids, count)) for count in result.accepted]


@pytest.mark.parametrize("interval", [1, 5])
def test_reports_add_up_to_the_result(decoder: JacobiDecoder, interval: int) -> None:
    wanted = [([1 + n, 2, 3], 5 + n) for n in range(9)]
    expected = [decoder.generate([prompt], max_new_tokens=length)[0] for prompt, length in wanted]
    decoder.sync_interval = interval
    worker = Worker(Queue(decoder, 3), 100)
    jobs = [job(*one) for one in wanted]
    worker.submit([one for one, _ in jobs])
    for (_, reports), result in zip(jobs, expected, strict=True):
        steps, last = answer_of(reports)
        assert (steps, last.stop) == (steps_of(result), result.stop)
    worker.stop()
    assert worker.running == worker.waiting == 0


def test_cancelled_jobs_make_room_and_say_nothing_more(decoder: JacobiDecoder) -> None:
    worker = Worker(Queue(decoder, 1), 3)
    endless, first = job([1, 2], 90_000)
    waiting, second = job([3, 4], 90_000)
    short, third = job([5, 6], 4)
    worker.submit([endless, waiting, short])
    first.get(timeout=60)
    with pytest.raises(Busy, match="2 requests are waiting, and at most 3 may"):
        worker.submit([job([7], 1)[0]] * 2)
    worker.cancel([waiting, endless])
    assert answer_of(third)[0] == steps_of(decoder.generate([[5, 6]], max_new_tokens=4)[0])
    worker.stop()
    assert second.empty()
    with pytest.raises(Closed):
        worker.submit([short])


def test_stopping_ends_everything_with_an_error(decoder: JacobiDecoder) -> None:
    worker = Worker(Queue(decoder, 1), 10)
    jobs = [job([1, 2], 90_000) for _ in range(3)]
    worker.submit([one for one, _ in jobs])
    jobs[0][1].get(timeout=60)
    worker.stop()
    assert all("shut down" in str(answer_of(reports)[1].error) for _, reports in jobs)
    assert not worker.ready


def test_a_failure_ends_its_batch_only(decoder: JacobiDecoder, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    forward, failing = decoder.model.forward, threading.Event()
    failing.set()

    def fail_once(*args, **kwargs):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("the device is gone")
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder.model, "forward", fail_once)
    worker = Worker(Queue(decoder, 2), 10)
    first, reports = job([1, 2], 5)
    worker.submit([first])
    assert "the model failed" in str(answer_of(reports)[1].error)
    assert "the device is gone" in caplog.text
    caplog.clear()
    second, reports = job([1, 2], 5)
    worker.submit([second])
    assert sum(map(len, answer_of(reports)[0])) == 5
    worker.stop()


def test_out_of_memory_halves_the_batch_and_nothing_is_said_twice(decoder: JacobiDecoder, monkeypatch, caplog) -> None:
    wanted = [([1 + n, 2, 3], 30) for n in range(5)]
    expected = [decoder.generate([prompt], max_new_tokens=length)[0] for prompt, length in wanted]
    forward, calls = decoder.model.forward, []

    def forward_of_two_rows(input_ids, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > 2 and len(calls) > 4:
            raise torch.OutOfMemoryError("too many rows")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(decoder.model, "forward", forward_of_two_rows)
    worker = Worker(Queue(decoder, 4), 10)
    jobs = [job(*one) for one in wanted]
    worker.submit([one for one, _ in jobs])
    for (_, reports), result in zip(jobs, expected, strict=True):
        steps, last = answer_of(reports)
        assert (steps, last.error) == (steps_of(result), None)
    worker.stop()
    assert worker.queue.batch_size == 2 and max(calls[:5]) == 4 and max(calls[5:]) == 2
    assert "out of memory; going on with batch size 2" in caplog.text

"""Continuous batching changes which rows share a batch, never their texts."""

import random
from itertools import count

import pytest
import torch
from tiny import KINDS, random_adapter, tiny_model

from cllm.decoding import JacobiDecoder, Queue, Request
from cllm.decoding.step import Step
from cllm.errors import UsageError


def requests(seed: int, number: int, vocabulary: int = 97) -> list[Request]:
    draw = random.Random(seed)
    return [Request([draw.randrange(1, vocabulary) for _ in range(draw.randint(1, 25))], draw.randint(1, 30)) for _ in range(number)]


def alone(decoder: JacobiDecoder, wanted: list[Request]):
    return [decoder.generate([r.prompt], max_new_tokens=r.max_new_tokens)[0] for r in wanted]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", ["sliding", "block"])
def test_rows_equal_those_decoded_alone(kind: str, window) -> None:
    """Results and statistics, as rows join and leave at any moment, with and without end-of-sequence ids."""
    for case in range(5):
        draw = random.Random(f"{kind} {case}")
        model = tiny_model(kind, case, vocab_size=97, eos_token_id=None)
        eos = draw.choice([[], [draw.randrange(97) for _ in range(8)]])
        decoder = JacobiDecoder(model, draw.randint(1, 12), eos_token_ids=eos, window=window)
        wanted = requests(case, draw.randint(1, 14))
        found = dict(Queue(decoder, draw.randint(1, 5)).run(iter(wanted)))
        assert [found[n] for n in range(len(wanted))] == alone(decoder, wanted)


def test_rare_synchronisation_changes_nothing() -> None:
    """As on a GPU, where finished rows stay until the host synchronises."""
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 5, eos_token_ids=[3, 4, 5, 6])
    wanted = requests(1, 12)
    expected = alone(decoder, wanted)
    decoder.sync_interval = 7
    found = dict(Queue(decoder, 4).run(wanted))
    assert [found[n] for n in range(12)] == expected


def test_finished_row_makes_room_at_once() -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 1)
    wanted = [Request([1], 40), *(Request([2, n], 4) for n in range(1, 10))]
    order = [number for number, _ in Queue(decoder, 2).run(wanted)]
    assert order[-1] == 0 and sorted(order) == list(range(10))  # the long one ran next to all the others


def test_requests_are_read_lazily() -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 4)
    read = count()
    endless = (Request([1 + next(read) % 90], 3) for _ in iter(int, 1))
    results = Queue(decoder, 2).run(endless)
    for _ in range(5):
        next(results)
    results.close()
    assert next(read) < 100


def test_cache_stays_within_its_bound() -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 4)
    wanted = requests(3, 20)
    rows, flow = [], decoder.flow

    def watched(feed, cancelled=()):
        for iteration in flow(feed, cancelled):
            rows.append(len(iteration.rows_B))
            yield iteration

    decoder.flow = watched  # type: ignore[method-assign]
    found = dict(Queue(decoder, 8, max_slots=150).run(wanted))
    assert len(found) == 20 and [found[n].token_ids for n in range(20)] == [r.token_ids for r in alone(decoder, wanted)]
    longest = max(len(r.prompt) + r.max_new_tokens + 4 for r in wanted)
    assert 150 // longest < max(rows) < 8  # more rows after the long ones, never as many as unbounded


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_out_of_memory_halves_the_batch(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of decoding, without losing or repeating a result."""
    decoder = JacobiDecoder(tiny_model(vocab_size=97, eos_token_id=None), 4)
    wanted = requests(4, 15)
    flow, seen = decoder.flow, count()

    def short(feed, cancelled=()):
        for iteration in flow(feed, cancelled):
            if len(iteration.rows_B) > 3 and next(seen) > 25:
                raise error
            yield iteration

    decoder.flow = short  # type: ignore[method-assign]
    found = list(Queue(decoder, 7).run(wanted))
    assert sorted(number for number, _ in found) == list(range(15))
    assert [dict(found)[n].token_ids for n in range(15)] == [r.token_ids for r in alone(decoder, wanted)]
    assert [r.getMessage() for r in caplog.records] == ["out of memory; going on with batch size 3"]


def test_out_of_memory_with_one_row_halves_the_width(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Window and drafts become narrower, and the text stays the same."""
    model = tiny_model(vocab_size=97, eos_token_id=None)
    forward, most = Step.forward, 9

    def short(self, tokens, *arguments, **options):
        if tokens.shape[1] > most:
            raise torch.OutOfMemoryError
        return forward(self, tokens, *arguments, **options)

    wanted = requests(1, 2)
    expected = [r.token_ids for r in alone(JacobiDecoder(model, 1), wanted)]
    monkeypatch.setattr(Step, "forward", short)
    queue = Queue(JacobiDecoder(model, 8, adapter=random_adapter(model), drafts=12, prefill_chunk=2), 1)
    found = dict(queue.run(wanted))
    assert [found[number].token_ids for number in range(2)] == expected
    assert (queue.decoder.block_size, queue.decoder.step.drafts) == (2, 3)
    assert [r.getMessage() for r in caplog.records] == [f"out of memory; going on with width {width}" for width in (4, 2)]


def test_final_out_of_memory_and_bugs_are_raised() -> None:
    decoder = JacobiDecoder(tiny_model(), 1)
    for error, batch_size in ((torch.OutOfMemoryError(), 1), (RuntimeError("a defect"), 4)):

        def broken(feed, cancelled, error=error):
            raise error

        decoder.flow = broken  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            list(Queue(decoder, batch_size).run([Request([1], 2)]))


@pytest.mark.parametrize(
    ("batch_size", "max_slots", "message"),
    [(0, None, "batch_size must be >= 1, got 0"), (2, 10, "prompt 0 may need 16 cache slots, which is more than max_slots 10")],
)
def test_bad_bounds(batch_size: int, max_slots: int | None, message: str) -> None:
    decoder = JacobiDecoder(tiny_model(), 4)
    with pytest.raises(UsageError, match=message):
        list(Queue(decoder, batch_size, max_slots).run([Request([1, 2], 10)]))

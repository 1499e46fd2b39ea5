"""Captured and compiled steps give what eager steps give. Captures are kept, bounded, and given up if they fail."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import AROUND_THE_SWITCH, longrope
from tiny import KINDS, random_adapter, tiny_model

from cllm.decoding import GREEDY, JacobiDecoder, Queue, Request, Sampling
from cllm.decoding import runner as runner_module
from cllm.decoding.guess import STRATEGIES
from cllm.decoding.runner import CapturingRunner, CompiledStep, Runner
from cllm.decoding.sampling import ProcessedSampling
from cllm.errors import UsageError

SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7)


class Recording:
    """Captures like CUDA graphs: nothing runs during the capture, and all replays write to the same result."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function):
        self.captures += 1
        results: list[torch.Tensor] = []

        def replay():
            self.replays += 1
            result = function()
            results.append(result) if not results else results[0].copy_(result)
            return results[0]

        return replay


def capturing(model: Any, width: int, capture: Any = None, **options: Any) -> JacobiDecoder:
    """A decoder that captures steps and synchronises as rarely as on a GPU."""
    decoder = JacobiDecoder(model, width, **options)
    decoder.runner = CapturingRunner(decoder.step, capture or Recording())
    decoder.sync_interval = 8
    return decoder


def requests(draw: random.Random, count: int) -> list[Request]:
    prompts = [[draw.randrange(1, 97) for _ in range(draw.randint(1, 25))] for _ in range(count)]
    return [Request(prompt, draw.randint(1, 40), draw.choice([GREEDY, GREEDY, SAMPLED])) for prompt in prompts]


@pytest.mark.parametrize("guess", [*STRATEGIES, "pool+prompt_lookup"])
def test_captured_steps_give_the_same_texts(guess: str) -> None:
    """All kinds of models, both windows; rows join and leave, greedy ones next to sampled ones."""
    for case, kind in enumerate(KINDS):
        draw = random.Random(f"{guess} {kind}")
        model, width, window = tiny_model(kind, case, vocab_size=97), draw.randint(1, 9), draw.choice(["sliding", "block"])
        wanted, options = requests(draw, 9), {"window": window, "guess": guess, "eos_token_ids": [3, 4, 5]}
        whole = JacobiDecoder(model, width, **options)
        whole.runner.narrows = False  # captured steps compute whole windows
        plain, decoder = dict(Queue(whole, 3).run(wanted)), capturing(model, width, **options)
        assert dict(Queue(decoder, 3).run(wanted)) == plain, kind
        assert decoder.runner.capture.replays > decoder.runner.capture.captures > 0


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_captured_steps_with_longrope(name: str) -> None:
    """Frequencies are chosen on the device, and a text is recomputed some iterations after its row has ended."""
    model = longrope(name)
    plain, decoder = dict(Queue(JacobiDecoder(model, 4), 3).run(AROUND_THE_SWITCH)), capturing(model, 4)
    found = dict(Queue(decoder, 3).run(AROUND_THE_SWITCH))
    assert {number: row.token_ids for number, row in found.items()} == {number: row.token_ids for number, row in plain.items()}
    assert decoder.runner.capture.replays > 0


def test_rows_with_a_process() -> None:
    """It is called with its own row's true text, wherever that row is in the batch; such steps are not captured."""

    def process(text_t: torch.Tensor, scores_V: torch.Tensor) -> torch.Tensor:
        return scores_V.index_fill(0, text_t[-3:], -torch.inf)

    draw, model = random.Random(5), tiny_model(seed=2, vocab_size=97)
    picky = [ProcessedSampling(process=process), ProcessedSampling(temperature=1.0, seed=3, process=process)]
    wanted = [replace(request, sampling=draw.choice([GREEDY, SAMPLED, *picky])) for request in requests(draw, 12)]
    (ar, plain, captured) = (JacobiDecoder(model, 1), JacobiDecoder(model, 6), capturing(model, 6))
    expected = {}
    for at, request in enumerate(wanted):
        expected[at] = ar.generate([request.prompt], max_new_tokens=request.max_new_tokens, sampling=request.sampling)
    for decoder in (plain, captured):
        results = dict(Queue(decoder, 4).run(wanted))
        assert {at: result.token_ids for at, result in results.items()} == {at: r.token_ids for at, (r,) in expected.items()}


def test_yielded_iterations_are_not_overwritten() -> None:
    model = tiny_model(seed=2, vocab_size=97, eos_token_id=None)
    plain = [i.fields_BF.tolist() for i in JacobiDecoder(model, 4).iterate([[1, 2], [3]], max_new_tokens=30)]
    held = list(capturing(model, 4).iterate([[1, 2], [3]], max_new_tokens=30))
    running = [i.fields_BF for i in held if i.running_B.all()]
    assert [fields.tolist() for fields in running] == plain[: len(running)]
    assert len({fields.data_ptr() for fields in running}) == len(running) > 5


def test_captures_are_reused_by_the_next_batch() -> None:
    """Also a smaller batch, and after a caller that stopped early. A longer text needs larger buffers and new captures."""
    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None, max_position_embeddings=1024)
    decoder = capturing(model, 1)
    capture = decoder.runner.capture
    first = decoder.generate([[1, 2], [3, 4, 5]], max_new_tokens=20)
    assert capture.captures == 1
    iterations = decoder.iterate([[7], [8]], max_new_tokens=20)
    next(iterations), next(iterations)
    iterations.close()
    assert decoder.generate([[1, 2], [3, 4, 5]], max_new_tokens=20) == first and capture.captures == 1
    decoder.generate([[3]], max_new_tokens=20)
    assert capture.captures == 2
    long = decoder.generate([[9] * 5], max_new_tokens=300)
    assert long == JacobiDecoder(model, 1).generate([[9] * 5], max_new_tokens=300)
    assert decoder.generate([[1, 2], [3, 4, 5]], max_new_tokens=20) == first and capture.captures > 3


def test_buffers_keep_their_addresses() -> None:
    """For any prompts, as long as texts are no longer than before."""
    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None)
    decoder, wanted = capturing(model, 2), [([5] * 3, 240), ([6] * 230, 9), ([7] * 200, 40)]
    places = set()
    for prompt, new_tokens in wanted:
        expected = JacobiDecoder(model, 2).generate([prompt], max_new_tokens=new_tokens)
        assert decoder.generate([prompt], max_new_tokens=new_tokens) == expected
        batch = decoder.runner._kept
        stores = [store for layer in batch.cache.row_layers for store in (layer.keys, layer.values)]
        places.add(tuple(store.data_ptr() for store in (*stores, *vars(batch.rows).values())))
    assert len(places) == 1 and decoder.runner.capture.captures == 1


@pytest.mark.parametrize("tokens", [9, 10, 13, 25])
def test_a_row_that_ends_costs_one_iteration_more(tokens: int) -> None:
    """However rarely the host looks; and the place of such a row is taken by the next request at once."""
    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None)
    decoder = capturing(model, 1)
    assert len(list(decoder.iterate([[1, 2, 3]], max_new_tokens=tokens))) <= tokens + 1
    waiting = [Request([1, 2], tokens), Request([4], tokens)]
    iterations = list(decoder.flow(lambda running: [waiting.pop()] if waiting and not running else []))
    assert len(iterations) <= 2 * (tokens + 1) and sum(int(i.emitted_B.sum()) for i in iterations) == 2 * tokens


def test_two_concurrent_batches() -> None:
    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None)
    decoder, plain = capturing(model, 3), JacobiDecoder(model, 3)
    together = list(zip(decoder.iterate([[1]], max_new_tokens=9), decoder.iterate([[2]], max_new_tokens=9), strict=False))
    for side, prompt in enumerate([[1], [2]]):
        expected = [i.choices_BW.tolist() for i in plain.iterate([prompt], max_new_tokens=9)]
        found = [pair[side].choices_BW.tolist() for pair in together if pair[side].running_B[0]]
        assert found == expected[: len(found)] and len(found) > 3


def test_number_of_captures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MOST_CAPTURED", 2)
    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None)
    decoder = capturing(model, 2)
    samplings = [Sampling(temperature=1.0, top_k=k) for k in range(1, 6)]
    for sampling in samplings:
        plain = JacobiDecoder(model, 2).generate([[1, 2]], max_new_tokens=12, sampling=sampling)
        assert decoder.generate([[1, 2]], max_new_tokens=12, sampling=sampling) == plain
    assert decoder.runner.capture.captures == 5
    assert len(decoder.runner._kept.captured) == 2


def test_lengths_and_sizes() -> None:
    runner = CapturingRunner(None, Recording())
    assert [runner.length(reach) for reach in (1, 256, 257, 1025, 2049, 3000, 4097)] == [256, 256, 512, 1280, 2560, 3072, 5120]
    assert [runner.size(used, 6) for used in (0, 1, 2, 3, 5, 6)] == [0, 1, 2, 4, 6, 6]


def test_step_that_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = tiny_model(seed=1, vocab_size=97, eos_token_id=None)
    decoder, prompts = capturing(model, 4, refuse), [[1, 2], [3]]
    plain = JacobiDecoder(model, 4).generate(prompts, max_new_tokens=30)
    assert decoder.generate(prompts, max_new_tokens=30) == decoder.generate(prompts, max_new_tokens=30) == plain
    (record,) = caplog.records
    assert "cannot be captured" in record.getMessage() and "not permitted" in record.getMessage()


# ------------------------------------------------------------------------------------------------------ torch.compile


def compiled(model: Any, width: int, backend: str, **options: Any) -> tuple[JacobiDecoder, CompiledStep]:
    torch._dynamo.reset()
    decoder = JacobiDecoder(model, width, **options)
    step = CompiledStep(decoder.step, backend)
    decoder.runner = Runner(step)
    return decoder, step


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_step_compiles_to_one_graph(kind: str) -> None:
    """``fullgraph`` refuses every graph break, including any read of a value."""
    model = tiny_model(kind, vocab_size=97, eos_token_id=None)
    decoder, step = compiled(model, 4, "eager", guess="pool")
    expected = JacobiDecoder(model, 4, guess="pool+context").generate([[1, 2, 3], [4]], max_new_tokens=20)
    assert decoder.generate([[1, 2, 3], [4]], max_new_tokens=20) == expected
    assert step.compiled is not step.plain


@pytest.mark.slow
def test_inductor_gives_the_same_texts() -> None:
    model = tiny_model(vocab_size=97, eos_token_id=None, num_hidden_layers=1)
    decoder, step = compiled(model, 4, "inductor")
    expected = JacobiDecoder(model, 4).generate([[1, 2, 3], [4]], max_new_tokens=20)
    assert decoder.generate([[1, 2, 3], [4]], max_new_tokens=20) == expected
    assert step.compiled is not step.plain


KINDS_OF_BATCH = [(count, length) for length in (10, 60) for count in (3, 1, 4, 2)]


def decode_all(decoder: JacobiDecoder) -> list:
    """Decode batches of several sizes and lengths, and a queue whose rows finish one by one."""
    batches = [decoder.generate([[1, 2, 3]] * count, max_new_tokens=length) for count, length in KINDS_OF_BATCH]
    return [*batches, dict(Queue(decoder, 4).run(Request([number], 3 * number + 2) for number in range(1, 7)))]


def test_many_kinds_of_step_compile() -> None:
    model = tiny_model(vocab_size=97, eos_token_id=None, num_hidden_layers=1)
    decoder, step = compiled(model, 4, "eager")
    assert decode_all(decoder) == decode_all(JacobiDecoder(model, 4))
    assert step.compiled is not step.plain


@pytest.mark.parametrize("drafts", [False, True])
def test_recompile_limit(drafts: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("cllm.decoding.runner.MOST_COMPILED", 2)
    model = tiny_model(vocab_size=97, eos_token_id=None, num_hidden_layers=1)
    options = {"adapter": random_adapter(model)} if drafts else {}
    decoder, step = compiled(model, 4, "eager", **options)
    assert decode_all(decoder) == decode_all(JacobiDecoder(model, 4, **options))
    assert step.compiled is step.plain
    assert len([r for r in caplog.records if "cannot be compiled" in r.getMessage()]) == 1


def test_sampled_batches_are_not_compiled() -> None:
    model = tiny_model(vocab_size=97, eos_token_id=None)
    decoder, step = compiled(model, 4, "eager")
    step.compiled = None
    expected = JacobiDecoder(model, 4).generate([[1, 2, 3]], max_new_tokens=20, sampling=SAMPLED)
    assert decoder.generate([[1, 2, 3]], max_new_tokens=20, sampling=SAMPLED) == expected


def test_step_that_cannot_be_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(vocab_size=97, eos_token_id=None)
    model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    decoder, _ = compiled(model, 4, "eager")
    expected = JacobiDecoder(model, 4).generate([[1, 2, 3]], max_new_tokens=20)
    assert decoder.generate([[1, 2, 3]], max_new_tokens=20) == expected
    assert len([r for r in caplog.records if "cannot be compiled" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fast", "compile must be one of auto, off, graph, compile, got 'fast'"),
        ("graph", "needs the whole model on one CUDA device, got cpu"),
    ],
)
def test_bad_modes(mode: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JacobiDecoder(tiny_model(), 4, compile=mode)


def test_modes_on_a_cpu() -> None:
    assert type(JacobiDecoder(tiny_model(), 4).runner) is type(JacobiDecoder(tiny_model(), 4, compile="off").runner) is Runner
    assert isinstance(JacobiDecoder(tiny_model(), 4, compile="compile").runner.step, CompiledStep)

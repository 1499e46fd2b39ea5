"""A step never synchronises with the device, and chunks of a prompt give what the whole prompt gives."""

import pytest
import torch
from tiny import KINDS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from cllm.decoding import GREEDY, Iteration, JacobiDecoder, Sampling
from cllm.decoding.cache import RowCache
from cllm.decoding.guess import STRATEGIES
from cllm.decoding.sampling import Chooser
from cllm.errors import UsageError

aten = torch.ops.aten
SYNCS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2}
SYNCS |= {aten.lift_fresh}  # copies a value from the host to the device
ALL = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)


class NoSync(TorchDispatchMode):
    """Fails on operations that read a value, or whose shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func.overloadpacket
        assert operation not in SYNCS, f"{func} waits for the device"
        if operation in (aten.index, aten.index_put, aten.index_put_):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **kwargs or {})


def step_once(decoder: JacobiDecoder, sampling: Sampling) -> None:
    """Run a prefill normally, then one step that must not synchronise."""
    decoder.sync_interval = 100
    steps, plain = decoder.iterate([[1, 2, 3], [4]], max_new_tokens=20, sampling=sampling), decoder.runner.step

    def watched(*args):
        with NoSync():
            return plain(*args)

    decoder.runner.step = watched
    next(steps)
    next(steps)


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("guess", [*STRATEGIES, "pool+prompt_lookup"])
def test_step_does_not_synchronise(guess: str, window: str) -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97), 5, eos_token_ids=range(3, 20), window=window, guess=guess)
    for sampling in (GREEDY, ALL):
        step_once(decoder, sampling)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])  # which sorts tokens by expert, using their counts
def test_models_do_not_synchronise(kind: str) -> None:
    step_once(JacobiDecoder(tiny_model(kind), 4), GREEDY)


def test_no_sync_check_can_fail() -> None:
    ones = torch.ones(2)
    for waiting in (lambda: ones[0].item(), lambda: ones[ones > 0], lambda: bool(ones[0] > 0), lambda: torch.tensor([1])):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            waiting()


def test_step_works_in_place() -> None:
    """Captured steps hold the addresses of buffers, so a step must not replace any."""
    decoder = JacobiDecoder(tiny_model(vocab_size=97), 5, window="block", guess="pool")
    plain, places = decoder.runner.step, []

    def watched(rows, chooser, cache, *shape):
        fields = plain(rows, chooser, cache, *shape)
        buffers = [*vars(rows).values(), *(store for layer in cache.row_layers for store in (layer.keys, layer.values))]
        places.append([buffer.data_ptr() for buffer in buffers])
        return fields

    decoder.runner.step = watched
    decoder.generate([[1, 2, 3], [4]], max_new_tokens=12)
    assert len(places) > 12 and len(places[0]) == 13 + 2 * 3
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_chunked_prefill(kind: str) -> None:
    """Ragged prompts, sliding windows of 12 tokens, smaller and larger chunks. A prefill counts as one forward."""
    model = tiny_model(kind, seed=3, vocab_size=97, eos_token_id=None)
    prompts = [[*range(1, 41)], [5, 6], [*range(50, 70)]]
    whole = JacobiDecoder(model, 6).generate(prompts, max_new_tokens=20)
    for chunk in (1, 7, 13, 39, 40):
        assert JacobiDecoder(model, 6, prefill_chunk=chunk).generate(prompts, max_new_tokens=20) == whole


def test_prefill_forwards_have_at_most_a_chunk_and_a_window() -> None:
    model, sizes = tiny_model(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    JacobiDecoder(model, 4, prefill_chunk=10).generate([[3] * 34], max_new_tokens=4)
    assert sizes[:4] == [10, 10, 10, 3 + 4]
    with pytest.raises(UsageError, match="prefill_chunk must be >= 1, got 0"):
        JacobiDecoder(model, 4, prefill_chunk=0)


def test_iteration_fields_round_trip() -> None:
    scalars = [torch.tensor([n, n + 10]) for n in range(5)]
    fields = Iteration.pack(
        *scalars, torch.tensor([1, 0]), window_BW=torch.tensor([[7, 8], [9, 6]]), choices_BW=torch.tensor([[3, 4], [5, 2]])
    )
    iteration = Iteration(fields)
    named = (iteration.rows_B, iteration.start_B, iteration.emitted_B, iteration.fast_forwarded_B, iteration.stationary_B)
    assert [column.tolist() for column in named] == [column.tolist() for column in scalars]
    assert iteration.running_B.tolist() == [True, False]
    assert iteration.window_BW.tolist() == [[7, 8], [9, 6]] and iteration.choices_BW.tolist() == [[3, 4], [5, 2]]


def test_chooser_kinds() -> None:
    cold, warm = Sampling(temperature=0.5, seed=1), Sampling(temperature=2.0, seed=2)
    assert Chooser([cold]).kind == Chooser([warm, GREEDY]).kind != Chooser([GREEDY]).kind == Chooser([GREEDY] * 3).kind
    assert Chooser([Sampling(temperature=1, top_k=3)]).kind != Chooser([Sampling(temperature=1, top_k=4)]).kind


def test_moved_or_grown_caches_drop_their_views() -> None:
    """Views would keep the old keys and values of all layers in memory."""
    model, cache, other = tiny_model(), RowCache(), RowCache()
    for one in (cache, other):
        one.place(torch.tensor([[0, 1]]), 2)
        with torch.inference_mode():
            model(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 1]]), past_key_values=one, use_cache=True)
    with torch.inference_mode():
        cache.move_in(other, torch.tensor([1]), 2)
    assert all(layer.keys is None and not layer._views for layer in other.row_layers)
    assert all(len(layer.keys) == 2 and not layer._views for layer in cache.row_layers)

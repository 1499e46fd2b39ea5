"""A step leaves every value on the device, and prompts may go through the model in pieces."""

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
SYNCS |= {aten.lift_fresh}  # a value of the host's that would have to go to the device
ALL = Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)


class NoSync(TorchDispatchMode):
    """Raises where a step asks for a value, or for a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of = func.overloadpacket
        assert of not in SYNCS, f"{func} waits for the device"
        if of in (aten.index, aten.index_put, aten.index_put_):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **kwargs or {})


def step_once(decoder: JacobiDecoder, sampling: Sampling) -> None:
    """A prefill as usual, then one step that may not wait."""
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
def test_a_step_waits_for_nothing(guess: str, window: str) -> None:
    decoder = JacobiDecoder(tiny_model(vocab_size=97), 5, eos_token_ids=range(3, 20), window=window, guess=guess)
    for sampling in (GREEDY, ALL):
        step_once(decoder, sampling)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])  # sorts tokens by expert, with their counts
def test_models_in_a_step_wait_for_nothing(kind: str) -> None:
    step_once(JacobiDecoder(tiny_model(kind), 4), GREEDY)


def test_the_check_can_fail() -> None:
    ones = torch.ones(2)
    for waiting in (lambda: ones[0].item(), lambda: ones[ones > 0], lambda: bool(ones[0] > 0), lambda: torch.tensor([1])):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            waiting()


def test_a_step_works_in_place() -> None:
    """What is captured points at buffers: a step may put no others in their place."""
    decoder = JacobiDecoder(tiny_model(vocab_size=97), 5, window="block", guess="pool")
    plain, places = decoder.runner.step, []

    def watched(rows, chooser, cache, *shape):
        facts = plain(rows, chooser, cache, *shape)
        buffers = [*vars(rows).values(), *(store for layer in cache.row_layers for store in (layer.keys, layer.values))]
        places.append([buffer.data_ptr() for buffer in buffers])
        return facts

    decoder.runner.step = watched
    decoder.generate([[1, 2, 3], [4]], max_new_tokens=12)
    assert len(places) > 12 and len(places[0]) == 13 + 2 * 3
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prefill_in_pieces(kind: str) -> None:
    """Ragged prompts, sliding windows of 12 tokens, chunks below and above them; the forwards of a prefill count as one."""
    model = tiny_model(kind, seed=3, vocab_size=97, eos_token_id=None)
    prompts = [[*range(1, 41)], [5, 6], [*range(50, 70)]]
    whole = JacobiDecoder(model, 6).generate(prompts, max_new_tokens=20)
    for chunk in (1, 7, 13, 39, 40):
        assert JacobiDecoder(model, 6, prefill_chunk=chunk).generate(prompts, max_new_tokens=20) == whole


def test_a_prefill_has_no_more_tokens_than_a_chunk_and_a_window() -> None:
    model, sizes = tiny_model(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    JacobiDecoder(model, 4, prefill_chunk=10).generate([[3] * 34], max_new_tokens=4)
    assert sizes[:4] == [10, 10, 10, 3 + 4]
    with pytest.raises(UsageError, match="prefill_chunk must be >= 1, got 0"):
        JacobiDecoder(model, 4, prefill_chunk=0)


def test_iterations_tell_the_same_in_one_tensor() -> None:
    singles = [torch.tensor([n, n + 10]) for n in range(5)]
    facts = Iteration.pack(
        *singles, torch.tensor([1, 0]), window_BW=torch.tensor([[7, 8], [9, 6]]), choices_BW=torch.tensor([[3, 4], [5, 2]])
    )
    iteration = Iteration(facts)
    named = (iteration.rows_B, iteration.start_B, iteration.emitted_B, iteration.fast_forwarded_B, iteration.stationary_B)
    assert [column.tolist() for column in named] == [column.tolist() for column in singles]
    assert iteration.running_B.tolist() == [True, False]
    assert iteration.window_BW.tolist() == [[7, 8], [9, 6]] and iteration.choices_BW.tolist() == [[3, 4], [5, 2]]


def test_choosers_of_one_kind() -> None:
    cold, warm = Sampling(temperature=0.5, seed=1), Sampling(temperature=2.0, seed=2)
    assert Chooser([cold]).kind == Chooser([warm, GREEDY]).kind != Chooser([GREEDY]).kind == Chooser([GREEDY] * 3).kind
    assert Chooser([Sampling(temperature=1, top_k=3)]).kind != Chooser([Sampling(temperature=1, top_k=4)]).kind


def test_a_cache_that_is_used_up_or_grows_keeps_nothing_of_what_it_was() -> None:
    """Views of the keys and values would keep all layers in memory twice."""
    model, cache, other = tiny_model(), RowCache(), RowCache()
    for one in (cache, other):
        one.place(torch.tensor([[0, 1]]), 2)
        with torch.inference_mode():
            model(torch.tensor([[5, 6]]), position_ids=torch.tensor([[0, 1]]), past_key_values=one, use_cache=True)
    with torch.inference_mode():
        cache.move_in(other, torch.tensor([1]), 2)
    assert all(layer.keys is None and not layer._views for layer in other.row_layers)
    assert all(len(layer.keys) == 2 and not layer._views for layer in cache.row_layers)

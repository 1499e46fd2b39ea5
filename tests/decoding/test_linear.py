"""Linear layers by oneDNN: the same numbers, weights as they are now, and a model that shows no trace of it."""

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_model
from torch import nn

from cllm.decoding import JacobiDecoder, linear
from cllm.decoding.linear import Linears

pytestmark = pytest.mark.skipif(not linear._supported(torch.float32), reason="no x86 CPU, or a torch without oneDNN")
PROMPT, OTHER = [5, 6, 7, 8, 5, 6], [9, 3, 4]


def layers(model) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def patched(model) -> int:
    return sum("forward" in layer.__dict__ for layer in layers(model))


@pytest.mark.parametrize("most", [linear.PACKED_BYTES, 0])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 32), (2, 32), (32,)])
@torch.inference_mode()
def test_the_same_numbers(shape, most, monkeypatch):
    """Also of inputs that do not lie in one piece, with a bias, and where the weights are too large for a second copy."""
    monkeypatch.setattr(linear, "PACKED_BYTES", most)
    model = tiny_model("qwen2")
    assert any(layer.bias is not None for layer in layers(model))
    linears = Linears.fresh(model)
    for layer in (layer for layer in layers(model) if layer.in_features == 32):
        x = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)
        expected = layer(x)
        with linears:
            assert patched(model) == len(layers(model))
            torch.testing.assert_close(layer(x), expected)
    assert not patched(model)


def test_used_by_the_decoder_and_gone_after_it():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(patched(model)))
    for _ in JacobiDecoder(model, 4).iterate([PROMPT], max_new_tokens=8):
        assert not patched(model)  # whoever gets an iteration may train the model, or save it
    assert set(seen) == {len(layers(model))}
    assert pickle.dumps(model.state_dict()) and all("forward" not in vars(module) for module in model.modules())


def test_nothing_is_left_where_a_forward_fails():
    model = tiny_model()
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)
    assert not patched(model)
    handle.remove()
    assert JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=4)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w.data.mul_(-1), id="in place, behind autograd's back"),
        pytest.param(lambda w: w.data.copy_(w.data.flip(0).contiguous()), id="rows in another order"),
        pytest.param(lambda w: setattr(w, "data", w.data.roll(1, 1)), id="another tensor, columns in another order"),
        pytest.param(lambda w: w.data[3, 5:6].add_(2.0), id="one number"),
    ],
)
def test_weights_are_those_of_now(change):
    """Training, merging of adapters and users change weights in ways that leave no mark."""
    model = tiny_model(tie_word_embeddings=False)
    decoder = JacobiDecoder(model, 4)
    decoder.generate([PROMPT], max_new_tokens=8)
    for weight in (model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
        change(weight)
        x = torch.randn(2, weight.shape[1])
        with torch.inference_mode():
            with Linears.fresh(model):
                layer = next(layer for layer in layers(model) if layer.weight is weight)
                torch.testing.assert_close(layer(x), x @ weight.T)


def test_training_in_the_midst_of_decoding():
    """Gradients flow as ever while iterations are being fetched, and the next text is that of the new weights."""
    model, decoder = tiny_model(), None
    decoder = JacobiDecoder(model, 4)
    iterations = decoder.iterate([PROMPT], max_new_tokens=12)
    next(iterations)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    assert all(layer.weight.grad is not None for layer in layers(model))
    optimizer.step()
    iterations.close()
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    texts = [of.generate([PROMPT], max_new_tokens=12)[0].token_ids for of in (decoder, JacobiDecoder(twin, 4))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case", ["float64", "switched off", "autocast", "forward of its own", "another class"])
def test_left_alone(case):
    class Own(nn.Linear):
        pass

    model = tiny_model()
    if case == "float64":
        model.double()
    odd = layers(model)[0]
    if case == "forward of its own":
        odd.forward = own = lambda x: nn.functional.linear(x, odd.weight, odd.bias)
    if case == "another class":
        odd.__class__ = Own
    linears = Linears.fresh(model)
    with (
        torch.backends.mkldnn.flags(enabled=case != "switched off"),
        torch.autocast("cpu", enabled=case == "autocast"),
        linears,
    ):
        expected = {"forward of its own": len(layers(model)), "another class": len(layers(model)) - 1}.get(case, 0)
        assert patched(model) == expected
    if case == "forward of its own":
        assert odd.__dict__["forward"] is own


def test_one_copy_for_all_decoders_of_a_model_and_none_without_them():
    model = tiny_model()
    first, second = JacobiDecoder(model, 4), JacobiDecoder(model, 8)
    assert first.step.linears is second.step.linears is not JacobiDecoder(tiny_model(), 4).step.linears
    first.generate([PROMPT], max_new_tokens=4)
    key = id(model)
    del first
    gc.collect()
    assert key in Linears._known
    del second
    gc.collect()
    assert key not in Linears._known


def test_threads_that_decode_with_one_model():
    model = tiny_model()
    prompts = [PROMPT, OTHER] * 4
    expected = [JacobiDecoder(model, 4).generate([ids], max_new_tokens=24)[0].token_ids for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda ids: JacobiDecoder(model, 4).generate([ids], max_new_tokens=24)[0].token_ids, prompts)
        assert [*found] == expected
    assert not patched(model)


def test_gradients_flow_where_another_thread_decodes():
    model = tiny_model()
    with Linears.fresh(model):
        model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    assert all(layer.weight.grad is not None for layer in layers(model))


def test_bfloat16():
    if not linear._supported(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")
    model = tiny_model().bfloat16()
    x = torch.randn(3, 32).bfloat16()
    linears, layer = Linears.fresh(model), layers(model)[0]
    with torch.inference_mode():
        expected = layer(x)
        with linears:
            assert patched(model)
            torch.testing.assert_close(layer(x), expected)

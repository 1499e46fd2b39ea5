"""Linear layers by oneDNN give the same numbers, use the current weights, and leave the model unchanged."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import random_adapter, tiny_model
from torch import nn

from cllm.decoding import JacobiDecoder, linear, onednn
from cllm.decoding.linear import LinearPatch

pytestmark = pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="no x86 CPU, or a torch without oneDNN")
PROMPT, OTHER = [5, 6, 7, 8, 5, 6], [9, 3, 4]


@pytest.fixture(autouse=True)
def use_onednn_for_any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Intel CPUs, a few rows would otherwise be left to MKL."""
    monkeypatch.setattr(linear, "_fewest_rows", lambda dtype: 1)


def layers(model) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def patched(model) -> int:
    return sum("forward" in layer.__dict__ for layer in layers(model))


@pytest.mark.parametrize("most", [linear.PACKED_BYTES, 0])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 7, 32), (2, 32), (32,)])
@torch.inference_mode()
def test_same_numbers(shape, most, monkeypatch):
    """Also for non-contiguous inputs, with a bias, and with weights too large to be packed."""
    monkeypatch.setattr(linear, "PACKED_BYTES", most)
    model = tiny_model("qwen2")
    assert any(layer.bias is not None for layer in layers(model))
    linears = LinearPatch.refreshed(model)
    for layer in (layer for layer in layers(model) if layer.in_features == 32):
        x = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)
        expected = layer(x)
        with linears:
            assert patched(model) == len(layers(model))
            torch.testing.assert_close(layer(x), expected)
    assert not patched(model)


@pytest.mark.skipif(not onednn.has_onednn(torch.bfloat16), reason="no matrix units for bfloat16")
@torch.inference_mode()
def test_packed_bfloat16_gives_the_bits_of_torch() -> None:
    model = tiny_model("qwen2").bfloat16()
    linears = LinearPatch.refreshed(model)
    for layer in (layer for layer in layers(model) if layer.in_features == 32):
        x = torch.randn(32, 32).bfloat16()
        expected = layer(x)
        with linears:
            assert patched(model) == len(layers(model))
            assert all(layer(x[:rows]).equal(expected[:rows]) for rows in (1, 2, 7, 16, 32))


def outputs(model, adapter, x: torch.Tensor, drafts: int, length: int) -> list[torch.Tensor]:
    """What the layers give that take ``x``, if the last ``drafts`` of each row's ``length`` tokens are drafts."""
    linears = LinearPatch.for_model(model)
    for _ in range(2):  # the first forward finds the groups
        with linears.drafting(adapter, length, drafts):
            found = [layer(x) for layer in layers(model) if layer.in_features == x.shape[-1]]
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(1, 7, 64), (3, 7, 64), (21, 64)])
@torch.inference_mode()
def test_joined_products(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    """Verify tokens get the bits that they have without an adapter; draft tokens get its deltas."""
    if not onednn.has_onednn(dtype):
        pytest.skip("no matrix units for bfloat16")
    model = tiny_model("qwen2", hidden_size=64).to(dtype)
    adapter, x = random_adapter(model), torch.randn(shape).to(dtype)
    linears = LinearPatch.for_model(model)
    linears.refresh(adapter)
    deltas = linears._deltas[adapter]
    assert set(deltas.joined) == set(adapter.down)
    with linears:
        plain = [layer(x) for layer in layers(model) if layer.in_features == 64]
    joined = outputs(model, adapter, x, 3, 7)
    deltas.joined = {}
    added = outputs(model, adapter, x, 3, 7)
    assert len(joined) == len(plain) > 10
    for together, apart, without in zip(joined, added, plain, strict=True):
        together, apart, without = (tensor.view(-1, 7, tensor.shape[-1]) for tensor in (together, apart, without))
        assert together[:, :-3].equal(without[:, :-3])
        torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)
    assert not joined[0].equal(plain[0])


@torch.inference_mode()
def test_joined_products_are_of_the_current_weights() -> None:
    model = tiny_model()
    adapter, x = random_adapter(model), torch.randn(1, 7, 32)
    linears = LinearPatch.for_model(model)
    linears.refresh(adapter)
    before = outputs(model, adapter, x, 3, 7)[0]
    layers(model)[0].weight.mul_(2)
    linears.refresh(adapter)
    after = outputs(model, adapter, x, 3, 7)[0]
    torch.testing.assert_close(after[:, :4], 2 * before[:, :4])


def test_nothing_is_joined_where_it_would_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    monkeypatch.setattr(linear, "pad", lambda x, sizes: nn.functional.pad(x, sizes) * 1.0001)
    expected = JacobiDecoder(model, 1).generate([PROMPT], max_new_tokens=20)[0].token_ids
    decoder = JacobiDecoder(model, 6, adapter=adapter)
    assert decoder.generate([PROMPT], max_new_tokens=20)[0].token_ids == expected
    assert decoder.step.linears._deltas[adapter].joined == {}


def test_decoder_patches_the_model_only_during_forwards():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(patched(model)))
    for _ in JacobiDecoder(model, 4).iterate([PROMPT], max_new_tokens=8):
        assert not patched(model)  # between iterations, the caller may train or save the model
    assert set(seen) == {len(layers(model))}
    assert pickle.dumps(model.state_dict()) and all("forward" not in vars(module) for module in model.modules())


def test_failing_forward_leaves_the_model_unpatched():
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
def test_changed_weights_are_noticed(change):
    """Including changes that alter neither version counter nor data pointer."""
    model = tiny_model(tie_word_embeddings=False)
    decoder = JacobiDecoder(model, 4)
    decoder.generate([PROMPT], max_new_tokens=8)
    for weight in (model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
        change(weight)
        x = torch.randn(2, weight.shape[1])
        with torch.inference_mode():
            with LinearPatch.refreshed(model):
                layer = next(layer for layer in layers(model) if layer.weight is weight)
                torch.testing.assert_close(layer(x), x @ weight.T)


@pytest.mark.parametrize("size", [1e-2, 1e-7])
@pytest.mark.parametrize("place", [(3, 5), (3, 31), (0, 1)])
def test_small_edit_next_to_a_huge_weight(size, place):
    model = tiny_model(tie_word_embeddings=False)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[:, 0] = 1e12
    LinearPatch.refreshed(model)
    weight.data[place] = size
    x = torch.zeros(1, 32)
    x[0, place[1]] = 1
    with torch.inference_mode(), LinearPatch.refreshed(model):
        assert float(model.model.layers[1].mlp.up_proj(x)[0, place[0]]) == pytest.approx(size)


def test_swapped_weights_are_noticed():
    model = tiny_model(tie_word_embeddings=False)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    x = torch.randn(2, 32)
    with torch.inference_mode():
        expected = second(x)
        LinearPatch.refreshed(model)
        first.weight.data, second.weight.data = second.weight.data, first.weight.data
        with LinearPatch.refreshed(model):
            torch.testing.assert_close(first(x), expected)


def test_training_during_decoding():
    """Gradients flow as usual between iterations, and the next text is that of the new weights."""
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
    texts = [each.generate([PROMPT], max_new_tokens=12)[0].token_ids for each in (decoder, JacobiDecoder(twin, 4))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case", ["float64", "float16", "switched off", "forward of its own", "another class"])
def test_unsupported_layers_are_not_patched(case):
    class OtherLinear(nn.Linear):
        pass

    model = tiny_model()
    if case in ("float64", "float16"):
        model.to(getattr(torch, case))
    other = layers(model)[0]
    if case == "forward of its own":
        other.forward = own = lambda x: nn.functional.linear(x, other.weight, other.bias)
    if case == "another class":
        other.__class__ = OtherLinear
    with torch.backends.mkldnn.flags(enabled=case != "switched off"), LinearPatch.refreshed(model):
        expected = {"forward of its own": len(layers(model)), "another class": len(layers(model)) - 1}.get(case, 0)
        assert patched(model) == expected
    if case == "forward of its own":
        assert other.__dict__["forward"] is own


def test_later_forward_is_kept():
    """Other libraries may set a layer's forward between two iterations."""
    model = tiny_model()
    linears, layer = LinearPatch.refreshed(model), layers(model)[0]
    layer.forward = own = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with linears:
        assert layer.__dict__["forward"] is own and patched(model) == len(layers(model))
    assert layer.__dict__["forward"] is own and patched(model) == 1


def test_autocast():
    model = tiny_model()
    with torch.inference_mode(), LinearPatch.refreshed(model), torch.autocast("cpu", torch.bfloat16):
        assert layers(model)[0](torch.randn(2, 32)).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_model():
    model = tiny_model(num_hidden_layers=1)
    expected = JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=12)[0].token_ids
    model.compile(backend="inductor")
    assert JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=12)[0].token_ids == expected


def test_decoders_of_a_model_share_one_copy_until_it_is_deleted():
    model = tiny_model()
    first, second = JacobiDecoder(model, 4), JacobiDecoder(model, 8)
    assert first.step.linears is second.step.linears is not JacobiDecoder(tiny_model(), 4).step.linears
    first.generate([PROMPT], max_new_tokens=4)
    kept = first.step.linears._products
    second.generate([PROMPT], max_new_tokens=4)
    assert second.step.linears._products is kept and kept
    gone = weakref.ref(model)
    del first, second, model
    gc.collect()
    assert gone() is None and not any(linears._products is kept for linears in LinearPatch._instances.values())


def test_clear_frees_the_copies():
    model = tiny_model()
    linears = LinearPatch.refreshed(model)
    linears.clear()
    with linears:
        assert not patched(model)
    assert len(LinearPatch.refreshed(model)._products) == len(layers(model))


def test_failed_packing_leaves_the_model_unchanged(monkeypatch):
    model, calls = tiny_model(), []
    packed = linear.pack_weight

    def fails(weight):
        calls.append(weight)
        if len(calls) == 4:
            raise MemoryError
        return packed(weight)

    monkeypatch.setattr(linear, "pack_weight", fails)
    decoder = JacobiDecoder(model, 4)
    model.train()
    with pytest.raises(MemoryError):
        decoder.generate([PROMPT], max_new_tokens=4)
    assert model.training and not patched(model) and not decoder.step.linears._products
    assert decoder.generate([PROMPT], max_new_tokens=4) and len(decoder.step.linears._products) == len(layers(model))


def test_recovers_from_an_interrupt():
    """The effect of a badly timed Ctrl-C lasts until the next text at most."""
    model = tiny_model()
    linears = LinearPatch.refreshed(model)
    linears.__enter__()  # never left
    model.lm_head.weight.data.mul_(-1)
    text = JacobiDecoder(model, 4).generate([PROMPT], max_new_tokens=8)[0].token_ids
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    assert text == JacobiDecoder(twin, 4).generate([PROMPT], max_new_tokens=8)[0].token_ids and not patched(model)


def test_threads_share_a_model():
    model = tiny_model()
    prompts = [PROMPT, OTHER] * 4
    expected = [JacobiDecoder(model, 4).generate([ids], max_new_tokens=24)[0].token_ids for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda ids: JacobiDecoder(model, 4).generate([ids], max_new_tokens=24)[0].token_ids, prompts)
        assert [*found] == expected
    assert not patched(model)


def test_other_threads_can_train_and_see_current_weights():
    model = tiny_model()
    layer = model.lm_head
    x = torch.randn(2, layer.in_features)

    def elsewhere() -> None:
        model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
        layer.weight.data.mul_(2)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T)

    with LinearPatch.refreshed(model), ThreadPoolExecutor(1) as pool:
        pool.submit(elsewhere).result()
        model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()  # inside the patch, with gradients
    assert all(layer.weight.grad is not None for layer in layers(model))


def test_decoders_can_be_deepcopied():
    decoder = JacobiDecoder(tiny_model(), 4)
    text = decoder.generate([PROMPT], max_new_tokens=8)[0].token_ids
    twin = copy.deepcopy(decoder)
    assert twin.step.linears is LinearPatch.for_model(twin.model) is not decoder.step.linears
    assert twin.generate([PROMPT], max_new_tokens=8)[0].token_ids == text

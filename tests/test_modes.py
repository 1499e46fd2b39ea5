"""Evaluation mode for overlapping callers, and every module's own mode afterwards."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from tiny import tiny_model
from torch import nn

from cllm.decoding import JacobiDecoder
from cllm.evaluation.quality import response_nll, response_nlls
from cllm.modes import evaluating

PROMPTS = [[5, 6, 7, 8], [9, 3, 4, 9, 3]]


def partly_frozen() -> nn.Module:
    """A model with much dropout in training mode, except for one layer, except for one part of that."""
    model = tiny_model(attention_dropout=0.9).train()
    model.model.layers[1].eval()
    model.model.layers[1].mlp.train()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def texts(model: nn.Module) -> list[list[int]]:
    return [JacobiDecoder(model, 4).generate([prompt], max_new_tokens=20)[0].token_ids for prompt in PROMPTS]


def test_every_module_gets_its_own_mode_back() -> None:
    model = partly_frozen()
    before = modes(model)
    assert len(set(before)) == 2
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    texts(model)
    assert modes(model) == before
    response_nlls(model, PROMPTS, PROMPTS)
    assert modes(model) == before


def test_modes_are_restored_after_an_error() -> None:
    model = partly_frozen()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert modes(model) == before


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_callers_decode_without_dropout(first_to_end: int) -> None:
    model = partly_frozen()
    before, expected = modes(model), texts(tiny_model(attention_dropout=0.9))
    flows = [JacobiDecoder(model, 4).iterate([prompt], max_new_tokens=20) for prompt in PROMPTS]
    found: list[list[int]] = [[], []]

    def advance(row: int) -> bool:
        for iteration in flows[row]:
            found[row] += iteration.choices_BW[0, : int(iteration.emitted_B[0])].tolist()
            return True
        return False

    advance(0), advance(1)
    while advance(first_to_end):
        assert not any(modes(model))
    assert not any(modes(model))  # the other one is still decoding
    while advance(1 - first_to_end):
        pass
    assert found == expected
    assert modes(model) == before


def test_a_nested_caller() -> None:
    model = partly_frozen()
    before, expected = modes(model), response_nll(tiny_model(attention_dropout=0.9), *PROMPTS)
    flow = JacobiDecoder(model, 4).iterate(PROMPTS[:1], max_new_tokens=20)
    next(flow)
    assert response_nlls(model, PROMPTS[:1], PROMPTS[1:]) == [expected]
    assert not any(modes(model))
    flow.close()
    assert modes(model) == before


def test_a_model_and_its_submodel() -> None:
    """A model with an adapter contains the target model; the first caller to leave must not end the other's mode."""
    model = partly_frozen()
    before, part, whole = modes(model), evaluating(model.model.layers), evaluating(model)
    part.__enter__()
    assert model.training and not any(modes(model.model.layers))
    whole.__enter__()
    part.__exit__(None, None, None)
    assert not any(modes(model))
    part = evaluating(model.model.layers)
    part.__enter__()
    whole.__exit__(None, None, None)
    assert model.training and not any(modes(model.model.layers))
    part.__exit__(None, None, None)
    assert modes(model) == before


def test_threads() -> None:
    model = partly_frozen()
    before, expected = modes(model), texts(tiny_model(attention_dropout=0.9))
    together = Barrier(3)

    def work(_: int) -> list[list[int]]:
        together.wait()
        return texts(model)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [expected] * 3
    assert modes(model) == before

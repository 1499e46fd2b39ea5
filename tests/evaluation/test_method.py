"""All methods decode greedily, so in float32 they write the same text."""

import pytest
from tiny import EOS_ID, random_adapter, tiny_model
from transformers import GenerationConfig

from cllm.adapter import attach
from cllm.errors import UsageError
from cllm.evaluation.method import HuggingFace, build_methods, count_forwards, pad_left
from cllm.evaluation.method_name import AR, GENERATE, JACOBI, NO_ADAPTER, PROMPT_LOOKUP

PROMPTS = [[5, 9, 13, 5, 9], [40, 41, 42, 43, 44, 45, 46, 40, 41], [7]]


def decode_all(model, prompts=PROMPTS, eos=(EOS_ID,), **options):
    found = {}
    for method in build_methods(model, [GENERATE, PROMPT_LOOKUP], block_size=6, eos_ids=list(eos), **options):
        groups = [[p] for p in prompts] if method.one_by_one else [prompts]
        found[method.name] = [response for group in groups for response in method.decode(group, 20)]
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("window", ["sliding", "block"])
def test_all_methods_agree(kind, window):
    model = tiny_model(kind)
    plain = decode_all(model, window=window)
    eos = plain[AR][0].token_ids[7]  # and once more with a stop that is met
    for responses in (plain, decode_all(model, eos=[eos], window=window)):
        texts = {name: [r.token_ids for r in each] for name, each in responses.items()}
        assert texts[JACOBI] == texts[GENERATE] == texts[PROMPT_LOOKUP] == texts[AR]
    assert texts[AR][0][-1] == eos and eos not in texts[AR][0][:-1]


def test_the_same_window_without_the_adapter():
    model = tiny_model()
    with pytest.raises(UsageError, match="no_adapter needs a model with a consistency adapter"):
        build_methods(model, [NO_ADAPTER], block_size=6, eos_ids=[])
    attach(model, random_adapter(model))
    with_it, without, ar = build_methods(model, [NO_ADAPTER], block_size=6, drafts=9, eos_ids=[EOS_ID])
    assert (with_it.name, without.name, ar.name) == (JACOBI, "jacobi:no_adapter", AR)
    assert (with_it.label, without.label) == ("Jacobi 6+9 sliding, context", "Jacobi 6 sliding, without the adapter")
    assert [method.decoder.step.drafts for method in (with_it, without, ar)] == [9, 0, 0]
    texts = [[r.token_ids for r in method.decode(PROMPTS, 20)] for method in (with_it, without, ar)]
    assert texts[0] == texts[1] == texts[2]


def test_forwards():
    responses = decode_all(tiny_model())
    for name in (AR, GENERATE):
        assert all(r.forwards == len(r.token_ids) for r in responses[name])
    for name in (JACOBI, PROMPT_LOOKUP):
        assert all(0 < r.forwards <= len(r.token_ids) for r in responses[name])
    assert responses[GENERATE][0].fast_forwarded is None and responses[JACOBI][0].fast_forwarded is not None


def test_the_checkpoints_own_sampling_settings_are_kept_out_and_left_alone():
    model = tiny_model()
    expected = decode_all(model)
    model.generation_config = own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=9)
    changed = decode_all(model)
    assert [r.token_ids for r in changed[GENERATE]] == [r.token_ids for r in expected[GENERATE]]
    assert model.generation_config is own


def test_a_failing_generate_is_a_usage_error():
    model = tiny_model()
    hugging_face = build_methods(model, [GENERATE], block_size=4, eos_ids=[EOS_ID])[-1]
    model.generate = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("no cache"))
    with pytest.raises(UsageError, match="HF generate does not work with this model: no cache"):
        hugging_face.decode(PROMPTS, 3)


@pytest.mark.slow
def test_compiled_generate_writes_the_same():
    model = tiny_model()
    plain, compiled = (HuggingFace(model, [EOS_ID], compiled=on).decode(PROMPTS, 12) for on in (False, True))
    assert [r.token_ids for r in compiled] == [r.token_ids for r in plain]


def test_prompt_lookup_covers_as_many_positions_as_the_window():
    def lookup(block_size):
        return build_methods(tiny_model(), [PROMPT_LOOKUP], block_size=block_size, eos_ids=[EOS_ID])[-1].lookup

    assert (lookup(1), lookup(2), lookup(16)) == (1, 1, 15)


def test_pad_left():
    ids, mask = pad_left([[1, 2, 3], [4]], 0, "cpu")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_count_forwards_stops_counting():
    model = tiny_model()
    method = build_methods(model, [], block_size=1, eos_ids=[])[1]
    with count_forwards(model) as calls:
        method.decode([[3, 4]], 5)
    method.decode([[3, 4]], 5)
    assert len(calls) == 5

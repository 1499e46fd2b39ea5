"""A self-test for model families that no test covers: do windows give the logits that plain forwards give?

Shapes: B = 2 rows, T tokens of a forward, S tokens of the texts, W window width, V vocabulary.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from cllm.attention import round_up
from cllm.decoding.cache import RowCache
from cllm.decoding.step import Step
from cllm.errors import UnsupportedModelError, out_of_memory
from cllm.models import embedding_device, first_line
from cllm.modes import evaluating

TOLERANCE, TOLERANCE_16 = 0.01, 1.0  # in standard deviations of the logits; in 16 bits, rounding may select another expert
FAMILIES = frozenset(  # tests/decoding/test_families.py compares their texts with those of AR decoding
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 beam bert bert-generation biogpt bitnet camembert codegen cohere
    cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 electra
    ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text gemma3n_text
    gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama longcat_flash megatron-bert mellum mimo_v2_flash minicpm3
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roc_bert
    sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm-roberta xlm-roberta-xl youtu
    """.split()
)

_tried: WeakSet[PreTrainedModel] = WeakSet()


def self_test(step: Step) -> None:
    """Raise UnsupportedModelError if the logits of windows in a ragged batch differ from those of plain forwards.

    Runs four short forwards, once per model; none for the families in FAMILIES. The texts are too short to test sliding
    windows.
    """
    name = step.model.config.model_type
    if name in FAMILIES or step.model in _tried:
        return
    try:
        difference = largest_logit_error(step)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(f"{name} fails with the masks and positions of Jacobi decoding: {first_line(error)}") from error
    tolerance = TOLERANCE_16 if step.model.dtype.itemsize <= 2 else TOLERANCE
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{name} does not compute AR decoding's logits under the masks and positions of Jacobi decoding: they differ by "
            f"{difference:.2g} standard deviations; rounding explains at most {tolerance}"
        )
    _tried.add(step.model)


@torch.inference_mode()
def largest_logit_error(step: Step, longest: int = 8, width: int = 4) -> float:
    """The largest difference between logits of windows of ``width`` tokens and of plain forwards, in standard deviations.

    Two rows of random tokens: prompts of ``longest // 3`` + 1 and of ``longest`` tokens are computed with a window of wrong
    guesses, then the right tokens overwrite those in the cache.
    """
    model, device = step.model, embedding_device(step.model)
    ids_BS = torch.randint(step.vocabulary, (2, longest + width), generator=torch.Generator().manual_seed(0)).to(device)
    start_B1 = torch.tensor([[longest // 3], [longest - 1]], device=device)
    positions_BT = (start_B1 + torch.arange(1 - longest, width, device=device)).clamp(min=-1)
    tokens_BT = ids_BS.gather(1, positions_BT.clamp(min=0))
    tokens_BT[:, longest:] = (tokens_BT[:, longest:] + 1) % step.vocabulary
    next_BW = start_B1 + torch.arange(1, width + 1, device=device)
    cache, slots = RowCache(), round_up(longest + width)
    reach_BT = torch.maximum(positions_BT, start_B1)
    with evaluating(model):
        first_BWV = step.forward(tokens_BT, positions_BT, cache, slots, width, reach_BT=reach_BT)
        second_BWV = step.forward(ids_BS.gather(1, next_BW), next_BW, cache, slots, width)
        texts = [ids_S[None, : end + 1] for ids_S, end in zip(ids_BS, next_BW[:, -1].tolist(), strict=True)]
        plain = [model(input_ids=text, position_ids=_positions(text), use_cache=False).logits for text in texts]
    plain_BWV = torch.cat([logits[:, -width - 1 :] for logits in plain]).float()
    found_BWV = torch.cat([first_BWV[:, :1], second_BWV], dim=1).float()
    return float((found_BWV - plain_BWV).abs().max() / plain_BWV.std())


def _positions(text_1S: torch.Tensor) -> torch.Tensor:
    """Positions from 0, as ``generate`` passes them; some models start from another number if they get none."""
    return torch.arange(text_1S.shape[1], device=text_1S.device)[None]

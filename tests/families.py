"""Every decoder-only family of transformers as a tiny random model.

    from families import build, longrope, text_families

SIZES has the settings by the names that most configurations share, WITH what single families need in addition. Attention
windows are 12 tokens.
"""

import dataclasses
from typing import Any

import torch
from tiny import PAD_ID
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cllm.decoding import Request

VOCABULARY, WINDOW = 97, 12
MOST_PARAMETERS = 10_000_000
PARTS_OF_A_DECODER = {"attn_config", "ffn_config", "patcher_config", "encoder_config", "decoder_config", "global_config"}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "dim_ff": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "initializer_range": 0.3,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent layers
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    # per-layer embeddings
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
MIXED = ["sliding_attention", "full_attention"] * 2
WITH: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"layer_types": MIXED, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16]},
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hrm_text": {"initializer_range": 0.1},  # its many rounds amplify rounding errors
}
SWITCH = 32
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = DEFAULT_ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 6.0, 4.0, 2.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}


def text_families() -> list[str]:
    """Names of the families that decode text only, without an encoder or parts for images or sound."""
    configs = {name: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return [
        name
        for name, kind in configs.items()
        if not getattr(kind, "is_encoder_decoder", False) and set(kind.sub_configs) <= PARTS_OF_A_DECODER
    ]


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of the family in evaluation mode; the same seed gives the same weights.

    ``changes`` replace single settings. Raises whatever the family raises if it cannot be built with these settings.
    """
    model_config = config(name, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(model_config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name} has {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD_ID)  # no EOS: texts run to their full length
    return model


def config(name: str, **changes: Any) -> PretrainedConfig:
    kind: Any = CONFIG_MAPPING[name]
    taken = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in taken}
    if "kv_lora_rank" in taken:  # latent attention has keys for every head
        sizes["num_key_value_heads"] = 4
    return kind(**sizes | WITH.get(name, {}) | changes)


def longrope(name: str) -> PreTrainedModel:
    """A model with a context of 128 whose rotary frequencies change after SWITCH tokens."""
    rope = {"sliding_attention": DEFAULT_ROPE, "full_attention": LONGROPE} if name == "gemma3_text" else LONGROPE
    changes = {"original_max_position_embeddings": SWITCH} if name.startswith("phi") else {}
    return build(name, max_position_embeddings=128, rope_parameters=rope, **changes)


def drawn(length: int) -> list[int]:
    """A prompt of ``length`` tokens."""
    return [(7 * index + length) % (VOCABULARY - 3) + 3 for index in range(length)]


AROUND_THE_SWITCH = [  # prompt, new tokens: below it, up to it, across it, beyond it
    Request(drawn(length), tokens) for length, tokens in [(9, 10), (9, 23), (9, 24), (9, 50), (31, 8), (32, 8), (33, 8), (60, 20)]
]

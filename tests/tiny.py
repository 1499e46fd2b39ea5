"""Tiny random models and a character tokenizer, for tests that need a real checkpoint but no meaningful text.

    from tiny import Successor, save_tiny_adapter, save_tiny_checkpoint, surround, tiny_config, tiny_model, tiny_tokenizer

Weights have a standard deviation of 0.3, so that greedy outputs vary. Sliding windows are 12 tokens.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, BASE, LOSSLESS, PREFIX, Adapter, fingerprint
from cllm.models import write_record

PAD_ID, UNK_ID, EOS_ID = 0, 1, 2
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
VOCABULARY = ["<pad>", "<unk>", "<eos>", *CHARACTERS]
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral")
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SLIDING = {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8}


def tiny_config(kind: str = "llama", **changes: Any) -> PretrainedConfig:
    """A configuration with three layers and 32 channels. ``changes`` replace single settings."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
        "initializer_range": 0.3,
    } | changes
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    match kind:
        case "llama":
            return LlamaConfig(**settings)
        case "qwen2":
            return Qwen2Config(**settings)
        case "qwen3":
            return Qwen3Config(**{"head_dim": 8} | settings)
        case "gemma2":
            return Gemma2Config(**SLIDING | settings)
        case "gemma3":
            return Gemma3TextConfig(**SLIDING | {"layer_types": mixed} | settings)
        case "mixtral":
            return MixtralConfig(**{"num_local_experts": 4} | settings)
    raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def random_adapter(model: PreTrainedModel, seed: int = 0, rank: int = 4, size: float = 0.5, modules: Sequence[str] = ("",)) -> Adapter:
    """A random adapter of every linear layer except the output layer, or of those whose names end in one of ``modules``."""
    draw, head = torch.Generator().manual_seed(seed), model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head}
    layers = {name: layer for name, layer in linear.items() if name.endswith(tuple(modules))}
    down = {name: size * torch.randn(rank, layer.in_features, generator=draw) for name, layer in layers.items()}
    return Adapter(down, {name: size * torch.randn(layers[name].out_features, rank, generator=draw) for name in layers})


def save_tiny_adapter(folder: str | Path, base: str | Path, seed: int = 0, **record: Any) -> Path:
    """Save a random adapter for the checkpoint ``base`` as `cllm train --lossless` does; returns the folder."""
    folder = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = random_adapter(model, seed)
    made = {LOSSLESS: True, BASE: fingerprint(model), "block_size": 4, "target_model": str(base)}
    write_record(model.config, made | record)
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": adapter.rank, "lora_alpha": adapter.rank}
    config |= {"base_model_name_or_path": str(base), "target_modules": sorted({n.split(".")[-1] for n in adapter.down})}
    (folder / ADAPTER).write_text(json.dumps(config))
    pairs = {"lora_A": adapter.down, "lora_B": adapter.up}
    tensors = {f"{PREFIX}{name}.{kind}.weight": weight for kind, weights in pairs.items() for name, weight in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return folder


class Successor(torch.nn.Module):
    """Acts as a causal model whose choice is always the input token plus one, modulo ``count``."""

    _is_stateful = False

    def __init__(self, count: int = 97, vocabulary: int = 97) -> None:
        super().__init__()
        model = tiny_model()
        self.config, self.embed, self.dtype = model.config, model.get_input_embeddings(), model.dtype
        self.count, self.vocabulary = count, vocabulary

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep=0):
        choices = (input_ids[:, -logits_to_keep:] + 1) % self.count
        return SimpleNamespace(logits=torch.nn.functional.one_hot(choices, self.vocabulary).float())


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; ``<eos>`` ends a response."""
    words = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def surround(tokenizer: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer put special tokens around every text: ``surround(tokenizer, "<pad> $A <eos>")``."""
    special = [(token, VOCABULARY.index(token)) for token in text.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=text, special_tokens=special)
    return tokenizer


def save_tiny_checkpoint(folder: str | Path, kind: str = "llama", chat_template: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as a plain checkpoint; returns the folder."""
    folder = Path(folder)
    model = tiny_model(kind, seed, **changes)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template, shared by all tests: do not write into it."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")

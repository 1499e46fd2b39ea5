"""LoRA adapters: which weights are trained, what is refused, and what is saved."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_checkpoint, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from cllm.errors import UsageError
from cllm.models import load_model, read_record, write_record
from cllm.training.lora import AdapterArguments, LoraArguments, add_adapter, current_adapter, merge_saved_adapter

pytest.importorskip("peft")
IDS = torch.arange(3, 20)[None]


def test_only_the_adapter_is_trained_and_the_output_layer_has_none() -> None:
    model = add_adapter(tiny_model(), LoraArguments(lora_r=2), seed=0)
    learned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learned) == 3 * 7 * 2 and all("lora_" in name and "lm_head" not in name for name in learned)
    one = add_adapter(tiny_model(), LoraArguments(lora_r=2, lora_target_modules=["q_proj"]), seed=0)
    assert sum(weight.requires_grad for weight in one.parameters()) == 3 * 2


OTHERS = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "gpt_neox": {"intermediate_size": 64},
    "phi3": {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    "kind, modules",
    [
        ("llama", ["down_proj", "o_proj"]),
        ("gemma3", ["down_proj", "o_proj"]),
        ("mixtral", ["o_proj"]),
        ("opt", ["fc2", "out_proj"]),
        ("gpt_neox", ["dense", "dense_4h_to_h"]),
        ("phi3", ["down_proj", "o_proj"]),
    ],
)
def test_a_consistency_adapter_is_on_what_writes_to_the_residual_stream(kind: str, modules: list[str]) -> None:
    if kind in OTHERS:
        sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **OTHERS[kind]))
    else:
        model = tiny_model(kind)
    assert AdapterArguments().target_modules(model) == modules
    adapted = current_adapter(add_adapter(model, AdapterArguments(lora_r=2), seed=0))
    width = model.config.hidden_size
    assert {len(up) for up in adapted.up.values()} == {width}
    assert len(adapted.up) == len(modules) * model.config.num_hidden_layers


@pytest.mark.parametrize("tied", [False, True])
def test_merged_or_not_the_folder_loads_as_the_adapted_model(tmp_path: Path, tied: bool) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    model = add_adapter(load_model(str(base)), LoraArguments(lora_r=2), seed=0)
    write_record(model.config, {"block_size": 4})
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    expected, plain = model(IDS).logits, load_model(str(base))(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    for merge in (False, True):
        folder = tmp_path / f"merged-{merge}"
        model.save_pretrained(folder)
        model.config.save_pretrained(folder)
        merge_saved_adapter(str(folder), LoraArguments(lora_r=2, merge_lora=merge), "float32")
        loaded = load_model(str(folder))
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        assert read_record(loaded.config)["block_size"] == 4
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert not [path.name for path in folder.iterdir() if "adapter" in path.name]


def test_unknown_modules_are_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(UsageError, match="has no attn, lm_head; choose from down_proj, gate_proj, k_proj, o_proj"):
        add_adapter(tiny_model(), LoraArguments(lora_r=2, lora_target_modules=["attn", "q_proj", "lm_head"]), seed=0)


def test_invalid_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in [
        ({"lora_r": -1}, "lora_r must be >= 0, got -1"),
        ({"lora_r": 2, "lora_alpha": 0}, "lora_alpha must be >= 1, got 0"),
        ({"qlora": True}, "need lora_r >= 1"),
        ({"merge_lora": False}, "need lora_r >= 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            LoraArguments(**options)
    here = {"peft"}
    monkeypatch.setattr("cllm.training.lora.find_spec", lambda name: name in here or None)
    with pytest.raises(UsageError, match=r"qlora needs bitsandbytes: pip install -e .\[qlora\]"):
        LoraArguments(lora_r=2, qlora=True)
    here |= {"bitsandbytes"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="qlora needs a CUDA GPU"):
        LoraArguments(lora_r=2, qlora=True)
    here.clear()
    with pytest.raises(UsageError, match=r"lora_r needs peft: pip install -e .\[lora\]"):
        LoraArguments(lora_r=2)

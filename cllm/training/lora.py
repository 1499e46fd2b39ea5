"""Low-rank adapters through peft: LoRA (arXiv 2106.09685), and QLoRA over 4-bit weights (arXiv 2305.14314).

The model with its adapter disabled *is* the frozen target, so no second copy of the weights is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, set_seed

from cllm.adapter import ADAPTER, ADAPTER_WEIGHTS, Adapter
from cllm.errors import UsageError, check_minimums
from cllm.models import load_model

PEFT_FILES = (ADAPTER, ADAPTER_WEIGHTS, "README.md")


@dataclass
class AdapterArguments:
    """Options of the adapter to train. Raises UsageError for a bad value, a missing package, or QLoRA without a GPU."""

    lora_r: int = field(default=128, metadata={"help": "rank of the adapter (needs the extra lora)"})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA's alpha, which scales the adapter by alpha / rank; default: twice the rank"}
    )
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "names of the linear layers to adapt; default: those that write to the residual stream (o_proj, down_proj)"},
    )
    qlora: bool = field(default=False, metadata={"help": "keep the frozen weights in 4 bits; needs --lora_r, a GPU and the extra qlora"})
    min_rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_minimums(self, {"lora_r": self.min_rank, "lora_alpha": 1})
        if self.lora_r:
            _require("peft", "lora_r", "lora")
        if self.qlora:
            _require("bitsandbytes", "qlora", "qlora")
            if not torch.cuda.is_available():
                raise UsageError("qlora needs a CUDA GPU, and none was found; --lora_r without --qlora works on a CPU")

    def load_options(self, device: str) -> dict[str, Any]:
        """Arguments for :func:`cllm.models.load_model`."""
        if not self.qlora:
            return {"device": "cpu"}  # the trainer moves the model
        from transformers import BitsAndBytesConfig

        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"device": device, "quantization": four_bits}

    def target_modules(self, model: PreTrainedModel) -> list[str]:
        """The last components of the names of the layers to adapt. Raises UsageError for layers that ``model`` does not have."""
        allowed = _linear_names(model)
        if not allowed:
            raise UsageError(f"{model.name_or_path} has no torch.nn.Linear layers, which adapters need (GPT-2's are Conv1D)")
        unknown = sorted(set(self.lora_target_modules) - set(allowed))
        if unknown:
            got = ", ".join(unknown)
            raise UsageError(f"lora_target_modules: {model.name_or_path} has no {got}; choose from {', '.join(allowed)}")
        return self.lora_target_modules or self._default_modules(model) or allowed

    def _default_modules(self, model: PreTrainedModel) -> list[str]:
        return _residual_names(model)

    @property
    def merged(self) -> bool:
        """Whether the result is a plain checkpoint with the adapter merged into its weights."""
        return False

    def record(self) -> dict[str, Any]:
        """The entries for the checkpoint's record."""
        return {"lora_r": self.lora_r, "qlora": self.qlora} if self.lora_r else {}


@dataclass
class LoraArguments(AdapterArguments):
    """Options of LoRA in place of training all weights. Raises UsageError as :class:`AdapterArguments` does."""

    lora_r: int = field(default=0, metadata={"help": "rank of the LoRA adapter (needs the extra lora); 0 trains all weights"})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "names of the linear layers to adapt; default: all but the output layer"}
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "merge the adapter into a plain checkpoint at the end; otherwise save the adapter alone"}
    )
    min_rank: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not self.lora_r and (self.qlora or self.lora_alpha is not None or self.lora_target_modules or not self.merge_lora):
            raise UsageError("qlora, lora_alpha, lora_target_modules and merge_lora need lora_r >= 1, the rank of the adapter")
        super().__post_init__()

    def _default_modules(self, model: PreTrainedModel) -> list[str]:
        return _linear_names(model)

    @property
    def merged(self) -> bool:
        return self.lora_r > 0 and self.merge_lora


def add_adapter(model: PreTrainedModel, lora: AdapterArguments, seed: int) -> Any:
    """The model with a trainable adapter, initialised from ``seed``; the model itself where ``lora_r`` is 0.

    Raises UsageError for target modules that the model does not have, or a model without linear layers.
    """
    if not lora.lora_r:
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    modules = lora.target_modules(model)
    if lora.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha or 2 * lora.lora_r,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    with_adapters = get_peft_model(model, config)
    name = str(model.name_or_path)
    config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    return with_adapters


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether a model has an adapter."""
    return hasattr(model, "disable_adapter")


def current_adapter(model: Any) -> Adapter:
    """The current weights of the adapter in training, scale folded into ``up``, for :func:`cllm.adapter.attach`."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    return Adapter(*(dict(zip(layers, weights)) for weights in zip(*map(_pair, layers.values()))))


def _pair(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of peft's layer, the scale folded into the second."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * layer.scaling[name]


def merge_saved_adapter(folder: str, lora: AdapterArguments, dtype: str) -> None:
    """Replace the adapter saved in ``folder`` by a plain checkpoint of ``dtype``, if ``lora`` says to merge."""
    if lora.merged:
        load_model(folder, dtype=dtype, device="cpu").save_pretrained(folder)
        remove_adapter(folder)


def remove_adapter(folder: str) -> None:
    """Remove the files that peft wrote, if any: beside a model's own weights, loaders would prefer the adapter."""
    if Path(folder, ADAPTER).is_file():
        for name in PEFT_FILES:
            Path(folder, name).unlink(missing_ok=True)


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last components of the names of all linear layers except the output layer, which the frozen target shares."""
    head = model.get_output_embeddings()
    layers = model.named_modules()
    return sorted({name.split(".")[-1] for name, layer in layers if isinstance(layer, torch.nn.Linear) and layer is not head})


def _residual_names(model: PreTrainedModel) -> list[str]:
    """As :func:`_linear_names`, for layers that write to the residual stream: the last of each attention block and each MLP."""
    width = model.config.get_text_config().hidden_size
    found: set[str] = set()
    for part in model.modules():
        layers = part.named_children()
        found.update([name for name, layer in layers if isinstance(layer, torch.nn.Linear) and layer.out_features == width][-1:])
    return sorted(found & set(_linear_names(model)))


def _require(package: str, option: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{option} needs {package}: pip install -e .[{extra}]")

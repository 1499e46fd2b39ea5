"""Consistency adapters: low-rank weights that are on for guesses only, so that the target model alone determines the text.

They are stored in peft's format (LoRA, arXiv 2106.09685): ``adapter_config.json`` and ``adapter_model.safetensors``.
Shapes: R rank, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cllm.errors import UsageError

ADAPTER = "adapter_config.json"  # its presence makes a folder that of a LoRA adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # the folder of the adapter in an exported target model
LOSSLESS = "lossless"  # record key: a consistency adapter, as opposed to one that is to be merged
BASE = "base_weights"  # record key: the base model's fingerprint
BASE_REVISION = "base_revision"  # record key: the base model's commit, if it came from the hub
PREFIX = "base_model.model."  # peft puts this before every name
SAMPLES = 64  # numbers of each weight that enter a fingerprint

_attached: WeakKeyDictionary[PreTrainedModel, Adapter] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Adapter:
    """For linear layers, by their names in the base model, the matrices of the term ``x @ down.T @ up.T`` to be added.

    Raises UsageError if there are none, or if the names of ``down`` and ``up`` differ.
    """

    down: Mapping[str, torch.Tensor]  # [R, I]
    up: Mapping[str, torch.Tensor]  # [O, R], the scale included

    def __post_init__(self) -> None:
        if not self.down or self.down.keys() != self.up.keys():
            raise UsageError("an adapter needs a pair of matrices for at least one linear layer, got none")

    @property
    def rank(self) -> int:
        return max(len(down) for down in self.down.values())

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weights in (self.down, self.up) for weight in weights.values())

    def check(self, model: PreTrainedModel) -> None:
        """Raise UsageError if a layer of the adapter is missing in ``model`` or has another shape."""
        layers = dict(model.named_modules())
        for name, down in self.down.items():
            layer = layers.get(name)
            found = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
            wanted = (down.shape[1], self.up[name].shape[0])
            if found != wanted:
                what = f"its {name} maps {found[0]} to {found[1]} features" if layer is not None else f"it has no {name}"
                raise UsageError(
                    f"the adapter was trained for another model, not {model.name_or_path!r}: {what}; "
                    f"the adapter needs {wanted[0]} to {wanted[1]}"
                )


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter in peft's format. Raises UsageError for damaged files and for anything but plain LoRA."""
    folder = Path(folder)
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"cannot load the adapter in {str(folder)!r}: {error}") from error
    _check_form(config, folder)
    rank, alpha = config.get("r") or 0, config.get("lora_alpha") or 0
    if rank < 1:
        raise UsageError(f"the adapter in {str(folder)!r} has rank {rank}; it must be at least 1")
    pairs: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, weight in weights.items():
        layer, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in pairs:
            raise UsageError(f"the adapter in {str(folder)!r} holds {name}; expected lora_A and lora_B of linear layers only")
        if not weight.isfinite().all():
            raise UsageError(f"the adapter in {str(folder)!r} is damaged: {name} holds numbers that are not finite")
        pairs[kind][layer] = weight
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(pairs["lora_A"], {name: up * scale for name, up in pairs["lora_B"].items()})


def _check_form(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for anything but two matrices per layer."""
    if config.get("peft_type") != "LORA":
        raise UsageError(f"the adapter in {str(folder)!r} is {config.get('peft_type')!r}; expected 'LORA'")
    unsupported = [key for key in ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise UsageError(f"the adapter in {str(folder)!r} uses {', '.join(unsupported)}; expected plain LoRA of linear layers")


def attach(model: PreTrainedModel, adapter: Adapter | None) -> None:
    """Make ``adapter`` the default of all new decoders of ``model``; None detaches the current one.

    The model itself does not change. Raises UsageError for an adapter of another model.
    """
    if adapter is None:
        _attached.pop(model, None)
    else:
        adapter.check(model)
        _attached[model] = adapter


def attach_from(folder: str | Path, model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Attach the adapter in ``folder``. Raises UsageError unless ``model`` has the base weights named in its ``record``."""
    check_base(model, record)
    attach(model, read_adapter(folder))


def attached(model: PreTrainedModel) -> Adapter | None:
    """The adapter that the model's decoders use by default."""
    return _attached.get(model)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Hashes that identify a base model's weights in any precision, one for each of two groups.

    ``linear``: the matrices of linear layers, missing if they are quantised; ``other``: embeddings, norms and biases. They
    cover SAMPLES numbers of each weight, rounded to bfloat16.
    """
    hashes = {"linear": hashlib.sha256(), "other": hashlib.sha256()}
    quantised = False
    for name, weight in _weights(model):
        if not weight.is_floating_point():
            quantised = True
            continue
        flat = weight.detach().flatten()
        at = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        sample = flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu()
        kind = "linear" if weight.dim() > 1 and not name.endswith("embed") else "other"
        hashes[kind].update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
    return {kind: digest.hexdigest()[:16] for kind, digest in hashes.items() if not (quantised and kind == "linear")}


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights, without those of adapters in training; the name of the input embedding ends in ``.embed``."""
    embedding = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", "") + (".embed" if weight is embedding else ""), weight


def check_base(model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Raise UsageError unless ``model`` has the base weights named in an adapter's ``record``.

    Models in float16 are not checked: that rounding changes the bfloat16 numbers of the fingerprint.
    """
    if model.dtype == torch.float16:
        return
    found, wanted = fingerprint(model), record.get(BASE) or {}
    if any(found[kind] != wanted[kind] for kind in found.keys() & wanted.keys()):
        raise UsageError(
            f"the adapter was trained for other weights, not those of {model.name_or_path!r}: their fingerprint is "
            f"{'-'.join(found.values())}, the adapter's base has {'-'.join(wanted.values())}"
        )

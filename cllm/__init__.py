"""Consistency large language models: decode several tokens per forward pass.

Decode: :class:`JacobiDecoder`, :class:`Queue`, ``model.generate(..., custom_generate=cllm.jacobi)``. Collect: :func:`collect`.
Train: :func:`train`, or :func:`build_trainer` and its ``train()``. Measure: :func:`measure_speed`,
:func:`measure_accuracy`, :func:`tune`. Everything in one: :func:`make`. Export: :func:`export`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllm.custom_generate import jacobi
    from cllm.decoding import JacobiDecoder, Queue, Request, RowResult, Sampling
    from cllm.errors import UsageError
    from cllm.evaluation.accuracy_run import measure_accuracy
    from cllm.evaluation.arguments import AccuracyArguments, SpeedArguments, TuneArguments
    from cllm.evaluation.speed_run import measure_speed
    from cllm.evaluation.tune import tune
    from cllm.making.arguments import MakeArguments
    from cllm.making.make import make
    from cllm.models import load_model, load_tokenizer, stop_token_ids
    from cllm.serving.arguments import DecoderArguments, GenerateArguments
    from cllm.serving.decoder import open_decoder
    from cllm.serving.export import export
    from cllm.serving.offline import generate_file
    from cllm.tasks import get_task, task_names
    from cllm.tasks.base import Example, Task
    from cllm.training.arguments import CllmTrainingArguments, LosslessTrainingArguments
    from cllm.training.build import TrainingInputs, build_trainer, train
    from cllm.training.lora import AdapterArguments, LoraArguments
    from cllm.training.lossless import LosslessTrainer
    from cllm.training.trainer import CllmTrainer
    from cllm.trajectory.arguments import CollectArguments
    from cllm.trajectory.collection import Collected, collect
    from cllm.trajectory.store import TrajectoryDataset

__version__ = "0.1.0"
# fmt: off
__all__ = [
    "JacobiDecoder", "Queue", "Request", "RowResult", "Sampling", "jacobi",
    "load_model", "load_tokenizer", "open_decoder", "stop_token_ids", "DecoderArguments",
    "collect", "CollectArguments", "Collected", "TrajectoryDataset",
    "build_trainer", "train", "TrainingInputs", "CllmTrainer", "CllmTrainingArguments", "LosslessTrainer",
    "LosslessTrainingArguments", "AdapterArguments", "LoraArguments",
    "measure_accuracy", "measure_speed", "tune", "AccuracyArguments", "SpeedArguments", "TuneArguments",
    "make", "MakeArguments", "export", "generate_file", "GenerateArguments",
    "get_task", "task_names", "Example", "Task", "UsageError",
]
# fmt: on
_MODULES = {  # where the names come from, imported when one is asked for: torch takes seconds to load
    "custom_generate": ("jacobi",),
    "decoding": ("JacobiDecoder", "Queue", "Request", "RowResult", "Sampling"),
    "errors": ("UsageError",),
    "evaluation.accuracy_run": ("measure_accuracy",),
    "evaluation.arguments": ("AccuracyArguments", "SpeedArguments", "TuneArguments"),
    "evaluation.speed_run": ("measure_speed",),
    "evaluation.tune": ("tune",),
    "making.arguments": ("MakeArguments",),
    "making.make": ("make",),
    "models": ("load_model", "load_tokenizer", "stop_token_ids"),
    "serving.arguments": ("DecoderArguments", "GenerateArguments"),
    "serving.decoder": ("open_decoder",),
    "serving.export": ("export",),
    "serving.offline": ("generate_file",),
    "tasks": ("get_task", "task_names"),
    "tasks.base": ("Example", "Task"),
    "training.arguments": ("CllmTrainingArguments", "LosslessTrainingArguments"),
    "training.build": ("TrainingInputs", "build_trainer", "train"),
    "training.lora": ("AdapterArguments", "LoraArguments"),
    "training.lossless": ("LosslessTrainer",),
    "training.trainer": ("CllmTrainer",),
    "trajectory.arguments": ("CollectArguments",),
    "trajectory.collection": ("Collected", "collect"),
    "trajectory.store": ("TrajectoryDataset",),
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cllm.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

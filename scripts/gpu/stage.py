"""What the stages of the GPU run share: options, device, captured decoders, and the file that each stage leaves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cllm.cli.main import main
from cllm.decoding import JacobiDecoder
from cllm.decoding.engine import CUDA_SYNC_INTERVAL
from cllm.decoding.runner import CapturingRunner
from cllm.evaluation.environment import environment
from cllm.files import write_json


def options(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output", type=Path, required=True, help="JSON file to write")
    result.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU; the figures mean nothing")
    return result


def device(args: argparse.Namespace) -> str:
    """Exits with status 2 where there is no CUDA device and none is to be rehearsed."""
    if args.rehearse:
        return "cpu"
    if not torch.cuda.is_available():
        print("error: no CUDA device here; --rehearse runs the same stages on a CPU", file=sys.stderr)
        sys.exit(2)
    return "cuda"


def dtype(args: argparse.Namespace) -> str:
    return "float32" if args.rehearse else "bfloat16"


def captured(args: argparse.Namespace, model: PreTrainedModel, width: int, **how: Any) -> JacobiDecoder:
    """A decoder of captured steps. A rehearsal keeps steps and runs them again, in the same buffers, but not as CUDA graphs."""
    decoder = JacobiDecoder(model, width, compile="off" if args.rehearse else "graph", **how)
    if args.rehearse:
        decoder.runner, decoder.sync_interval = CapturingRunner(decoder.step, lambda step: step), CUDA_SYNC_INTERVAL
    return decoder


def command(*words: Any) -> None:
    """The command ``cllm``, in this process."""
    main([str(word) for word in words])


def publish(args: argparse.Namespace, title: str, result: dict[str, Any]) -> None:
    """Write the stage's file, which `cllm report` can read, and print the result."""
    content = {
        "benchmark": f"{title} (rehearsal on a CPU)" if args.rehearse else title,
        "rehearsal": args.rehearse,
        "result": result,
        "environment": environment(device(args)),
    }
    write_json(args.output, content)
    for name, value in result.items():
        print(f"{name}: {value}")

"""``cllm make``: the same model, faster."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from cllm.cli.command import add_options, command, parser
from cllm.making.arguments import MakeArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(
        "Make a model faster at what you ask it, with the text that it writes today: it answers the prompts, an adapter learns "
        "to draft those answers, the window that is fastest on this device is found, and all is measured on prompts that were "
        "held out. Where nothing is faster, plain decoding is stored. Run it again to go on after an interruption.",
        "cllm make",
    )
    add_options(options, MakeArguments)
    words = list(sys.argv[1:] if argv is None else argv)
    given = vars(options.parse_args(words))
    _launch(words, given["device"])
    from cllm.making.make import make

    figures = make(**given)
    if int(os.environ.get("RANK", 0)) == 0:
        print(render(figures))


def _launch(words: Sequence[str], device: str | None) -> None:
    """With several GPUs, replace this process by `accelerate launch` with a process for each."""
    import torch

    if "RANK" in os.environ or torch.cuda.device_count() < 2 or device not in (None, "cuda"):
        return
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(torch.cuda.device_count())]
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "cllm", "make", *words])


def render(figures: dict[str, Any]) -> str:
    """The outcome for people."""
    from cllm.evaluation.table import number, percent, with_interval
    from cllm.making.plan import Plan

    plan = Plan(**figures["plan"])
    if "speedup" not in figures:
        return str(plan)
    window = f"{figures['width']} tokens, {figures['drafts']} drafted, {figures['guess']}"
    lines = {
        "window": window if figures["reason"] is None else f"1, which is AR decoding; {window}: {figures['reason']}",
        "tokens per forward": with_interval(figures["tokens_per_forward"], figures["tokens_per_forward_interval"]),
        "tokens/s": f"{number(figures['tokens_per_second'], 1)}, AR {number(figures['ar_tokens_per_second'], 1)}",
        "speedup over AR": with_interval(figures["speedup"], figures["speedup_interval"]),
        "same text as AR": percent(figures["same_as_ar"]),
        "minutes": number(sum(figures["seconds"].values()) / 60, 1),
    }
    tried = "" if figures["reason"] is None else ", with the window that was tried"
    return f"on {figures['measured']} held-out prompts{tried}\n" + "\n".join(f"  {name:<20}{text}" for name, text in lines.items())

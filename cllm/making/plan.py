"""What a run will take on this device: from a few responses and a few training steps, how many prompts and epochs fit."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from cllm.errors import UsageError

EPOCHS = 10  # at most
STEPS = 400  # of training in all epochs, where time is unlimited
MARGIN = 0.9  # share of the time that is used
MEASURING_SHARE = 0.2  # share of the spare time that is spent on measuring with held-out prompts
TUNING_PROMPTS, TUNING_TOKENS = 8, 64  # prompts, and the most tokens of a response
TUNING_RESPONSES = 35  # what tuning costs, in responses by AR decoding
LEAST_HELD_OUT = 2  # an interval needs two


@dataclass(frozen=True)
class Costs:
    """What a sample took; times are in seconds."""

    response: float  # of one prompt, in a batch
    example: float  # of one training example in one epoch
    token: float  # of one token by AR decoding of a prompt alone
    tokens: float  # of a response
    sampled: int  # prompts that have been answered already
    spent: float  # since the start, without these answers
    memory: int  # most bytes until here
    batch: int  # examples of a training step, of all processes
    at_once: int  # examples that fit into a process's memory at once


@dataclass(frozen=True)
class Plan:
    """What will be done, and the minutes that it should take."""

    prompts: int
    held_out: int
    epochs: int
    response_tokens: int  # of all responses together
    trained_tokens: int  # of these in all epochs
    minutes: dict[str, float]  # by stage
    memory: int  # bytes
    at_once: int  # examples that each process trains on at once

    @property
    def total_minutes(self) -> float:
        return sum(self.minutes.values())

    def measurable(self, seconds: float, held_out: int) -> int:
        """How many of the held-out prompts can be measured in this time, or the fewest that give an interval."""
        planned = max(60 * self.minutes["measure"], 1e-3)  # rounded, so it may be 0
        return max(LEAST_HELD_OUT, min(held_out, int(seconds * self.held_out / planned)))

    def __str__(self) -> str:
        """For people."""
        stages = ", ".join(f"{name} {minutes:.1f}" for name, minutes in self.minutes.items())
        return (
            f"  prompts   {self.prompts} to learn from, in {self.epochs} epochs; about {self.held_out} to measure on\n"
            f"  tokens    about {self.response_tokens} of responses, {self.trained_tokens} in training\n"
            f"  minutes   about {self.total_minutes:.1f} ({stages})\n"
            f"  memory    {self.memory / 2**30:.1f} GiB in a trial of each; longer prompts take more"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(costs: Costs, prompts: int, held_out: int, minutes: float | None) -> Plan:
    """The best use of the time: as many prompts as fit, then more epochs.

    New prompts teach more than repeated ones, unless writing a response takes longer than learning from it: then each response
    is used for as many epochs as it costs from the start.
    ``prompts`` and ``held_out``: how many there are. ``minutes``: of the whole run; None for as long as it takes. Raises
    UsageError where the time is too short for anything.
    """
    tuning = TUNING_RESPONSES * min(costs.tokens, TUNING_TOKENS) * costs.token
    if minutes is None:
        epochs = max(1, min(EPOCHS, round(STEPS * costs.batch / prompts)))
        return _plan(costs, prompts, held_out, epochs, tuning)
    epochs = min(math.ceil(costs.response / costs.example), EPOCHS)
    each, measured = costs.response + epochs * costs.example, 2 * costs.tokens * costs.token
    left = MARGIN * 60 * minutes - costs.spent - tuning
    spare = left - LEAST_HELD_OUT * measured - costs.sampled * (costs.response + costs.example)
    if spare < 0:
        least = math.ceil(10 * (minutes - spare / (60 * MARGIN))) / 10
        raise UsageError(f"minutes must be at least {least:.1f} for this model on this device, got {minutes:g}")
    held_out = min(held_out, LEAST_HELD_OUT + int(MEASURING_SHARE * spare / measured))
    left -= held_out * measured
    count = min(prompts, max(costs.sampled, int(left / each)))
    epochs = min(EPOCHS, max(1, int((left - count * costs.response) / (count * costs.example))))
    return _plan(costs, count, held_out, epochs, tuning)


def _plan(costs: Costs, prompts: int, held_out: int, epochs: int, tuning: float) -> Plan:
    seconds = {
        "plan": costs.spent,
        "responses": prompts * costs.response,
        "adapter": prompts * epochs * costs.example,
        "tune": tuning,
        "measure": 2 * held_out * costs.tokens * costs.token,
    }
    tokens = round(prompts * costs.tokens)
    minutes = {name: round(each / 60, 2) for name, each in seconds.items()}
    return Plan(prompts, held_out, epochs, tokens, tokens * epochs, minutes, costs.memory, costs.at_once)


class StepClock(TrainerCallback):
    """When the optimizer steps of a training run ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step; the first one, which warms up, does not count."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def peak_memory() -> int:
    """The most bytes that this process has used so far: of GPU memory where there is a GPU, otherwise of RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

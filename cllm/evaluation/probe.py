"""A quick check of a model in training: its speed and the quality of its text, on a few held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.adapter import attach
from cllm.attention import MASKABLE
from cllm.decoding import JacobiDecoder
from cllm.evaluation.prompt import Prompt
from cllm.evaluation.quality import quality, response_entropies, response_nlls, score_replies
from cllm.tasks.base import Task
from cllm.training.lora import current_adapter, has_adapter
from cllm.training.probe_metrics import ProbeMetrics


@dataclass(frozen=True)
class Probe:
    """Greedy Jacobi responses of up to ``length`` tokens to all ``prompts`` in one batch, measured.

    ``target``: the model before training, whose likelihoods judge the text; it is moved to where the measured model is.
    """

    task: Task
    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    target: PreTrainedModel
    block_size: int
    guess: str
    length: int
    stop_ids: Sequence[int]

    def __call__(self, model: Any) -> ProbeMetrics:
        if has_adapter(model):
            model = model.get_base_model()  # with its adapters
        with maskable(model), maskable(self.target):
            return self._figures(model)

    def _figures(self, model: PreTrainedModel) -> ProbeMetrics:
        decoder = JacobiDecoder(
            model, self.block_size, eos_token_ids=self.stop_ids, guess=self.guess, compile="off", prefix_cache=0
        )  # nothing is captured or kept, since the weights keep changing
        prompts = [prompt.ids for prompt in self.prompts]
        results = decoder.generate(prompts, max_new_tokens=self.length)
        decoder.step.linears.clear()  # training needs the memory and changes the weights
        responses = [result.token_ids for result in results]
        target: Any = self.target
        target.to(model.device)
        text = quality(
            responses,
            eos_ids=self.stop_ids,
            scores=score_replies(self.task, [prompt.example for prompt in self.prompts], responses, self.tokenizer),
            nlls=response_nlls(target, prompts, responses),
        )
        tokens = max(sum(map(len, responses)), 1)
        return ProbeMetrics(
            prompts=len(prompts),
            tpf=tokens / sum(result.forwards for result in results),
            nll=text.nll_per_token or 0.0,
            repetition=text.repetition,
            entropy=sum(response_entropies(model, prompts, responses)) / tokens,
            accuracy=text.score,
        )


@dataclass(frozen=True)
class DraftProbe:
    """Like :class:`Probe`, for a target model with a consistency adapter that is being trained, or without one."""

    probe: Probe
    in_training: Any  # the model with the adapter

    def __call__(self, model: Any) -> ProbeMetrics:
        base = self.in_training.get_base_model()
        attach(base, current_adapter(model) if has_adapter(model) else None)
        try:
            with self.in_training.disable_adapter():
                return self.probe(base)
        finally:
            attach(base, None)


@contextmanager
def maskable(model: PreTrainedModel) -> Iterator[None]:
    """While active, a model that trains with another attention uses one that takes the masks of decoding."""
    own = model.config._attn_implementation
    if own not in MASKABLE:
        model.set_attn_implementation(MASKABLE[0])
    try:
        yield
    finally:
        if own not in MASKABLE:
            model.set_attn_implementation(own)

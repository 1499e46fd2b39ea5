"""Jacobi decoding as the decoding loop of transformers' ``generate``, which prepares its inputs as usual.

    model.generate(**inputs, max_new_tokens=256, custom_generate=cllm.jacobi)     # any model
    model.generate(**inputs, max_new_tokens=256)                # an exported checkpoint, loaded with trust_remote_code=True

Shapes: B rows, P longest prompt, S positions of the sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, GenerationMode, MaxLengthCriteria

from cllm.attention import CACHE, OLD_CACHE
from cllm.decoding.engine import JacobiDecoder, Streamer, unpad
from cllm.decoding.prefix_cache import DEFAULT_BYTES
from cllm.decoding.result import Iteration
from cllm.decoding.sampling import ProcessedSampling, Sampling
from cllm.errors import UsageError
from cllm.models import attach_exported

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
NO_OUTPUT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
PREPARED = {"attention_mask", "position_ids", CACHE, OLD_CACHE, "use_cache", "logits_to_keep"}  # set by generate itself
SAMPLING_OPTIONS = {  # processors that Sampling can replace, in their order: their attribute, and Sampling's
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


@dataclass
class JacobiOutput(GenerateDecoderOnlyOutput):
    """The result with ``return_dict_in_generate``: ``sequences`` [B, S], and how many forward passes each row took [B]."""

    forwards: torch.Tensor | None = None


def generate(
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    model: PreTrainedModel,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> torch.Tensor | JacobiOutput:
    """``model.generate`` of an exported checkpoint: takes the same arguments, and the keyword arguments of :func:`jacobi`.

    The first call attaches the checkpoint's consistency adapter, if any, to the model.
    Raises UsageError, which is a ValueError, for what :func:`jacobi` refuses, for stop strings without a ``tokenizer``, and for
    an adapter of another model.
    """
    if "custom_generate" in kwargs:  # the caller wants another loop
        more = {"streamer": streamer, "tokenizer": tokenizer}
    elif kwargs.get("assistant_model") is not None:
        raise UsageError("Jacobi decoding takes no draft model, got assistant_model")
    else:  # transformers passes neither streamer nor tokenizer to a loop given as a function
        criteria = list(stopping_criteria or [])
        sources = (kwargs.get("stop_strings"), generation_config and generation_config.stop_strings)
        if strings := next(filter(None, (*sources, model.generation_config.stop_strings)), None):
            if tokenizer is None:
                raise UsageError("stop_strings need the model's tokenizer: pass tokenizer=...")
            criteria.append(StopStringCriteria(tokenizer, strings))
            kwargs["stop_strings"] = None
        stopping_criteria = StoppingCriteriaList(criteria)
        attach_exported(model)
        more = {"custom_generate": jacobi, "stream_to": streamer}
    model_class: Any = type(model)
    output: torch.Tensor | JacobiOutput = model_class.generate(
        model, inputs, generation_config, logits_processor, stopping_criteria, **more, **kwargs
    )
    return output


def jacobi(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    block_size: int | None = None,
    guess: str | None = None,
    drafts: int | None = None,
    seed: int | None = None,
    stream_to: Streamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | JacobiOutput:
    """The decoding loop for ``model.generate(..., custom_generate=jacobi)``.

    ``input_ids`` [B, P]: padded prompts. Returns [B, S]: the prompts and their responses, padded on the right, as ``generate``
    does. Greedy responses are those of AR decoding; sampled ones have the distribution of AR sampling.

    ``block_size``, ``guess`` and ``drafts``: as for JacobiDecoder; by default what the checkpoint's config.json says. Drafts
    need a consistency adapter, by default the one attached to the model.
    ``seed``: each row's seed is derived from it; by default drawn from torch's generator, which ``set_seed`` seeds.
    ``stream_to``: a streamer, since ``generate`` does not pass its ``streamer`` to a loop given as a function.

    Logits processors are called once per token of a row, in order, with the text so far, as in AR decoding; in a batch they
    must be stateless. Stopping criteria are called as in AR decoding.

    Raises UsageError for beam search, a draft model, ``output_scores`` and the like, inputs other than token ids, a non-empty
    cache, and in a batch for logits processors with state.
    """
    mask_BP = model_kwargs.get("attention_mask")
    mask_BP = torch.ones_like(input_ids).bool() if mask_BP is None else mask_BP.bool()
    _refuse_other_tasks(generation_config, model_kwargs, mask_BP)
    prompts = unpad(input_ids, mask_BP)
    decoder = JacobiDecoder(
        model,
        block_size,
        eos_token_ids=[int(i) for c in stopping_criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id],
        guess=guess,
        drafts=drafts,
        prefix_cache=DEFAULT_BYTES if len(prompts) > 1 else 0,  # only shared within this call, which has its own decoder
    )
    new_tokens = generation_config.max_length - input_ids.shape[1]
    room = [min(new_tokens, (decoder.context or new_tokens + len(prompt)) - len(prompt)) for prompt in prompts]
    seed = (int(torch.randint(1 << 62, ())) if generation_config.do_sample else 0) if seed is None else seed
    samplings = _samplings(logits_processor, generation_config, input_ids, mask_BP, decoder.eos_ids.tolist(), seed)
    output = OutputBatch(input_ids, room, stopping_criteria, generation_config._pad_token_tensor)
    _decode(decoder.iterate(prompts, max_new_tokens=new_tokens, sampling=samplings), output, stream_to)
    if generation_config.return_dict_in_generate:
        forwards_B = torch.tensor(output.forwards, device=input_ids.device)
        return JacobiOutput(sequences=output.sequences, forwards=forwards_B)  # type: ignore[arg-type]
    return output.sequences


def _decode(iterations: Iterator[Iteration], output: OutputBatch, streamer: Streamer | None) -> None:
    """Fill ``output``, synchronising after each iteration only if a streamer or a stopping criterion needs it."""
    if streamer is None and all(isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria)) for criterion in output.criteria):
        for iteration in iterations:
            output.add(iteration)
        return output.close()  # the engine has stopped the rows itself
    if streamer is not None:
        streamer.put(output.sequences.cpu())
    for iteration in iterations:
        output.add(iteration)
        output.grow(streamer)
        if not output.unfinished:
            break
    if streamer is not None:
        streamer.end()


def _refuse_other_tasks(config: GenerationConfig, model_kwargs: dict[str, Any], mask_BP: torch.Tensor) -> None:
    """Raise UsageError for what this loop does not support and would silently ignore."""
    if (mode := config.get_generation_mode()) not in MODES:
        raise UsageError(f"Jacobi decoding takes greedy search or sampling, got {mode.value.replace('_', ' ')}")
    if asked := [name for name in NO_OUTPUT if getattr(config, name)]:
        raise UsageError(f"Jacobi decoding gives sequences only, got {', '.join(asked)}")
    if unknown := sorted(name for name, value in model_kwargs.items() if value is not None and name not in PREPARED):
        raise UsageError(f"Jacobi decoding takes input_ids and attention_mask only, got {', '.join(unknown)}")
    for name in (CACHE, OLD_CACHE):
        if (cache := model_kwargs.get(name)) is not None and cache.get_seq_length():
            raise UsageError(f"Jacobi decoding starts from an empty cache; {name} is not empty")
    positions = model_kwargs.get("position_ids")
    if positions is not None and not torch.equal((positions * mask_BP), ((mask_BP.cumsum(1) - 1) * mask_BP)):
        raise UsageError("Jacobi decoding counts positions from each row's first token; position_ids differ from that")


def _samplings(
    processors: LogitsProcessorList,
    config: GenerationConfig,
    input_ids: torch.Tensor,
    mask_BP: torch.Tensor,
    eos_ids: Sequence[int],
    seed: int,
) -> list[Sampling]:
    """How the tokens of each row are chosen: by Sampling's options if they can express the processors, else by calling them."""
    B, P = input_ids.shape
    options = _equivalent_options(processors, bool(config.do_sample), (~mask_BP).sum(1).tolist())
    if options is not None:
        return [Sampling(**options, seed=seed).derive(str(row)) for row in range(B)]
    return [
        ProcessedSampling(
            temperature=float(bool(config.do_sample)),
            seed=seed,
            process=Processed(processors, B, row, input_ids[row, ~mask_BP[row]], P, config.max_length, eos_ids),
        ).derive(str(row))
        for row in range(B)
    ]


def _equivalent_options(processors: LogitsProcessorList, draws: bool, padding: list[int]) -> dict[str, Any] | None:
    """The options of Sampling that are equivalent to the processors; None if there are others, or in another order."""
    kinds = [type(processor) for processor in processors]
    if kinds != [kind for kind in SAMPLING_OPTIONS if kind in kinds] or not draws and kinds not in ([], [RepetitionPenaltyLogitsProcessor]):
        return None
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            ignored = processor.prompt_ignore_length
            if (ignored.tolist() if isinstance(ignored, torch.Tensor) else [ignored or 0] * len(padding)) != padding:
                return None  # it covers less than the prompt, or padding as well
    options: dict[str, Any] = {"temperature": 1.0} if draws else {}
    for processor in processors:
        attribute, option = SAMPLING_OPTIONS[type(processor)]
        options[option] = getattr(processor, attribute)
    return options


@dataclass(frozen=True)
class Processed:
    """Applies ``generate``'s processors to the scores of one row, given the text of that row.

    Processors may depend on the batch size and on the row's index, so they get a full batch of copies of the row.
    """

    processors: LogitsProcessorList
    batch_size: int
    row: int
    padding_t: torch.Tensor  # comes before the text
    prompt_length: int  # including padding
    max_length: int
    eos_ids: Sequence[int]

    def __call__(self, text_t: torch.Tensor, scores_V: torch.Tensor) -> torch.Tensor:
        """The processed scores [V] of the token after ``text_t``.

        Raises UsageError in a batch for processors with state, because their calls would not come in AR decoding's order.
        """
        ids_S = torch.cat([self.padding_t.to(text_t.device), text_t])
        ended = len(ids_S) > self.prompt_length and int(ids_S[-1]) in self.eos_ids
        if ended or len(ids_S) >= self.max_length:
            return scores_V  # the token will not join the output
        processed_V = self._apply(ids_S, scores_V)
        if self.batch_size > 1 and not torch.equal(processed_V, self._apply(ids_S, scores_V)):
            names = ", ".join(type(processor).__name__ for processor in self.processors)
            raise UsageError(f"one of {names} keeps state, so it takes one prompt at a time, got {self.batch_size}")
        return processed_V

    def _apply(self, ids_S: torch.Tensor, scores_V: torch.Tensor) -> torch.Tensor:
        processors: Any = self.processors
        processed_BV: torch.Tensor = processors(ids_S.repeat(self.batch_size, 1), scores_V.repeat(self.batch_size, 1))
        return processed_BV[self.row]


class OutputBatch:
    """The sequences as AR decoding would have them after each of its steps, although rows advance at different speeds.

    Stopping criteria are called once per step, with all rows, as soon as every unfinished row has its token for that step.
    """

    def __init__(self, input_ids: torch.Tensor, room: Sequence[int], criteria: StoppingCriteriaList, pad: torch.Tensor | None) -> None:
        self.criteria, self.room = criteria, room  # room: the most new tokens of each row
        self.pad = int(pad) if pad is not None else 0
        self.ids_BS = torch.nn.functional.pad(input_ids, (0, max(room)), value=self.pad)
        self.length = input_ids.shape[1]
        self.start = self.length
        self.tokens: list[list[int]] = [[] for _ in room]
        self.forwards = [0 for _ in room]
        self.unfinished = set(range(len(room)))
        self._new: list[Iteration] = []

    @property
    def sequences(self) -> torch.Tensor:
        return self.ids_BS[:, : self.length]

    def add(self, iteration: Iteration) -> None:
        self._new.append(iteration)

    def close(self) -> None:
        """Take all steps at once, without calling criteria."""
        self._fetch()
        for row, tokens in enumerate(self.tokens):
            self.ids_BS[row, self.start : self.start + len(tokens)] = torch.tensor(tokens, device=self.ids_BS.device)
        self.length = self.start + max(map(len, self.tokens))

    def grow(self, streamer: Streamer | None) -> None:
        """Take all steps that are complete; the streamer gets their tokens: [k] for one row, else [B] once per step."""
        self._fetch()
        before = self.length
        while self.unfinished and all(len(self.tokens[row]) > self.length - self.start for row in self.unfinished):
            self._step()
        if streamer is not None and self.length > before:
            new_BK = self.ids_BS[:, before : self.length].cpu()
            for value in new_BK if len(new_BK) == 1 else new_BK.T:
                streamer.put(value)

    def _step(self) -> None:
        at = self.length - self.start
        column = [tokens[at] if row in self.unfinished else self.pad for row, tokens in enumerate(self.tokens)]
        self.ids_BS[:, self.length] = torch.tensor(column, device=self.ids_BS.device)
        self.length += 1
        done = self.criteria(self.sequences, None).tolist()
        self.unfinished = {row for row in self.unfinished if not done[row] and at + 1 < self.room[row]}

    def _fetch(self) -> None:
        for it in self._new:
            columns = torch.stack([it.rows_B, it.emitted_B, it.running_B.long()], dim=1).tolist()
            for (row, emitted, running), choices in zip(columns, it.choices_BW.tolist(), strict=True):
                self.tokens[row] += choices[:emitted]
                self.forwards[row] += running and row in self.unfinished
        self._new.clear()

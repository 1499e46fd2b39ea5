"""The decoding methods that are compared: our engine, and Hugging Face's ``generate``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from cllm.adapter import attached
from cllm.decoding import GREEDY, GuessStrategy, JacobiDecoder, Sampling, make_guess
from cllm.decoding.prefix_cache import DEFAULT_BYTES
from cllm.errors import UsageError
from cllm.evaluation.method_name import AR, GENERATE, JACOBI, NO_ADAPTER, PROMPT_LOOKUP
from cllm.trajectory.hygiene import cut_at_eos


@dataclass(frozen=True)
class Response:
    """What a method wrote for one prompt. Statistics that only our engine has are None elsewhere."""

    token_ids: list[int]
    forwards: int  # prefill counted as one
    fast_forwarded: int | None = None
    stationary: int | None = None
    accepted: list[int] | None = None  # tokens gained by each forward


class Method(Protocol):
    """A way to decode a batch of prompts greedily."""

    name: str
    label: str
    model: PreTrainedModel
    one_by_one: bool  # takes a single prompt per call

    def decode(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Response]: ...


class Engine:
    """Our engine, at any width; greedy unless ``sampling`` says otherwise."""

    one_by_one = False

    def __init__(self, decoder: JacobiDecoder, name: str, label: str, sampling: Sampling = GREEDY) -> None:
        self.decoder, self.name, self.label, self.model = decoder, name, label, decoder.model
        self.sampling = sampling

    def decode(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Response]:
        results = self.decoder.generate(prompts, max_new_tokens=max_new_tokens, sampling=self.sampling)
        return [Response(r.token_ids, r.forwards, r.fast_forwarded, r.stationary, r.accepted) for r in results]


class HuggingFace:
    """``model.generate``, greedy.

    With ``lookup`` tokens drafted from the text so far (prompt lookup, batch 1), or, ``compiled``, over a static cache under
    torch.compile.
    """

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int], lookup: int | None = None, compiled: bool = False) -> None:
        self.model, self.eos_ids, self.lookup, self.compiled = model, list(eos_ids), lookup, compiled
        self.name, self.one_by_one = (PROMPT_LOOKUP, True) if lookup else (GENERATE, False)
        self.label = f"HF prompt lookup {lookup}" if lookup else "HF generate" + ", compiled" * compiled

    def decode(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Response]:
        ids_BP, mask_BP = pad_left(prompts, self.eos_ids[0], self.model.device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.eos_ids[0],
            prompt_lookup_num_tokens=self.lookup,
            **(_compilation() if self.compiled else {}),
        )
        counted: AbstractContextManager[list[None]] = nullcontext([])
        if self.lookup:  # elsewhere a forward gives a token, and a hook would disturb a compiled model
            counted = count_forwards(self.model)
        try:
            with _no_defaults(self.model), counted as forwards, torch.inference_mode():
                generate: Any = self.model.generate
                output_BT = generate(ids_BP, attention_mask=mask_BP, generation_config=settings)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(f"{self.label} does not work with this model: {error}") from error
        responses = [cut_at_eos(row, set(self.eos_ids)) for row in output_BT[:, ids_BP.shape[1] :].tolist()]
        if self.lookup:
            return [Response(responses[0], len(forwards))]
        return [Response(ids, len(ids)) for ids in responses]


def build_methods(
    model: PreTrainedModel,
    names: Collection[str],
    *,
    block_size: int,
    drafts: int | None = None,
    window: str = "sliding",
    guesses: Sequence[GuessStrategy] = (),
    eos_ids: Sequence[int],
    seed: int = 0,
    prefix_cache: int = DEFAULT_BYTES,
) -> list[Method]:
    """The Jacobi engine with each of ``guesses``, the engine at width 1, and the baselines among ``names``.

    The first of the guesses (default: random tokens of the context) makes the method ``jacobi``, the others ``jacobi:NAME``.
    ``jacobi:no_adapter`` is the first one without the model's consistency adapter. Raises UsageError where there is none.
    Prompt lookup drafts block_size - 1 tokens (at least one), so a forward covers as many positions as our window does.
    ``prefix_cache``: of every engine; Hugging Face's methods have none.
    """
    methods: list[Method] = []
    shared: Any = {"eos_token_ids": eos_ids, "prefix_cache": prefix_cache}
    guesses = guesses or [make_guess("context")]
    for guess in guesses:
        options: Any = {"window": window, "guess": guess, "drafts": drafts, "seed": seed}
        jacobi = JacobiDecoder(model, block_size, **options, **shared)
        name = f"{JACOBI}:{guess.name}" if methods else JACOBI
        width = f"{block_size}+{jacobi.step.drafts}" if jacobi.step.drafts else str(block_size)
        methods.append(Engine(jacobi, name, f"Jacobi {width} {window}, {guess.name}"))
    if NO_ADAPTER in names:
        if attached(model) is None:
            raise UsageError(f"{NO_ADAPTER} needs a model with a consistency adapter, and {model.name_or_path!r} has none")
        options = {"adapter": None, "window": window, "guess": guesses[0], "seed": seed}
        plain = JacobiDecoder(model, block_size, **options, **shared)
        methods.append(Engine(plain, f"{JACOBI}:{NO_ADAPTER}", f"Jacobi {block_size} {window}, without the adapter"))
    methods.append(Engine(JacobiDecoder(model, 1, **shared), AR, "AR"))
    if GENERATE in names:
        methods.append(HuggingFace(model, eos_ids))
    if PROMPT_LOOKUP in names:
        methods.append(HuggingFace(model, eos_ids, lookup=max(1, block_size - 1)))
    return methods


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [B, P], the padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _compilation() -> dict[str, Any]:
    """Generation settings: the static cache, whose steps are compiled on a CPU too, where it is not the default."""
    config: Any = CompileConfig()
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def count_forwards(model: PreTrainedModel) -> Iterator[list[None]]:
    """A list that gets one item with every forward pass of ``model``."""
    calls: list[None] = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Keep the checkpoint's own sampling and penalty settings out: the baseline must be plain greedy decoding."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own

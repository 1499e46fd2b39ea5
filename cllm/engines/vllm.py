"""Jacobi decoding inside vLLM, as a proposer of its speculative decoding.

vLLM verifies the drafts of a request in one forward, and with greedy decoding what it accepts is the text of AR decoding. Jacobi
iteration only needs the drafts to be the model's own choices: those after the first rejected draft, which vLLM computes and then
throws away. :func:`register` lets its rejection sampler hand them over to :class:`JacobiProposer`, which runs in the same step.

Nothing is kept from one step to the next and nothing belongs to a request, so requests may join, leave, be preempted, resumed or
aborted, and every worker of a tensor-parallel group comes to the same drafts.
Shapes: R requests of a step, W window width, S positions of a text, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cllm.adapter import LOSSLESS
from cllm.decoding.guess import make_guess
from cllm.decoding.guess_strategy import GuessStrategy, PartialWindow
from cllm.engines.follower import follow
from cllm.errors import UsageError
from cllm.models import DEFAULT_GUESS, TRAINED_GUESS, default_guess, read_record

if TYPE_CHECKING:
    import numpy as np

VERSIONS = ("0.32",)  # of vLLM, major and minor: what the tests marked vllm are written for
FORWARD = ["self", "metadata", "draft_probs", "logits", "sampling_metadata"]  # parameters of RejectionSampler.forward
OPTIONS = "cllm"  # the key of vLLM's additional_config with the proposer's options
GUESS, STEP_TOKENS = "guess", "step_tokens"  # the options
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 32, 256  # tokens of a step that cost little more than one token for each request
WATCHED = "_cllm_watched"

logger = logging.getLogger(__name__)


class _Step(threading.local):
    """What the model chose in the step that runs, until the proposer takes it."""

    watched = False  # is there a proposer in this process?
    choices: torch.Tensor | None = None  # after every token that was forwarded for a sample, one request after the other
    lengths: Sequence[int] = ()  # how many of them each request has: its drafts and one more


_step = _Step()


def register() -> None:
    """vLLM's entry point for plug-ins, called in each of its processes: watch the rejection sampler, end with the leader.

    On a CPU, :func:`expand_batch_to_tokens` also replaces vLLM's own, for every kind of draft. Does nothing with a vLLM that has no
    such sampler; a proposer then refuses to start.
    """
    follow()
    try:
        from vllm.platforms import current_platform
        from vllm.v1.sample import rejection_sampler
        from vllm.v1.sample.rejection_sampler import RejectionSampler
    except ImportError:
        return
    forward = RejectionSampler.forward
    if hasattr(forward, WATCHED) or list(inspect.signature(forward).parameters) != FORWARD:
        return

    @functools.wraps(forward)
    def watched(self: Any, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        if _step.watched:  # before the call, which may change the logits in place
            _step.choices, _step.lengths = logits.argmax(dim=-1), [drafts + 1 for drafts in metadata.num_draft_tokens]
            if not any(metadata.num_draft_tokens):  # there is nothing to verify, though vLLM asks
                return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        return forward(self, metadata, draft_probs, logits, sampling_metadata)

    setattr(watched, WATCHED, True)
    RejectionSampler.forward = watched
    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """``x`` [R] repeated for the tokens of each request: [num_tokens]; ``cu_num_tokens`` [R] is their cumulative number.

    In the place of vLLM's function on a CPU, which in 0.32 returns unset memory for any dtype but int64: drafts would be verified
    at a random temperature, top-k and top-p.
    """
    counts_R = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts_R, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


def take_choices(requests: int) -> list[list[int]]:
    """For each request of the step that runs, what the model chose after the last verified token and after each draft.

    Empty lists in a step without drafts, or the choices of an earlier step if no proposer took them: drafts made of those are
    wrong, and vLLM rejects them like any wrong draft.
    """
    choices, lengths = _step.choices, _step.lengths
    _step.choices = None
    if choices is None or len(lengths) != requests:
        return [[]] * requests
    return [part.tolist() for part in choices.cpu().split(list(lengths))]


class JacobiProposer:
    """Drafts for vLLM's ``speculative_config``: ``{"method": "custom_class", "model": "cllm.engines.vllm.JacobiProposer",
    "num_speculative_tokens": 15}`` is a window of 16 tokens.

    The drafts after the model's own choices are the fresh guesses that the checkpoint's record names, or
    ``additional_config={"cllm": {"guess": "prompt_lookup"}}``. With many requests in a step each has fewer drafts, so that the
    step has ``step_tokens`` tokens at most (another option there); where that leaves none, decoding is AR.

    Raises UsageError for a vLLM that it does not work with, a lossless adapter, and options that do not exist.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_vllm(vllm_config)
        record = read_record(vllm_config.model_config.hf_config)
        check_record(record, vllm_config.model_config.model)
        options = dict(vllm_config.additional_config.get(OPTIONS, {}))
        self.guess = vllm_guess(options.pop(GUESS, None) or stateless_guess(record))
        cheap = CPU_STEP_TOKENS if vllm_config.device_config.device_type == "cpu" else GPU_STEP_TOKENS
        self.step_tokens = options.pop(STEP_TOKENS, cheap)
        if not isinstance(self.step_tokens, int) or self.step_tokens < 1:
            raise UsageError(f"{STEP_TOKENS} must be an integer >= 1, got {self.step_tokens!r}")
        if options:
            raise UsageError(f"unknown options {', '.join(options)} of {OPTIONS}; choose from {GUESS}, {STEP_TOKENS}")
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        _Step.watched = True

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM's runners call it; there is no model to load."""

    def drafts_for(self, requests: int) -> int:
        """The number of drafts for each of ``requests`` that share a step."""
        return max(0, min(self.most, self.step_tokens // max(requests, 1) - 1))

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The drafts of each request: [] for one that is not yet through its prompt.

        ``sampled_token_ids``: what this step added to each text, in order of the rows of ``token_ids_cpu`` [>= R, S], of which
        the first ``num_tokens_no_spec`` [>= R] tokens are the text.
        """
        requests = len(sampled_token_ids)
        refined = [chosen[len(new) :] for new, chosen in zip(sampled_token_ids, take_choices(requests))]
        drafts = self.drafts_for(sum(map(bool, sampled_token_ids)))
        if not drafts:
            return [[] for _ in sampled_token_ids]
        start_R = torch.from_numpy(num_tokens_no_spec[:requests]).long() - 1
        text_RS = torch.from_numpy(token_ids_cpu[:requests, : int(start_R.max()) + 1 + drafts])
        window_RD = self._window(text_RS, start_R, [guesses[:drafts] for guesses in refined], drafts)
        return [guesses if new else [] for new, guesses in zip(sampled_token_ids, window_RD.tolist())]

    def _window(self, text_RS: torch.Tensor, start_R: torch.Tensor, refined: list[list[int]], drafts: int) -> torch.Tensor:
        """The refined guesses of each request with fresh ones after them: [R, drafts]."""
        filled_R = torch.tensor([1 + len(guesses) for guesses in refined])
        padded = [guesses + [0] * (drafts - len(guesses)) for guesses in refined]
        window_RW = torch.cat([text_RS.gather(1, start_R[:, None]), torch.tensor(padded, dtype=text_RS.dtype)], dim=1)
        one_R, zero_R = torch.ones_like(start_R), torch.zeros_like(start_R)
        partial = PartialWindow(text_RS, start_R, window_RW, one_R, filled_R, one_R, zero_R, self.vocabulary)
        return self.guess.fill(torch.empty(len(refined), 0), partial).window_BW[:, 1:]


def vllm_guess(name: str) -> GuessStrategy:
    """The strategy for fresh guesses called ``name``. Raises UsageError for a strategy that keeps state per request."""
    guess = make_guess(name)
    if guess.memory_size:
        raise UsageError(f"guess {name!r} remembers what a request chose earlier, which it cannot in vLLM; choose another")
    return guess


def stateless_guess(record: Mapping[str, Any]) -> str:
    """The name of the checkpoint's fresh guesses, less those that keep something of a request."""
    parts = [name for name in default_guess(record).split("+") if not make_guess(name).memory_size]
    return "+".join(parts) or str(record.get(TRAINED_GUESS) or DEFAULT_GUESS)


def check_vllm(vllm_config: Any) -> None:
    """Raise UsageError for a vLLM that the proposer is not made for, and one that runs without what it needs."""
    import vllm
    from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN, RejectionSampler

    if ".".join(vllm.__version__.split(".")[:2]) not in VERSIONS:
        raise UsageError(f"Jacobi decoding works with vLLM {', '.join(VERSIONS)}, and this is {vllm.__version__}")
    if vllm_config.use_v2_model_runner:
        raise UsageError("Jacobi decoding needs vLLM's V1 model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
    parameters = list(inspect.signature(RejectionSampler.forward).parameters)
    if parameters != FORWARD:
        raise UsageError(f"vLLM's RejectionSampler.forward takes {', '.join(parameters)}; Jacobi decoding needs {', '.join(FORWARD)}")
    if not hasattr(RejectionSampler.forward, WATCHED):
        raise UsageError("vLLM has not loaded the plug-in cllm; install the project with pip, and name it in VLLM_PLUGINS if that is set")
    if (drafts := vllm_config.speculative_config.num_speculative_tokens) > MAX_SPEC_LEN:
        raise UsageError(f"num_speculative_tokens must be between 1 and {MAX_SPEC_LEN}, got {drafts}")


def check_record(record: Mapping[str, Any], model: str) -> None:
    """Raise UsageError for a model with a lossless adapter; warn of one that was not trained for Jacobi decoding."""
    if record.get(LOSSLESS):
        raise UsageError(
            f"{model!r} has a lossless adapter, which must be on for drafts and off for verified tokens within one forward, and "
            "vLLM cannot do that. Serve it with `cllm serve`, or in SGLang after `cllm export --format uno`"
        )
    if not record:
        logger.warning("%s is no CLLM: few of its drafts will be right, and Jacobi decoding gains little or nothing", model)

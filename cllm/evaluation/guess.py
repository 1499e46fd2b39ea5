"""Which fresh guesses to decode with: those that the user names, those stored in the checkpoint, or the fastest."""

from __future__ import annotations

import logging

from cllm.adapter import attached
from cllm.decoding import GREEDY, Sampling, make_guess
from cllm.decoding.engine import Prompts
from cllm.evaluation.choice import CANDIDATES, fastest, lossless_candidates, measure_choices
from cllm.models import context_length, default_guess
from cllm.open_model import OpenModel
from cllm.options import AUTO

SAMPLE_PROMPTS, SAMPLE_TOKENS = 4, 48  # what `auto` measures with
logger = logging.getLogger(__name__)


def check_guess(name: str | None) -> None:
    """Raise UsageError for an unknown strategy, before anything is loaded. None: the option was not given."""
    if name not in (None, AUTO):
        make_guess(name)


def pick_guess(
    name: str | None,
    opened: OpenModel,
    width: int,
    prompts: Prompts,
    *,
    batch_size: int = 1,
    sampling: Sampling = GREEDY,
) -> str:
    """The strategy to decode with: ``name``, else what ``cllm tune`` stored, else what the model was trained with.

    ``auto`` decodes the first few of ``prompts`` (token ids) with each candidate and takes the one with the most tokens/s.
    """
    stored = default_guess(opened.record)
    if name != AUTO or width == 1 or not prompts:
        return stored if name in (None, AUTO) else name
    room = context_length(opened.model.config)
    samples = [ids for ids in prompts if room is None or len(ids) + max(SAMPLE_TOKENS, 4 * width) <= room]
    if not samples:
        logger.info("--guess auto: no prompt leaves room to measure with; %s is taken", stored)
        return stored
    measured = measure_choices(
        opened.model,
        samples[:SAMPLE_PROMPTS],
        [width],
        CANDIDATES if attached(opened.model) is None else lossless_candidates(opened.record),
        [batch_size],
        max_new_tokens=SAMPLE_TOKENS,
        eos_ids=opened.stops,
        sampling=sampling,
    )
    best = fastest(measured, batch_size)
    figures = ", ".join(f"{m.guess} {m.tokens_per_second:.1f}" for m in measured if m.batches == best.batches)
    logger.info("--guess auto: %s, by tokens/s on %d prompts (%s)", best.guess, len(samples[:SAMPLE_PROMPTS]), figures)
    return best.guess

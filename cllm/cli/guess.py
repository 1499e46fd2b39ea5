"""What commands make of ``--guess`` (:func:`cllm.cli.command.add_guess_option`)."""

from __future__ import annotations

import logging

from cllm.adapter import attached
from cllm.cli.command import AUTO
from cllm.cli.model import OpenModel
from cllm.decoding import GREEDY, Sampling, make_guess
from cllm.decoding.engine import Prompts
from cllm.evaluation.choice import CANDIDATES, fastest, lossless_candidates, measure_choices
from cllm.models import context_length, default_guess

SAMPLE_PROMPTS, SAMPLE_TOKENS = 4, 48  # what `auto` measures with
logger = logging.getLogger(__name__)


def check_guess(name: str | None) -> None:
    """Raise UsageError for an unknown strategy, before anything is loaded. None: the option was not given."""
    if name not in (None, AUTO):
        make_guess(name)


def pick_guess(
    name: str | None,
    of: OpenModel,
    width: int,
    prompts: Prompts,
    *,
    batch_size: int = 1,
    sampling: Sampling = GREEDY,
) -> str:
    """The strategy to decode with: the one named, else what ``cllm tune`` stored, else the training's.

    ``auto`` decodes the first few of ``prompts`` (token ids) with each candidate and takes the one with the most tokens/s.
    """
    stored = default_guess(of.record)
    if name != AUTO or width == 1 or not prompts:
        return stored if name in (None, AUTO) else name
    room = context_length(of.model.config)
    samples = [ids for ids in prompts if room is None or len(ids) + max(SAMPLE_TOKENS, 4 * width) <= room]
    if not samples:
        logger.info("--guess auto: no prompt leaves room to measure with; %s is taken", stored)
        return stored
    measured = measure_choices(
        of.model,
        samples[:SAMPLE_PROMPTS],
        [width],
        CANDIDATES if attached(of.model) is None else lossless_candidates(of.record),
        [batch_size],
        max_new_tokens=SAMPLE_TOKENS,
        eos_ids=of.stops,
        sampling=sampling,
    )
    best = fastest(measured, batch_size)
    figures = ", ".join(f"{m.guess} {m.tokens_per_second:.1f}" for m in measured if m.batches == best.batches)
    logger.info("--guess auto: %s, by tokens/s on %d prompts (%s)", best.guess, len(samples[:SAMPLE_PROMPTS]), figures)
    return best.guess

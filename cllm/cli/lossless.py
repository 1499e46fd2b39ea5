"""``cllm train --lossless``: what is built from the options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.probe import ProbeArguments, watch_drafts
from cllm.cli.training import data_seed, make_trainer
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.cli.train import Source
    from cllm.training.lora import AdapterArguments


def lossless_trainer(source: Source, lora: AdapterArguments, probe: ProbeArguments, args: Any):
    """The trainer of a consistency adapter. Raises UsageError for what does not fit together."""
    from cllm.adapter import BASE, BASE_REVISION, LOSSLESS, fingerprint
    from cllm.decoding.guess import STARTS
    from cllm.models import TRAINED_GUESS, packed_length, write_record
    from cllm.training.arguments import LOSSLESS_OBJECTIVE
    from cllm.training.drafts import DraftCollator, DraftDataset
    from cllm.training.lora import add_adapter
    from cllm.training.lossless import LosslessTrainer

    model, record, tokenizer = source.model, source.record, source.tokenizer
    context = packed_length(model.config)
    if context is not None and record["block_size"] >= context:
        raise UsageError(f"block_size must be below the model's context of {context}, got {record['block_size']}")
    guess = STARTS[record[TRAINED_GUESS]](model.config.get_text_config(decoder=True).vocab_size)
    made = {LOSSLESS: True, BASE: fingerprint(model)}
    revision = getattr(model.config, "_commit_hash", None)
    if revision and not Path(record["target_model"]).is_dir():
        made[BASE_REVISION] = revision
    objective = {name: getattr(args, name) for name in LOSSLESS_OBJECTIVE}
    write_record(model.config, record | made | objective | lora.record())
    trainer = make_trainer(
        LosslessTrainer,
        args,
        model=add_adapter(model, lora, args.seed),
        train_dataset=DraftDataset(source.rows, args.states_per_block, guess, data_seed(args), context),
        data_collator=DraftCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    if probe.probe_prompts:
        watch_drafts(trainer, probe)
    return trainer

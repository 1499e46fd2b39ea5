"""``cllm sft``: fine-tune a general model on a task's answers, which gives the target model to collect from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from cllm.cli.command import command
from cllm.cli.training import checkpoint, make_trainer, open_weights, parse, train

logger = logging.getLogger(__name__)


@dataclass
class RunArguments:
    """What to train on."""

    model: str = field(metadata={"help": "the general model: checkpoint folder or hub name"})
    task: str = field(metadata={"help": "whose answers to learn; `cllm tasks` lists them"})
    filename: str | None = field(default=None, metadata={"help": "local data, plain or .gz; default: the hub dataset"})
    eval_file: str | None = field(
        default=None, metadata={"help": "held-out rows: their loss is logged after every epoch, or as --eval_strategy says"}
    )
    data_size: int | None = field(default=None, metadata={"help": "use only the first so many examples"})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "as in `cllm collect`; default: the model's chat template, else the task's plain prompt"},
    )
    dtype: str = field(default="float32", metadata={"help": "of the weights in training; use --bf16 for mixed precision on a GPU"})


@command
def main(argv: Sequence[str] | None = None) -> None:
    from transformers import IntervalStrategy, TrainingArguments

    from cllm.models import load_tokenizer, packed_length, read_record, write_record
    from cllm.prompts import choose_template
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples
    from cllm.training.lora import LoraArguments, add_adapter
    from cllm.training.sft import AnswerCollator, AnswerDataset, AnswerTrainer

    words = sys.argv[1:] if argv is None else argv
    run, lora, args = parse(words, "cllm sft", __doc__, RunArguments, LoraArguments, TrainingArguments)
    args.remove_unused_columns = False
    resume_from = checkpoint(args)
    task = get_task(run.task)
    examples = load_examples(task, run.filename, "train", run.data_size)
    tokenizer = load_tokenizer(run.model)
    model = open_weights(run.model, dtype=run.dtype, **lora.load_options(str(args.device)))
    template = choose_template(run.prompt_template, task.plain_template, tokenizer, read_record(model.config))
    context = packed_length(model.config)
    rows = AnswerDataset(examples, template, tokenizer, context)
    for reason, count in rows.left_out.items():
        logger.warning("%d examples left out: %s", count, reason)
    write_record(model.config, {"prompt_template": template.text, "task": task.name, "base_model": run.model, **lora.record()})
    collator = AnswerCollator(tokenizer.pad_token_id)
    model = add_adapter(model, lora, args.seed)
    parts = {"model": model, "train_dataset": rows, "data_collator": collator, "processing_class": tokenizer}
    if run.eval_file is not None:
        parts["eval_dataset"] = AnswerDataset(load_examples(task, run.eval_file, "test"), template, tokenizer, context)
        if args.eval_strategy == "no":
            args.eval_strategy = IntervalStrategy.EPOCH
    train(make_trainer(AnswerTrainer, args, **parts), resume_from, "target model", lora, run.dtype)

"""Ordinary fine-tuning on a dataset's answers: what makes a general model the target model of a task.

The paper's targets were made so (arXiv 2403.00835, section 4.1). A long beginning that examples of a batch have in common (a
database's schema, worked examples) is computed once.
Shapes: B rows, T tokens of a packed row, M answer tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset
from transformers import IntervalStrategy, PreTrainedTokenizerBase, TrainingArguments

from cllm.attention import LENGTHS
from cllm.errors import UsageError
from cllm.models import load_tokenizer, packed_length, read_record, write_record
from cllm.packing import pack_alike
from cllm.prompts import PromptTemplate, choose_template
from cllm.tasks import get_task
from cllm.tasks.base import Example
from cllm.tasks.source import load_examples
from cllm.training.base import Batch, TokenMeanTrainer, hidden_at
from cllm.training.examples import index_pairs, layout_fields
from cllm.training.head import LanguageHead
from cllm.training.lora import LoraArguments, add_adapter
from cllm.training.objective import cross_entropy_sum
from cllm.training.run import ModelLoading, checkpoint, make_trainer, open_weights, train_and_save

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """A prompt and its answer as token ids; the answer ends with the token that ends a reply."""

    prompt_ids: list[int]
    answer_ids: list[int]


class AnswerDataset(Dataset):
    """The examples that have an answer and fit the context; ``left_out`` counts the others by reason.

    Raises UsageError when none is left.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        template: PromptTemplate,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
    ) -> None:
        self.left_out: Counter[str] = Counter()
        self.rows: list[Answered] = []
        end = template.end_id(tokenizer)
        for example in examples:
            if example.reference is None:
                self.left_out["no answer"] += 1
                continue
            prompt = template.encode(example.messages, tokenizer)
            answer = [*tokenizer(example.reference, add_special_tokens=False).input_ids, end]
            if context is not None and len(prompt) + len(answer) > context:
                self.left_out["longer than the context"] += 1
                continue
            self.rows.append(Answered(prompt, answer))
        if not self.rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
            raise UsageError(f"no example to train on ({reasons})")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Answered:
        return self.rows[index]

    def length(self, index: int) -> int:
        return len(self.rows[index].prompt_ids) + len(self.rows[index].answer_ids)


@dataclass(frozen=True)
class AnswerCollator:
    """Packs examples, the beginning that several share only once. The loss is on answers only."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Answered]) -> Batch:
        """input_ids and layout [B, T]; ``index`` [M, 2], row and column of the tokens that predict ``target`` [M]."""
        texts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
        input_ids, layout, places = pack_alike(texts, self.pad_token_id, LENGTHS)
        before = [range(len(row.prompt_ids) - 1, len(text) - 1) for row, text in zip(rows, texts, strict=True)]
        return {
            **layout_fields(input_ids, layout),
            "index": index_pairs(places, before),
            "target": torch.tensor([token for row in rows for token in row.answer_ids], dtype=torch.long),
        }


class AnswerTrainer(TokenMeanTrainer):
    """Cross-entropy on the answers, whose tokens alone get logits."""

    terms = ("answer_loss",)

    def counts(self, batch: Batch) -> torch.Tensor:
        return torch.tensor([float(len(batch["target"]))])

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        head = LanguageHead(self.accelerator.unwrap_model(model))
        hidden_MH = hidden_at(self.packed_hidden(model, batch, head), batch["index"])
        return cross_entropy_sum(hidden_MH, head, batch["target"], self.args.label_smoothing_factor)[None]


@dataclass
class FineTuningInputs(ModelLoading):
    """What to train on."""

    model: str = field(kw_only=True, metadata={"help": "the general model: checkpoint folder or hub name"})
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


def fine_tune(inputs: FineTuningInputs, args: TrainingArguments, lora: LoraArguments | None = None) -> None:
    """Ordinary fine-tuning on a task's answers (arXiv 2403.00835, section 4.1); the target model is left in ``args.output_dir``.

    ``lora``: adapters instead of all weights. ``args.resume_from_checkpoint`` continues an interrupted run. Raises UsageError
    where model, data and options do not fit together and for a full disk.
    """
    lora = lora or LoraArguments()
    args.remove_unused_columns = False
    resume_from = checkpoint(args)
    task = get_task(inputs.task)
    examples = load_examples(task, inputs.filename, "train", inputs.data_size)
    tokenizer = load_tokenizer(inputs.model)
    model = open_weights(inputs.model, **inputs.load_options(), **lora.load_options(str(args.device)))
    template = choose_template(inputs.prompt_template, task.plain_template, tokenizer, read_record(model.config))
    context = packed_length(model.config)
    rows = AnswerDataset(examples, template, tokenizer, context)
    for reason, count in rows.left_out.items():
        logger.warning("%d examples left out: %s", count, reason)
    write_record(model.config, {"prompt_template": template.text, "task": task.name, "base_model": inputs.model, **lora.record()})
    held_out = None
    if inputs.eval_file is not None:
        held_out = AnswerDataset(load_examples(task, inputs.eval_file, "test"), template, tokenizer, context)
        if args.eval_strategy == "no":
            args.eval_strategy = IntervalStrategy.EPOCH
    trainer = make_trainer(
        AnswerTrainer,
        args,
        model=add_adapter(model, lora, args.seed),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    train_and_save(trainer, resume_from, lora, inputs.dtype)

"""Ordinary fine-tuning on a dataset's answers: what makes a general model the target model of a task.

The paper's targets were made so (arXiv 2403.00835, section 4.1). Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from cllm.errors import UsageError
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Example
from cllm.training.base import Batch, TokenMeanTrainer
from cllm.training.head import LanguageHead
from cllm.training.objective import cross_entropy_sum

IGNORED = -100  # the label of tokens that no loss is taken at


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
    """Stacks examples, padded on the right: input_ids, attention_mask and labels [B, T], the loss on answers only."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Answered]) -> dict[str, torch.Tensor]:
        ids = [row.prompt_ids + row.answer_ids for row in rows]
        labels = [[IGNORED] * len(row.prompt_ids) + row.answer_ids for row in rows]
        return {
            "input_ids": _stack(ids, self.pad_token_id),
            "attention_mask": _stack([[1] * len(row) for row in ids], 0),
            "labels": _stack(labels, IGNORED),
        }


class AnswerTrainer(TokenMeanTrainer):
    """Cross-entropy on the answers, whose tokens alone get logits."""

    terms = ("answer_loss",)

    def counts(self, batch: Batch) -> torch.Tensor:
        return (batch["labels"] != IGNORED).sum(dtype=torch.float32)[None]

    def useful_tokens(self, batch: Batch) -> torch.Tensor:
        return batch["attention_mask"].sum()

    def loss_sums(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        head = LanguageHead(self.accelerator.unwrap_model(model))
        hidden_BTH = self.last_hidden(model, head, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        goals = batch["labels"][:, 1:]
        learned = goals != IGNORED
        smoothing = self.args.label_smoothing_factor
        return cross_entropy_sum(hidden_BTH[:, :-1][learned], head, goals[learned], smoothing)[None]


def _stack(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])

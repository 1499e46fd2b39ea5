"""Arithmetic word problems in GSM8K's form, written by this project: any number of them, with no download."""

import random
from collections.abc import Set

from cllm.errors import UsageError
from cllm.tasks.gsm8k import Gsm8k
from cllm.tasks.stories import STORIES, Draw, Sheet, Story, Unfit

_TRIES = 1000  # draws in vain, one after another, before giving up


class Arithmetic(Gsm8k):
    """Generated word problems; scored as GSM8K's are."""

    name = "arithmetic"
    description = "Generated arithmetic word problems in GSM8K's form"
    hub = None


def generate(count: int, seed: int, exclude: Set[str] = frozenset()) -> list[dict[str, str]]:
    """Make ``count`` different problems: rows ``{question, answer}`` with a worked answer that ends in ``#### n``.

    The same arguments give the same rows, and fewer rows are the start of more. All stories are told equally often.

    Args:
        exclude: questions that must not come up, such as those of the training set when held-out ones are made.

    Raises:
        UsageError: when ``count`` is below 1, or so many different problems cannot be found.
    """
    if count < 1:
        raise UsageError(f"the number of problems must be >= 1, got {count}")
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict[str, str]] = []
    stories: list[Story] = []
    while len(rows) < count:
        stories = stories or rng.sample(STORIES, len(STORIES))
        row = _new(stories.pop(), rng, seen)
        seen.add(row["question"])
        rows.append(row)
    return rows


def _new(story: Story, rng: random.Random, seen: Set[str]) -> dict[str, str]:
    for _ in range(_TRIES):
        sheet = Sheet()
        try:
            question = story(Draw(rng), sheet)
        except Unfit:
            continue
        if question not in seen:
            return {"question": question, "answer": "\n".join([*sheet.lines, f"#### {sheet.result}"])}
    raise UsageError(f"no new problem in {_TRIES} draws of the story {story.__name__!r}; ask for fewer")


TASK = Arithmetic()

"""A task in a file of your own: dates. `python examples/my_task.py dates.jsonl` writes rows to try it on."""

import json
import sys
from datetime import date, timedelta

from cllm.tasks.base import Example, Task, text_field, user_turn


class Dates(Task):
    """Rewrite a date in ISO form; a reply is right when it is that form and nothing else."""

    name = "dates"
    description = "dates in words, to be written as YYYY-MM-DD"
    fields = "date and iso"
    metric = "exact"

    def example(self, row):
        iso = text_field(row, "iso")
        return Example(user_turn(f"Write as YYYY-MM-DD: {text_field(row, 'date')}"), reference=iso, target=iso)

    def score(self, reply, example):
        return {"exact": reply.strip() == example.target}


TASK = Dates()

if __name__ == "__main__":
    days = (date(2020, 1, 1) + timedelta(days=37 * n) for n in range(100))
    with open(sys.argv[1], "w") as file:
        file.writelines(json.dumps({"date": f"{day:%-d %B %Y}", "iso": str(day)}) + "\n" for day in days)

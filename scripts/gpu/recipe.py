"""Stages `gsm8k` and `sql`: the small model learns a task's answers, `cllm make` makes it faster, and that is measured.

What was done is kept in --work, so a second call goes on. The file is that of `cllm speedup` on held-out prompts; in `recipe`
it says what was trained on how much and for how long, and in `texts` where texts leave those of AR decoding: those of Jacobi
decoding, and those of AR decoding in batches of 8.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import sql_questions
import stage
from common import encode
from exactness import departures, ours

from cllm.files import read_rows, write_json, write_text
from cllm.models import load_model, load_tokenizer, stop_token_ids

GSM8K, SQL = "gsm8k", "sql"
HELD_OUT = 200  # prompts that are measured on
BATCH = 8


@dataclass(frozen=True)
class Sizes:
    task: str
    examples: int  # that the target model learns from
    batch: int
    epochs: int
    length: int  # new tokens of a response
    held_out: int
    texts: int  # prompts whose texts are compared
    making: float | None  # share of the stage's time that `cllm make` has; None: as long as it takes


FULL = {
    GSM8K: Sizes("gsm8k", 7473, 64, 1, 256, HELD_OUT, 24, 0.45),
    SQL: Sizes("spider", 640, 32, 2, 80, HELD_OUT, 24, 0.5),
}
TINY = {GSM8K: Sizes("gsm8k", 12, 4, 1, 16, 4, 2, None), SQL: Sizes("spider", 12, 4, 1, 16, 4, 2, None)}


def main() -> None:
    options = stage.options(__doc__)
    options.add_argument("name", choices=FULL)
    options.add_argument("--model", required=True, help="the general model")
    options.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl.gz and test.jsonl.gz")
    options.add_argument("--work", type=Path, required=True, help="folder for all that lies on the way")
    options.add_argument("--seconds", type=float, required=True)
    args = options.parse_args()
    sizes = (TINY if args.rehearse else FULL)[args.name]
    train, test = questions(args, sizes)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *of: Any) -> Any:
        start = time.perf_counter()
        result = work(args, sizes, *of)
        seconds[name] = time.perf_counter() - start
        return result

    timed("target", learn, train)
    made = timed("make", make, train)
    report = timed("measure", measure, made, test)
    report["texts"] = timed("texts", compare, made, test)
    report |= {"rehearsal": args.rehearse, "recipe": {"seconds": seconds, "make": made}}
    write_json(args.output, report)


def questions(args: Namespace, sizes: Sizes) -> tuple[Path, Path]:
    """Where the rows to learn from and the held-out ones are."""
    if args.name == GSM8K:
        rows = [row for _, row in islice(read_rows(args.data / "train.jsonl.gz"), sizes.examples)]
        write_text(train := args.work / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return train, args.data / "test.jsonl.gz"
    folder = args.work / "questions"
    sql_questions.main([str(folder), str(sizes.examples), str(sizes.held_out)])
    return folder, folder


def learn(args: Namespace, sizes: Sizes, train: Path) -> None:
    """Make the target model, unless it is there."""
    target = args.work / "target"
    if (target / "trainer_state.json").exists():  # written last
        return
    what = ["--model", args.model, "--task", sizes.task, "--filename", train, "--output_dir", target]
    how = ["--num_train_epochs", sizes.epochs, "--per_device_train_batch_size", sizes.batch, "--learning_rate", 5e-4]
    how += ["--lr_scheduler_type", "cosine", "--warmup_steps", 0.05, "--train_sampling_strategy", "group_by_length"]
    how += ["--logging_steps", 8, "--save_strategy", "no", "--report_to", "none", "--use_cpu" if args.rehearse else "--bf16"]
    stage.command("sft", *what, *how)


def make(args: Namespace, sizes: Sizes, train: Path) -> dict[str, Any]:
    """The figures of `cllm make`."""
    minutes = [] if sizes.making is None else ["--minutes", sizes.making * args.seconds / 60]
    made = args.work / "cllm"
    stage.command("make", args.work / "target", f"{sizes.task}:{train}", made, *minutes, *decoding(args, sizes))
    return json.loads((made / "make.json").read_text(encoding="utf-8"))


def measure(args: Namespace, sizes: Sizes, made: dict[str, Any], test: Path) -> dict[str, Any]:
    """What `cllm speedup` says of the window that `cllm make` tuned."""
    file = args.work / "speedup.json"
    what = ["--task", sizes.task, "--test_model", args.work / "cllm", "--filename", test, "--data_size", sizes.held_out]
    window = ["--max_new_tokens", made["width"], "--drafts", made["drafts"], "--guess", made["guess"]]
    stage.command("speedup", *what, *window, *decoding(args, sizes), "--output", file)
    return json.loads(file.read_text(encoding="utf-8"))


def decoding(args: Namespace, sizes: Sizes) -> list[Any]:
    return ["--max_new_seq_len", sizes.length, "--dtype", stage.dtype(args), "--device", stage.device(args)]


def compare(args: Namespace, sizes: Sizes, made: dict[str, Any], test: Path) -> dict[str, Any]:
    """How many texts leave those of AR decoding one by one, and by what logit margins, in two precisions."""
    folder, found = str(args.work / "cllm"), {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load_model(folder, dtype=dtype, device=stage.device(args)), load_tokenizer(folder)
        prompts = encode(model, tokenizer, sizes.task, str(test), sizes.texts)
        asked = model, stop_token_ids(model, tokenizer), prompts, sizes.length
        ar = ours(*asked, 1, 1)
        jacobi = ours(*asked, 1, made["width"], drafts=made["drafts"], guess=made["guess"])
        sides = {"Jacobi": jacobi, f"AR in batches of {BATCH}": ours(*asked, BATCH, 1)}
        found[dtype] = {name: departures(model, prompts, ar, texts) for name, texts in sides.items()}
    return found


if __name__ == "__main__":
    main()

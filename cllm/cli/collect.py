"""``cllm collect`` and ``data/generate_trajectory_*.py``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cllm.cli.command import (
    STARTS,
    add_model_options,
    add_prefix_option,
    add_task_option,
    command,
    parser,
    positive,
)
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.tasks.source import Extent

OUTPUT_FOLDER = "collected_jacobi_trajectory"


def build_parser(task: str | None, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    options = parser("Drive a target model with Jacobi iteration and store the trajectories.", "cllm collect")
    add_task_option(options, task, "collect", argv)
    add_model_options(options, "--model")
    options.add_argument("--filename", help="local data, plain or .gz; default: the hub dataset")
    options.add_argument("--max_new_tokens", type=int, default=16, help="block size n")
    options.add_argument("--max_new_seq_len", type=int, default=512, help="longest response, in tokens")
    options.add_argument(
        "--guess",
        choices=STARTS,
        default=STARTS[0],
        help="what trajectories start from: random tokens of the context (the paper), random tokens of the vocabulary, or the "
        "same token everywhere. The CLLM then decodes with the same",
    )
    options.add_argument("--use_aug", action="store_true", help="add states with some wrong guesses set right")
    options.add_argument(
        "--responses_only", action="store_true", help="store no trajectories: enough for `cllm train --lossless`, and quicker"
    )
    options.add_argument("--use_labels", action="store_true", help="store the dataset's own answers as well")
    options.add_argument("--data_size", type=positive, help="use only the first so many examples")
    options.add_argument("--batch_size", type=positive, default=16, help="prompts decoded together")
    add_prefix_option(options)
    options.add_argument(
        "--output",
        help=f"folder to write; default: one named after the settings in {OUTPUT_FOLDER}/ of the folder this is run in, or of "
        "its data/ where that has the scripts",
    )
    options.add_argument("--published", metavar="FILE", help="also write the paper's JSON form; blocks then start at 0")
    options.add_argument("--seed", type=int, default=0, help="of starting guesses and block boundaries")
    options.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with what the folder holds")
    return options


@command
def main(argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    run(build_parser(task, argv).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Collect what the options say, in every process that was started for it."""
    if args.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens (the block size) must be >= 1, got {args.max_new_tokens}")
    if args.responses_only and args.published:
        raise UsageError("--published writes trajectories, and --responses_only stores none; leave out one of them")
    from cllm.evaluation.environment import check_writable
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples

    chosen = get_task(args.task).configure(args)
    examples = load_examples(chosen, args.filename, "train", args.data_size)
    next(iter(examples))  # a file that cannot be used is refused before a model is loaded
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:  # every process reads the whole file; one of them is enough to name its bad rows
        logging.getLogger("cllm").setLevel(logging.ERROR)
    elif args.published:
        check_writable(args.published)
    extent = examples.extent()
    collector, settings = make_collector(args, chosen, extent.fingerprint if extent else None)
    folder = Path(args.output) if args.output else _default_folder(args, chosen)

    state = process_group(processes)
    from cllm.trajectory.store import TrajectoryWriter, stored_counts

    with state.main_process_first() if state else nullcontext():
        writer = TrajectoryWriter(folder, settings.as_dict(), resume=args.resume or rank > 0, rank=rank)
    with writer:
        if rank == 0:
            print(f"collecting into {folder} ({len(writer.done_ids)} examples there already)", file=sys.stderr)
        total = _expected(extent, args.data_size)
        with tqdm(total=total and total // processes, unit="example", disable=rank > 0, smoothing=0.1) as bar:
            for size in collector.run(examples, writer, batch_size=args.batch_size, rank=rank, processes=processes):
                bar.update(size)
                bar.set_postfix(stored=writer.counts()["kept"])
        if state:
            state.wait_for_everyone()
        if rank == 0:
            if args.published:
                _publish(args.published, folder, collector)
            _report(folder, stored_counts(folder), examples.bad)


def make_collector(args: argparse.Namespace, task, source_rows: str | None = None):
    """The collector that the options describe, and its settings. ``source_rows``: fingerprint of the rows it is for."""
    from cllm.cli.model import open_model
    from cllm.models import vocabulary_stamp, weights_stamp
    from cllm.trajectory.collect import CollectionSettings, Collector

    if args.device is None and "LOCAL_RANK" in os.environ:
        import torch

        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    of = open_model(args, task.plain_template)
    settings = CollectionSettings(
        model=args.model,
        task=args.task,
        prompt_template=of.template.text,
        block_size=args.max_new_tokens,
        max_new_seq_len=args.max_new_seq_len,
        guess=args.guess,
        use_aug=args.use_aug,
        use_labels=args.use_labels,
        responses_only=args.responses_only,
        aligned=args.published is not None,
        seed=args.seed,
        dtype=of.dtype,
        vocab_size=of.model.config.get_text_config(decoder=True).vocab_size,
        vocabulary=vocabulary_stamp(of.tokenizer),
        task_options=task.settings(),
        weights=weights_stamp(args.model),
        source=Path(args.filename).name if args.filename else "",
        source_rows=source_rows,
    )
    return Collector(of.model, of.tokenizer, settings, args.prefix_cache), settings


def process_group(processes: int):
    """The processes of this run, as accelerate knows them; None where there is one."""
    if processes == 1:
        return None
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def _default_folder(args: argparse.Namespace, task) -> Path:
    scripts = Path.cwd() / "data"
    base = scripts if any(scripts.glob("generate_trajectory_*.py")) else Path.cwd()
    name = f"{args.task}_{Path(args.model).name}_n{args.max_new_tokens}_len{args.max_new_seq_len}"
    name += f"_{args.guess}" * (args.guess != STARTS[0])
    name += "_responses" * args.responses_only + "_aug" * args.use_aug + "_labels" * args.use_labels
    name += "".join(f"_{option}" for option, value in task.settings().items() if value is True)
    return base / OUTPUT_FOLDER / name


def _expected(extent: Extent | None, data_size: int | None) -> int | None:
    """How many examples there will be, about."""
    if extent is None:
        return data_size
    return min(extent.rows, data_size or extent.rows)


def _publish(path: str, folder: Path, collector) -> None:
    from cllm.trajectory.published import write_published
    from cllm.trajectory.store import read_rows

    write_published(path, read_rows(folder), collector.settings.block_size, collector.tokenizer.pad_token_id)


def _report(folder: Path, counts: dict, bad) -> None:
    print(f"{counts['kept']} responses stored in {folder}")
    for reason, count in sorted(counts["dropped"].items()):
        print(f"  {count} left out: {reason}")
    for reason, count in sorted(bad.items()):
        print(f"  {count} rows passed over: {reason}")
    if not counts["kept"]:
        raise UsageError(f"no response was kept; the reasons are above, and nothing can be trained from {folder}")

"""Collecting the trajectories of a target model on a task's prompts, in all processes that were started for it."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from cllm.errors import UsageError
from cllm.evaluation.environment import check_writable
from cllm.models import vocabulary_stamp, weights_stamp
from cllm.open_model import OpenModel, open_model
from cllm.options import KEY
from cllm.tasks.base import Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import Extent, load_examples
from cllm.trajectory.arguments import FOLDER, CollectArguments
from cllm.trajectory.collect import CollectionSettings, Collector, Source
from cllm.trajectory.departures import Departure
from cllm.trajectory.published import write_published
from cllm.trajectory.store import TrajectoryWriter, read_rows, stored_counts


@dataclass(frozen=True)
class Collected:
    """What a folder of trajectories holds, and what was left out."""

    folder: Path
    kept: int  # responses
    dropped: dict[str, int]  # reason -> prompts and responses left out
    bad_rows: dict[str, int]  # reason -> rows of the data that could not be used
    compared: int  # responses of another source than our engine, in this run
    departures: dict[str, Departure]  # row id -> where one of them is not the model's own greedy text

    def check(self) -> None:
        """Raise UsageError where there is nothing to train from."""
        if not self.kept:
            reasons = "; ".join(f"{count} {reason}" for reason, count in (self.dropped | self.bad_rows).items())
            raise UsageError(f"no response was kept, so nothing can be trained from {self.folder}; left out: {reasons or 'none'}")


def collect(args: CollectArguments) -> Collected:
    """Let a target model answer a task's prompts, and store the Jacobi trajectories of its answers (paper, section 3.1).

    Writes Parquet shards of token ids as responses finish; run again with the same arguments, it goes on where it stopped. In a
    run of several processes (RANK, WORLD_SIZE) each of them collects a share. Raises UsageError where model, data and options
    do not fit together, and where the folder holds trajectories that were made with other settings.
    """
    task = configured_task(args.task, "collect", filename=args.filename, model=args.model, **args.task_options)
    examples = load_examples(task, args.filename, "train", args.data_size)
    next(iter(examples))  # a file that cannot be used is refused before a model is loaded
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:  # every process reads the whole file; one of them is enough to name its bad rows
        logging.getLogger("cllm").setLevel(logging.ERROR)
    elif args.published:
        check_writable(args.published)
    extent = examples.extent()
    collector = make_collector(args, task, extent)
    folder = Path(args.output) if args.output else _default_folder(args, task)

    state = process_group(processes)
    with state.main_process_first() if state else nullcontext():
        writer = TrajectoryWriter(folder, collector.settings.as_dict(), resume=args.resume or rank > 0, rank=rank)
    with writer:
        if rank == 0:
            tqdm.write(f"collecting into {folder} ({len(writer.done_ids)} examples there already)", file=sys.stderr)
        total = _expected(extent, args.data_size)
        with tqdm(total=total and total // processes, unit="example", disable=rank > 0, smoothing=0.1) as bar:
            for size in collector.run(examples, writer, batch_size=args.batch_size, rank=rank, processes=processes):
                bar.update(size)
                bar.set_postfix(stored=writer.counts()["kept"])
        if state:
            state.wait_for_everyone()
        if rank == 0 and args.published:
            write_published(args.published, read_rows(folder), args.block_size, collector.tokenizer.pad_token_id)
        counts = stored_counts(folder)
    bad_rows = dict(Counter(examples.bad))
    return Collected(folder, counts["kept"], counts["dropped"], bad_rows, collector.compared, collector.departures)


def make_collector(args: CollectArguments, task: Task, extent: Extent | None) -> Collector:
    """The collector that the arguments describe, for the rows of ``extent`` if that is known."""
    if args.device is None and (local_rank := os.environ.get("LOCAL_RANK")):
        args = replace(args, device=f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    opened = open_model(args, task.plain_template)
    shared = ("model", "task", "block_size", "max_new_seq_len", "guess", "use_aug", "use_labels", "responses_only", "seed")
    settings = CollectionSettings(
        **{name: getattr(args, name) for name in shared},
        prompt_template=opened.template.text,
        aligned=args.published is not None,
        dtype=opened.dtype,
        vocab_size=opened.model.config.get_text_config(decoder=True).vocab_size,
        vocabulary=vocabulary_stamp(opened.tokenizer),
        task_options=task.settings(),
        weights=weights_stamp(args.model),
        source=Path(args.filename).name if args.filename else "",
        responses="vllm" if args.engine == "vllm" else "server" if args.base_url else Path(args.responses or "").name,
        source_rows=extent.fingerprint if extent else None,
    )
    return Collector(opened.model, opened.tokenizer, settings, args.prefix_cache, open_source(args, opened))


def open_source(args: CollectArguments, opened: OpenModel) -> Source | None:
    """Who writes the responses of the model; None for our engine."""
    if args.engine == "vllm":
        from cllm.engines.vllm_engine import VllmEngine

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("--engine vllm works in one process, which shares GPUs by --tensor_parallel_size; start it alone")
        sharing = {"tensor_parallel_size": args.tensor_parallel_size}
        return VllmEngine(args.model, opened.stops, args.max_new_seq_len, dtype=opened.dtype, **sharing)
    if args.base_url:
        from cllm.engines.server import Server

        return Server(args.base_url, args.model, opened.stops, args.max_new_seq_len, os.environ.get(KEY))
    if args.responses:
        from cllm.engines.response_file import ResponseFile

        return ResponseFile(args.responses, opened.template, opened.tokenizer)
    return None


def process_group(processes: int) -> PartialState | None:
    """The processes of this run, as accelerate knows them; None where there is one."""
    if processes == 1:
        return None
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def _default_folder(args: CollectArguments, task: Task) -> Path:
    scripts = Path.cwd() / "data"
    base = scripts if any(scripts.glob("generate_trajectory_*.py")) else Path.cwd()
    name = f"{args.task}_{Path(args.model).name}_n{args.block_size}_len{args.max_new_seq_len}"
    name += f"_{args.guess}" * (args.guess != "context")
    name += "_responses" * args.responses_only + "_aug" * args.use_aug + "_labels" * args.use_labels
    name += "".join(f"_{option}" for option, value in task.settings().items() if value is True)
    return base / FOLDER / name


def _expected(extent: Extent | None, data_size: int | None) -> int | None:
    """About how many examples there will be."""
    if extent is None:
        return data_size
    return min(extent.rows, data_size or extent.rows)

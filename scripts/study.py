"""The effect of every training option on speed and quality: one change at a time, equal training tokens, the same prompts.

    python scripts/study.py --model TARGET --trajectories TRAJECTORIES --task spider --filename QUESTIONS \\
        --runs default paper --seeds 0 1 2 --output FOLDER -- --num_train_epochs 2 --learning_rate 1.5e-4 --use_cpu
    python scripts/study.py --table FOLDER [--picture PNG]

Flags after ``--`` go to ``cllm train`` in every run, followed by the run's own flags. Nothing else differs: all runs see the
same responses equally often (they may draw and pack more or fewer states; both are counted), except that a run NAME@N is the run
NAME for N epochs. Each run and seed writes one JSON. Existing results are skipped, so a study can be interrupted and resumed, and
several processes may share a folder with different ``--runs``. The target model is measured in the same way. The picture shows
TPF against training time and joins the runs NAME@N of each NAME by a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.adapter import Adapter
from cllm.cli.command import command
from cllm.cli.train import arguments
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.evaluation import plot
from cllm.evaluation.environment import environment
from cllm.evaluation.interval import bootstrap, ratio_interval
from cllm.evaluation.prompt import encode
from cllm.evaluation.quality import response_entropies, response_nlls, score_replies
from cllm.files import write_json
from cllm.models import DEFAULT_GUESS, default_guess, load_model, load_tokenizer, read_record, stop_token_ids, weights_stamp
from cllm.prompts import PromptTemplate
from cllm.tasks.base import Task
from cllm.tasks.configure import configured_task
from cllm.tasks.source import load_examples
from cllm.training.arguments import LOSSLESS_OBJECTIVE, OBJECTIVE_FIELDS, LosslessTrainingArguments
from cllm.training.build import build_trainer
from cllm.training.lora import current_adapter
from cllm.trajectory.hygiene import repetition
from cllm.trajectory.store import TrajectoryDataset

BASE, TARGET = "default", "target"
EPOCHS = "@"  # run NAME@N is NAME for N epochs
GUESS = "guess_"  # run guess_NAME reads the folder TRAJECTORIES_NAME, collected with `--guess NAME`
RUNS = {  # name -> flags of `cllm train`
    BASE: "",
    "paper": "--teacher self --ar_loss fixed_point --ar_weight 10 --distance_decay 1 --states_per_block 1 --label_smoothing_factor 0.1",
    "guess_uniform": "",
    "guess_filler": "",
    "states_2": "--states_per_block 2",
    "states_4": "--states_per_block 4",
    "noise": "--state_choice noise",
    "random_block": "--random_block_size",
    "decay_0.8": "--distance_decay 0.8",
    "decay_1": "--distance_decay 1",
    "reverse_kl": "--divergence reverse_kl",
    "hard": "--divergence hard",
    "local": "--consistency local",
    "self_teacher": "--teacher self",
    "ar_fixed_point": "--ar_loss fixed_point",
    "ar_smoothed": "--ar_loss fixed_point --label_smoothing_factor 0.1",
    "ar_labels": "--ar_loss labels",
    "ar_weight_2": "--ar_weight 2",
    "ar_weight_6": "--ar_weight 6",
    "bold": "--ar_weight 2 --distance_decay 0.8",
    "lossless": "--lossless --learning_rate 2e-3",
}
METRICS = {  # title -> (numerator and denominator, both summed over prompts, decimals)
    "TPF": ("tokens", "forwards", 2),
    "accuracy": ("score", "responses", 3),
    "repetition": ("repeated", "tokens", 3),
    "NLL under target": ("nll", "tokens", 3),
    "entropy": ("entropy", "tokens", 3),
    "length": ("tokens", "responses", 1),
} | {f"TPF, quarter {n}": (f"tokens_{n}", f"forwards_{n}", 2) for n in (1, 2, 3, 4)}
BATCH = 16  # prompts decoded together; does not affect the figures
Row = dict[str, float]  # the counts of one response


@command
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = build_parser().parse_args(own)
    if args.picture and not args.table:
        raise UsageError("--picture needs the --table FOLDER whose results it shows")
    if args.table:
        if args.picture:
            Path(args.picture).write_bytes(picture(Path(args.table)))
        print(table(Path(args.table)))
        return
    if None in (args.model, args.trajectories, args.task, args.output):
        raise UsageError("a study needs --model, --trajectories, --task and --output")
    runs = dict(_named(text) for text in args.runs)
    study = Study(args)
    study.once(TARGET, {}, study.measure_target)
    for seed in args.seeds:
        for name, own_flags in runs.items():
            every = [*flags, *own_flags.split(), "--seed", str(seed)]
            study.once(f"{name}-{seed}", study.objective(every) | {"flags": every}, partial(study.run, name, seed, every))


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="the target model")
    options.add_argument("--trajectories", help="a folder that `cllm collect` wrote with it")
    options.add_argument("--task")
    options.add_argument("--filename", help="held-out examples; default: the hub dataset")
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--length", type=int, default=128, help="new tokens per response")
    options.add_argument("--device", help="device of the measurement; default: cuda if available, else cpu")
    options.add_argument("--runs", nargs="+", default=[BASE, "paper"], metavar="NAME[@N][=FLAGS]", help=", ".join(RUNS))
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--output", help="folder of the results")
    options.add_argument("--keep_weights", action="store_true", help="keep the weights of each run in OUTPUT/NAME-SEED/")
    options.add_argument("--table", metavar="FOLDER", help="print the results in a folder as a Markdown table")
    options.add_argument("--picture", metavar="PNG", help="with --table: draw TPF against training time")
    return options


def _named(text: str) -> tuple[str, str]:
    name, given, flags = text.partition("=")
    kind, _, epochs = name.partition(EPOCHS)
    if not given and kind not in RUNS:
        raise UsageError(f"unknown run {kind!r}; choose from {', '.join(RUNS)}, or define it: NAME='FLAGS'")
    return name, " ".join([flags if given else RUNS[kind], *(["--num_train_epochs", epochs] if epochs else [])])


class Study:
    """What all runs share: target model, prompts, and the folder of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.output)
        self.inputs = ["--model", args.model, "--trajectories", args.trajectories]
        self.settings = TrajectoryDataset(args.trajectories).settings
        if "block_size" not in self.settings:
            raise UsageError(f"{args.trajectories} is no folder that `cllm collect` wrote")
        self.task: Task = configured_task(args.task, "speedup", filename=args.filename)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(args.model)
        self.target = load_model(args.model, dtype="float32", device=args.device)
        template = PromptTemplate(self.settings["prompt_template"])
        self.stops = stop_token_ids(self.target, self.tokenizer, template)
        examples = load_examples(self.task, args.filename, "test", args.prompts)
        self.prompts, _ = encode(islice(examples, args.prompts), template, self.tokenizer, None)

    def once(self, name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Write NAME.json with the figures unless it exists. Raises UsageError if it was made with other settings."""
        settings = settings | {key: getattr(self.args, key) for key in ("task", "length")}
        settings |= {key: Path(getattr(self.args, key) or "").name for key in ("model", "trajectories", "filename")}
        settings |= {"prompts": len(self.prompts), "weights": weights_stamp(self.args.model)}
        path = self.folder / f"{name}.json"
        if path.exists():
            if (there := json.loads(path.read_text(encoding="utf-8"))["settings"]) != settings:
                raise UsageError(f"{path} was made with other settings: {there} there, {settings} now")
            return
        result = make()
        figures = {title: figure(result["prompts"], title) for title in METRICS}
        content = {"run": name, "settings": settings, "figures": figures}
        write_json(path, content | result | {"environment": environment(self.target.device)})
        shown = (f"{title} {entry['value']:.3f}" for title, entry in figures.items() if entry)
        print(f"{name}: {', '.join(shown)}", flush=True)

    def objective(self, flags: Sequence[str]) -> dict[str, Any]:
        """What such a run is trained on, whether its flags say so or are silent: a default may change."""
        _, args, parts = arguments([*self.inputs, "--output_dir", str(self.folder), *flags], "study.py")
        if not isinstance(args, LosslessTrainingArguments):
            return {name: getattr(args, name) for name in OBJECTIVE_FIELDS}
        lora = parts["lora"]
        adapter = {"lora_r": lora.lora_r, "lora_target_modules": lora.target_modules(self.target)}
        return adapter | {name: getattr(args, name) for name in LOSSLESS_OBJECTIVE}

    def measure_target(self) -> dict[str, Any]:
        return {"prompts": self.measure(self.target, self.settings.get("guess", DEFAULT_GUESS))}

    def run(self, name: str, seed: int, flags: list[str]) -> dict[str, Any]:
        """Train one CLLM and measure it. Its weights are removed unless ``--keep_weights`` is given."""
        guess = name.partition(EPOCHS)[0].removeprefix(GUESS)
        other = ["--trajectories", f"{self.args.trajectories}_{guess}"] if name.startswith(GUESS) else []
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder / f"{name}-{seed}" if self.args.keep_weights else Path(scratch)
            words = [*self.inputs, *other, "--output_dir", str(folder), "--save_strategy", "no", "--report_to", "none", *flags]
            inputs, args, parts = arguments(words, "study.py")
            trainer = build_trainer(inputs, args, **parts)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            if self.args.keep_weights:
                trainer.save_model()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False).eval()
        guess = default_guess(read_record(model.config))
        if isinstance(args, LosslessTrainingArguments):
            rows = self.measure(self.target, guess, current_adapter(model))
        else:
            rows = self.measure(model.to(self.target.device), guess)
        return {
            "training": tokens_seen(trainer) | {"seconds": seconds, "log": trainer.state.log_history},
            "prompts": rows,
        }

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel, guess: str, adapter: Adapter | None = None) -> list[Row]:
        """The counts of the model's greedy Jacobi responses to the held-out prompts.

        With an adapter, a window has as many draft tokens as leave guesses even where all of it is accepted.
        """
        width = self.settings["block_size"]
        drafting = {"adapter": adapter, "drafts": 2 * width - 2} if adapter else {}
        decoder = JacobiDecoder(model, width, eos_token_ids=self.stops, guess=guess, **drafting)
        prompts, results = [prompt.ids for prompt in self.prompts], []
        for at in range(0, len(prompts), BATCH):
            results += decoder.generate(prompts[at : at + BATCH], max_new_tokens=self.args.length)
        texts = [result.token_ids for result in results]
        nlls = response_nlls(self.target, prompts, texts)
        rows = [
            {
                "responses": 1,
                "tokens": len(result.token_ids),
                "forwards": result.forwards,
                "repeated": repetition(result.token_ids) * len(result.token_ids),
                "nll": nll,
                "entropy": entropy,
            }
            | quarters(result.accepted)
            for result, nll, entropy in zip(results, nlls, response_entropies(model, prompts, texts), strict=True)
        ]
        scores = score_replies(self.task, [prompt.example for prompt in self.prompts], texts, self.tokenizer)
        if scores is not None and len(scores) == len(rows):
            rows = [row | {"score": float(score)} for row, score in zip(rows, scores)]
        return rows


def tokens_seen(trainer: Any) -> dict[str, int]:
    """Response tokens trained on, counting repetitions, and packed tokens, estimated from one epoch's states."""
    data, epochs = trainer.train_dataset, trainer.state.epoch
    response = sum(len(row.response_ids) for row in data.rows)
    packed = sum(len(data[index].row) for index in range(len(data)))
    return {"response_tokens": round(epochs * response), "packed_tokens": round(epochs * packed)}


def quarters(accepted: Sequence[int]) -> Row:
    """Tokens gained and forwards spent in each quarter of a response; a forward belongs to the quarter of its first token."""
    counts: Row = {f"{what}_{n}": 0 for what in ("tokens", "forwards") for n in (1, 2, 3, 4)}
    at, length = 0, sum(accepted)
    for gained in accepted:
        quarter = min(4 * at // length, 3) + 1
        counts[f"tokens_{quarter}"] += gained
        counts[f"forwards_{quarter}"] += 1
        at += gained
    return counts


def figure(rows: Sequence[Row], title: str) -> dict[str, Any] | None:
    """A metric over all prompts with its 95% bootstrap interval; None if it was not measured."""
    numerator, denominator, _ = METRICS[title]
    if numerator not in rows[0]:
        return None
    columns = [[row[numerator] for row in rows], [row[denominator] for row in rows]]
    total = sum(columns[1])
    return {"value": sum(columns[0]) / total if total else None, "interval": ratio_interval(*columns)}


def read_runs(folder: Path) -> dict[str, dict[str, dict]]:
    """The results in a folder: name of the run -> seed -> result."""
    runs: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name, _, seed = result["run"].rpartition("-")
        runs.setdefault(name or result["run"], {})[seed] = result
    if not runs:
        raise UsageError(f"{folder} holds no results")
    return runs


def table(folder: Path) -> str:
    """A Markdown table: each run's mean over seeds (lowest to highest), and its difference from the default with an interval."""
    runs = read_runs(folder)
    order = [name for name in (TARGET, *RUNS) if name in runs]
    results = [result for seeds in runs.values() for result in seeds.values()]
    titles = [title for title in METRICS if any(result["figures"][title] for result in results)]
    lines = [["run", "seeds", "response tokens", "packed tokens", *titles], ["---"] * (4 + len(titles))]
    for name in [*order, *sorted(runs.keys() - set(order))]:
        seeds = runs[name]
        counts = [next(iter(seeds.values())).get("training", {}).get(key, 0) for key in ("response_tokens", "packed_tokens")]
        cells = [_cell(seeds, {} if name in (BASE, TARGET) else runs.get(BASE, {}), title) for title in titles]
        lines.append([name, str(len(seeds)), *(f"{count:,}" if count else "-" for count in counts), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(folder: Path) -> bytes:
    """TPF against minutes of training (log axis), as PNG: a point per run, the mean over its seeds."""
    runs, lines = read_runs(folder), {}
    for name, seeds in runs.items():
        if name != TARGET:
            point = fmean(result["training"]["seconds"] / 60 for result in seeds.values()), _mean_tpf(seeds)
            lines.setdefault(name.partition(EPOCHS)[0], []).append(point)
    figure, (axes,) = plot.new_figure()
    axes.axhline(_mean_tpf(runs[TARGET]), color=plot.colour(0), linestyle="--", label=TARGET)
    for index, (label, points) in enumerate(lines.items(), start=1):
        axes.plot(*zip(*sorted(points)), marker="o", color=plot.colour(index), label=label)
    axes.set(xlabel="minutes of training", ylabel=plot.TPF, xscale="log")
    plot.log_ticks(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return plot.png(figure)


def _mean_tpf(seeds: dict[str, dict]) -> float:
    return fmean(result["figures"]["TPF"]["value"] for result in seeds.values())


def _cell(seeds: dict[str, dict], base: dict[str, dict], title: str) -> str:
    digits = METRICS[title][2]
    entries = [result["figures"][title] for result in seeds.values()]
    values = [entry["value"] for entry in entries if entry and entry["value"] is not None]
    if not values:
        return "-"
    text = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    common = sorted(seeds.keys() & base.keys())
    if common:
        value, interval = difference([seeds[s]["prompts"] for s in common], [base[s]["prompts"] for s in common], title)
        text += f"<br>{value:+.{digits}f}"
        text += f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else ""
    return text


def difference(runs: Sequence[Sequence[Row]], bases: Sequence[Sequence[Row]], title: str) -> tuple[float, tuple[float, float] | None]:
    """The difference of a metric between runs and base runs with the same seeds, paired by prompt, with a 95% interval.

    The bootstrap resamples prompts and pools seeds.
    """
    numerator, denominator, _ = METRICS[title]
    columns = [
        [sum(rows[prompt][key] for rows in side) for prompt in range(len(side[0]))]
        for side in (runs, bases)
        for key in (numerator, denominator)
    ]
    sums = [sum(column) for column in columns]
    return sums[0] / sums[1] - sums[2] / sums[3], bootstrap(columns, lambda s: s[0] / s[1] - s[2] / s[3])


if __name__ == "__main__":
    main()

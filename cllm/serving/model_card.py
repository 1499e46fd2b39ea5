"""Model cards: a README.md that says what a checkpoint is, how to use it, how it was made and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from cllm.adapter import ADAPTER, ADAPTER_FOLDER, BASE, BASE_REVISION, LOSSLESS
from cllm.errors import UsageError
from cllm.evaluation.quality import QUALITY_ROWS
from cllm.evaluation.table import number, percent, percent_with_interval, with_interval
from cllm.files import StrPath, open_text
from cllm.models import DATA, DRAFTS, GUESS, HUB_NAME, ORIGINS, REASON, WIDTH, default_drafts, default_width
from cllm.prompts import CHAT, DIALOGUES, QUESTION
from cllm.tasks import get_task, task_names
from cllm.tasks.base import Task

MARK = "<!-- written by cllm export -->"
PLAIN = "Without it, the model decodes as an ordinary AR model"  # "it": trust_remote_code
ADAPTED = f"It reads the adapter in `{ADAPTER_FOLDER}/`. Without it, the model is the plain target model"
TAGS = ["cllm", "custom_generate", "jacobi-decoding", "arxiv:2403.00835"]
RECIPE = {  # record key -> its title in the card
    "block_size": "block size",
    "responses": "responses trained on",
    "guess": "starting guesses",
    "consistency": "consistency loss",
    "states_per_block": "states per block",
    "teacher": "teacher of the states",
    "ar_loss": "AR loss",
    "ar_weight": "weight of the AR loss",
    "distance_decay": "distance decay",
}
ADAPTER_RECIPE = {
    "lora_r": "rank of the adapter",
    "block_size": "largest block",
    "responses": "responses trained on",
    "guess": "starting guesses",
    "states_per_block": "cuts of each response per epoch",
    "distance_decay": "distance decay",
}
Report = dict[str, Any]  # the JSON of `cllm speedup` or `cllm acc`


def read_reports(paths: Sequence[StrPath], record: Mapping[str, Any]) -> list[Report]:
    """Read the result files of the checkpoint with this ``record``.

    Raises UsageError for files of another kind or of another checkpoint.
    """
    reports = []
    for path in paths:
        with open_text(path) as file:
            try:
                report = json.load(file)
            except ValueError as error:
                raise UsageError(f"not a JSON file: {path} ({error})") from error
        if not isinstance(report, dict) or not ("methods" in report or "summary" in report) or "settings" not in report:
            raise UsageError(f"{path} is not what `cllm speedup` or `cllm acc` writes")
        if _recipe_of(report.get("record") or record) != _recipe_of(record):
            raise UsageError(f"{path} was measured on another checkpoint: its record differs from the one in config.json")
        reports.append(report)
    return reports


def model_card(
    name: str,
    record: Mapping[str, Any],
    template: str,
    reports: Sequence[Report],
    *,
    alone: bool = False,
    more: Sequence[str] = (),
) -> str:
    """The card as Markdown with YAML front matter.

    ``record``: the record in the checkpoint's config.json; ``template``: the text of its PromptTemplate; ``alone``: for a
    consistency adapter without its target model; ``more``: further sections, put after those on how to use it.
    """
    task = get_task(record["task"]) if record.get("task") in task_names() else None
    if record.get(LOSSLESS):
        parts = [_adapter_head(name, record, alone)]
        parts += [] if alone else [_usage(template, task, ADAPTED)]
        parts += [_toolkit_usage(template, task), *more, _making(record, task, ADAPTER_RECIPE)]
    else:
        parts = [_head(name, record), _usage(template, task, PLAIN), *more, _making(record, task, RECIPE)]
    if reports:
        parts.append("## Measured\n\nBrackets: 95% intervals.")
        parts += [_speed(report) if "methods" in report else _accuracy(report) for report in reports]
    head = _metadata(name, record, task, reports, alone).to_yaml()
    return f"---\n{head}\n---\n\n{MARK}\n\n" + "\n\n".join(parts) + "\n"


def _recipe_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what may be added after training, and with paths reduced as in an export."""
    kept = {key: value for key, value in record.items() if key not in (WIDTH, DRAFTS, GUESS, REASON)}
    return kept | {key: Path(kept[key]).name for key in ORIGINS if kept.get(key)}


def _metadata(name: str, record: Mapping[str, Any], task: Task | None, reports: Sequence[Report], alone: bool) -> ModelCardData:
    target = str(record.get("target_model") or "")
    on_hub = bool(HUB_NAME.fullmatch(target)) and isinstance(try_to_load_from_cache(target, "config.json"), str)
    return ModelCardData(
        library_name="cllm" if alone else "transformers",  # the hub shows how to load the model with this library
        pipeline_tag="text-generation",
        tags=[*TAGS, "lossless"] if record.get(LOSSLESS) else TAGS,
        base_model=target if on_hub else None,  # a local path may look like a hub name
        datasets=[task.hub.path] if task is not None and task.hub is not None else None,
        model_name=name,
        eval_results=[result for report in reports for result in _figures(report)] or None,
    )


def _figures(report: Report) -> list[EvalResult]:
    """The results that the hub shows with a model."""
    task = str(report["settings"].get("task"))
    if "methods" in report:
        score = report["quality"]["jacobi"]["score"]
        values = {"tokens_per_forward": report["methods"]["jacobi"]["tokens_per_forward"], report["settings"]["metric"]: score}
    else:
        values = {name: score["mean"] for name, score in report["summary"]["scores"].items()}
    return [EvalResult("text-generation", task, task, name, round(value, 4)) for name, value in values.items() if value is not None]


def _head(name: str, record: Mapping[str, Any]) -> str:
    return (
        f"# {name}\n\nA consistency large language model ([CLLM](https://arxiv.org/abs/2403.00835)): an ordinary checkpoint that "
        "decodes several tokens per forward pass by Jacobi iteration. The text is that of autoregressive (AR) decoding, token "
        f"for token; sampled text has the distribution of AR sampling. Window: {default_width(record)} tokens."
    )


def _adapter_head(name: str, record: Mapping[str, Any], alone: bool) -> str:
    width = default_width(record)
    target = str(record.get("target_model"))
    revision = record.get(BASE_REVISION)
    where = f"at revision `{revision}` on the hub" if revision else "a folder on the machine that trained the adapter"
    weights = " ".join((record.get(BASE) or {}).values())
    start = "A consistency adapter" if alone else f"The unchanged `{target}` with a consistency adapter"
    paragraphs = [
        f"# {name}",
        f"{start}: low-rank weights that are on for guesses only ([CLLM](https://arxiv.org/abs/2403.00835), Jacobi iteration). "
        "The target model checks every guess with its own weights, so the text is that of its autoregressive (AR) decoding, "
        "token for token; sampled text has the distribution of AR sampling. The adapter affects only the speed. "
        f"Window: {width} tokens, {default_drafts(record, width)} of them drafted.",
        f"Target model: `{target}`, {where}; fingerprint of its weights: `{weights}`. "
        "The adapter is refused for a model with other weights.",
    ]
    if record.get(REASON):
        why = f"On the machine that made it, the window was {record[REASON]}. `cllm tune` finds out whether it is on yours."
        paragraphs.append(why)
    if alone:
        paragraphs.append(_warning(record))
    else:
        paragraphs.append(f"Do not merge `{ADAPTER_FOLDER}/` into the weights: the result is a different model that writes other text.")
    return "\n\n".join(paragraphs)


def _warning(record: Mapping[str, Any]) -> str:
    """What can go wrong with an adapter without its target model."""
    parts = [
        "**Do not load this folder with peft or `AutoModelForCausalLM`, and do not merge it.** They switch the adapter on for "
        "every token, which gives the drafting model instead of the target model, and other text. `cllm export PATH OUTPUT` "
        "writes target model and adapter in a form that transformers decodes correctly; `--format uno` writes the adapter for "
        "SGLang, if it was trained to start from random tokens of the vocabulary."
    ]
    if not record.get(BASE_REVISION):
        parts.append(
            f"`{ADAPTER}` names the target model by a path on the machine that trained the adapter: elsewhere, edit its "
            "`base_model_name_or_path` first."
        )
    return "\n\n".join(parts)


def _inputs(template: str, task: Task | None) -> str:
    """Code that turns a question into the model's inputs."""
    question = task.default_question if task is not None else "1 + 1 = ?"
    if template == CHAT:
        messages = '[{"role": "user", "content": question}]'
        options = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
        inputs = f"tokenizer.apply_chat_template(\n    {messages}, {options}\n)"
    else:
        text = DIALOGUES[template].text if template in DIALOGUES else template
        inputs = f'tokenizer({text!r}.replace("{QUESTION}", question), return_tensors="pt")'
    return f"question = {question!r}\ninputs = {inputs}"


def _usage(template: str, task: Task | None, without: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
{_inputs(template, task)}
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`trust_remote_code=True` runs this checkpoint's `custom_generate/generate.py`. {without}.
Batches, streamers, sampling, stop strings and logits processors work as usual; `block_size=`, `guess=` and `seed=` are
additional options. Beam search and `output_scores` are not supported."""


def _toolkit_usage(template: str, task: Task | None) -> str:
    return f"""## Use with the CLLM toolkit

`cllm chat --model PATH`, `cllm serve PATH` (OpenAI protocol) and all other commands draft with the adapter. In Python:

```python
from cllm.decoding import JacobiDecoder
from cllm.models import load_model, load_tokenizer, stop_token_ids

model, tokenizer = load_model("PATH"), load_tokenizer("PATH")  # the target model, with the adapter attached
decoder = JacobiDecoder(model, eos_token_ids=stop_token_ids(model, tokenizer))
{_inputs(template, task)}
(result,) = decoder.generate(inputs["input_ids"], max_new_tokens=256)
print(tokenizer.decode(result.token_ids, skip_special_tokens=True))
```"""


def _making(record: Mapping[str, Any], task: Task | None, recipe: Mapping[str, str]) -> str:
    lines = []
    if record.get("target_model"):
        lines.append(f"- target model: {record['target_model']}")
    if record.get(DATA):
        lines.append(f"- data: the target model's own responses to prompts of {', '.join(record[DATA])}")
    elif task is not None:
        states = "" if record.get(LOSSLESS) else "Jacobi trajectories of "
        where = f" ([{task.hub.path}](https://huggingface.co/datasets/{task.hub.path}))" if task.hub is not None else ""
        lines.append(f"- data: {task.description}{where}; {states}the target model's own responses")
    lines += [f"- {title}: {record[key]}" for key, title in recipe.items() if record.get(key) is not None]
    return "## How it was made\n\n" + ("\n".join(lines) or "Its config.json does not say.")


def _speed(report: Report) -> str:
    """The results of `cllm speedup`: a table of speeds, and one of quality, next to the target model's if it was measured."""
    settings, machine = report["settings"], report["environment"]
    head = (
        f"**{settings['task']}**, {report['data']['prompts']} prompts, up to {settings['max_new_seq_len']} new tokens, "
        f"batch size {settings['batch_size']}, {settings['dtype']} on {machine['device_name']}:"
    )
    rows = []
    for name, figures in report["methods"].items():
        forward = with_interval(figures["tokens_per_forward"], figures["tokens_per_forward_interval"])
        speedup = with_interval(figures["speedup"], figures["speedup_interval"])
        per_second, same = number(figures["tokens_per_second"], 1), percent(figures["same_as_ar"])
        rows.append([report["labels"][name], forward, per_second, speedup, same])
    speed = _table(["method", "tokens per forward", "tokens/s", "over AR", "same text as AR"], rows)
    titles = {"jacobi": "this model", "target": "target model"}
    columns = {title: report["quality"][name] for name, title in titles.items() if name in report["quality"]}
    quality = []
    for title, value, interval, as_percent in QUALITY_ROWS:
        show = percent_with_interval if as_percent else with_interval
        cells = [show(figures[value], figures[interval] if interval else None) for figures in columns.values()]
        quality.append([settings["metric"] if title == "score" else title, *cells])
    return "\n\n".join([head, speed, _table(["", *columns], quality)])


def _accuracy(report: Report) -> str:
    """The results of `cllm acc`."""
    settings, summary = report["settings"], report["summary"]
    head = f"**{settings['task']}**, {summary['answers']} answers, up to {settings.get('max_tokens')} new tokens:"
    rows = [[name, percent_with_interval(score["mean"], score["interval"])] for name, score in summary["scores"].items()]
    rows.append(["tokens per forward", with_interval(summary["tokens_per_forward"], summary["tokens_per_forward_interval"])])
    return head + "\n\n" + _table(["", "this model"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])

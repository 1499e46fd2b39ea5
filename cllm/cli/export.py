"""``cllm export``: a checkpoint that decodes by Jacobi iteration in plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cllm.cli.command import add_options, command, parser, read
from cllm.options import Options, option


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The options of ``cllm export``."""

    model: str = field(
        metadata={"help": "folder of a checkpoint or a consistency adapter, or hub name", "flag": "model", "metavar": "MODEL"}
    )
    output: str = field(metadata={"help": "folder to write: new, empty, or an earlier export", "flag": "output", "metavar": "OUTPUT"})
    results: Sequence[str] = option("JSON files of `cllm speedup` and `cllm acc` on this model, for the model card", (), metavar="FILE")
    adapter_only: bool = option(
        "leave the target model out: a small folder that needs this toolkit and, where it is used, the target model", False
    )
    form: Literal["transformers", "uno", "merged"] = option(
        "uno: the adapter as SGLang's UNO algorithm takes it, not run there; merged is refused, since the adapter in the weights "
        "would give another text",
        "transformers",
        flag="--format",
    )
    push: str | None = option(
        "upload the result to the Hugging Face hub, where it is public; default: OUTPUT's name among your own models",
        None,
        nargs="?",
        const="",
        metavar="OWNER/NAME",
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(
        "Write a checkpoint that decodes by Jacobi iteration in plain transformers (trust_remote_code=True), and as an "
        "ordinary model everywhere else; with a model card. A consistency adapter (`cllm train --lossless`) is written "
        "together with its target model, which then drafts with it.",
        "cllm export",
    )
    add_options(options, ExportOptions)
    args = read(ExportOptions, vars(options.parse_args(argv)))
    from cllm.serving import hub
    from cllm.serving.export import export

    if args.push is not None:
        owner = hub.account()  # before gigabytes are copied
    export(args.model, args.output, args.results, adapter_only=args.adapter_only, form=args.form)
    print(f"{'Adapter' if args.adapter_only or args.form == 'uno' else 'Checkpoint'} exported to {args.output}")
    if args.push is not None:
        print(f"Pushed to {hub.push(Path(args.output), args.push or f'{owner}/{Path(args.output).resolve().name}')}")

"""``cllm export``: a checkpoint that decodes by Jacobi iteration in plain transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cllm.cli.command import command, parser

FORMS = ("transformers", "uno")  # written out here, because `--help` must not wait for torch; a test compares them


def options() -> argparse.ArgumentParser:
    result = parser(
        "Write a checkpoint that decodes by Jacobi iteration in plain transformers (trust_remote_code=True), and as an "
        "ordinary model everywhere else; with a model card. A consistency adapter (`cllm train --lossless`) is written "
        "together with its target model, which then drafts with it.",
        "cllm export",
    )
    result.add_argument("model", metavar="MODEL", help="folder of a checkpoint or a consistency adapter, or hub name")
    result.add_argument("output", metavar="OUTPUT", help="folder to write: new, empty, or an earlier export")
    result.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON files of `cllm speedup` and `cllm acc` on this model, for the model card",
    )
    result.add_argument(
        "--adapter_only",
        action="store_true",
        help="leave the target model out: a small folder that needs this toolkit and, where it is used, the target model",
    )
    result.add_argument(
        "--format",
        choices=(*FORMS, "merged"),
        default=FORMS[0],
        help="uno: the adapter as SGLang's UNO algorithm takes it, not run there; merged is refused, since the adapter in the "
        "weights would give another text",
    )
    result.add_argument(
        "--push",
        nargs="?",
        const="",
        metavar="OWNER/NAME",
        help="upload the result to the Hugging Face hub, where it is public; default: OUTPUT's name among your own models",
    )
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options().parse_args(argv)
    from cllm.serving import hub
    from cllm.serving.export import export

    if args.push is not None:
        owner = hub.account()  # before gigabytes are copied
    export(args.model, args.output, args.results, adapter_only=args.adapter_only, form=args.format)
    print(f"{'Adapter' if args.adapter_only or args.format == 'uno' else 'Checkpoint'} exported to {args.output}")
    if args.push is not None:
        print(f"Pushed to {hub.push(Path(args.output), args.push or f'{owner}/{Path(args.output).resolve().name}')}")

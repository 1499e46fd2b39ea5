"""``cllm demo``: AR and Jacobi decoding side by side, as a web page or as an animated picture."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from cllm.cli.command import command, parser, positive
from cllm.cli.serve import add_service_options, api_keys, check_packages, open_decoder, open_service
from cllm.errors import UsageError


def options() -> argparse.ArgumentParser:
    from cllm.tasks import DEFAULT_TASK, task_names

    result = parser("Watch AR and Jacobi decoding write the same text side by side, in a web page or a picture.", "cllm demo")
    add_service_options(result)
    result.add_argument("--cllm_type", choices=task_names(), default=DEFAULT_TASK, help="whose default question the page starts with")
    result.add_argument("--prompt", help="another question to start with")
    result.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True, help="open the page in a browser")
    result.add_argument("--record", metavar="FILE.svg", help="no page: write the race as an animated SVG")
    result.add_argument("--record_tokens", type=positive, default=160, help="new tokens in the picture at most")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options().parse_args(argv)
    from cllm.tasks import get_task

    question = args.prompt or get_task(args.cllm_type).default_question
    if args.record:
        _record(args, question)
    else:
        _show(args, question)


def _record(args: argparse.Namespace, question: str) -> None:
    from cllm.evaluation.environment import check_writable
    from cllm.serving.demo.picture import animate
    from cllm.serving.demo.race import ar_decoder, race

    if Path(args.record).suffix != ".svg":
        raise UsageError(f"--record writes SVG, so its name must end with .svg, got {args.record!r}")
    check_writable(args.record)
    of, decoder = open_decoder(args, question)
    prompt = of.template.encode([{"role": "user", "content": question}], of.tokenizer)
    steps = list(race(ar_decoder(decoder), decoder, of.tokenizer, prompt, args.record_tokens))
    Path(args.record).write_text(animate(steps, question, Path(args.model).resolve().name), encoding="utf-8")
    print(f"{len(steps)} forwards of both methods in {args.record}")


def _show(args: argparse.Namespace, question: str) -> None:
    check_packages()
    from cllm.decoding import GREEDY
    from cllm.serving.demo.routes import add_demo
    from cllm.serving.server.app import create_app
    from cllm.serving.server.run import Server, address, bind, own_names

    keys = api_keys(args)
    with bind(args.host, args.port) as listener:
        service = open_service(args, question, GREEDY)
        app = create_app(service, keys, own_names(listener, args.host))
        add_demo(app, service, question, asks_key=bool(keys))
        server = Server(app, service.worker, grace=1.0)
        print(f"{service.name} on {address(listener)}; Ctrl-C stops it", flush=True)
        if args.browser:
            webbrowser.open(address(listener))
        server.run(sockets=[listener])

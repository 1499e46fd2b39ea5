"""``cllm demo``: AR and Jacobi decoding side by side, as a web page or as an animated picture."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm.cli.command import add_options, command, parser, read
from cllm.cli.serve import ServiceOptions, check_packages, open_service
from cllm.errors import UsageError
from cllm.options import option
from cllm.tasks import DEFAULT_TASK, get_task, task_names


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ServiceOptions):
    """The options of the demo."""

    cllm_type: str = option("whose default question the page starts with", DEFAULT_TASK, choices=task_names())
    prompt: str | None = option("another question to start with", None)
    browser: bool = option("open the page in a browser", True)
    record: str | None = option("no page: write the race as an animated SVG", None, metavar="FILE.svg")
    record_tokens: int = option("new tokens in the picture at most", 160, least=1)


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser("Watch AR and Jacobi decoding write the same text side by side, in a web page or a picture.", "cllm demo")
    add_options(options, DemoOptions)
    args = read(DemoOptions, vars(options.parse_args(argv)))
    question = args.prompt or get_task(args.cllm_type).default_question
    if args.record:
        _record(args, args.record, question)
    else:
        _show(args, question)


def _record(args: DemoOptions, picture: str, question: str) -> None:
    from cllm.evaluation.environment import check_writable
    from cllm.serving.decoder import encode, open_decoder
    from cllm.serving.demo.picture import animate
    from cllm.serving.demo.race import ar_decoder, race

    if Path(picture).suffix != ".svg":
        raise UsageError(f"--record writes SVG, so its name must end with .svg, got {picture!r}")
    check_writable(picture)
    opened, decoder = open_decoder(args, question)
    steps = list(race(ar_decoder(decoder), decoder, opened.tokenizer, encode(opened, question), args.record_tokens))
    Path(picture).write_text(animate(steps, question, Path(args.model).resolve().name), encoding="utf-8")
    print(f"{len(steps)} forwards of both methods in {picture}")


def _show(args: DemoOptions, question: str) -> None:
    check_packages()
    from cllm.decoding import GREEDY
    from cllm.serving.demo.routes import add_demo
    from cllm.serving.server.app import create_app
    from cllm.serving.server.run import Server, address, bind, own_names

    keys = args.api_keys()
    with bind(args.host, args.port) as listener:
        service = open_service(args, question, GREEDY)
        app = create_app(service, keys, own_names(listener, args.host))
        add_demo(app, service, question, asks_key=bool(keys))
        server = Server(app, service.worker, grace=1.0)
        print(f"{service.name} on {address(listener)}; Ctrl-C stops it", flush=True)
        if args.browser:
            webbrowser.open(address(listener))
        server.run(sockets=[listener])

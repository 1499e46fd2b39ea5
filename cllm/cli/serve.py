"""``cllm serve``: a server that speaks the OpenAI protocol."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.cli.command import (
    add_guess_option,
    add_model_options,
    add_prefix_option,
    add_sampling_options,
    command,
    parser,
    positive,
    sampling_of,
    seconds,
)
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.cli.model import OpenModel
    from cllm.decoding import JacobiDecoder, Sampling
    from cllm.serving.server.service import Service

KEY = "CLLM_API_KEY"


def options() -> argparse.ArgumentParser:
    result = parser("Serve a model under the OpenAI protocol: /v1/chat/completions, /v1/completions, /v1/models.", "cllm serve")
    add_service_options(result)
    result.add_argument("--grace", type=seconds, default=30.0, help="seconds that running answers get to end after SIGTERM")
    add_sampling_options(result)
    return result


def add_service_options(options: argparse.ArgumentParser) -> None:
    """What ``cllm serve`` and ``cllm demo`` share; :func:`open_service` reads it."""
    add_model_options(options)
    options.add_argument("--served_model_name", metavar="NAME", help="default: the last part of the path")
    options.add_argument("--host", default="127.0.0.1", help="0.0.0.0 or :: lets other machines in")
    options.add_argument("--port", type=int, default=8000, help="0: a free one")
    options.add_argument(
        "--api_key",
        action="append",
        help=f"what clients must send, may be repeated: one for each client; default: the environment's {KEY}, else none",
    )
    options.add_argument("--block_size", type=positive, help="default: what `cllm tune` or the training stored, else 16")
    options.add_argument("--batch_size", type=positive, default=8, help="responses decoded together at most")
    options.add_argument(
        "--max_slots", type=positive, help="bound of the key-value cache: responses together times the longest text, in tokens"
    )
    options.add_argument("--max_tokens", type=positive, default=1024, help="new tokens per response at most")
    options.add_argument("--max_waiting", type=positive, default=128, help="responses waiting at most; beyond: status 429")
    options.add_argument("--max_body", type=positive, default=1 << 20, help="bytes of a request at most; beyond: status 413")
    options.add_argument("--timeout", type=seconds, default=600.0, help="seconds for an answer; beyond: status 408")
    add_guess_option(options)
    add_prefix_option(options)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options().parse_args(argv)
    sampling = sampling_of(args)
    check_packages()
    from cllm.serving.server.app import create_app
    from cllm.serving.server.run import Server, address, bind, own_names
    from cllm.tasks import DEFAULT_TASK, get_task

    keys = api_keys(args)
    with bind(args.host, args.port) as listener:
        service = open_service(args, get_task(DEFAULT_TASK).default_question, sampling)
        app = create_app(service, keys, own_names(listener, args.host))
        print(f"{service.name} on {address(listener)}/v1; Ctrl-C stops it", flush=True)
        Server(app, service.worker, args.grace).run(sockets=[listener])


def api_keys(args: argparse.Namespace) -> list[str]:
    """What clients may send; none where neither the option nor the environment names a key, which opens the server.

    Raises UsageError for an empty one, as a shell makes of a variable that is not set, and for one that no client can send.
    """
    keys: list[str] = args.api_key or [os.environ[name] for name in (KEY,) if name in os.environ]
    if any(not key or key != key.strip() for key in keys):
        raise UsageError(f"the API key is empty or has blanks around it; for none, unset {KEY} and leave --api_key out")
    return keys


def check_packages() -> None:
    """Raise UsageError where the extra packages are missing."""
    try:
        import cllm.serving.server.app
        import cllm.serving.server.run  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs more packages: pip install -e .[serve] (cannot import {error.name})") from error


def open_service(args: argparse.Namespace, question: str, sampling: Sampling) -> Service:
    """Load the model and start its worker; ``--guess auto`` measures with ``question``."""
    from cllm.decoding import Queue
    from cllm.serving.server.service import Limits, Service

    of, decoder = open_decoder(args, question)
    queue = Queue(decoder, args.batch_size, args.max_slots)
    limits = Limits(args.max_body, args.max_tokens, args.max_waiting, args.timeout)
    name = args.served_model_name or Path(args.model).resolve().name
    return Service(name, queue, of.tokenizer, of.template, limits, sampling)


def open_decoder(args: argparse.Namespace, question: str) -> tuple[OpenModel, JacobiDecoder]:
    """The model and its decoder; ``--guess auto`` measures with ``question``."""
    from cllm.cli.guess import check_guess, pick_guess
    from cllm.cli.model import open_model
    from cllm.decoding import JacobiDecoder
    from cllm.models import default_width
    from cllm.prompts import QUESTION

    check_guess(args.guess)
    of = open_model(args, QUESTION)
    width = args.block_size or default_width(of.record)
    sample = of.template.encode([{"role": "user", "content": question}], of.tokenizer)
    guess = pick_guess(args.guess, of, width, [sample])
    return of, JacobiDecoder(of.model, width, eos_token_ids=of.stops, guess=guess, prefix_cache=args.prefix_cache)

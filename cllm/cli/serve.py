"""``cllm serve``: a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cllm.cli.command import add_options, command, parser, read
from cllm.errors import UsageError
from cllm.options import KEY, Engine, SamplingOptions, option
from cllm.serving.arguments import DecoderArguments
from cllm.tasks import DEFAULT_TASK, get_task

if TYPE_CHECKING:
    from cllm.decoding import Sampling
    from cllm.serving.server.service import Service

OWN_OPTIONS = (  # vLLM's server has no such options, or calls them otherwise
    *("max_slots", "max_tokens", "max_waiting", "max_body", "timeout", "grace", "prefix_cache"),
    *("device", "attn_implementation", "prompt_template"),
)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(DecoderArguments):
    """The options that ``cllm serve`` and ``cllm demo`` share."""

    model: str = field(metadata={"help": "checkpoint folder or hub name", "flag": "model", "metavar": "MODEL"})
    served_model_name: str | None = option("default: the last part of the path", None, metavar="NAME")
    host: str = option("0.0.0.0 or :: lets other machines in", "127.0.0.1")
    port: int = option("0: a free one", 8000)
    api_key: Sequence[str] = option(
        f"what clients must send, may be repeated: one for each client; default: the environment's {KEY}, else none",
        (),
        action="append",
        nargs=None,
    )
    batch_size: int = option("responses decoded together at most", 8, least=1)
    max_slots: int | None = option("bound of the key-value cache: responses together times the longest text, in tokens", None, least=1)
    max_tokens: int = option("new tokens per response at most", 1024, least=1)
    max_waiting: int = option("responses waiting at most; beyond: status 429", 128, least=1)
    max_body: int = option("bytes of a request at most; beyond: status 413", 1 << 20, least=1)
    timeout: float = option("seconds for an answer; beyond: status 408", 600.0, least=0)

    def api_keys(self) -> Sequence[str]:
        """The keys that clients may send; none, which opens the server, where neither option nor environment names one.

        Raises UsageError for a key that is empty, as a shell makes of an unset variable, or that no client can send.
        """
        keys = self.api_key or [os.environ[name] for name in (KEY,) if name in os.environ]
        if any(not key or key != key.strip() for key in keys):
            raise UsageError(f"the API key is empty or has blanks around it; for none, unset {KEY} and leave --api_key out")
        return keys


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SamplingOptions, ServiceOptions):
    """The options of ``cllm serve``."""

    engine: Engine = option(
        "vllm: start `vllm serve` with the window and the guesses of this checkpoint; options of vLLM may follow after --", "cllm"
    )
    grace: float = option("seconds that running answers get to end after SIGTERM", 30.0, least=0)


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser("Serve a model under the OpenAI protocol: /v1/chat/completions, /v1/completions, /v1/models.", "cllm serve")
    add_options(options, ServeOptions)
    words = list(sys.argv[1:] if argv is None else argv)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = read(ServeOptions, vars(options.parse_args(own)))
    sampling = args.sampling()
    if args.engine == "vllm":
        start_vllm(args, sampling, more)
    if more:
        raise UsageError(f"options after -- are vLLM's and need --engine vllm, got {' '.join(more)}")
    check_packages()
    from cllm.serving.server.app import create_app
    from cllm.serving.server.run import Server, address, bind, own_names

    keys = args.api_keys()
    with bind(args.host, args.port) as listener:
        service = open_service(args, get_task(DEFAULT_TASK).default_question, sampling)
        app = create_app(service, keys, own_names(listener, args.host))
        print(f"{service.name} on {address(listener)}/v1; Ctrl-C stops it", flush=True)
        Server(app, service.worker, args.grace).run(sockets=[listener])


def start_vllm(args: ServeOptions, sampling: Sampling, more: Sequence[str]) -> NoReturn:
    """Become vLLM's server. Raises UsageError for options that it has no counterpart of, and a model that it cannot decode."""
    from cllm.engines.install import check_installed
    from cllm.engines.vllm_server import serve_command
    from cllm.models import default_device, default_width, load_config, read_record

    for each in fields(ServeOptions):
        if each.name in OWN_OPTIONS and getattr(args, each.name) != each.default:
            raise UsageError(f"--{each.name} is an option of our own server; leave it out with --engine vllm")
    if sampling.min_p:
        raise UsageError(f"vLLM takes no min_p (--min_p) beside drafts, got {sampling.min_p}")
    record = read_record(load_config(args.model))
    chosen = asdict(sampling)
    del chosen["seed"]  # requests have theirs
    passed = {
        "served-model-name": args.served_model_name or Path(args.model).resolve().name,
        "host": args.host,
        "port": args.port,
        "dtype": args.dtype or ("auto" if default_device() == "cuda" else "float32"),
        "max-num-seqs": args.batch_size,
        "override-generation-config": json.dumps(chosen),
    }
    words = [word for name, value in passed.items() for word in (f"--{name}", str(value))]
    command = serve_command(args.model, record, args.block_size or default_width(record), guess=args.guess, more=[*words, *more])
    check_installed()
    print(shlex.join(command), flush=True)
    keys = ["--api-key", *keys] if (keys := args.api_keys()) else []
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:], *keys], environment)


def check_packages() -> None:
    """Raise UsageError where the extra packages are missing."""
    try:
        import cllm.serving.server.app
        import cllm.serving.server.run  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs more packages: pip install -e .[serve] (cannot import {error.name})") from error


def open_service(args: ServiceOptions, question: str, sampling: Sampling) -> Service:
    """Load the model and start its worker; ``--guess auto`` measures with ``question``."""
    from cllm.decoding import Queue
    from cllm.serving.decoder import open_decoder
    from cllm.serving.server.service import Limits, Service

    opened, decoder = open_decoder(args, question)
    queue = Queue(decoder, args.batch_size, args.max_slots)
    limits = Limits(args.max_body, args.max_tokens, args.max_waiting, args.timeout)
    name = args.served_model_name or Path(args.model).resolve().name
    return Service(name, queue, opened.tokenizer, opened.template, limits, sampling)

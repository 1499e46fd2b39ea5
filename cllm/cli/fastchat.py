"""``cllm fastchat``: FastChat's own programs, with CLLMs decoded by this toolkit."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from cllm.cli.command import command
from cllm.errors import UsageError

SERVICES = ("cli", "controller", "model_worker", "multi_model_worker", "openai_api_server")
WITHOUT_MODEL = ("controller", "openai_api_server")
HELP = f"usage: cllm fastchat {{{','.join(SERVICES)}}} [options of fastchat.serve.cli and so on; --help lists them]"


@command
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return
    if not words or words[0] not in SERVICES:
        raise UsageError(HELP)
    from cllm.serving.fastchat import patch_streaming, register

    if words[0] in WITHOUT_MODEL:
        patch_streaming()
    else:
        register()
    before, sys.argv = sys.argv, [f"fastchat.serve.{words[0]}", *words[1:]]
    try:
        runpy.run_module(f"fastchat.serve.{words[0]}", run_name="__main__")
    finally:
        sys.argv = before

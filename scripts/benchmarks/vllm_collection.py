"""Collecting responses by vLLM in the same process, by a vLLM server, and by our engine: the same prompts, in one run.

python scripts/benchmarks/vllm_collection.py --model MODEL --filename gsm8k_train.jsonl --output vllm_collection.json
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from common import load, model_parser, publish

from cllm.engines.server import Server
from cllm.engines.vllm_engine import VllmEngine
from cllm.models import stop_token_ids
from cllm.trajectory.collect import OwnEngine, Prompt, Source
from cllm.trajectory.departures import departures
from cllm.trajectory.record import Dropped

OURS = "our engine"


def main() -> None:
    options = model_parser(__doc__, prompts=200)
    options.add_argument("--together", type=int, default=16, help="prompts that are answered together")
    args = options.parse_args()
    model, tokenizer, prompts = load(args)
    asked = [Prompt(str(number), ids, None) for number, ids in enumerate(prompts)]
    stops = stop_token_ids(model, tokenizer)
    with served(args) as url:
        sources: dict[str, Source] = {
            OURS: OwnEngine(model, stops, args.length),
            "vLLM in the same process": VllmEngine(args.model, stops, args.length, dtype=args.dtype),
            "a vLLM server": Server(url, args.model, stops, args.length),
        }
        texts, result = {}, {}
        for name, source in sources.items():
            list(source.respond(asked[: args.together], args.together))  # warm-up
            start = time.perf_counter()
            answers = list(source.respond(asked, args.together))
            seconds = time.perf_counter() - start
            texts[name] = {answer[0].row_id: answer[1] for answer in answers if not isinstance(answer, Dropped)}
            different = [row_id for row_id, ids in texts[name].items() if ids != texts[OURS][row_id]]
            found = departures(model, [prompts[int(n)] for n in different], [texts[name][n] for n in different]) if different else []
            result[name] = {
                "seconds": seconds,
                "responses/s": len(texts[name]) / seconds,
                "tokens/s": sum(map(len, texts[name].values())) / seconds,
                "same responses": f"{len(texts[name]) - len(different)} of {len(prompts)}",
                "margins of the others": {n: departure and departure.margin for n, departure in zip(different, found)},
            }
            print(f"{name}: {result[name]}", flush=True)
    publish(args, model, result)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The address of a vLLM server of the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.cli.main", "serve", args.model, "--dtype", args.dtype, "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the vLLM server ended with status {process.returncode} before it answered") from None
                time.sleep(1)
        yield f"{address}/v1"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()

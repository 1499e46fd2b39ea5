"""A server with a tiny model in a thread of the test process, on a free port of the loopback interface.

from servers import Running, run_server, until_empty
"""

import queue as queues
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from cllm.decoding import JacobiDecoder, Queue
from cllm.prompts import PromptTemplate
from cllm.serving.demo.routes import add_demo
from cllm.serving.server.app import create_app
from cllm.serving.server.run import Server, address, bind, own_names
from cllm.serving.server.service import Limits, Service
from cllm.serving.server.worker import Progress


@dataclass
class Running:
    """A server that answers as ``tiny``."""

    service: Service
    server: Server
    url: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, whatever their labels."""
        families = text_string_to_metric_families(self.service.metrics.text().decode())
        return sum(s.value for family in families for s in family.samples if s.name == name)


def until_empty(running: Running, seconds: float = 10.0) -> None:
    """Wait until all rows are gone; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while running.service.worker.running or running.service.worker.waiting:
        assert time.monotonic() < end, "rows are left over"
        time.sleep(0.01)


@contextmanager
def run_server(
    limits: Limits,
    *,
    name: str = "tiny",
    context: int = 256,
    model: PreTrainedModel | None = None,
    eos: Sequence[int] = (),
    batch_size: int = 4,
    chat_template: str = CHAT_TEMPLATE,
    api_keys: Sequence[str] = (),
    question: str | None = None,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """Run a server of ``model``, by default a tiny one with this ``context``. Without ``eos`` all answers reach their limit.

    ``name`` is the model's name in requests. ``question`` adds the demo with this default question. ``send_buffer`` is the socket's
    send buffer in bytes.
    """
    decoder = JacobiDecoder(model or tiny_model(max_position_embeddings=context), 4, eos_token_ids=eos)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    service = Service(name, Queue(decoder, batch_size), tokenizer, PromptTemplate("chat"), limits)
    with bind("127.0.0.1", 0) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        app = create_app(service, api_keys, own_names(listener, "127.0.0.1"))
        if question is not None:
            add_demo(app, service, question, asks_key=bool(api_keys))
        server = Server(app, service.worker, grace=5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Running(service, server, address(listener))
        server.should_exit = True
        thread.join()


def answer_of(reports: "queues.Queue[Progress]") -> tuple[list[list[int]], Progress]:
    """The token ids of each forward, and the last report."""
    steps: list[list[int]] = []
    while True:
        progress = reports.get(timeout=300)
        steps += progress.steps
        if progress.stop or progress.error:
            return steps, progress

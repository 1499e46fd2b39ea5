"""Responses from vLLM in this process, by its continuous batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from cllm.engines.follower import lead
from cllm.engines.install import check_installed
from cllm.errors import UsageError
from cllm.models import first_line
from cllm.trajectory.collect import Prompt, Response
from cllm.trajectory.record import Dropped

SPARE = 0.05  # of a GPU's memory, left to this process beside what it has taken


class VllmEngine:
    """The greedy responses of the model in ``path``, which is loaded when the first one is asked for.

    On a GPU vLLM takes what memory this process has left free. Raises UsageError where vLLM is not installed.
    """

    def __init__(self, path: str, stops: Sequence[int], max_new_tokens: int, *, dtype: str, tensor_parallel_size: int = 1) -> None:
        check_installed()
        self.stops, self.max_new_tokens = list(stops), max_new_tokens
        self.settings: dict[str, Any] = {"model": path, "dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
        self._engine: Any = None

    def respond(self, prompts: Iterable[Prompt], together: int) -> Iterator[Response | Dropped]:
        """Responses in the order in which they finish."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = SamplingParams(
            temperature=0,
            max_tokens=self.max_new_tokens,
            stop_token_ids=self.stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine, source, running = self._open(together), iter(prompts), dict[str, Prompt]()
        try:
            while True:
                for prompt in islice(source, together - len(running)):
                    running[prompt.row_id] = prompt
                    engine.add_request(prompt.row_id, {"prompt_token_ids": prompt.ids}, how)
                if not running:
                    return
                for output in engine.step():
                    yield running.pop(output.request_id), list(output.outputs[0].token_ids)
        finally:
            engine.abort_request(list(running))

    def _open(self, together: int) -> Any:
        if self._engine is None:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            lead()
            memory = {"gpu_memory_utilization": _free_share() - SPARE} if torch.cuda.is_available() else {}
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**self.settings, **memory, max_num_seqs=together))
            except Exception as error:  # its own log above says more
                raise UsageError(f"vLLM cannot run {self.settings['model']!r}: {first_line(error)}") from error
        return self._engine


def _free_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return free / total

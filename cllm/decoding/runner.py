"""Ways to run a step: as it is, under ``torch.compile``, or captured as a CUDA graph and replayed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from cllm.attention import round_up
from cllm.decoding.batch import Batch
from cllm.decoding.cache import RowCache
from cllm.decoding.rows import Rows
from cllm.decoding.sampling import Chooser
from cllm.decoding.step import Step
from cllm.errors import UsageError
from cllm.models import first_line

logger = logging.getLogger(__name__)

Mode = Literal["auto", "off", "graph", "compile"]
StepFunction = Callable[[Rows, Chooser, RowCache, int, int], torch.Tensor]  # Step and what wraps it
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]  # a step with fixed arguments -> the same, whose result lives until the next call

CAPTURED_LENGTHS = 256  # captured attention sees a multiple of so many slots, and of a quarter of the power of two below
WARM_UP = 2  # steps of a kind that are run as they are, before the next one is captured
MOST_CAPTURED = 32  # kinds of step that are kept
COMPILING = {  # of a decoder's own, as far as this torch has it: by default all decoders share 8 kinds of step
    "recompile_limit": 64,
    "isolate_recompiles": True,
}


class Runner:
    """Runs steps as they are."""

    fixed = False  # are the buffers kept for the next batch, and made large enough for the longest text at once?

    def __init__(self, step: StepFunction, narrows: bool = False) -> None:
        self.step = step
        self.narrows = narrows  # may steps be about fewer tokens than the windows have?

    @contextmanager
    def batch(self, empty: Rows) -> Iterator[Batch]:
        """A batch without rows."""
        yield Batch(empty)

    def size(self, used: int, room: int) -> int:
        """How many of a batch's places a step should be about, if so many are used and there is room for so many."""
        return used

    def length(self, reach: int) -> int:
        """How many slots attention should see, if no window ends beyond ``reach``."""
        return round_up(reach)

    def run(self, batch: Batch, chooser: Chooser, length: int, width: int) -> torch.Tensor:
        """One step of a batch: the facts of an iteration, which no later step changes."""
        return self.step(batch.live, chooser, batch.cache, length, width)


class CapturingRunner(Runner):
    """Captures each kind of step (rows, slots seen, width, sampling) when it comes for the third time, and replays it then.

    Buffers and captured steps are kept from one batch to the next; both go when the buffers have to grow. Memory: the largest
    cache so far, for its rows and its longest text, and what the largest captured step needs in between.
    Where a step cannot be captured, a warning says so once, and steps are run as they are from then on.
    """

    fixed = True

    def __init__(self, step: StepFunction, capture: Capture) -> None:
        super().__init__(step)
        self.capture: Capture | None = capture
        self._kept: Batch | None = None

    @contextmanager
    def batch(self, empty: Rows) -> Iterator[Batch]:
        """The one kept from last time, unless it is in use."""
        batch, self._kept = self._kept or Batch(empty), None
        batch.clear()
        try:
            yield batch
        except GeneratorExit:  # the caller has seen enough
            self._kept = batch
            raise
        self._kept = batch

    def size(self, used: int, room: int) -> int:
        return min(room, 1 << (used - 1).bit_length()) if used else 0

    def length(self, reach: int) -> int:
        unit = max(CAPTURED_LENGTHS, 1 << max(reach.bit_length() - 3, 0))
        return round_up(reach, unit)

    def run(self, batch: Batch, chooser: Chooser, length: int, width: int) -> torch.Tensor:
        if chooser.processes:  # the host has a say in every token
            return super().run(batch, chooser, length, width)
        kind = (batch.size, length, width, chooser.kind)
        known = batch.captured.pop(kind, 0)  # how often it was run, or its replay
        if known == WARM_UP and self.capture:
            known = self._captured(self.capture, batch, chooser, length, width) or known
        replay = known if callable(known) else None
        batch.captured[kind] = replay or min(known + 1, WARM_UP)
        if len(batch.captured) > MOST_CAPTURED:
            batch.captured.popitem(last=False)
        return replay().clone() if replay else super().run(batch, chooser, length, width)

    def _captured(self, capture: Capture, batch: Batch, chooser: Chooser, length: int, width: int) -> Replay | None:
        rows, cache = batch.live, batch.cache
        try:
            return capture(lambda: self.step(rows, chooser, cache, length, width))
        except Exception as error:
            logger.warning("a step of this model cannot be captured, so it runs uncaptured: %s", first_line(error))
            self.capture = None
            return None


class CompiledStep:
    """A step under ``torch.compile``. Where that fails, a warning says so once, and the step runs as it is.

    Only greedy rows are compiled: inductor (torch 2.13, on a CPU) gives the filters of sampling an index out of bounds.
    """

    def __init__(self, step: Step, backend: str = "inductor") -> None:
        self.plain = step
        here = inspect.signature(torch.compile).parameters
        options: dict[str, Any] = {name: value for name, value in COMPILING.items() if name in here}
        self.compiled: StepFunction = torch.compile(step, fullgraph=True, backend=backend, **options)

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int, width: int) -> torch.Tensor:
        if not chooser.greedy:
            return self.plain(rows, chooser, cache, length, width)
        try:
            with self.plain.tracing(width):
                return self.compiled(rows, chooser, cache, length, width)
        except Exception as error:
            # Slow to import; what is raised while nothing has run yet.
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            if not isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit)):
                raise
            logger.warning("a step of this model cannot be compiled, so it runs uncompiled: %s", first_line(error))
            self.compiled = self.plain
            return self.plain(rows, chooser, cache, length, width)


class CudaGraphs:
    """Captures steps as CUDA graphs. They share their memory, since they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, function: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def make_runner(step: Step, mode: Mode) -> Runner:
    """``off``: steps as they are; ``graph``: captured as CUDA graphs; ``compile``: under torch.compile, and captured on a GPU;
    ``auto``: ``graph`` where the whole model is on one GPU, else ``off``.

    Raises UsageError for another mode, for ``graph`` where no graph can be captured, and for ``compile`` with longrope.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"compile must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    devices = {parameter.device for parameter in step.model.parameters()}
    capturable = len(devices) == 1 and next(iter(devices)).type == "cuda"
    if mode == "graph" and not capturable:
        raise UsageError(f"compile='graph' needs the whole model on one CUDA device, got {', '.join(map(str, devices))}")
    if mode == "compile" and step.rotary:
        raise UsageError("compile='compile' takes no model with longrope, whose frequencies are chosen outside of its code")
    function = CompiledStep(step) if mode == "compile" else step
    if mode == "off" or not capturable:
        return Runner(function, narrows=(step.narrows or step.drafts > 0) and function is step)
    return CapturingRunner(function, CudaGraphs(next(iter(devices))))

"""Ways to run a step: eagerly, under ``torch.compile``, or captured as a CUDA graph and replayed."""

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
StepFunction = Callable[[Rows, Chooser, RowCache, int, int], torch.Tensor]  # Step, or a wrapper of it
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]  # from a step with fixed arguments to its replay, whose result the next call overwrites

CAPTURED_LENGTHS = 256  # captured attention sees a multiple of this many slots, and of an eighth to a quarter of its length
WARM_UP = 2  # eager runs of a kind of step before it is captured
MOST_CAPTURED = 32  # captured steps to keep
MOST_COMPILED = 64  # compiled kinds of step to keep; torch's own limit is 8


class Runner:
    """Runs steps eagerly, or compiled where the step is a :class:`CompiledStep`."""

    fixed = False  # are the buffers kept for the next batch, and allocated for the longest text at once?

    def __init__(self, step: StepFunction, narrows: bool = False) -> None:
        self.step = step
        self.narrows = narrows  # may steps compute only the leading tokens of the windows?

    @contextmanager
    def batch(self, empty: Rows) -> Iterator[Batch]:
        """A batch without rows; ``empty`` gives the form of its rows."""
        yield Batch(empty)

    def size(self, used: int, room: int) -> int:
        """How many places of a batch a step should process, if ``used`` of its ``room`` places are in use."""
        return used

    def length(self, reach: int) -> int:
        """How many slots attention should see, if no window ends beyond ``reach``."""
        return round_up(reach)

    def run(self, batch: Batch, chooser: Chooser, length: int, width: int) -> torch.Tensor:
        """One step of a batch; returns the fields [B, F] of its iteration, which later steps leave unchanged."""
        return self.step(batch.live, chooser, batch.cache, length, width)


class CapturingRunner(Runner):
    """Captures each kind of step (number of rows, slots, width, sampling) on its third run, and replays it from then on.

    Buffers and captured steps are kept between batches, until the buffers have to grow. Memory: the largest cache so far, for
    its rows and its longest text, and the intermediate results of the largest captured step.
    If a step cannot be captured, a warning says so once, and all further steps run uncaptured.
    """

    fixed = True

    def __init__(self, step: StepFunction, capture: Capture) -> None:
        super().__init__(step)
        self.capture: Capture | None = capture
        self._kept: Batch | None = None

    @contextmanager
    def batch(self, empty: Rows) -> Iterator[Batch]:
        """The batch kept from last time, cleared, or a new one if that is in use."""
        batch, self._kept = self._kept or Batch(empty), None
        batch.clear()
        try:
            yield batch
        except GeneratorExit:  # the caller stopped early
            self._kept = batch
            raise
        self._kept = batch

    def size(self, used: int, room: int) -> int:
        return min(room, 1 << (used - 1).bit_length()) if used else 0

    def length(self, reach: int) -> int:
        unit = max(CAPTURED_LENGTHS, 1 << max(reach.bit_length() - 3, 0))
        return round_up(reach, unit)

    def run(self, batch: Batch, chooser: Chooser, length: int, width: int) -> torch.Tensor:
        if chooser.processes:  # the host takes part in choosing tokens
            return super().run(batch, chooser, length, width)
        kind = (batch.size, length, width, chooser.kind)
        known = batch.captured.pop(kind, 0)  # the number of its eager runs, or its replay
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
    """A step under ``torch.compile``. If compiling fails, a warning says so once, and the step runs eagerly.

    Only greedy batches are compiled: inductor (torch 2.13, CPU) compiles the sampling filters to an out-of-bounds index.
    """

    def __init__(self, step: Step, backend: str = "inductor") -> None:
        self.plain = step
        isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # before torch 2.13, all decoders share them
        options: dict[str, Any] = {"isolate_recompiles": True} if isolates else {}
        self.compiled: StepFunction = torch.compile(step, fullgraph=True, backend=backend, **options)

    def __call__(self, rows: Rows, chooser: Chooser, cache: RowCache, length: int, width: int) -> torch.Tensor:
        if self.compiled is self.plain or not chooser.greedy:
            return self.plain(rows, chooser, cache, length, width)
        try:
            with self.plain.tracing(width), torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
                return self.compiled(rows, chooser, cache, length, width)
        except Exception as error:
            # Slow to import. These errors are raised before the step has changed anything.
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            if not isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit)):
                raise
            logger.warning("a step of this model cannot be compiled, so it runs uncompiled: %s", first_line(error))
            self.compiled = self.plain
            return self.plain(rows, chooser, cache, length, width)


class CudaGraphs:
    """Captures steps as CUDA graphs. All graphs share one memory pool, since they never run at the same time."""

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
    """The runner for a compile mode.

    ``off``: eager steps; ``graph``: steps captured as CUDA graphs; ``compile``: steps under torch.compile, also captured if
    the whole model is on one GPU; ``auto``: ``graph`` if the whole model is on one GPU, otherwise ``off``.

    Raises UsageError for an unknown mode, for ``graph`` without such a model, and for ``compile`` with longrope.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"compile must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    devices = {parameter.device for parameter in step.model.parameters()}
    capturable = len(devices) == 1 and next(iter(devices)).type == "cuda"
    if mode == "graph" and not capturable:
        raise UsageError(f"compile='graph' needs the whole model on one CUDA device, got {', '.join(map(str, devices))}")
    if mode == "compile" and step.rotary:
        raise UsageError("compile='compile' does not support longrope, whose frequencies are chosen outside the compiled code")
    function = CompiledStep(step) if mode == "compile" else step
    if mode == "off" or not capturable:
        return Runner(function, narrows=(step.narrows or step.drafts > 0) and function is step)
    return CapturingRunner(function, CudaGraphs(next(iter(devices))))

"""Stages that run one after the other, each once: a run that was killed anywhere resumes where it stopped.

``stages.json`` records what every stage was made from and whether it ended. This includes the inputs of all earlier stages, so a
changed input reruns its stage and those after it; so does a missing output.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.files import write_json

FILE = "stages.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step. It writes to its ``outputs`` or adds to those of earlier ones; started again, it resumes from what is there."""

    name: str
    doing: str  # for people
    run: Callable[[], None]
    outputs: Sequence[Path]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # JSON values, without the outputs of earlier stages
    together: bool = False  # run by all processes, otherwise by the first one alone


class Stages:
    """The stages of one folder, run by process ``rank``; ``wait`` returns once every process has called it."""

    def __init__(self, folder: Path, stages: Sequence[Stage], rank: int = 0, wait: Callable[[], None] = lambda: None) -> None:
        self.file, self.stages, self.rank, self.wait = folder / FILE, stages, rank, wait

    def run(self) -> None:
        """Run them. Raises whatever a stage raises; what had been done by then is kept."""
        made_from, redone = "", False
        for number, stage in enumerate(self.stages, 1):
            made_from = _digest([made_from, stage.name, dict(stage.inputs)])
            known = self._read().get(stage.name, {})
            same, ended = known.get("made_from") == made_from, bool(known.get("ended"))
            there = all(path.exists() for path in stage.outputs)
            self.wait()  # before one process writes what the others read here
            where = f"stage {number} of {len(self.stages)}: {stage.doing}"
            if same and ended and there and not redone:
                self._say(f"{where}: done before")
                continue
            self._say(where)
            resumed = same and not ended and not redone
            redone = True
            if self.rank == 0 and not resumed:
                for path in stage.outputs:
                    _remove(path)
                self._write(stage, made_from=made_from, ended=False)
            self.wait()
            start = time.perf_counter()
            if stage.together or self.rank == 0:
                stage.run()
            self.wait()
            if self.rank == 0:
                self._write(stage, made_from=made_from, ended=True, seconds=round(time.perf_counter() - start, 1))

    def seconds(self) -> dict[str, float]:
        """Seconds that each finished stage took, counted from its last start."""
        return {name: facts["seconds"] for name, facts in self._read().items() if facts.get("ended")}

    def _say(self, text: str) -> None:
        if self.rank == 0:
            logger.info(text)

    def _write(self, stage: Stage, **facts: Any) -> None:
        write_json(self.file, self._read() | {stage.name: facts})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
            return known
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {self.file}: {error}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

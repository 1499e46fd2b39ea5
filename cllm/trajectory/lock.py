"""A writer's lock on a folder. The system releases it when the process ends, however that happens."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

from cllm.errors import UsageError

logger = logging.getLogger(__name__)


class WriterLock:
    """An exclusive ``flock`` on a hidden file, one per ``rank``: writers of other ranks share the folder.

    Rank 0 opens the folder, so its lock also fails while a writer of any other rank is active. On a file system without locks
    a warning is logged instead.

    Raises:
        UsageError: another process holds the lock, or the file cannot be created.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f".writer-{rank}.lock"
        self._file = _acquire(self.path)
        if rank == 0:
            try:
                for other in [path for path in folder.glob(".writer-*.lock") if path != self.path]:
                    _release(other, _acquire(other))
            except UsageError:
                self.release()
                raise

    def release(self) -> None:
        """Release the lock. Releasing it twice is allowed."""
        _release(self.path, self._file)


def _acquire(path: Path) -> BinaryIO:
    import fcntl  # imported here because Windows lacks it, and reading trajectories must work there

    while True:
        try:
            file = open(path, "ab")
        except OSError as error:
            raise UsageError(f"cannot write to {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(f"another process is writing into {path.parent}; wait until it ends, or write elsewhere") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s); make sure that nothing else writes there", path.parent, error.strerror)
        if _names_file(path, file):
            return file
        file.close()  # the previous holder removed the file before we locked it


def _names_file(path: Path, file: BinaryIO) -> bool:
    """Whether ``path`` still names the open ``file``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _release(path: Path, file: BinaryIO) -> None:
    if not file.closed:
        path.unlink(missing_ok=True)  # before closing, so that nobody locks a file that is about to be removed
        file.close()

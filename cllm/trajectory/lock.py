"""A writer's claim on a folder. It ends with its process, however that ends."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

from cllm.errors import UsageError

logger = logging.getLogger(__name__)


class WriterLock:
    """Held by the one writer of this ``rank`` in ``folder``, through ``flock`` on a hidden file; other ranks share the folder.

    The writer of rank 0 opens the folder, so it is refused while a writer of any rank is at work there. On a file system
    without locks there is a warning instead.

    Raises:
        UsageError: another writer has it, or the file cannot be made.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f".writer-{rank}.lock"
        self._file = _take(self.path)
        if rank == 0:
            try:
                for other in [path for path in folder.glob(".writer-*.lock") if path != self.path]:
                    _give_back(other, _take(other))
            except UsageError:
                self.release()
                raise

    def release(self) -> None:
        _give_back(self.path, self._file)


def _take(path: Path) -> BinaryIO:
    import fcntl  # not on Windows, where stored trajectories can be read all the same

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
            logger.warning("%s cannot be locked (%s); let nothing else write there", path.parent, error.strerror)
        if _is_at(path, file):
            return file
        file.close()  # its last holder removed it before it was ours


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _give_back(path: Path, file: BinaryIO) -> None:
    if not file.closed:
        path.unlink(missing_ok=True)  # first, so that nobody can lock a file that is about to go
        file.close()

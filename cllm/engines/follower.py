"""Followers: processes that end when the one that started them has ended, even if it was killed and could not end them.

vLLM runs its engine in a separate process. If that process outlives a killed command, it keeps a core busy and holds GPU memory
that the next run needs.
"""

from __future__ import annotations

import os
import signal
import threading
import time

LEADER = "CLLM_LEADER"  # environment variable: the id of the process to follow
SECONDS = 0.5  # between two looks


def lead() -> None:
    """Let the processes that this one starts from now on, and that call :func:`follow`, end with it."""
    if os.environ.get(LEADER) != str(os.getpid()):
        os.environ[LEADER] = str(os.getpid())
        os.register_at_fork(after_in_child=follow)


def follow() -> None:
    """End this process as soon as its parent has ended, if that is a leader."""
    leader = os.getppid()
    if os.environ.get(LEADER) == str(leader):
        threading.Thread(target=_end_after, args=[leader], daemon=True).start()


def _end_after(leader: int) -> None:
    while os.getppid() == leader:  # an orphan gets another parent
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)

"""A process that is killed takes its followers along."""

import os
import signal
import subprocess
import sys
import time

import pytest

START = """
import multiprocessing, os, sys, time
from cllm.engines.follower import follow, lead

def child(call):
    if call:
        follow()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    way, call, leads = sys.argv[1], sys.argv[2] == "call", sys.argv[3] == "lead"
    if leads:
        lead()
    multiprocessing.get_context(way).Process(target=child, args=[call]).start()
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize(("way", "call", "leads", "ends"), [("spawn", 1, 1, 1), ("fork", 0, 1, 1), ("spawn", 1, 0, 0), ("spawn", 0, 1, 0)])
def test_a_follower_ends_with_its_leader(tmp_path, way: str, call: int, leads: int, ends: int) -> None:
    script = tmp_path / "start.py"
    script.write_text(START)
    words = [sys.executable, str(script), way, "call" if call else "no", "lead" if leads else "no"]
    leader = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert leader.stdout
    pid = int(leader.stdout.readline())
    try:
        time.sleep(1)
        assert is_alive(pid)
        leader.kill()
        leader.wait()
        end = time.monotonic() + (10 if ends else 2)
        while is_alive(pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert is_alive(pid) != bool(ends)
    finally:
        leader.stdout.close()
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)

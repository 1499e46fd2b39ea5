"""Freed memory goes back to the system."""

import os
import platform
import subprocess
import sys

import pytest

HOLES = """
import torch
from cllm.training.heap import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

tensors = [torch.ones(1 << 18) for _ in range(400)]  # 1 MiB each
kept = tensors[::20]  # tensors that live on, with holes between them
full = resident()
del tensors
freed = resident()
give_back()
print(full, freed, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_holes_in_the_heap_are_given_back() -> None:
    """The environment is that of scripts/quickstart.sh: glibc itself gives nothing back."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    printed = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True).stdout
    full, freed, after = map(int, printed.split())
    assert freed > full - 50 and after < full - 300

"""What a process does with memory that it has no more use for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_BLOCKS = """
import sys
from contextlib import nullcontext
import torch
from qformer.malloc import give_back_large_blocks, large_blocks_given_back

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon"))

if "back" in sys.argv:
    assert give_back_large_blocks()
with large_blocks_given_back() if "meanwhile" in sys.argv else nullcontext():
    before, kept = held(), []
    for _ in range(4):
        blocks = []
        for _ in range(16):
            blocks.append(torch.ones(3 * 2**20))  # 12 MiB
            kept.append(torch.ones(2**14))  # and a little that stays, between them
        blocks.clear()
    print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_large_blocks_go_back_to_the_system() -> None:
    free = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def held(*flags: str) -> int:
        run = [sys.executable, "-c", _BLOCKS, *flags]
        return int(subprocess.run(run, check=True, capture_output=True, text=True, env=free).stdout)

    assert held("back") < 32
    assert held("meanwhile") < 32
    assert held() > 64  # what it is for

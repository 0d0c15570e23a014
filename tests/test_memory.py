"""The peak of a process tree counts what children hold, and survives their end."""

import subprocess
import sys
import time

import psutil

from monitoring.memory import PeakMemory, tree_rss

HOLD = (
    "import sys; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); print('held', flush=True); {then}"
)


def holding(megabytes: int, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """A process that holds so much memory until its stdin closes; returned when it does."""
    code = HOLD.format(size=megabytes * 1_000_000, then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_peak_outlives_the_child_that_made_it() -> None:
    with PeakMemory() as memory:
        before = memory.gb
        with holding(300):
            deadline = time.monotonic() + 20
            while memory.gb < before + 0.3 and time.monotonic() < deadline:
                time.sleep(0.05)
        peak = memory.gb
    assert before + 0.3 <= peak <= memory.gb < before + 0.6


def test_a_grandchild_counts() -> None:
    grandchild = "import subprocess; subprocess.run([sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    with holding(1, then=grandchild) as process:
        root = psutil.Process(process.pid)
        while not root.children():
            time.sleep(0.05)
        time.sleep(0.2)
        assert tree_rss(root) > root.memory_info().rss
        assert process.stdin is not None
        process.stdin.close()


def test_a_process_that_has_ended_takes_no_memory() -> None:
    with holding(1) as process:
        root = psutil.Process(process.pid)
    assert tree_rss(root) == 0

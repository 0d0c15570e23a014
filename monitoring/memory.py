"""How much memory a run takes: a process and all its descendants, sampled while they live.

It owns the measurement; it does not know what the processes do.
"""

import threading
from types import TracebackType
from typing import Self

import psutil

SAMPLES_A_SECOND = 2.0


class PeakMemory:
    """The largest resident memory that a process and its descendants held together while the `with` block ran.

    Pages that processes share count once for each of them, so the figure is never too small because of sharing;
    a peak between two samples is missed.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    @property
    def gb(self) -> float:
        """The peak so far, in 10^9 bytes."""
        return self._peak / 1e9

    def __enter__(self) -> Self:
        self._peak = tree_rss(self._root)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(1 / SAMPLES_A_SECOND):
            self._peak = max(self._peak, tree_rss(self._root))


def tree_rss(root: psutil.Process) -> int:
    """Resident bytes of a process and its descendants now; what has ended counts nothing."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_rss(process) for process in processes)


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0

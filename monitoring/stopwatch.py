"""How long a process itself was at work: of a rank, what it does between two waits for the others.

It owns the measurement, by the host's clock or by a device's events; it does not know what is done. A device works
behind its host: its seconds lie between two events of its queue, and can be read once the host has waited for it.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol


class Event(Protocol):
    """A point of a device's queue, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds until another point; both are in the past."""
        ...


class Stopwatch:
    """Sums the seconds of the blocks that it runs in."""

    def __init__(self, event: Callable[[], Event] | None = None) -> None:
        """With `event` it measures that device's time, else the host's."""
        self._event = event
        self._blocks: list[tuple[Event, Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """Count the block."""
        if self._event is None:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        begin, end = self._event(), self._event()
        begin.record()
        yield
        end.record()
        self._blocks.append((begin, end))

    def take(self) -> float:
        """The seconds since the last call. With a device: call it when the host has waited for what was counted."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._blocks) / 1e3
        self._seconds = 0.0
        self._blocks.clear()
        return seconds

"""What a build says while it runs: its log, and how far it is.

It owns the two objects the library calls back, from threads of its own; it knows nothing of builds or of terminals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(slots=True, frozen=True)
class BuildStep:
    """`done` of `total` steps of a phase; a phase is within its `parent`, or the whole build if that is None."""

    phase: str
    parent: str | None
    done: int
    total: int


OnProgress = Callable[[BuildStep], None]
"""Called from the builder's threads; what it raises stops the build, and is raised to who asked for the build."""


@dataclass(slots=True, frozen=True)
class Watch:
    """Who is told of a build while it runs."""

    log: Path | None = None
    """Keeps every message of the builder, line by line as it comes."""
    on_progress: OnProgress | None = None


class BuildLog:
    """The library's messages: every one in a file, and the warnings and errors in memory."""

    def __init__(self, path: Path | None) -> None:
        self.warnings: list[str] = []
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=1)  # by line: a crash of the builder keeps it

    def write(self, severity: str, message: str, *, warning: bool) -> None:
        line = f"{severity.lower()}: {message}"
        if self._file is not None:
            self._file.write(line + "\n")
        if warning:
            self.warnings.append(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def listener(self, trt: Any) -> Any:
        """The `ILogger` of the library in this process, which writes here until another log asks for it.

        A process has one: a library keeps the first it was given as long as anything that was given it lives, and
        ignores those that differ.
        """
        listener = _LISTENERS.get(trt.__name__) or _LISTENERS.setdefault(trt.__name__, _new_listener(trt))
        listener.target = self
        return listener


_LISTENERS: dict[str, Any] = {}


def _new_listener(trt: Any) -> Any:
    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.target: BuildLog | None = None

        def log(self, severity: Any, msg: str) -> None:
            if self.target and severity <= trt.ILogger.INFO:  # VERBOSE names every tactic that was tried
                self.target.write(severity.name, msg, warning=severity <= trt.ILogger.WARNING)

    return Listener()


class Progress:
    """Hands the library's phases on, and stops the build when the receiver raises."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.stopped: BaseException | None = None
        self._on_progress = on_progress
        self._phases: dict[str, tuple[str | None, int]] = {}

    def started(self, phase: str, parent: str | None, total: int) -> None:
        self._phases[phase] = parent, total
        self._tell(phase, 0)

    def stepped(self, phase: str, done: int) -> bool:
        """False asks the builder to stop."""
        return self._tell(phase, done)

    def finished(self, phase: str) -> None:
        self._tell(phase, self._phases[phase][1])

    def listener(self, trt: Any) -> Any:
        """An `IProgressMonitor` of the library that reports here."""
        progress = self

        class Listener(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.started(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.stepped(phase_name, step + 1)

            def phase_finish(self, phase_name: str) -> None:
                progress.finished(phase_name)

        return Listener()

    def _tell(self, phase: str, done: int) -> bool:
        if self.stopped is None:
            try:
                self._on_progress(BuildStep(phase, *self._step(phase, done)))
            except BaseException as error:  # an exception cannot pass through the builder's own frames
                self.stopped = error
        return self.stopped is None

    def _step(self, phase: str, done: int) -> tuple[str | None, int, int]:
        parent, total = self._phases.get(phase, (None, done))
        return parent, done, total

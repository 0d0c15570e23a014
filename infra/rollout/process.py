"""Processes that outlive whoever starts them: started detached, found again by number and start, stopped.

It owns how a process is told from a later one with its number; it knows nothing of what runs.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

from model.config import Config


class Process(Config):
    """One that runs detached."""

    pid: int
    started: float

    @classmethod
    def spawn(cls, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Self:
        """Start it in a session of its own, with its output at the end of `log`."""
        outputs = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            command[0],
            list(command),
            environment,
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), outputs, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        return cls(pid=pid, started=psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """None once it has ended."""
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None

    def stop(self, patience_s: float = 0.0) -> None:
        """SIGTERM; after `patience_s`, if it is not 0, SIGKILL to what is left of its family."""
        process = self.find()
        if process is None:
            return
        family = [process, *process.children(recursive=True)]
        process.terminate()
        if patience_s:
            for left in psutil.wait_procs(family, timeout=patience_s)[1]:
                left.kill()


def wait_until_answers(url: str, process: Process, log: Path, *, patience_s: float = 120.0) -> None:
    """Until `url` answers 200; a process that ends before is a RuntimeError with the end of its log."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.find() is None:
            raise RuntimeError(f"a process ended before {url} answered: {log.read_text()[-2000:]}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer after {patience_s:g} s; its log is {log}")

"""Keeps one server process running, as a kubelet does: what ends without being told to is started again, ever later.

It owns the process and the count of its restarts, in a file; it knows nothing of what runs. Standard library only: one
of these stands beside every server.

    python -m infra.rollout.keeper STATE_FILE COMMAND ...
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0


def keep(state: Path, command: list[str]) -> int:
    """Run `command` until SIGTERM, which is passed on; then wait for its end and return its code."""
    told = False
    child: subprocess.Popen[bytes] | None = None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if child is not None:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    restarts, pause = 0, FIRST_PAUSE_S
    while True:
        child = subprocess.Popen(command)
        _write(state, {"keeper": os.getpid(), "pid": child.pid, "restarts": restarts})
        if told:
            child.terminate()
        code = child.wait()
        if told:
            return code
        restarts += 1
        _write(state, {"keeper": os.getpid(), "pid": None, "restarts": restarts, "exit_code": code})
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        if told:
            return code


def _write(path: Path, state: dict[str, int | None]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(state))
    os.replace(draft, path)


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))

"""`python -m tests.checkpoint_kills`: saves that die at their N-th touch of the file system.

It reads lines `ROOT N STEP RANKS STORE`, where STORE is a folder or `-`, and answers each with `killed` or `done`. A
save runs in a fork, so that libraries are loaded once; the fork kills itself from an audit hook, so nothing of ours
knows of it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def die_at(number: int) -> None:
    """SIGKILL at that touch."""
    seen = [0]
    lock = threading.Lock()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOUCHES:
            with lock:
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    from infra.checkpoints import StoreSink
    from infra.store.folder import FolderStore
    from tests.checkpoints import save_cut, tensors

    for line in sys.stdin:
        root, number, step, ranks, store = line.split()
        child = os.fork()
        if child == 0:
            sinks = None if store == "-" else [StoreSink(FolderStore(Path(store))) for _ in range(int(ranks))]
            if sinks:
                sinks[0].latest()
            die_at(int(number))
            save_cut(Path(root), tensors(int(step)), int(step), int(ranks), sinks=sinks)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"a save of {line!r} ended with {status}"
        print("killed" if status else "done", flush=True)


@contextmanager
def killer() -> Generator[Callable[..., bool]]:
    """Calls `ROOT, N, step=, ranks=, store=` to this module's process; each says whether the save was killed."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def save_and_die(root: Path, number: int, *, step: int, ranks: int, store: Path | None = None) -> bool:
            ask.write(f"{root} {number} {step} {ranks} {store or '-'}\n")
            ask.flush()
            answer = answers.readline().strip()
            assert answer in ("killed", "done"), "the process that forks has ended"
            return answer == "killed"

        try:
            yield save_and_die
        finally:
            process.kill()


if __name__ == "__main__":
    main()

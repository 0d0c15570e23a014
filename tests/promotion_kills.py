"""`python -m tests.promotion_kills URL ENDPOINT`: publications and promotions that die at their N-th boundary.

It reads lines `ACTION N ARGUMENT` and answers each with `killed` or `done`. An action runs in a fork, so that libraries
are loaded and the store is open once; the fork kills itself from an audit hook, so nothing of ours knows of it. A
boundary is a touch of the file system or, with an S3 server, a message that is about to be sent: what the server has
done when the writer dies is what it was sent before.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from tests.s3_server import S3Server

TOUCHES = {"open", "os.mkdir", "os.link", "os.rename", "os.remove", "fcntl.flock", "http.client.send"}
REF = "stage/promoted"


def die_at(number: int) -> None:
    """SIGKILL at that boundary."""
    seen = [0]
    lock = threading.Lock()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOUCHES:
            with lock:
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(url: str, endpoint: str) -> None:
    from infra.registry.registry import Registry
    from infra.store.location import open_store
    from infra.store.s3 import S3Store
    from tests.chaos.promotions import promote, publish

    store = open_store(url, S3Server(endpoint).access if endpoint else None)
    registry = Registry(store)
    if isinstance(store, S3Store):
        store._client._client.close()  # forks must not share a connection; the next request makes a new one
    for line in sys.stdin:
        action, number, argument = line.split()
        child = os.fork()
        if child == 0:
            die_at(int(number))
            if action == "publish":
                publish(registry, {"weights": Path(argument), "code": Path(__file__)})
            else:
                promote(registry, REF, argument, who="who is killed")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"{line!r} ended with {status}"
        print("killed" if status else "done", flush=True)


@contextmanager
def killer(url: str, endpoint: str) -> Generator[Callable[[str, int, object], bool]]:
    """Calls `ACTION, N, ARGUMENT` to this module's process; each says whether the action was killed."""
    command = [sys.executable, "-m", __name__, url, endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def act_and_die(action: str, number: int, argument: object) -> bool:
            ask.write(f"{action} {number} {argument}\n")
            ask.flush()
            answer = answers.readline().strip()
            assert answer in ("killed", "done"), "the process that forks has ended"
            return answer == "killed"

        try:
            yield act_and_die
        finally:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])

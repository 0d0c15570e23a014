"""The tiny server as a process of its own, to be asked over the loopback, killed and started again.

It owns the process and the wait until it is ready; what it serves is `tiny_server`'s.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
PATIENCE_S = 150


@contextmanager
def server_process(folder: Path, port: int, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """Ready on `http://127.0.0.1:PORT` inside the block, and gone after it; its log is `folder / "log"`."""
    command = [sys.executable, "-m", "tests.tiny_server", str(folder), str(port), json.dumps(settings)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
    try:
        _wait_until_ready(process, port)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client() as client:  # one for all tries: a client takes longer to make than an answer to come
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended before it was ready"
            with suppress(httpx.TransportError):
                if client.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"the server was not ready in {PATIENCE_S} s")

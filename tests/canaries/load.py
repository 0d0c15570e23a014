"""Users: threads that ask for videos through a router without a pause, and count what went wrong for them.

It owns the requests and the count; it knows nothing of canaries.
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.tiny_server import KEY

PATIENCE_S = 240.0


@dataclass
class Users:
    """What they saw. A failure is any answer but the wanted one, no answer, or a video that failed."""

    made: int = 0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def one(self, client: httpx.Client, seed: int) -> None:
        answer = client.post("/v1/videos", json={"prompt": "a red circle", "seed": seed, "num_inference_steps": 3})
        video = self._wanted(answer)
        deadline = time.monotonic() + PATIENCE_S
        while video["status"] in ("queued", "in_progress"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{video['id']} is not made after {PATIENCE_S} s")
            time.sleep(0.1)
            video = self._wanted(client.get(f"/v1/videos/{video['id']}"))
        if video["status"] != "completed":
            raise RuntimeError(f"{video['id']} failed: {video['error']}")
        content = client.get(f"/v1/videos/{video['id']}/content")
        if content.status_code != 200 or content.content[4:8] != b"ftyp":
            raise RuntimeError(f"the content of {video['id']} is answered {content.status_code}")

    def _wanted(self, answer: httpx.Response) -> dict[str, str]:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.request.method} {answer.request.url} is answered {answer.status_code}")
        return answer.json()

    def ask(self, url: str, stop: threading.Event, seed: int) -> None:
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            while not stop.is_set():
                try:
                    self.one(client, seed)
                except (RuntimeError, httpx.HTTPError) as error:
                    with self._lock:
                        self.failures.append(repr(error))
                    time.sleep(0.2)
                else:
                    with self._lock:
                        self.made += 1


@contextmanager
def users(url: str, count: int) -> Generator[Users, None, None]:
    """`count` of them, until the block ends; each then waits for the video that it asked for last."""
    seen, stop = Users(), threading.Event()
    threads = [threading.Thread(target=seen.ask, args=(url, stop, seed)) for seed in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()

"""Kill -9 on replicas of the server at random moments under load, and the count of what came of it.

It owns the load, the kills and the verdict; the servers are real ones (`replicas`), and so is the database.
"""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import kill
from pathlib import Path
from typing import IO

import httpx

from tests.s3_server import free_ports
from tests.tiny_server import KEY

ROOT = Path(__file__).parents[2]
HEADERS = {"authorization": f"Bearer {KEY}"}
STEPS = (4, 40)
"""Denoise steps of a video: some are through between two kills, some outlive several."""
PATIENCE_S = 240.0


@dataclass(slots=True)
class Outcome:
    kills: int = 0
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Id of every job that a server promised -> its seed and steps, by number."""
    ended: dict[str, set[str]] = field(default_factory=dict)
    """What was ever said of a job after its end: its digest, its times."""
    failed: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    """Ids that the list of videos shows at the end."""
    resumed: int = 0
    """Jobs that went on from the latents of a killed worker."""
    contents: dict[int, set[bytes]] = field(default_factory=dict)
    """Request number -> the bytes of its videos."""

    @property
    def lost(self) -> list[str]:
        """Promised, and not there as a whole video at the end."""
        return [job for job in self.acknowledged if job not in self.ended or job not in self.listed]

    @property
    def doubled(self) -> list[str]:
        """Shown twice, or made twice: a job that had ended was ended again."""
        shown = {job for job in self.listed if self.listed.count(job) > 1}
        return sorted(shown | {job for job, said in self.ended.items() if len(said) > 1})


class Replicas:
    """Two server processes on two ports; one that is killed is started again at once."""

    def __init__(self, starter: subprocess.Popen[str], count: int = 2) -> None:
        self.starter = starter
        self.ports = free_ports(count)
        self.pids = {port: self._start(port) for port in self.ports}

    def kill(self, port: int) -> None:
        kill(self.pids[port], signal.SIGKILL)
        self.pids[port] = self._start(port)

    def stop(self) -> None:
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)

    def _start(self, port: int) -> int:
        pipe_in, pipe_out = _pipes(self.starter)
        pipe_in.write(f"{port}\n")
        pipe_in.flush()
        return int(pipe_out.readline())


@contextmanager
def running_replicas(folder: Path, database_url: str) -> Generator[Replicas]:
    command = [sys.executable, "-m", "tests.chaos.replicas", str(folder), database_url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        replicas = Replicas(starter)
        try:
            yield replicas
        finally:
            replicas.stop()
            starter.kill()


def storm(folder: Path, database_url: str, *, kills: int, seed: int, longest_pause_s: float = 0.5) -> Outcome:
    """`kills` kills, each up to `longest_pause_s` after a new promise or three; then all is waited for."""
    outcome = Outcome()
    with running_replicas(folder, database_url) as replicas:
        over = threading.Event()
        client = threading.Thread(target=lambda: asyncio.run(_load(replicas.ports, outcome, over, seed)))
        client.start()
        source = random.Random(seed)
        try:
            _wait_until_ready(replicas.ports)
            for _ in range(kills):
                _wait_for_promises(outcome, source.randint(1, 3))
                time.sleep(source.uniform(0, longest_pause_s))
                replicas.kill(source.choice(replicas.ports))
                outcome.kills += 1
        finally:  # a storm that failed must not leave a thread that asks for ever
            over.set()
            client.join()
        asyncio.run(_settle(replicas.ports, outcome))
    logs = [path.read_text() for path in folder.glob("*.log")]
    outcome.resumed = sum(log.count(" goes on after step ") for log in logs)
    return outcome


def asked(number: int) -> dict[str, object]:
    """The request of that number: five unlike ones take turns, so that one request is made under many kills."""
    kind = number % 5
    steps = STEPS[0] + kind * (STEPS[1] - STEPS[0]) // 4
    return {"prompt": "a red circle moves right", "seed": kind, "num_inference_steps": steps}


async def _load(ports: Sequence[int], outcome: Outcome, over: threading.Event, seed: int) -> None:
    """Ask, and look at what was promised, at any replica; one that is down is no answer, and is asked again."""
    source, number = random.Random(seed + 1), 0
    async with httpx.AsyncClient(headers=HEADERS, timeout=5) as client:
        while not over.is_set():
            url = f"http://127.0.0.1:{source.choice(ports)}/v1/videos"
            with suppress(httpx.TransportError):
                if sum(job not in outcome.ended for job in outcome.acknowledged) < 8:
                    created = await client.post(url, json=asked(number))
                    if created.status_code == 200:
                        outcome.acknowledged[created.json()["id"]] = number % 5
                        number += 1
                for job in source.sample(sorted(outcome.acknowledged), min(4, len(outcome.acknowledged))):
                    _note(outcome, (await client.get(f"{url}/{job}")))
            await asyncio.sleep(0.05)


async def _settle(ports: Sequence[int], outcome: Outcome) -> None:
    """Every promise is looked up until its job has ended, each at another replica than before; then all are listed."""
    deadline = time.monotonic() + PATIENCE_S
    async with httpx.AsyncClient(headers=HEADERS, timeout=10) as client:
        turn = 0
        while time.monotonic() < deadline:
            missing = [job for job in outcome.acknowledged if job not in outcome.ended and job not in outcome.failed]
            if not missing:
                break
            for job in missing:
                turn += 1
                with suppress(httpx.TransportError):
                    _note(outcome, await client.get(f"http://127.0.0.1:{ports[turn % len(ports)]}/v1/videos/{job}"))
            await asyncio.sleep(0.1)
        url = f"http://127.0.0.1:{ports[0]}/v1/videos"
        page: dict[str, object] = {"has_more": True, "last_id": None}
        while page["has_more"]:
            after = {} if page["last_id"] is None else {"after": str(page["last_id"])}
            page = (await client.get(url, params={"limit": "100", "order": "asc", **after})).json()
            outcome.listed += [video["id"] for video in page["data"]]  # pyright: ignore
        for job, number in outcome.acknowledged.items():
            if job in outcome.ended:
                _note(outcome, await client.get(f"{url}/{job}"))
                content = await client.get(f"{url}/{job}/content")
                if content.status_code == 200:
                    outcome.contents.setdefault(number, set()).add(content.content)
                else:
                    outcome.ended.pop(job)


def _note(outcome: Outcome, answer: httpx.Response) -> None:
    if answer.status_code != 200:
        return
    video = answer.json()
    if video["status"] == "completed":
        outcome.ended.setdefault(video["id"], set()).add(f"{video['completed_at']} {video['expires_at']}")
    if video["status"] == "failed":
        outcome.failed[video["id"]] = video["error"]["code"]


def _wait_for_promises(outcome: Outcome, count: int) -> None:
    """However slow the machine is, so that every kill hits replicas that have work."""
    wanted, deadline = len(outcome.acknowledged) + count, time.monotonic() + PATIENCE_S
    while len(outcome.acknowledged) < wanted:
        assert time.monotonic() < deadline, "the replicas take no job"
        time.sleep(0.005)


def _wait_until_ready(ports: Sequence[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for port in ports:
        while True:
            assert time.monotonic() < deadline, "the replicas do not get ready"
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            time.sleep(0.1)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout

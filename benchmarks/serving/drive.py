"""The clients: requests sent at their times whatever becomes of earlier ones, and what was seen of each.

It owns the open loop and the processes it is offered to; it knows nothing of what the servers do. A video's latency
counts from when it was to be asked for, so a server that is slow to accept is not spared.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from benchmarks.contestants.serving_peers import JOB_SERVERS
from benchmarks.serving.load import Ask
from infra.serving.jobs.store import JobStore
from infra.serving.scheduling.outlook import Outlook
from tests.tiny_server import KEY

ROOT = Path(__file__).parent.parent.parent
HEADERS = {"authorization": f"Bearer {KEY}"}
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


@dataclass(frozen=True, slots=True)
class Call:
    """Of an engine."""

    began: float
    ended: float
    bucket: str
    rows: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a trace: seconds from asking to having, in the trace's order."""

    latencies: list[float]
    asked: list[float]
    """When each was to be asked for."""
    calls: list[Call]

    @property
    def seconds(self) -> float:
        """From the first request to the last video."""
        done = [at + latency for at, latency in zip(self.asked, self.latencies, strict=True)]
        return max(done) - self.asked[0]

    @property
    def idle_share(self) -> float:
        """Of that time, in which the engine did nothing."""
        return 1 - sum(call.ended - call.began for call in self.calls) / self.seconds


class Contestant:
    def __init__(self, name: str, folder: Path, url: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.folder = folder
        self.url = url
        self.process = process

    def wait_until_ready(self) -> None:
        url, deadline = f"{self.url}/{'ready' if self.name in JOB_SERVERS else 'health'}", time.monotonic() + 200
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"no answer of {url}: {(self.folder / 'log').read_text()[-2000:]}")

    def offer(self, asks: Sequence[Ask], *, a_second: float) -> Seen:
        """The trace at that rate, and then wait for its last video."""
        known = len(self.calls())
        asked, latencies = asyncio.run(self._offer(asks, a_second))
        return Seen(latencies, asked, self.calls()[known:])

    def alone(self, ask: Ask) -> float:
        """Seconds of one request to an idle server."""
        return self.offer([replace(ask, at=0.0)], a_second=1.0).latencies[0]

    def calls(self) -> list[Call]:
        lines = (line.split(" ") for line in (self.folder / "calls").read_text().splitlines())
        return [
            Call(float(began), float(ended), bucket, int(rows), tuple(ids.split(",")))
            for began, ended, bucket, rows, ids in lines
        ]

    def deliveries(self) -> Mapping[str, float]:
        """Seconds from a video's last step until it could be had, by bucket, as the server learnt them."""
        jobs = JobStore(f"sqlite:///{self.folder}/jobs.db")
        said = jobs.states(max_age_s=3600.0)
        jobs.close()
        return Outlook.from_json(said[0]).prices.deliveries

    async def _offer(self, asks: Sequence[Ask], a_second: float) -> tuple[list[float], list[float]]:
        began = time.time() + 0.1
        asked = [began + ask.at / a_second for ask in asks]
        send = self._send_job if self.name in JOB_SERVERS else self._send
        async with httpx.AsyncClient(base_url=self.url, headers=HEADERS, limits=LIMITS, timeout=None) as client:
            sends = [_at(when, lambda ask=ask: send(client, ask)) for when, ask in zip(asked, asks, strict=True)]
            answers = await asyncio.gather(*sends)
        if self.name in JOB_SERVERS:
            done = self._done_at()
            answers = [done[str(job_id)] for job_id in answers]
        return asked, [float(at) - when for at, when in zip(answers, asked, strict=True)]

    async def _send_job(self, client: httpx.AsyncClient, ask: Ask) -> str:
        answer = await client.post("/v1/videos", json=ask.body())
        return answer.raise_for_status().json()["id"]

    async def _send(self, client: httpx.AsyncClient, ask: Ask) -> float:
        answer = await client.post("/predict", json=ask.plain_body())
        answer.raise_for_status()
        return time.time()

    def _done_at(self) -> dict[str, float]:
        """Of every job, as its row says it: from then on the video can be downloaded."""
        jobs = JobStore(f"sqlite:///{self.folder}/jobs.db")
        while jobs.count("queued") + jobs.count("in_progress"):
            time.sleep(0.1)
        page = jobs.page(after=None, limit=100_000, order="asc").jobs
        jobs.close()
        failed = [
            f"{job.id}: {job.error_message}" for job in page if job.completed_at is None and job.state == "failed"
        ]
        if failed:
            raise RuntimeError(f"{self.name} failed {len(failed)} videos; the first is {failed[0]}")
        return {job.id: job.completed_at or 0.0 for job in page}


async def _at(when: float, send: Callable[[], Awaitable[str | float]]) -> str | float:
    await asyncio.sleep(when - time.time())
    return await send()


@contextmanager
def contestant(name: str, scratch: Path, peers: Path) -> Generator[Contestant, None, None]:
    """A server process of its own, which starts meanwhile."""
    folder = scratch / name
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.contestants.serving_peers", name, str(folder), str(port)]
    path = f"{ROOT}{os.pathsep}{peers.absolute()}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Contestant(name, folder, f"http://127.0.0.1:{port}", process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cancel_to_free(server: Contestant, *, videos: int, cancelled: int) -> list[int]:
    """Engine calls that began after a client's DELETE was sent and still held the video, for each of several."""
    ask = Ask(0.0, 32, 32, 8, 200, 3.0, None, False, 0)
    sent: dict[str, float] = {}
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        ids = [client.post("/v1/videos", json=ask.body()).raise_for_status().json()["id"] for _ in range(videos)]
        while any(client.get(f"/v1/videos/{id}").json()["progress"] < 2 for id in ids):
            time.sleep(0.05)
        for job_id in ids[:cancelled]:
            sent[job_id] = time.time()
            client.delete(f"/v1/videos/{job_id}").raise_for_status()
            time.sleep(0.2)
        for job_id in ids[cancelled:]:
            client.delete(f"/v1/videos/{job_id}").raise_for_status()
    calls = server.calls()
    return [sum(job_id in call.ids and call.began > at for call in calls) for job_id, at in sent.items()]

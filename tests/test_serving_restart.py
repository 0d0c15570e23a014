"""The server as its own process, killed without warning: nothing that was acknowledged is lost."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from infra.serving.jobs.store import JobStore
from tests.tiny_server import KEY

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.tiny_server", str(folder), str(port)], cwd=ROOT, stderr=log
        )
    try:
        wait_until_ready(process, port)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server was not ready in 150 s")


def test_a_killed_server_loses_no_job_and_a_stopped_one_finishes_what_runs(tmp_path: Path) -> None:
    port = free_port()
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
        with server(tmp_path, port) as process:
            early = client.videos.create_and_poll(prompt="a red circle", extra_body={"seed": 1})
            long = [
                client.videos.create(prompt="a red circle", extra_body={"seed": 1, "num_inference_steps": 30})
                for _ in range(4)
            ]
            while client.videos.retrieve(long[-1].id).status != "in_progress":
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with server(tmp_path, port) as process:
            done = [client.videos.poll(video.id, poll_interval_ms=100) for video in long]
            assert {video.status for video in done} == {"completed"}
            content = {client.videos.download_content(video.id).read() for video in long}
            assert "jobs of lost workers were taken back" in (tmp_path / "log").read_text()
            assert len(content) == 1  # one seed, one video, whether it was interrupted or not
            assert client.videos.retrieve(early.id).status == "completed"
            assert client.videos.download_content(early.id).read()[4:8] == b"ftyp"

            last = client.videos.create(prompt="a red circle", extra_body={"num_inference_steps": 20})
            while client.videos.retrieve(last.id).status == "queued":
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)
            log = (tmp_path / "log").read_text()
            assert f"job {last.id} completed" in log
            assert "0 jobs handed back" in log


def test_a_swap_under_load_drops_no_job_and_each_says_which_engine_made_it(tmp_path: Path) -> None:
    """SIGHUP to the real process: first with nothing to load, then with a new engine, while videos run and wait."""
    port, old, new = free_port(), "tiny" * 16, "new" * 20
    jobs = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    with (
        openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
        server(tmp_path, port) as process,
    ):

        def create(steps: int) -> str:
            return client.videos.create(prompt="a red circle", extra_body={"seed": 1, "num_inference_steps": steps}).id

        def log_says(words: str) -> None:
            deadline = time.monotonic() + 60
            while words not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)

        process.send_signal(signal.SIGHUP)
        log_says("the engine was not swapped, the old one goes on")
        before = [create(30) for _ in range(8)]
        while jobs.count("in_progress") < 4:
            time.sleep(0.01)
        (tmp_path / "swap").write_text(new)
        process.send_signal(signal.SIGHUP)
        log_says(f"new videos are made by engine {new[:12]}")
        running = {job_id for job_id in before if jobs.get(job_id).state != "queued"}
        after = [create(10) for _ in range(3)]
        while jobs.count("queued") + jobs.count("in_progress"):
            time.sleep(0.05)
        done = {job_id: jobs.get(job_id) for job_id in (*before, *after)}
        assert {job.state for job in done.values()} == {"completed"}
        assert done[before[0]].engine == old and {done[job_id].engine for job_id in after} == {new}
        assert {done[job_id].engine for job_id in before if job_id not in running} <= {new}
        for engine in (old, new):  # one seed: one video of each engine, whoever it shared calls with
            assert (
                len({job.artifacts["video"] for job in done.values() if job.engine == engine and job.id in before}) < 2
            )
    jobs.close()

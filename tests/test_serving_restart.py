"""The server as its own process, killed without warning: nothing that was acknowledged is lost, and nobody who waits
for a webhook waits in vain."""

import base64
import json
import signal
import time
from pathlib import Path

import openai

from infra.serving.jobs.store import JobStore
from tests.s3_server import free_ports
from tests.server_process import server_process
from tests.tiny_server import KEY
from tests.webhook_receiver import receiving

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


def test_a_killed_server_loses_no_job_and_a_stopped_one_finishes_what_runs(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with (
        receiving(SECRET) as receiver,
        openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
    ):
        told = {"webhook_url": receiver.url, "webhook_secret": SECRET}
        receiver.answers = [503] * 1000  # hears nothing of the first server
        with server_process(tmp_path, port, **told) as process:
            early = client.videos.create_and_poll(prompt="a red circle", extra_body={"seed": 1})
            long = [
                client.videos.create(prompt="a red circle", extra_body={"seed": 1, "num_inference_steps": 30})
                for _ in range(4)
            ]
            while client.videos.retrieve(long[-1].id).status != "in_progress":
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert receiver.taken == []
        receiver.answers.clear()
        with server_process(tmp_path, port, **told) as process:
            done = [client.videos.poll(video.id, poll_interval_ms=100) for video in long]
            assert {video.status for video in done} == {"completed"}
            content = {client.videos.download_content(video.id).read() for video in long}
            assert "jobs of lost workers were taken back" in (tmp_path / "log").read_text()
            assert len(content) == 1  # one seed, one video, whether it was interrupted or not
            assert client.videos.retrieve(early.id).status == "completed"
            assert client.videos.download_content(early.id).read()[4:8] == b"ftyp"

            wanted = {f"evt_{video.id.removeprefix('video_')}": video.id for video in [early, *long]}
            deadline = time.monotonic() + 60
            while {message_id for message_id, _ in receiver.taken} < wanted.keys():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for message_id, body in receiver.taken:  # perhaps twice, then under the same id
                event = json.loads(body)
                assert (event["id"], event["type"]) == (message_id, "video.completed")
                assert event["data"]["id"] == wanted[message_id]

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
    (port,), old, new = free_ports(1), "tiny" * 16, "new" * 20
    jobs = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    with (
        openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
        server_process(tmp_path, port) as process,
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

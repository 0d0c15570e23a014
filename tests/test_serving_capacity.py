"""What the simulator foretells, against the server itself; and what is asked of it before replicas are bought."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import NewJob
from infra.serving.scheduling.capacity import faster, forecast, percentile
from infra.serving.scheduling.cost import Prices
from infra.serving.scheduling.simulator import Arrival
from infra.serving.worker.worker import Worker
from infra.store.folder import FolderStore
from tests.tiny_server import request, tiny_pipeline, tiny_settings

SMALL = "8x32x32"
KNOWN = Prices(buckets={SMALL: (1.0, 0.1)}, deliveries={SMALL: 0.5})


def arrivals(count: int, every_s: float) -> list[Arrival]:
    return [Arrival(f"job{place}", SMALL, 10, 2, 100 + every_s * place) for place in range(count)]


def test_more_replicas_make_the_same_traffic_faster_until_nobody_waits() -> None:
    told = [forecast(arrivals(40, 1.0), KNOWN, replicas=count, max_rows=4) for count in (1, 2, 4, 40)]
    assert [one.videos for one in told] == [40] * 4
    assert told[0].p50_s > told[1].p50_s > told[2].p50_s >= told[3].p50_s == pytest.approx(10 * 1.2 + 0.5)
    assert told[0].in_time < told[1].in_time < told[3].in_time == 1.0
    assert told[0].busy > 0.95 > told[3].busy


def test_twice_the_load_is_the_same_requests_in_half_the_time() -> None:
    late = Arrival("late", SMALL, 10, 2, 200.0, deadline_at=230.0)
    moved = faster([*arrivals(3, 10.0), late], 2.0)
    assert [one.created_at for one in moved] == [100.0, 105.0, 110.0, 150.0]
    assert moved[-1].deadline_at == 180.0
    with pytest.raises(ValueError, match="no request to forecast from"):
        forecast([], KNOWN, replicas=1, max_rows=4)


def test_the_simulator_foretells_the_server_and_the_command_says_so(tmp_path: Path) -> None:
    """Jobs of two shapes at once on the real worker; then `stiv capacity` of what its database remembers."""
    jobs = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    worker = Worker(
        jobs, tiny_pipeline(), JobFiles(jobs.database, FolderStore(tmp_path / "store")), tiny_settings(tmp_path)
    )
    for place in range(10):
        body = request(num_inference_steps=(10, 20, 40)[place % 3], width=(32, 64)[place % 2], seed=place)
        jobs.create(NewJob(body, model="stiv-tiny", inputs={}), max_queued=99)
    worker.start()
    while jobs.count("queued") + jobs.count("in_progress"):
        time.sleep(0.05)
    outlook = worker.floor.scheduler.outlook()
    jobs.publish_state(worker.endings.owner, outlook.to_json())
    worker.stop()
    made = jobs.page(after=None, limit=100, order="asc").jobs
    began = min(job.started_at or 0 for job in made)
    waits = [(job.completed_at or 0) - began for job in made]
    told = forecast(jobs.history(since=0.0), outlook.prices, replicas=1, max_rows=outlook.max_rows)
    jobs.close()
    assert outlook.prices.deliveries.keys() == {SMALL, "8x32x64"}
    assert told.videos == 10
    assert told.p95_s == pytest.approx(percentile(waits, 95), rel=0.5)
    assert told.p50_s == pytest.approx(percentile(waits, 50), rel=0.6)

    command = [sys.executable, "-m", "flows.cli", "capacity", f"sqlite:///{tmp_path}/jobs.db", "--replicas", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line for line in said.splitlines() if line.startswith("│")]
    assert len(rows) == 2 and "%" in rows[0]
    nothing = subprocess.run([*command, "--hours", "0"], capture_output=True, text=True)
    assert nothing.returncode == 1 and "no request was made in the last 0 hours" in nothing.stderr

"""The worker with all its threads, on real stores and databases; faults are those of real parts."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import text

from infra.serving import media
from infra.serving.golden import GoldenMismatch, write_golden
from infra.serving.jobs.files import JobFiles
from infra.serving.jobs.owner import new_owner
from infra.serving.jobs.store import JobStore
from infra.serving.jobs.table import Job, NewJob
from infra.serving.limits import VideoRequest
from infra.serving.pipeline import VideoPipeline
from infra.serving.worker.worker import Worker
from infra.store.artifacts import blob_key
from infra.store.folder import FolderStore
from model.vae import PatchPca
from tests.tiny_server import CLIP, WordEncoder, image, request, tiny_pipeline, tiny_recipe, tiny_settings


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return tiny_pipeline()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


@pytest.fixture
def files(jobs: JobStore, tmp_path: Path) -> JobFiles:
    return JobFiles(jobs.database, FolderStore(tmp_path / "store"))


@pytest.fixture
def create(jobs: JobStore) -> Callable[..., Job]:
    def create(body: VideoRequest | None = None, **inputs: str) -> Job:
        return jobs.create(NewJob(body or request(), model="stiv-tiny", inputs=inputs), max_queued=99)

    return create


@pytest.fixture
def working(jobs: JobStore, pipeline: VideoPipeline, files: JobFiles, tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def working(other: VideoPipeline | None = None, **settings: object) -> Iterator[Worker]:
        told = tiny_settings(tmp_path, **{"drain_s": 60, "idle_poll_s": 0.02, "max_rows": 3, **settings})
        worker = Worker(jobs, other or pipeline, files, told)
        worker.start()
        try:
            yield worker
        finally:
            worker.stop()

    return working


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(jobs: JobStore) -> Callable[[], bool]:
    def over() -> bool:
        page = jobs.page(after=None, limit=100, order="asc")
        return all(job.state in ("completed", "failed") for job in page.jobs)

    return over


def states(jobs: JobStore, created: Sequence[Job]) -> list[str]:
    return [jobs.get(job.id).state for job in created]


def with_codec(pipeline: VideoPipeline, broken: Callable[[torch.Tensor], torch.Tensor]) -> VideoPipeline:
    """The same pipeline, except for what becomes of decoded frames."""

    class Codec(PatchPca):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return broken(super().decode(latents))

    whole = pipeline.codec
    assert isinstance(whole, PatchPca)
    codec = Codec.__new__(Codec)
    codec.__dict__.update(whole.__dict__)
    return VideoPipeline(pipeline.engine, codec, pipeline.text_encoder, pipeline.recipe, digest=pipeline.digest)


def test_all_jobs_are_made_and_a_video_made_in_company_is_the_video_made_alone(
    working: Callable[..., Any], jobs: JobStore, files: JobFiles, create: Callable[..., Job]
) -> None:
    digest = files.keep_bytes(image())
    alone = create(request(seed=3), image=digest)
    with working() as worker:
        until(ended(jobs))
        company = [create(request(seed=4)), create(request(seed=3), image=digest), create(request("blue", seed=5))]
        company += [create(request(num_inference_steps=9, guidance_scale=7.0))]
        until(ended(jobs))
        assert worker.state == "ready"
    assert states(jobs, [alone, *company]) == ["completed"] * 5
    videos = [files.read(jobs.get(job.id).artifacts["video"]) for job in (alone, company[1])]
    assert videos[0] == videos[1]
    assert videos[0][4:8] == b"ftyp" and videos[0].index(b"moov") < videos[0].index(b"mdat")
    assert jobs.get(company[0].id).artifacts["video"] != jobs.get(alone.id).artifacts["video"]
    assert jobs.get(alone.id).engine == worker.pipeline.digest
    assert set(jobs.get(alone.id).artifacts) == {"video", "thumbnail", "spritesheet"}


def test_whatever_breaks_in_one_job_its_batch_mates_are_made(
    working: Callable[..., Any],
    jobs: JobStore,
    files: JobFiles,
    pipeline: VideoPipeline,
    create: Callable[..., Job],
    tmp_path: Path,
) -> None:
    """Not a number, a call that raises, texts and inputs that cannot be read, undecodable frames, odd sizes."""

    class Encoder(WordEncoder):
        def encode(self, texts: Sequence[str]) -> Any:
            if "UNREADABLE" in texts[0]:
                raise RuntimeError("no such word")
            return super().encode(texts)

    def broken(frames: torch.Tensor) -> torch.Tensor:
        if frames.shape[-1] == 64:
            raise RuntimeError("the decoder ran out of memory")
        return frames[..., :-1] if frames.shape[-1] == 48 else frames  # an odd width is no H.264 video

    corrupt = files.keep_bytes(image())
    blob = tmp_path / "store" / blob_key(corrupt)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    bad = {
        "generation_diverged": create(request("NAN")),
        "internal_error": create(request("EXPLODE")),
        "input_lost": create(image="0" * 64),
        "input_lost ": create(image=corrupt),
        "internal_error ": create(request("UNREADABLE")),
        "internal_error  ": create(request(width=64)),
        "internal_error   ": create(request(width=48)),
    }
    good = [create(request(seed=seed, num_inference_steps=6)) for seed in range(3)]
    served = with_codec(pipeline, broken)
    served.text_encoder = Encoder()
    with working(served, max_rows=8, preview_every_s=0):
        until(ended(jobs))
        last = create()
        until(ended(jobs))
    assert states(jobs, [*good, last]) == ["completed"] * 4
    found = {code: jobs.get(job.id) for code, job in bad.items()}
    assert {code: (job.state, job.error_code) for code, job in found.items()} == {
        code: ("failed", code.strip()) for code in bad
    }
    assert "guidance_scale" in (found["generation_diverged"].error_message or "")
    assert "memory" not in str([job.error_message for job in found.values()])


def test_a_cancelled_job_leaves_and_the_others_go_on(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    here, elsewhere, other = (create(request(num_inference_steps=steps)) for steps in (200, 200, 6))
    with working() as worker:
        until(lambda: jobs.count("in_progress") == 3)
        jobs.delete(here.id)
        worker.cancel(here.id)  # as the API of this process says
        jobs.delete(elsewhere.id)  # as another replica does
        until(ended(jobs))
        until(lambda: not worker.floor.rows)
    assert jobs.get(other.id).state == "completed"
    assert jobs.count("deleted") == 2


def test_progress_and_a_preview_are_told_on_the_way(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    job, seen, previews = create(request(num_inference_steps=40)), [0], set[bytes | None]()
    with working(preview_every_s=0):
        while (found := jobs.get(job.id)).state != "completed":
            seen.append(found.progress)
            previews.add(jobs.preview(job.id))
            time.sleep(0.01)
    assert seen == sorted(seen) and 0 < seen[-1] < 100 and len(set(seen)) > 3
    assert len(previews - {None}) > 1
    assert all(preview[:4] == b"RIFF" for preview in previews if preview)


def test_a_stopping_worker_finishes_what_runs_and_leaves_the_queue(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    running = [create(request(num_inference_steps=20)) for _ in range(3)]
    with working() as worker:
        until(lambda: len(worker.floor.rows) == 3)
        worker.drain()
        waiting = create()
    assert worker.state == "stopped"
    assert states(jobs, [*running, waiting]) == ["completed"] * 3 + ["queued"]


def test_a_job_handed_back_goes_on_where_it_was_and_gives_the_same_video(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    asked = request(num_inference_steps=40, seed=11)
    undisturbed = create(asked)
    with working():
        until(ended(jobs))
    job = create(asked)
    with working(drain_s=0, keep_latents_steps=1000) as worker:
        until(lambda: (held := worker.held.find(job.id)) and held.progress > 30)
    back = jobs.get(job.id)
    assert (back.state, back.attempts) == ("queued", 0)
    assert 12 <= back.kept_step < 40
    with working():
        until(ended(jobs))
    assert jobs.get(job.id).artifacts["video"] == jobs.get(undisturbed.id).artifacts["video"]
    assert jobs.latents(job.id) is None


def test_a_job_of_another_engine_begins_anew(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    asked = request(num_inference_steps=20)
    job = create(asked)
    other = tiny_pipeline()
    other.digest = "other" * 12
    with working(drain_s=0) as worker:
        until(lambda: (held := worker.held.find(job.id)) and held.progress > 30)
    assert jobs.get(job.id).kept_step > 0
    twin = create(asked)
    with working(other):
        until(ended(jobs))
    done = jobs.get(job.id)
    assert (done.engine, done.artifacts["video"]) == (other.digest, jobs.get(twin.id).artifacts["video"])


def test_a_slow_delivery_does_not_keep_the_engine_waiting(
    working: Callable[..., Any], jobs: JobStore, pipeline: VideoPipeline, create: Callable[..., Job]
) -> None:
    """A decoder that stands still until the engine is through with all that there is."""
    engine_is_through = threading.Event()

    def slow(frames: torch.Tensor) -> torch.Tensor:
        assert engine_is_through.wait(100)
        return frames

    first = [create(request(num_inference_steps=2)) for _ in range(4)]
    long = create(request(num_inference_steps=30))
    with working(with_codec(pipeline, slow), max_rows=5, preview_every_s=60) as worker:
        until(lambda: (held := worker.held.find(long.id)) and held.row and held.row.done)
        assert states(jobs, first) == ["in_progress"] * 4
        engine_is_through.set()
        until(ended(jobs))
    assert states(jobs, [*first, long]) == ["completed"] * 5


def test_an_outage_of_the_database_or_the_store_pauses_and_loses_nothing(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job], tmp_path: Path
) -> None:
    created = [create(request(seed=seed, num_inference_steps=10)) for seed in range(4)]
    with working(max_rows=2):
        until(lambda: jobs.count("in_progress") >= 2)
        with jobs.database.write() as session:  # gone for as long as this transaction lasts, as others see it
            session.execute(text("alter table video_jobs rename to video_jobs_away"))
            session.commit()
        time.sleep(0.5)
        with jobs.database.write() as session:
            session.execute(text("alter table video_jobs_away rename to video_jobs"))
        (tmp_path / "store" / "cas").rename(tmp_path / "away") if (tmp_path / "store" / "cas").exists() else None
        (tmp_path / "store" / "cas").write_text("a file where a folder was")
        time.sleep(0.5)
        assert jobs.count("failed") == 0
        (tmp_path / "store" / "cas").unlink()
        (tmp_path / "away").rename(tmp_path / "store" / "cas") if (tmp_path / "away").exists() else None
        until(ended(jobs))
    assert states(jobs, created) == ["completed"] * 4


def test_a_lease_whose_answer_was_lost_is_given_back(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    with working(max_rows=1) as worker:
        until(lambda: worker.state == "ready")
        job = create()
        jobs.lease(worker.endings.owner, [job.id])  # as if the answer had not arrived
        until(ended(jobs))
    assert jobs.get(job.id).state == "completed"


def test_new_jobs_go_to_the_new_engine_while_running_ones_end_with_the_old(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    new = tiny_pipeline()
    new.digest = "new" * 20
    with torch.no_grad():
        new.engine.network.patch_embedding.weight.mul_(1.1)  # pyright: ignore
    with working() as worker:
        before = create(request(num_inference_steps=40))
        until(lambda: (held := worker.held.find(before.id)) and held.progress > 5)
        worker.swap(lambda: new)
        after = create(request(num_inference_steps=40))
        until(ended(jobs))
    assert [jobs.get(job.id).engine for job in (before, after)] == ["tiny" * 16, "new" * 20]
    assert jobs.get(before.id).artifacts["video"] != jobs.get(after.id).artifacts["video"]


def test_an_engine_that_serves_something_else_or_draws_wrong_is_not_swapped_in(
    working: Callable[..., Any], pipeline: VideoPipeline, tmp_path: Path
) -> None:
    small = tiny_recipe().model_copy(update={"video": tiny_recipe().video.model_copy(update={"num_frames": 4})})
    write_golden(pipeline, tmp_path / "golden.safetensors")
    wrong = tiny_pipeline()
    wrong.golden = tmp_path / "golden.safetensors"
    with torch.no_grad():
        wrong.engine.network.patch_embedding.weight.mul_(1.5)  # pyright: ignore
    with working() as worker:
        with pytest.raises(ValueError, match="takes other shapes"):
            worker.swap(lambda: tiny_pipeline(small))
        with pytest.raises(GoldenMismatch, match="off its golden"):
            worker.swap(lambda: wrong)
        assert worker.pipeline is pipeline


def test_a_worker_is_ready_only_after_a_warm_up_like_its_golden(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job], tmp_path: Path
) -> None:
    golden = tmp_path / "golden.safetensors"
    served, broken = tiny_pipeline(), tiny_pipeline()
    write_golden(served, golden)
    served.golden = broken.golden = golden
    with torch.no_grad():
        broken.engine.network.patch_embedding.weight.fill_(torch.nan)  # pyright: ignore
    job = create()
    with working(broken) as worker:
        until(lambda: worker.state == "failed")
        assert jobs.get(job.id).state == "queued"
    with working(served):
        until(ended(jobs))
    assert jobs.get(job.id).state == "completed"


def test_files_are_deleted_when_the_last_job_that_needs_them_is_over(
    working: Callable[..., Any], jobs: JobStore, files: JobFiles, create: Callable[..., Job]
) -> None:
    upload = files.keep_bytes(image())
    first, twin = create(image=upload), create(image=upload)
    with working(retention_s=1000):
        until(ended(jobs))
    video = jobs.get(first.id).artifacts["video"]
    assert jobs.get(twin.id).artifacts["video"] == video
    jobs.delete(first.id)
    assert files.delete_expired() == 0
    assert files.read(video)[4:8] == b"ftyp"
    with jobs.database.write() as session:  # a thousand seconds later
        session.execute(text("update video_files set expires_at = expires_at - 100000"))
    assert files.delete_expired() == 4  # the upload, the video, its thumbnail and its sprite sheet
    assert files.store.list("cas") == []


def test_a_video_continues_a_given_one_from_its_last_frames(pipeline: VideoPipeline, tmp_path: Path) -> None:
    media.write_frames(tmp_path / "source", CLIP, 8)
    asked = request(source_frames=8, given_frames=2, surplus_frames=1)
    row = pipeline.prepare("job", asked, {"video": (tmp_path / "source").read_bytes()})
    assert row.image.frame_mask.tolist() == [[True, True] + [False] * 6]
    while not row.done:
        pipeline.advance([row])
    clip = pipeline.decode(row)
    assert len(clip) == 8 + 8 - 2 - 1 == asked.delivered_frames
    assert np.array_equal(clip[:8], CLIP)


def test_a_dead_worker_without_kept_latents_is_no_loss(
    working: Callable[..., Any], jobs: JobStore, create: Callable[..., Job]
) -> None:
    job, twin = create(), create()
    jobs.lease(new_owner(), [job.id])
    jobs.requeue_abandoned(lease_s=-1)
    with working():
        until(ended(jobs))
    assert jobs.get(job.id).artifacts["video"] == jobs.get(twin.id).artifacts["video"]

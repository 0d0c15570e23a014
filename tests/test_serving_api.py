import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from infra.serving.http.videos import poll_after_ms
from infra.serving.jobs.table import Job
from infra.serving.pipeline import VideoPipeline
from tests.tiny_server import BODY_LIMIT, CLIP, Running, encoded, serving, tiny_pipeline, tiny_recipe


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, pipeline: VideoPipeline) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), pipeline) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client as client:
        yield client


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with running.http as client:
        yield client


def decoded(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def refused(call: Callable[[], object]) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert isinstance(caught.value.body, dict)  # the client found an `error` object in the answer
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    return caught.value


def test_text_to_video_from_request_to_download(client: openai.OpenAI) -> None:
    created = client.videos.create(prompt="a red circle moves right")
    assert created.object == "video"
    assert (created.status, created.progress, created.model) == ("queued", 0, "stiv-tiny")
    assert (created.seconds, created.size, created.prompt) == ("1", "32x32", "a red circle moves right")
    done = client.videos.poll(created.id)
    assert (done.id, done.status, done.progress, done.error) == (created.id, "completed", 100, None)
    assert done.completed_at is not None and done.expires_at is not None
    assert created.created_at <= done.completed_at < done.expires_at
    assert decoded(client.videos.download_content(created.id).read()).shape == (8, 32, 32, 3)


def test_image_to_video_keeps_its_first_frame(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(
        prompt="a red circle moves right",
        input_reference=("first.png", encoded(CLIP[0]), "image/png"),
        size="32x32",  # pyright: ignore[reportArgumentType]
        seconds="1",  # pyright: ignore[reportArgumentType]
        extra_body={"seed": 7},
    )
    assert done.status == "completed"
    video = decoded(client.videos.download_content(done.id, variant="video").read())
    assert np.abs(video[0].astype(int) - CLIP[0]).mean() < 14
    assert np.abs(video[4].astype(int) - CLIP[4]).mean() > 14


def test_extras_are_taken_as_form_fields(client: openai.OpenAI) -> None:
    extras: dict[str, Any] = {
        "num_frames": 4, "fps": 2, "num_inference_steps": 2, "guidance_scale": 6.5, "seed": 7,
        "negative_prompt": "blurry", "flow_shift": 2,
    }  # fmt: skip
    body = {"prompt": "a green square", "size": "64x48", "extra_body": extras}
    first, second = (client.videos.create_and_poll(**body) for _ in range(2))
    assert (first.seconds, first.size) == ("2", "64x48")
    videos = [client.videos.download_content(video.id).read() for video in (first, second)]
    assert decoded(videos[0]).shape == (4, 48, 64, 3)
    assert videos[0] == videos[1]


def test_a_json_body_is_read_too(http: httpx.Client) -> None:
    answer = http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 2, "seed": 1})
    assert answer.status_code == 200
    assert answer.json()["status"] == "queued"
    assert set(answer.json()) == {
        "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "seconds", "size",
        "prompt", "remixed_from_video_id", "error",
    }  # fmt: skip


def test_two_at_once_are_the_same_as_each_alone(client: openai.OpenAI) -> None:
    def create(seed: int) -> openai.types.Video:
        return client.videos.create(prompt="a red circle moves right", extra_body={"seed": seed})

    def video(job: openai.types.Video) -> bytes:
        assert client.videos.poll(job.id).status == "completed"
        return client.videos.download_content(job.id).read()

    alone = [video(create(seed)) for seed in (1, 2)]
    assert [video(job) for job in [create(1), create(2)]] == alone


def test_variants_are_pictures_of_the_video(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(prompt="a red circle", input_reference=encoded(CLIP[0]))
    thumbnail = client.videos.download_content(done.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    picture = Image.open(io.BytesIO(thumbnail.read()))
    assert (picture.format, picture.size) == ("WEBP", (32, 32))
    sheet = Image.open(io.BytesIO(client.videos.download_content(done.id, variant="spritesheet").read()))
    assert (sheet.format, sheet.size) == ("JPEG", (96, 96))
    error = refused(lambda: client.videos.download_content(done.id, variant="poster"))  # pyright: ignore
    assert (error.status_code, error.param) == (400, "variant")
    assert "'video', 'thumbnail' or 'spritesheet'" in error.message


def test_a_list_is_paged_through_in_both_orders(client: openai.OpenAI) -> None:
    ids = [client.videos.create(prompt="a red circle", extra_body={"num_frames": 2}).id for _ in range(5)]
    newest = client.videos.list(limit=2)
    assert [video.id for video in newest.data] == [ids[4], ids[3]]
    assert newest.has_more
    assert [video.id for video in client.videos.list(limit=2)][:5] == ids[::-1]
    assert [video.id for video in client.videos.list(after=ids[1], order="asc", limit=100)] == ids[2:]
    assert refused(lambda: client.videos.list(limit=101)).param == "limit"
    assert refused(lambda: client.videos.list(order="up")).param == "order"  # pyright: ignore
    assert refused(lambda: client.videos.list(after="video_none")).param == "after"


def test_an_empty_page_has_no_ids(http: httpx.Client, client: openai.OpenAI) -> None:
    last = client.videos.create(prompt="a red circle").id
    page = http.get("/v1/videos", params={"after": last, "order": "asc"}).json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_deleted_video_is_gone(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(prompt="a red circle")
    deleted = client.videos.delete(done.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (done.id, "video.deleted", True)
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        error = refused(lambda call=call: call(done.id))
        assert (error.status_code, error.code) == (404, "video_not_found")
    assert done.id not in [video.id for video in client.videos.list(limit=100)]


def test_deleting_a_running_video_cancels_it(client: openai.OpenAI, http: httpx.Client) -> None:
    long = client.videos.create(prompt="a red circle", extra_body={"num_inference_steps": 200, "num_frames": 32})
    while client.videos.retrieve(long.id).status == "queued":
        time.sleep(0.01)
    client.videos.delete(long.id)
    deadline = time.monotonic() + 30
    while "stiv_jobs_running 0.0" not in http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_failed_job_is_an_answer_and_not_an_error(client: openai.OpenAI) -> None:
    failed = client.videos.create_and_poll(prompt="NAN")
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "generation_diverged"
    error = refused(lambda: client.videos.download_content(failed.id))
    assert (error.status_code, error.code) == (400, "video_not_completed")
    assert "'failed'" in error.message


def test_polling_is_told_when_to_come_again(client: openai.OpenAI) -> None:
    job = client.videos.create(prompt="a red circle")
    header = client.videos.with_raw_response.retrieve(job.id).headers["openai-poll-after-ms"]
    assert 200 <= int(header) <= 5000
    queued = Job(state="queued", progress=0, created_at=100.0)
    assert [poll_after_ms(queued, now=now) for now in (100.1, 104.0, 900.0)] == [200, 1000, 5000]
    expected = Job(state="in_progress", progress=25, created_at=90.0, estimated_done_at=110.0)
    assert [poll_after_ms(expected, now=now) for now in (100.0, 108.5, 112.0)] == [5000, 1500, 200]


IMAGE = ("a.png", encoded(CLIP[0]), "image/png")


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "words"),
    [
        ({"prompt": ""}, 400, "prompt", "invalid_prompt", "at least 1 character"),
        ({"prompt": "word " * 77}, 400, "prompt", "invalid_prompt", "78 tokens"),
        ({"size": "33x32"}, 400, "size", "invalid_size", "multiples of 16"),
        ({"size": "1280x720"}, 400, "size", "invalid_size", "at most 128 wide"),
        ({"seconds": "12"}, 400, "seconds", "invalid_seconds", "at most 32"),
        ({"extra_body": {"num_frames": 64}}, 400, "num_frames", "invalid_num_frames", "at most 32"),
        ({"extra_body": {"num_frames": 7}}, 400, "num_frames", "invalid_num_frames", "6 or 8"),
        ({"extra_body": {"steps": 5}}, 400, "steps", "unknown_field", "num_inference_steps"),
        ({"model": "sora-2"}, 404, "model", "model_not_found", "serves 'stiv-tiny'"),
        ({"input_reference": b""}, 400, "input_reference", "invalid_image", "0 bytes"),
        ({"input_reference": b"GIF89a" * 9}, 400, "input_reference", "invalid_image", "PNG, JPEG, WEBP"),
        ({"input_reference": IMAGE[1][:-30]}, 400, "input_reference", "invalid_image", "undamaged"),
        ({"input_reference": encoded(np.zeros((400, 400, 3), np.uint8))}, 400, "input_reference", "invalid_image",
         "400x400 = 160000 pixels, at most 100000"),
        ({"input_reference": b"x" * (BODY_LIMIT + 1)}, 413, None, "request_too_large", f"{BODY_LIMIT} bytes"),
        ({"input_reference": b"x" * 20_000_000}, 413, None, "request_too_large", "smaller file"),
        ({"extra_body": {"input_reference": "https://example.com/a.png"}}, 400, "input_reference",
         "invalid_input_reference", "data:image/png"),
        ({"extra_body": {"input_reference[image_url]": "https://example.com/a.png"}}, 400, "input_reference",
         "invalid_input_reference", "not fetched"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_the_envelope(
    client: openai.OpenAI, fields: dict[str, Any], status: int, param: str | None, code: str, words: str
) -> None:
    before = [video.id for video in client.videos.list(limit=1).data]
    error = refused(lambda: client.videos.create(**{"prompt": "a red circle", **fields}))
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.type == "invalid_request_error"
    assert words in error.message
    assert [video.id for video in client.videos.list(limit=1).data] == before


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"content": b"[1]", "headers": {"content-type": "application/json"}}, 400, "JSON object"),
        ({"content": b"prompt=x", "headers": {"content-type": "text/plain"}}, 415, "'text/plain'"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "multipart"),
        ({"json": {"prompt": "x", "input_reference": {"image_url": "https://example.com"}}}, 400, "not fetched"),
        ({"json": {"prompt": ["x"]}}, 400, "prompt"),
        ({"json": {"prompt": "x\0"}}, 400, "NUL"),
        ({"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, "unicode"),
        ({"content": b"[" * 200_000, "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
        ({"files": [("prompt", (None, "a")), ("prompt", (None, "b"))]}, 400, "sent twice"),
        ({"files": [("prompt", (None, "a")), ("mask", IMAGE)]}, 400, "'mask'"),
        ({"files": [("input_reference", IMAGE), ("input_reference", IMAGE)]}, 400, "multipart"),
        ({"files": [(f"f{n}", (None, "a")) for n in range(60)]}, 400, "multipart"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    http: httpx.Client, sent: dict[str, Any], status: int, words: str
) -> None:
    answer = http.post("/v1/videos", **sent)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_an_upload_of_unknown_length_is_cut_off(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    answer = http.post("/v1/videos", content=endless(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_wrong_key_is_refused_and_probes_need_none(running: Running) -> None:
    for key in ("sk-wrong", "sk-tes", "schlüssel"):
        header = {b"authorization": f"Bearer {key}".encode()}
        answer = httpx.get(f"{running.url}/v1/videos", headers=header)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with openai.OpenAI(api_key="sk-wrong", base_url=f"{running.url}/v1", max_retries=0) as client:
        error = refused(lambda: client.videos.create(prompt="a red circle"))
    assert isinstance(error, openai.AuthenticationError) and "the API key is not known" in error.message
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").json() == {"status": "ready"}


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stiv-tiny"]


def test_every_answer_to_a_wrong_address_is_the_envelope(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/nowhere", 404),
        ("GET", "/v1/videos/", 404),
        ("PUT", "/v1/videos", 405),
        ("POST", "/v1/videos/video_x", 405),
        ("GET", "/v1/videos/..%2f..%2fetc", 404),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_count_jobs_and_routes_but_name_no_video(client: openai.OpenAI, http: httpx.Client) -> None:
    done = client.videos.create_and_poll(prompt="a red circle")
    page = http.get("/metrics").text
    assert 'stiv_engine_info{digest="tinytinytiny",engine="SteadyEngine",stage="tiny"} 1.0' in page
    for line in (
        'stiv_jobs_total{outcome="completed"}',
        'stiv_http_requests_total{method="GET",route="/v1/videos/{video_id}",status="200"}',
        'stiv_request_rejected_total{reason="invalid_size"}',
        'stiv_stage_seconds_count{stage="decode"}',
        "stiv_denoise_batch_rows_bucket",
        "stiv_queue_depth",
    ):
        assert line in page, line
    assert done.id not in page


def test_the_openapi_document_describes_both_bodies(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    bodies = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data"}
    assert "input_reference" in json.dumps(bodies["multipart/form-data"])


def test_a_full_queue_answers_429_with_a_time_to_wait(tmp_path: Path, pipeline: VideoPipeline) -> None:
    settings = {"max_rows": 1, "max_queued": 1, "drain_s": 0}
    with serving(tmp_path, pipeline, **settings) as running, running.client as client:
        long: dict[str, Any] = {"prompt": "a circle", "extra_body": {"num_inference_steps": 200, "num_frames": 32}}
        first = client.videos.create(**long)
        while client.videos.retrieve(first.id).status == "queued":
            time.sleep(0.01)
        error = refused(lambda: [client.videos.create(**long) for _ in range(100)])
        assert isinstance(error, openai.RateLimitError)
        assert (error.code, error.type) == ("queue_full", "rate_limit_error")
        assert int(error.response.headers["retry-after"]) >= 1


def test_content_expires(tmp_path: Path, pipeline: VideoPipeline) -> None:
    with serving(tmp_path, pipeline, retention_s=0.01) as running, running.client as client:
        done = client.videos.create_and_poll(prompt="a red circle")
        time.sleep(0.05)
        error = refused(lambda: client.videos.download_content(done.id))
        assert (error.status_code, error.code) == (404, "video_expired")


def test_a_model_trained_on_text_alone_refuses_an_image(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tiny_recipe(task="t2v"))
    with serving(tmp_path, pipeline, api_keys=[], model_name="mine") as running, running.client as client:
        error = refused(lambda: client.videos.create(prompt="a red circle", input_reference=IMAGE))
        assert (error.code, error.param) == ("image_not_supported", "input_reference")
        assert client.videos.create(prompt="a red circle", model="mine").model == "mine"


def test_a_bug_is_answered_in_the_envelope_without_its_cause(
    tmp_path: Path, pipeline: VideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, pipeline) as running, running.client as client:
        done = client.videos.create_and_poll(prompt="a red circle")
        for path in (tmp_path / "store").rglob("*"):
            if path.is_file():
                path.write_bytes(b"flipped")
        error = refused(lambda: client.videos.download_content(done.id))
        assert (error.status_code, error.code, error.type) == (500, "internal_error", "server_error")
        assert "flipped" not in error.message and str(tmp_path) not in error.message
    assert "is corrupt" in caplog.text  # once the server has stopped: it answers first and logs then

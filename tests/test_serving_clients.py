"""Who asks and on what terms: the SDK's further calls, keys, quotas, idempotency, events and webhooks."""

import base64
import hashlib
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest

from infra.serving.clients.keys import ApiKey, KeyRing, RateLimit, new_key, read_keys
from infra.serving.pipeline import VideoPipeline
from tests.tiny_server import CLIP, KEY, Running, encoded, serving, tiny_pipeline

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
QUICK = {"num_frames": 2, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def heard() -> list[tuple[dict[str, str], bytes]]:
    return []


@pytest.fixture(scope="module")
def receiver(heard: list[tuple[dict[str, str], bytes]]) -> Iterator[str]:
    """A webhook receiver that is down when it is first asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(503 if len(heard) == 1 else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A keys file with one client of few rights, and its key."""
    secret, entry = new_key("guest")
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(entry + "max_active = 1\nmax_priority = 0\n")
    return path, secret


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, pipeline: VideoPipeline, keys: tuple[Path, str], receiver: str
) -> Iterator[Running]:
    settings = {"keys_file": keys[0], "webhook_url": receiver, "webhook_secret": SECRET}
    with serving(tmp_path_factory.mktemp("server"), pipeline, **settings) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client as client:
        yield client


@pytest.fixture
def web(running: Running) -> Iterator[httpx.Client]:
    with running.http as client:
        yield client


@pytest.fixture(scope="module")
def done(running: Running) -> openai.types.Video:
    with running.client as client:
        return client.videos.create_and_poll(prompt="a red circle", extra_body={"seed": 5})


def pixels(client: openai.OpenAI, video_id: str) -> np.ndarray:
    with av.open(io.BytesIO(client.videos.download_content(video_id).read()), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def frames(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def status_of(call: Any) -> tuple[int, str | None]:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value.status_code, caught.value.code


def test_a_remix_keeps_what_its_prompt_does_not_say(client: openai.OpenAI, done: openai.types.Video) -> None:
    same = client.videos.remix(done.id, prompt="a red circle")
    other = client.videos.remix(done.id, prompt="a blue square")
    assert (same.remixed_from_video_id, other.prompt, other.size) == (done.id, "a blue square", done.size)
    first, again, blue = (pixels(client, client.videos.poll(it.id).id) for it in (done, same, other))
    assert np.abs(first - again).mean() < 0.1 * np.abs(first - blue).mean()  # to the bit on a batch-invariant engine
    assert status_of(lambda: client.videos.remix("video_none", prompt="x")) == (404, "video_not_found")


def test_an_extension_is_the_video_and_its_continuation(client: openai.OpenAI, done: openai.types.Video) -> None:
    content = client.videos.download_content(done.id).read()
    longer = client.videos.extend(prompt="a red circle", seconds="1", video=("a.mp4", content))  # pyright: ignore
    assert longer.seconds == "2"
    assert client.videos.poll(longer.id).status == "completed"
    assert frames(client.videos.download_content(longer.id).read()) == 16


def test_a_video_of_this_server_is_extended_and_edited_by_its_id(
    web: httpx.Client, client: openai.OpenAI, done: openai.types.Video
) -> None:
    longer = web.post("/v1/videos/extensions", json={"prompt": "a", "num_frames": 3, "video": {"id": done.id}}).json()
    assert (longer["seconds"], longer["remixed_from_video_id"]) == ("1.375", done.id)
    form = {"prompt": (None, "a blue square"), "video[id]": (None, done.id)}
    edited = web.post("/v1/videos/edits", files=form).json()
    assert client.videos.poll(edited["id"]).status == "completed"
    refused = web.post(
        "/v1/videos/extensions", json={"prompt": "a", "seconds": 1, "size": "64x64", "video": {"id": done.id}}
    )
    assert refused.json()["error"]["code"] == "invalid_size"


def test_an_upload_is_edited_from_its_first_frame(client: openai.OpenAI, done: openai.types.Video) -> None:
    content = client.videos.download_content(done.id).read()
    assert client.videos.edit(prompt="a blue square", video=("a.mp4", content)).status == "queued"
    for upload in (b"", b"x" * 100, encoded(CLIP[0])):
        assert status_of(lambda upload=upload: client.videos.edit(prompt="a", video=upload)) == (400, "invalid_video")


def test_characters_are_refused_honestly(client: openai.OpenAI) -> None:
    created = status_of(lambda: client.videos.create_character(name="Ann", video=b"x"))
    assert created == (400, "characters_not_supported")
    assert status_of(lambda: client.videos.get_character("char_1")) == (404, "character_not_found")


def test_a_data_url_is_a_first_frame_and_no_other_url_is_fetched(web: httpx.Client) -> None:
    url = "data:image/png;base64," + base64.b64encode(encoded(CLIP[0])).decode()
    body = {"prompt": "a", "input_reference": {"image_url": url}, "extra_body": QUICK, "image_guidance_scale": 2}
    assert web.post("/v1/videos", json=body).status_code == 200
    for bad in (
        "http://127.0.0.1:1/a.png",
        "file:///etc/passwd",
        "https://169.254.169.254/",
        "data:,x",
        "data:;base64,?",
    ):
        answer = web.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": bad}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input_reference"), bad


def test_a_client_sees_its_own_videos_only(running: Running, keys: tuple[Path, str], done: openai.types.Video) -> None:
    with openai.OpenAI(api_key=keys[1], base_url=f"{running.url}/v1", max_retries=0) as guest:
        for call in (guest.videos.retrieve, guest.videos.delete, guest.videos.download_content):
            assert status_of(lambda call=call: call(done.id)) == (404, "video_not_found")
        assert status_of(lambda: guest.videos.list(after=done.id))[0] == 400
        assert done.id not in [video.id for video in guest.videos.list()]


def test_a_key_has_a_quota_and_bounds_of_priority(running: Running, keys: tuple[Path, str]) -> None:
    long = {"num_inference_steps": 200, "num_frames": 32}
    with openai.OpenAI(api_key=keys[1], base_url=f"{running.url}/v1", max_retries=0) as guest:
        urgent = {"x-priority": "5"}
        refused = status_of(lambda: guest.videos.create(prompt="a", extra_headers=urgent))
        assert refused == (403, "priority_not_allowed")
        first = guest.videos.create(prompt="a", extra_body=long)
        assert status_of(lambda: guest.videos.create(prompt="a")) == (429, "quota_exceeded")
        guest.videos.delete(first.id)
        guest.videos.delete(guest.videos.create(prompt="a", extra_body=long).id)


def test_an_idempotency_key_makes_one_video_of_one_request(client: openai.OpenAI) -> None:
    def create(prompt: str) -> str:
        return client.videos.create(prompt=prompt, extra_body=QUICK, extra_headers={"idempotency-key": "k1"}).id

    assert create("once") == create("once")
    assert status_of(lambda: create("another")) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    "header", [("x-priority", "11"), ("x-priority", "x"), ("x-deadline-seconds", "-1"), ("x-deadline-seconds", "nan")]
)
def test_terms_out_of_bounds_are_refused(web: httpx.Client, header: tuple[str, str]) -> None:
    answer = web.post("/v1/videos", json={"prompt": "a"}, headers=dict([header]))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, header[0])


def test_events_tell_a_video_until_it_ends(web: httpx.Client) -> None:
    video = web.post("/v1/videos", json={"prompt": "a", "num_frames": 4}).json()
    with web.stream("GET", f"/v1/videos/{video['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        said = "".join(answer.iter_text())
    events = [part.split("\n") for part in said.split("\n\n") if part.startswith("event: ")]
    assert events[0][0] in ("event: video.progress", "event: video.completed")
    assert events[-1][0] == "event: video.completed"
    assert json.loads(events[-1][1].removeprefix("data: "))["status"] == "completed"
    assert web.get("/v1/videos/video_none/events").status_code == 404


def test_content_is_sent_in_ranges(web: httpx.Client, done: openai.types.Video) -> None:
    path = f"/v1/videos/{done.id}/content"
    whole = web.get(path).content
    for header, start, end in (("bytes=0-9", 0, 10), ("bytes=10-", 10, None), ("bytes=-5", len(whole) - 5, None)):
        part = web.get(path, headers={"range": header})
        assert (part.status_code, part.content) == (206, whole[start:end])
    assert web.get(path, headers={"range": "bytes=0-1,4-5"}).content == whole
    outside = web.get(path, headers={"range": f"bytes={len(whole)}-"})
    assert (outside.status_code, outside.json()["error"]["code"]) == (416, "range_not_satisfiable")


def test_a_webhook_is_signed_as_the_sdk_checks_and_sent_until_it_is_heard(
    client: openai.OpenAI, done: openai.types.Video, heard: list[tuple[dict[str, str], bytes]]
) -> None:
    deadline = time.monotonic() + 60
    while len({headers["webhook-id"] for headers, _ in heard}) == len(heard):  # the first was refused once
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for headers, body in heard:
        client.webhooks.verify_signature(body, headers, secret=SECRET)
    about = [json.loads(body) for _, body in heard]
    assert done.id in [event["data"]["id"] for event in about]
    assert {event["type"] for event in about} <= {"video.completed", "video.failed"}
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(heard[0][1] + b" ", heard[0][0], secret=SECRET)


def test_requests_bear_a_name_and_strict_headers(web: httpx.Client) -> None:
    own = web.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert own.headers["x-request-id"] == "abc-1"
    assert web.get("/v1/models", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
    assert own.headers["x-content-type-options"] == "nosniff"
    assert web.get("/v1/models/stiv-tiny").json()["id"] == "stiv-tiny"
    assert web.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_page_of_another_site_cannot_use_a_server_without_keys(tmp_path: Path, pipeline: VideoPipeline) -> None:
    with serving(tmp_path, pipeline, api_keys=[]) as running:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            assert httpx.post(f"{running.url}/v1/videos", json={"prompt": "a"}, headers=headers).status_code == 403
        assert httpx.get(f"{running.url}/health", headers={"host": "10.0.0.9"}).status_code == 200
        assert httpx.get(f"{running.url}/v1/videos", headers={"origin": running.url}).status_code == 200


def test_a_keys_file_keeps_digests_and_says_what_is_wrong(tmp_path: Path) -> None:
    secret, entry = new_key("ann")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    assert secret not in entry
    ring = KeyRing(read_keys(path))
    found = ring.find(secret.encode())
    assert found is not None and found.name == "ann"
    assert ring.find(KEY.encode()) is None
    path.write_text(entry + "max_actve = 3\n")
    with pytest.raises(ValueError, match=r"keys.toml, key 1: max_actve"):
        read_keys(path)
    with pytest.raises(ValueError, match="twice"):
        KeyRing([ApiKey(name="a", sha256=hashlib.sha256(b"1").hexdigest())] * 2)


def test_a_rate_limit_refills_with_time() -> None:
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    taken = [rate.take("a").wait_s for _ in range(11)]
    assert taken == [0.0] * 10 + [1.0]
    assert rate.take("b").wait_s == 0
    now[0] = 1.0
    assert [rate.take("a").wait_s for _ in range(2)] == [0.0, 1.0]

"""What is shown of a video before it is there, who judges it before it is delivered, and what its files say of it."""

import base64
import io
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import av
import httpx
import pytest
from PIL import Image

from infra.serving.pipeline import VideoPipeline
from infra.serving.provenance import SOURCE_TYPE
from tests.tiny_server import serving, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return tiny_pipeline()


class Moderator:
    """A real endpoint of the shape of OpenAI's /v1/moderations; every text passes, pictures as it is told."""

    def __init__(self) -> None:
        self.url = ""
        self.flags_pictures = False
        self.silent = 0
        """How many questions about pictures are answered 500."""
        self.pictures: list[list[bytes]] = []
        """Of each question that had any."""

    def status(self, pictures: list[bytes]) -> int:
        if not pictures:
            return 200
        self.pictures.append(pictures)
        self.silent -= 1
        return 500 if self.silent >= 0 else 200


@contextmanager
def moderating() -> Generator[Moderator]:
    moderator = Moderator()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
            urls = [part["image_url"]["url"] for part in asked if part["type"] == "image_url"]
            pictures = [base64.b64decode(url.partition(",")[2]) for url in urls]
            self.send_response(moderator.status(pictures))
            self.end_headers()
            flagged = bool(pictures) and moderator.flags_pictures
            result = {"flagged": flagged, "categories": {"violence": flagged, "other": False}}
            self.wfile.write(json.dumps({"results": [result]}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        moderator.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield moderator
        server.shutdown()
        thread.join()


def test_a_finished_video_is_shown_only_if_its_frames_pass(tmp_path: Path, pipeline: VideoPipeline) -> None:
    with (
        moderating() as moderator,
        serving(tmp_path, pipeline, moderation_url=moderator.url, preview_every_s=0) as running,
        running.client as client,
        running.http as http,
    ):

        def made(**changes: int) -> Any:
            video = client.videos.create(prompt="a red circle", extra_body={"seed": 1, **changes})
            said = http.get(f"/v1/videos/{video.id}/events").text  # until it has ended
            assert "event: video.preview" not in said  # nobody has judged those
            return client.videos.retrieve(video.id)

        moderator.silent = 1  # asked again
        assert made(num_inference_steps=20).status == "completed"
        first, again = moderator.pictures
        assert first == again
        assert [Image.open(io.BytesIO(picture)).size for picture in first] == [(32, 32)] * 4
        assert len(set(first)) == 4  # over its whole length

        moderator.flags_pictures = True
        refused = made(num_inference_steps=2)
        assert (refused.status, refused.error.code) == ("failed", "content_policy_violation")
        assert "violence" in refused.error.message
        assert http.get(f"/v1/videos/{refused.id}/content").json()["error"]["code"] == "video_not_completed"

        moderator.silent = 99
        unjudged = made(num_inference_steps=2)
        assert (unjudged.status, unjudged.error.code) == ("failed", "moderation_unavailable")


def test_previews_come_over_the_events_and_are_pictures(tmp_path: Path, pipeline: VideoPipeline) -> None:
    with serving(tmp_path, pipeline, preview_every_s=0) as running, running.http as http:
        asked = {"prompt": "a red circle", "num_inference_steps": 60, "num_frames": 16, "size": "48x32"}
        video = http.post("/v1/videos", json=asked).json()
        said = [part.split("\n") for part in http.get(f"/v1/videos/{video['id']}/events").text.split("\n\n")]
    previews = [json.loads(lines[1].removeprefix("data: ")) for lines in said if lines[0] == "event: video.preview"]
    assert len({preview["image"] for preview in previews}) > 1
    assert [preview["progress"] for preview in previews] == sorted(preview["progress"] for preview in previews)
    for preview in previews:
        kind, _, data = preview["image"].partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        picture.load()
        assert (kind, picture.format, picture.size) == ("data:image/webp", "WEBP", (48, 32))


def contents(http: httpx.Client) -> dict[str, bytes]:
    body = {"prompt": "a red & round <circle>", "num_inference_steps": 1}
    video = http.post("/v1/videos", json=body).json()
    http.get(f"/v1/videos/{video['id']}/events")
    path = f"/v1/videos/{video['id']}/content"
    return {kind: http.get(path, params={"variant": kind}).content for kind in ("video", "thumbnail", "spritesheet")}


def said_of(file: bytes) -> dict[str, Any]:
    if file[4:8] == b"ftyp":
        assert file.index(b"moov") < file.index(b"mdat")
        with av.open(io.BytesIO(file), "r") as container:
            return json.loads(container.metadata["comment"])
    xmp = ElementTree.fromstring(Image.open(io.BytesIO(file)).info["xmp"])
    said = {element.tag.rpartition("}")[2]: element.text or "" for element in xmp.iter()}
    assert said["DigitalSourceType"] == SOURCE_TYPE
    return json.loads(said["li"])


def test_files_say_what_made_them_and_their_prompt_only_if_the_server_is_told_to(
    tmp_path: Path, pipeline: VideoPipeline
) -> None:
    with serving(tmp_path / "quiet", pipeline) as running, running.http as http:
        said = {kind: said_of(file) for kind, file in contents(http).items()}
    assert said["video"]["digitalSourceType"] == SOURCE_TYPE
    assert said["video"]["claim_generator"].startswith("stiv-platform/")
    assert (said["video"]["model"], said["video"]["manifest"]) == ("stiv-tiny", "sha256:" + "tiny" * 16)
    assert "prompt" not in said["video"]
    assert said["thumbnail"] == said["spritesheet"] == said["video"]
    with serving(tmp_path / "open", pipeline, embed_prompt=True) as running, running.http as http:
        said = {kind: said_of(file) for kind, file in contents(http).items()}
    assert {kind: it["prompt"] for kind, it in said.items()} == dict.fromkeys(said, "a red & round <circle>")

"""Every public call of the official package's `client.videos`, made by its sync and by its async client."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.resources.videos import AsyncVideos, Videos

from tests.tiny_server import CLIP, KEY, Running, encoded, serving, tiny_pipeline

QUICK = {"num_frames": 4, "num_inference_steps": 1}


class Recorded:
    """The client's `videos`, which remembers what was called; answers are awaited where they must be."""

    def __init__(self, videos: Videos | AsyncVideos) -> None:
        self.videos = videos
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.called.add(name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.videos, name)(*args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        return call


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), tiny_pipeline()) as server:
        yield server


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
async def test_every_call_of_the_package_is_answered(
    running: Running, kind: type[openai.OpenAI] | type[openai.AsyncOpenAI]
) -> None:
    client = kind(api_key=KEY, base_url=f"{running.url}/v1", max_retries=0)
    videos = Recorded(client.videos)
    try:
        await call_all(videos)
    finally:
        closing = client.close()
        if inspect.isawaitable(closing):
            await closing
    offered = {name for name, call in inspect.getmembers(type(client.videos), callable) if not name.startswith("_")}
    assert videos.called == offered


async def call_all(videos: Recorded) -> None:
    first = await videos.create_and_poll(
        prompt="a red circle", input_reference=("a.png", encoded(CLIP[0]), "image/png"), extra_body=QUICK
    )
    assert (first.status, first.seconds, first.size) == ("completed", "0.5", "32x32")
    created = await videos.create(prompt="a red circle", extra_body=QUICK)
    assert created.status == "queued"
    polled = await videos.poll(created.id, poll_interval_ms=50)
    assert (polled.id, polled.status) == (created.id, "completed")
    assert await videos.retrieve(created.id) == polled

    starts = {"video": b"\0\0\0", "thumbnail": b"RIFF", "spritesheet": b"\xff\xd8"}
    contents = {}
    for variant, start in starts.items():
        contents[variant] = body(await videos.download_content(first.id, variant=variant))
        assert contents[variant].startswith(start)
    assert body(await videos.download_content(first.id)) == contents["video"]

    remixed = await videos.remix(first.id, prompt="a blue square")
    edited = await videos.edit(prompt="a blue square", video=("a.mp4", contents["video"], "video/mp4"))
    extended = await videos.extend(prompt="a red circle", seconds="0.5", video=("a.mp4", contents["video"]))
    assert (remixed.remixed_from_video_id, extended.seconds) == (first.id, "1")
    for video in (remixed, edited, extended):
        assert (await videos.poll(video.id)).status == "completed"

    made = [first, created, remixed, edited, extended]
    page = await videos.list(limit=4, order="asc")
    ids = [video.id for video in page.data]
    while page.has_next_page():
        following = page.get_next_page()
        page = await following if inspect.isawaitable(following) else following
        ids += [video.id for video in page.data]
    assert ids[-len(made) :] == [video.id for video in made]
    assert next(video.id for video in (await videos.list(after=ids[-1])).data) == ids[-2]

    for video in made:
        deleted = await videos.delete(video.id)
        assert (deleted.id, deleted.deleted) == (video.id, True)
    with pytest.raises(openai.NotFoundError):
        await videos.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="keeps no characters"):
        await videos.create_character(name="Ann", video=contents["video"])
    with pytest.raises(openai.NotFoundError):
        await videos.get_character("char_1")


def body(content: Any) -> bytes:
    return content.read()

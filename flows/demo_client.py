"""The demo's client: the official `openai` package against a running server, as any user would drive it.

It owns the two requests and what the client saw; it knows nothing of how the server works.
"""

import socket
import subprocess
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from openai import OpenAI
from PIL import Image

from flows.results import ServedVideo
from model.data.shards import ShardSet
from model.recipe import StageRecipe

READY_SECONDS = 120.0
POLL_SECONDS = 0.2
TEXT_PROMPT = "a red circle moves right"


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until `/ready` answers 200; an early end of the server, or none in time, is an error with its log."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(POLL_SECONDS)
    lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the server at {address} did not become ready; the end of {log}:\n{lines}")


def drive(address: str, recipe: StageRecipe, heldout: ShardSet, folder: Path) -> tuple[list[ServedVideo], str]:
    """Ask for one video from text and one from text and an image, together; the videos, and what /metrics then says."""
    folder.mkdir(parents=True, exist_ok=True)
    place = next(place for place, entry in enumerate(heldout.entries) if entry.source == "moving_shapes")
    sample = heldout.sample(place)
    first_frame = folder / "first_frame.png"
    Image.fromarray(sample.frames[0]).save(first_frame)
    with warnings.catch_warnings():
        # The package marks the videos API as deprecated because OpenAI closed its own service.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"openai|flows")
        client = OpenAI(base_url=f"{address}/v1", api_key="demo")
        requests = [("text to video", TEXT_PROMPT, None), ("text and image to video", sample.caption, first_frame)]
        began = time.monotonic()
        created = [_create(client, recipe, prompt, image) for _, prompt, image in requests]
        transitions = _poll(client, created, began)
        videos: list[ServedVideo] = []
        for (title, prompt, image), job in zip(requests, created, strict=True):
            final = client.videos.retrieve(job)  # pyright: ignore[reportDeprecated]
            if final.status != "completed":
                raise RuntimeError(f"video {job} ended as {final.status}: {final.error}")
            mp4 = folder / f"{title.replace(' ', '_')}.mp4"
            client.videos.download_content(job).write_to_file(mp4)  # pyright: ignore[reportDeprecated]
            facts = {"model": final.model, "size": final.size, "seconds": final.seconds, "id": final.id}
            videos.append(
                ServedVideo(
                    title=title, prompt=prompt, mp4=mp4, first_frame=image, transitions=transitions[job], facts=facts
                )
            )
    return videos, _scrape(address)


def _create(client: OpenAI, recipe: StageRecipe, prompt: str, image: Path | None) -> str:
    size = f"{recipe.video.width}x{recipe.video.height}"
    extra: Mapping[str, object] = {"num_frames": recipe.video.num_frames, "fps": recipe.video.fps, "seed": 7}
    if image is None:
        video = client.videos.create(prompt=prompt, size=size, extra_body=extra)  # pyright: ignore[reportArgumentType, reportDeprecated]
    else:
        reference = (image.name, BytesIO(image.read_bytes()), "image/png")
        video = client.videos.create(  # pyright: ignore[reportDeprecated]
            prompt=prompt,
            size=size,  # pyright: ignore[reportArgumentType]
            input_reference=reference,
            extra_body=extra,
        )
    return video.id


def _poll(client: OpenAI, jobs: list[str], began: float) -> dict[str, list[tuple[str, float]]]:
    """Each job's statuses and when they were first seen, until all have ended."""
    seen: dict[str, list[tuple[str, float]]] = {job: [] for job in jobs}
    waiting = set(jobs)
    while waiting:
        for job in sorted(waiting):
            status = client.videos.retrieve(job).status  # pyright: ignore[reportDeprecated]
            if not seen[job] or seen[job][-1][0] != status:
                seen[job].append((status, time.monotonic() - began))
            if status in ("completed", "failed"):
                waiting.discard(job)
        time.sleep(POLL_SECONDS)
    return seen


def _scrape(address: str) -> str:
    """The server's own samples of /metrics, buckets and comments left out."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return "\n".join(line for line in lines if line.startswith("stiv_") and "_bucket" not in line)

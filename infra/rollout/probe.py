"""The probe: golden prompts sent to canary and stable alike, and what comes back compared frame by frame.

It owns the prompts, the requests and the figures; it knows nothing of Prometheus. The same weights must draw the same
video from the same seed. Other weights may draw another, and then a video only has to be one: not blank, and of a
contrast that stable's has too. That an engine computes what its own network does was proven before (parity, warm-up).
"""

import io
import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Annotated

import av
import httpx
import numpy as np
from pydantic import Field

from infra.rollout.analysis import Check, Share
from infra.serving.jobs.table import Track
from infra.serving.media import blank_frames
from model.config import Config, Positive
from model.generation import Clip
from monitoring import metrics

logger = logging.getLogger(__name__)

DEFAULT_PROMPTS = ("a red circle moves right", "a blue square moves up")
POLL_S = 0.1


class ProbeSettings(Config):
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_PROMPTS
    seed: int = 1
    num_inference_steps: Positive | None = None
    """What the served model takes unless said."""
    min_psnr_db: Annotated[float, Field(gt=0)] = 30.0
    """Between both videos, where both engines hold the same weights."""
    max_contrast_change: Annotated[float, Field(gt=1)] = 4.0
    """Between both videos' standard deviations, where they do not."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """For one video."""
    blank_share: Share = 0.5
    """Of a video's frames; above it nothing was drawn."""


@dataclass(frozen=True, slots=True)
class Backends:
    """Where both tracks answer, past the router."""

    stable: str
    canary: str
    key: str | None = None
    """API key, where the servers take any."""


class ProbeFailed(RuntimeError):
    """A server did not make a golden video; the message says which and why."""


def probe(backends: Backends, settings: ProbeSettings, *, same_weights: bool) -> Check:
    """Draw every golden prompt on both. A canary that does not answer fails; a stable that does not is inconclusive."""
    worst: list[str] = []
    for prompt in settings.prompts:
        try:
            wanted = draw(backends.stable, backends.key, prompt, settings)
        except (ProbeFailed, httpx.HTTPError) as error:
            return Check("probe", "inconclusive", f"stable did not draw '{prompt}': {error}")
        try:
            found = draw(backends.canary, backends.key, prompt, settings, track="canary")
        except (ProbeFailed, httpx.HTTPError) as error:
            return Check("probe", "fail", f"the canary did not draw '{prompt}': {error}")
        fault, words = _compare(found, wanted, settings, same_weights=same_weights)
        if fault:
            return Check("probe", "fail", f"'{prompt}': {fault}")
        worst.append(words)
    return Check("probe", "pass", f"{len(settings.prompts)} prompts: {', '.join(worst)}")


def _compare(found: Clip, wanted: Clip, settings: ProbeSettings, *, same_weights: bool) -> tuple[str, str]:
    """What is wrong, or nothing; and the figure in words."""
    if found.shape != wanted.shape:
        return f"the canary drew {found.shape}, stable {wanted.shape}", ""
    if blank_frames(found) > settings.blank_share * len(found) and blank_frames(wanted) == 0:
        return f"{blank_frames(found)} of {len(found)} frames are blank", ""
    if same_weights:
        decibels = psnr_db(found, wanted)
        limit = settings.min_psnr_db
        return ("" if decibels >= limit else f"{decibels:.1f} dB to stable's, at least {limit:g}"), f"{decibels:.1f} dB"
    change = float(found.std() + 1) / float(wanted.std() + 1)
    limit = settings.max_contrast_change
    wrong = "" if 1 / limit <= change <= limit else f"its contrast is {change:.2f} times stable's"
    return wrong, f"contrast {change:.2f} times stable's"


def psnr_db(found: Clip, wanted: Clip) -> float:
    """Of uint8 frames; infinite where they are equal."""
    error = float(np.mean((found.astype(np.float32) - wanted.astype(np.float32)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def draw(url: str, key: str | None, prompt: str, settings: ProbeSettings, *, track: Track | None = None) -> Clip:
    """The frames of a golden prompt's video; of `track` itself, where one is named.

    Raises `ProbeFailed` or one of httpx's errors.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body: dict[str, object] = {"prompt": prompt, "seed": settings.seed}
    if settings.num_inference_steps:
        body["num_inference_steps"] = settings.num_inference_steps
    deadline = time.monotonic() + settings.timeout_s
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        video = _json(client.post("/v1/videos", json=body))
        while video["status"] in ("queued", "in_progress"):
            if time.monotonic() > deadline:
                raise ProbeFailed(f"no video after {settings.timeout_s:g} s")
            time.sleep(POLL_S)
            answer = client.get(f"/v1/videos/{video['id']}")
            video = _json(answer)
            if track is not None and answer.headers.get("x-stiv-track", track) != track:
                raise ProbeFailed("it handed the video over")
        if video["status"] != "completed":
            raise ProbeFailed(f"{video['error']}")
        content = client.get(f"/v1/videos/{video['id']}/content")
        if content.status_code != 200:
            raise ProbeFailed(f"its content is answered {content.status_code}")
        client.delete(f"/v1/videos/{video['id']}")
    with av.open(io.BytesIO(content.content), "r", format="mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.uint8, copy=False)


def watch(url: str, key: str | None, settings: ProbeSettings, *, every_s: float, stop: threading.Event) -> None:
    """A synthetic user: probe the service at `url` until `stop` is set; one that fails is counted, never raised.

    Where few videos are asked for, only this tells that a service is down.
    """
    metrics.PROBE_LAST_SUCCESS_TIMESTAMP_SECONDS.set(time.time())
    while not stop.is_set():
        began = time.monotonic()
        try:
            draw(url, key, settings.prompts[0], settings)
        except (ProbeFailed, httpx.HTTPError) as error:
            logger.warning("no synthetic video: %s", error)
            metrics.PROBES_TOTAL.labels("failed").inc()
        else:
            metrics.PROBES_TOTAL.labels("completed").inc()
            metrics.PROBE_SECONDS.observe(time.monotonic() - began)
            metrics.PROBE_LAST_SUCCESS_TIMESTAMP_SECONDS.set(time.time())
        stop.wait(max(0.0, every_s - (time.monotonic() - began)))


def _json(answer: httpx.Response) -> dict[str, str]:
    if answer.status_code != 200:
        raise ProbeFailed(f"answered {answer.status_code}: {answer.text[:200]}")
    return answer.json()

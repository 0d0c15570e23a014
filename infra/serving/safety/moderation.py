"""The operator's own judge of prompts and pictures, asked before a video is made and before it is delivered.

It owns how a judge is asked; it knows nothing of what is allowed, of HTTP routes or of jobs. It fails closed: a judge
that does not answer lets nothing through.
"""

import base64
import json
import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import httpx

from infra.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

TIMEOUT_S = 20.0
TRIES, PAUSE_S = 3, 0.5
"""About a finished video, whose work would be lost with one answer."""


class Refused(Exception):
    """The judge's no, in words that a client may read."""


class ModerationUnavailable(Exception):
    """The judge gave no answer that can be read."""


class Moderator(Protocol):
    def check(self, *, text: str = "", images: Sequence[bytes] = ()) -> None:
        """Raise Refused or ModerationUnavailable, or do nothing. Images are PNG or WebP."""
        ...


def through_silence(ask: Callable[[], None]) -> None:
    """`ask` a few times more where no answer comes; the last ModerationUnavailable is raised."""
    for pause_s in (PAUSE_S * 2**turn for turn in range(TRIES - 1)):
        try:
            return ask()
        except ModerationUnavailable as error:
            logger.warning("moderation did not answer, asked again in %s s: %s", pause_s, error)
            time.sleep(pause_s)
    return ask()


def open_moderator(settings: ServerSettings) -> Moderator | None:
    if settings.moderation_url is not None:
        token = settings.moderation_token
        return EndpointModerator(settings.moderation_url, None if token is None else token.get_secret_value())
    if settings.moderation_command:
        return CommandModerator(settings.moderation_command)
    return None


@dataclass(frozen=True)
class EndpointModerator:
    """An HTTP endpoint with the shape of OpenAI's POST /v1/moderations."""

    url: str
    token: str | None = None

    def check(self, *, text: str = "", images: Sequence[bytes] = ()) -> None:
        parts = [{"type": "text", "text": text}] if text else []
        pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.post(self.url, json={"input": [*parts, *pictures]}, headers=headers, timeout=TIMEOUT_S)
            answer.raise_for_status()
            results = cast("list[dict[str, Any]]", answer.json()["results"])
            flagged = [name for result in results if result["flagged"] for name in _categories(result)]
            is_flagged = any(result["flagged"] for result in results)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ModerationUnavailable(f"{type(error).__name__} from the moderation endpoint") from error
        if not results:
            raise ModerationUnavailable("the moderation endpoint judged nothing")
        if is_flagged:
            raise Refused(", ".join(flagged) or "flagged")


@dataclass(frozen=True)
class CommandModerator:
    """A program that reads {"text", "images"} as JSON and writes {"allowed": true} or {"allowed": false, "reason"}."""

    command: Sequence[str]

    def check(self, *, text: str = "", images: Sequence[bytes] = ()) -> None:
        question = json.dumps({"text": text, "images": [data_url(image) for image in images]})
        try:
            done = subprocess.run(
                list(self.command), input=question.encode(), capture_output=True, timeout=TIMEOUT_S, check=True
            )
            answer = json.loads(done.stdout)
            allowed, reason = answer["allowed"], str(answer.get("reason", "refused"))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModerationUnavailable(f"{type(error).__name__} from the moderation command") from error
        if allowed is not True:
            raise Refused(reason[:200])


def _categories(result: dict[str, Any]) -> list[str]:
    categories: Any = result.get("categories")
    if not isinstance(categories, dict):
        return []
    return [str(name) for name, is_flagged in cast("dict[str, Any]", categories).items() if is_flagged]


def data_url(image: bytes) -> str:
    kind = "webp" if image[:4] == b"RIFF" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

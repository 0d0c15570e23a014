"""A signed webhook as Standard Webhooks (standardwebhooks.com, v1) has it: secret, signature, one POST.

It knows nothing of what is told, of retries or of who keeps the outbox. A receiver checks with `verify`, or with any
library of that standard.
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping

import httpx

PREFIX = "whsec_"
TOLERANCE = 300
"""Seconds a message may be old, or ahead, before a receiver takes it for a replay."""
TIMEOUT = 15.0


class WebhookFailed(RuntimeError):
    """The receiver did not acknowledge; the message is as unsent as before."""


def read_secret(text: str) -> bytes:
    """The key in `whsec_BASE64`, 24 to 64 bytes of it."""
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError(
            "a webhook's secret is whsec_ and 24 to 64 bytes in base64; make one with"
            " `python -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\"`"
        )
    return key


def headers(secret: bytes, message_id: str, body: bytes, *, timestamp: int) -> dict[str, str]:
    """What a receiver needs to trust `body`; the id is the same at every attempt, so that it can drop repeats."""
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": _signature(secret, message_id, timestamp, body),
    }


def post(url: str, secret: bytes, message_id: str, body: bytes, *, timeout: float = TIMEOUT) -> None:
    """Sign and send once; see `deliver`."""
    deliver(url, body, headers(secret, message_id, body, timestamp=int(time.time())), timeout=timeout)


def deliver(url: str, body: bytes, sent_with: Mapping[str, str], *, timeout: float = TIMEOUT) -> None:
    """Send once; anything but a 2xx answer within `timeout` seconds is `WebhookFailed`. Redirects are not followed."""
    try:
        answer = httpx.post(url, content=body, headers=dict(sent_with), timeout=timeout, follow_redirects=False)
    except httpx.HTTPError as error:
        raise WebhookFailed(f"{_public(url)}: {error or type(error).__name__}") from None
    if not answer.is_success:
        raise WebhookFailed(f"{_public(url)} answered {answer.status_code}")


def verify(secret: bytes, received: Mapping[str, str], body: bytes, *, now: float | None = None) -> str:
    """The id of a message that bears our signature and is not stale; ValueError says what is wrong with it.

    Args:
        received: headers, their names in lower case.
    """
    try:
        message_id, stamp = received["webhook-id"], int(received["webhook-timestamp"])
        given = received["webhook-signature"].split()
    except (KeyError, ValueError):
        raise ValueError("not a signed webhook: webhook-id, -timestamp or -signature is missing or no number") from None
    if abs((time.time() if now is None else now) - stamp) > TOLERANCE:
        raise ValueError(
            f"webhook {message_id} is stamped {stamp}, more than {TOLERANCE} s from now: a replay, or a clock"
        )
    expected = _signature(secret, message_id, stamp, body)
    if not any(hmac.compare_digest(expected.encode(), each.encode()) for each in given):
        raise ValueError(f"webhook {message_id} does not bear our signature")
    return message_id


def _signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    signed = b".".join([message_id.encode(), str(timestamp).encode(), body])
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


def _public(url: str) -> str:
    """A URL as a log may show it: its query and its password can be secrets."""
    parts = httpx.URL(url)
    return f"{parts.scheme}://{parts.host}{f':{parts.port}' if parts.port else ''}{parts.path}"

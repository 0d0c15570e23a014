"""A server that speaks OpenAI's chat completions: asked with text and pictures, patiently and within its limits.

It owns requests, retries, the rate and the bill; it knows nothing of what is asked.
"""

import base64
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from infra.curate.recipe import EndpointConfig

_LONGEST_PAUSE = 60.0
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Answers after which the same question may be answered."""
_OURS = {401, 402, 403, 404}
"""Answers that every question would get."""


class BudgetSpent(ValueError):
    """`max_cost` is reached; what was answered is kept, and a larger budget goes on from there."""


class Unanswerable(ValueError):
    """The server refused this one question, or what it said is no answer."""


@dataclass(slots=True)
class Bill:
    """What was asked for and what it costs."""

    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class Endpoint:
    """Safe from any number of threads; to be closed when all is asked."""

    def __init__(self, config: EndpointConfig, key: str | None = None, spent: float = 0.0) -> None:
        """`spent` before counts towards `max_cost`."""
        self.config = config
        self._spent = spent
        self.bill = Bill()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=config.concurrency)
        self._client = httpx.Client(headers=headers, timeout=config.timeout, limits=limits)
        self._url = config.url.rstrip("/") + "/chat/completions"
        self._lock = threading.Lock()
        self._next_start = 0.0

    def close(self) -> None:
        self._client.close()

    def ask(self, text: str, pictures: Sequence[bytes] = ()) -> str:
        """The answer's text; `pictures` are JPEGs.

        Raises:
            Unanswerable: this question only.
            ConnectionError: no answer after all attempts.
            ValueError: a wrong key, model or address; `BudgetSpent`.
        """
        images = [
            {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}
            for data in pictures
        ]
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }
        return self._text_of(self._answer(body))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(self.config.attempts):
            self._wait_for_turn()
            try:
                answer = self._client.post(self._url, json=body)
            except httpx.TransportError as error:
                problem, pause = f"{type(error).__name__}: {error}", None
            else:
                if answer.is_success:
                    return self._billed(answer)
                problem, pause = f"HTTP {answer.status_code}: {answer.text[:200]}", _retry_after(answer)
                if answer.status_code in _OURS:
                    raise ValueError(f"{self._url} refuses every question ({problem}); check url, model and key")
                if answer.status_code not in _PASSING:
                    raise Unanswerable(f"{self._url}: {problem}")
            if attempt + 1 < self.config.attempts:
                with self._lock:
                    self.bill.retries += 1
                time.sleep(min(_LONGEST_PAUSE, pause if pause is not None else random.uniform(0.5, 1) * 2**attempt / 4))
        raise ConnectionError(f"{self._url}: no answer after {self.config.attempts} attempts ({problem})")

    def _wait_for_turn(self) -> None:
        config = self.config
        with self._lock:
            if config.max_cost is not None and self._spent + self.bill.cost >= config.max_cost:
                spent = self._spent + self.bill.cost
                raise BudgetSpent(f"{self._url}: {spent:.2f} spent of max_cost {config.max_cost}; raise it")
            now = time.monotonic()
            start = max(now, self._next_start)
            if config.requests_per_minute is not None:
                self._next_start = start + 60 / config.requests_per_minute
        time.sleep(start - now)

    def _billed(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            told: dict[str, Any] = answer.json()
            usage: dict[str, int] = told.get("usage") or {}
        except (ValueError, AttributeError) as error:
            raise Unanswerable(f"{self._url}: the answer is not JSON: {answer.text[:200]}") from error
        tokens_in, tokens_out = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        with self._lock:
            self.bill.requests += 1
            self.bill.tokens_in += tokens_in
            self.bill.tokens_out += tokens_out
            self.bill.cost += (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6
        return told

    def _text_of(self, told: dict[str, Any]) -> str:
        try:
            text = told["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise Unanswerable(f"{self._url}: an answer without text: {str(told)[:200]}")
        return text.strip()


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None

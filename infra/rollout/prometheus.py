"""Questions to a Prometheus server over its HTTP API; it does not know what they are asked for.

It owns what counts as an answer: a vector of numbers. What is not a number is left out, and an empty vector is an
empty answer, never a zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT_S = 5.0


class PrometheusUnreachable(ConnectionError):
    """No answer from the server, or none that says anything; whoever asks must wait, not conclude."""


class QueryRefused(ValueError):
    """The server answers that the query is wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    labels: Mapping[str, str]
    value: float


class Prometheus:
    def __init__(self, url: str) -> None:
        """`url` as `http://127.0.0.1:9090`."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"'{url}' is no address of a Prometheus; give one such as http://127.0.0.1:9090")
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    def query(self, promql: str) -> list[Sample]:
        """Every finite sample of an instant vector, or of a scalar.

        Raises:
            PrometheusUnreachable. QueryRefused: it says what is wrong with `promql`.
        """
        data = self._ask("/api/v1/query", {"query": promql})
        found: list[Any] = (
            data["result"] if data["resultType"] == "vector" else [{"metric": {}, "value": data["result"]}]
        )
        samples = [Sample(each["metric"], float(each["value"][1])) for each in found]
        return [sample for sample in samples if math.isfinite(sample.value)]

    def require_ready(self) -> None:
        """Refuse to begin what would only end in a deadline."""
        try:
            self._client.get("/-/ready").raise_for_status()
        except httpx.HTTPError as error:
            raise PrometheusUnreachable(
                f"Prometheus at {self.url} is not ready ({error}); nothing can be said of a canary without it: start"
                " it, or name another with --prometheus"
            ) from None

    def close(self) -> None:
        self._client.close()

    def _ask(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        try:
            answer = self._client.get(path, params=dict(parameters))
        except httpx.HTTPError as error:
            raise PrometheusUnreachable(f"Prometheus at {self.url} does not answer: {error}") from None
        if answer.status_code in (400, 422):
            raise QueryRefused(f"Prometheus refuses {parameters}: {_reason(answer)}")
        if answer.status_code != 200:
            raise PrometheusUnreachable(f"Prometheus at {self.url} answers {answer.status_code}: {_reason(answer)}")
        try:
            return answer.json()["data"]
        except (ValueError, KeyError, TypeError):
            raise PrometheusUnreachable(f"{self.url} does not answer as a Prometheus does") from None


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]

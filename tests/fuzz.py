"""Requests made from a server's own OpenAPI document, valid and invalid, and what came of them.

It owns the cases and the verdict; it knows nothing of how the API is made. Every answer has to come in time, to be what
the document says, and no 5xx.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks, openapi
from schemathesis.core.failures import FailureGroup

from tests.tiny_server import KEY

BATCH = 40
"""Cases of one operation and mode before its next turn."""
TIMEOUT_S = 60.0
SETTINGS: dict[str, object] = {"requests_per_minute": 1_000_000, "max_queued": 16, "history_s": 3600.0}
"""Of the server: no rate limit, which would answer for it, and a queue that is full now and then."""


@dataclass
class Outcome:
    """Of all cases."""

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter[int])
    server_errors: list[str] = field(default_factory=list[str])
    unlike_document: list[str] = field(default_factory=list[str])
    slowest_s: float = 0.0


def fuzz(url: str, *, cases: int) -> Outcome:
    """Ask a running server `cases` times or a few more; its operations take turns."""
    return _Fuzz(url).run(cases)


class _Fuzz:
    def __init__(self, url: str) -> None:
        document: dict[str, Any] = httpx.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
        self.url = url
        self.schema: Any = openapi.from_dict(document)
        self.schema.config.generation.with_security_parameters = False  # the key comes with every case
        self.session = requests.Session()
        self.videos: list[str] = []
        """That were created and not deleted, so that cases meet real ones."""
        self.outcome = Outcome()

    def run(self, cases: int) -> Outcome:
        operations = [found.ok() for found in self.schema.get_all_operations()]
        turns = [(operation, mode) for operation in operations for mode in _modes(operation)]
        share, turn = min(BATCH, -(-cases // len(turns))), 0
        with self.session:
            while self.outcome.cases < cases:
                turn += 1
                for operation, mode in turns:
                    self._ask_about(operation, mode, count=share, turn=turn)
        return self.outcome

    def _ask_about(self, operation: Any, mode: GenerationMode, *, count: int, turn: int) -> None:
        @seed(turn)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
        )
        @given(case=operation.as_strategy(generation_mode=mode), choice=st.integers(0, 2**16))
        def ask(case: Any, choice: int) -> None:
            if self.videos and choice % 2 and "video_id" in (case.path_parameters or {}):
                case.path_parameters["video_id"] = self.videos[choice % len(self.videos)]
            self._ask(case)

        ask()

    def _ask(self, case: Any) -> None:
        start = time.monotonic()
        answer = case.call(
            base_url=self.url, session=self.session, headers={"authorization": f"Bearer {KEY}"}, timeout=TIMEOUT_S
        )
        outcome = self.outcome
        outcome.cases += 1
        outcome.statuses[answer.status_code] += 1
        outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - start)
        about = f"{case.method} {case.formatted_path} {answer.status_code}"
        if answer.status_code >= 500:
            outcome.server_errors.append(f"{about}: {case.as_curl_command()[:1000]}")
        try:
            case.validate_response(answer, checks=[checks.response_schema_conformance, checks.content_type_conformance])
        except FailureGroup as failures:
            outcome.unlike_document.append(f"{about}: {failures.exceptions}")
        self._remember(case, answer)

    def _remember(self, case: Any, answer: Any) -> None:
        if answer.status_code != 200:
            return
        said: dict[str, Any] = answer.json() if "json" in answer.headers.get("content-type", [""])[0] else {}
        if said.get("object") == "video" and case.method == "POST":
            self.videos.append(said["id"])
        if said.get("object") == "video.deleted" and said["id"] in self.videos:
            self.videos.remove(said["id"])


def _modes(operation: Any) -> list[GenerationMode]:
    """A route without a body, a query or headers takes any path, so nothing it can be asked is against the document."""
    said: dict[str, Any] = operation.definition.raw
    can_be_wrong = "requestBody" in said or any(parameter["in"] != "path" for parameter in said.get("parameters", ()))
    return [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if can_be_wrong else [])]

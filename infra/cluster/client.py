"""The one door to the `kubernetes` client: objects by kind, as JSON; retries, and errors a caller can act on.

It owns credentials, connections and what is tried again. It knows no kinds of object, nor what any is for.
"""

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.cluster.objects import Kind, Object

logger = logging.getLogger(__name__)

_ATTEMPTS = 6
_LONGEST_WAIT = 20.0
_TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and between two bytes."""
_AGAIN = (429, 500, 502, 503, 504)
FIELD_MANAGER = "stiv"


class ClusterError(RuntimeError):
    """The API server refused; `status` is HTTP's, 0 where it could not be reached."""

    def __init__(self, message: str, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class NotFound(ClusterError):
    """No such object, or no such kind."""


class Conflict(ClusterError):
    """It is there already, or was changed meanwhile."""


class WatchExpired(ClusterError):
    """The server has forgotten the changes since that version: list again."""


@dataclass(slots=True, frozen=True)
class Listing:
    """Objects, and the version from which a watch goes on."""

    items: tuple[Object, ...]
    version: str


@dataclass(slots=True, frozen=True)
class Change:
    """One event of a watch; a bookmark carries nothing but a version."""

    kind: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    thing: Object
    version: str


class ClusterClient:
    """The API server as one user sees it."""

    def __init__(self, api: Any, *, first_wait: float = 0.5) -> None:
        self._api = api
        self._first_wait = first_wait

    @classmethod
    def connect(cls, kubeconfig: str | None = None, *, first_wait: float = 0.5) -> "ClusterClient":
        """As kubectl does: the file, KUBECONFIG, ~/.kube/config, or a pod's own account."""
        try:
            from kubernetes import client, config
        except ImportError:
            raise ValueError("gangs on Kubernetes need its client: pip install 'stiv-platform[cluster]'") from None
        given: Any = client.Configuration()
        try:
            config.load_kube_config(kubeconfig, client_configuration=given)  # pyright: ignore[reportUnknownMemberType]
        except config.ConfigException as error:
            try:
                config.load_incluster_config(given)  # pyright: ignore[reportUnknownMemberType]
            except config.ConfigException:
                raise ValueError(
                    f"no usable kubeconfig ({error}): set KUBECONFIG to one, or run in a pod with a service account"
                ) from None
        given.retries = False  # ours, below, know which requests may be sent again
        return cls(client.ApiClient(given), first_wait=first_wait)

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        return self._json("GET", kind.path(namespace, name), f"get {kind.plural} {name!r}")

    def list(self, kind: Kind, namespace: str | None, *, labels: Mapping[str, str] | None = None) -> Listing:
        query = _selector(labels)
        found = self._json("GET", kind.path(namespace), f"list {kind.plural}", query=query)
        return Listing(tuple(found.get("items") or []), found["metadata"]["resourceVersion"])

    def create(self, kind: Kind, thing: Mapping[str, Any], *, dry_run: bool = False) -> Object:
        """Conflict where it is there already: also where a lost answer had made it."""
        query = [("fieldManager", FIELD_MANAGER), *([("dryRun", "All")] if dry_run else [])]
        path = kind.path(thing["metadata"].get("namespace"))
        return self._json("POST", path, f"create {kind.plural}", query=query, body=thing)

    def apply(self, kind: Kind, thing: Mapping[str, Any], *, force: bool = False, dry_run: bool = False) -> Object:
        """Server-side apply; Conflict where another manager owns a field that would change, unless forced."""
        query = [("fieldManager", FIELD_MANAGER), ("force", str(force).lower())]
        query += [("dryRun", "All")] if dry_run else []
        path = kind.path(thing["metadata"].get("namespace"), thing["metadata"]["name"])
        what = f"apply {kind.plural} {thing['metadata']['name']!r}"
        return self._json("PATCH", path, what, query=query, body=thing, content="application/apply-patch+yaml")

    def patch(self, kind: Kind, namespace: str | None, name: str, change: Mapping[str, Any]) -> Object:
        """JSON merge patch; with metadata.resourceVersion in it, Conflict where the object has moved on."""
        path = kind.path(namespace, name)
        content = "application/merge-patch+json"
        return self._json("PATCH", path, f"patch {kind.plural} {name!r}", body=change, content=content)

    def delete(self, kind: Kind, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """And what it owns; gone already is no error. With `uid`, Conflict where another bears the name by now."""
        body: dict[str, Any] = {"propagationPolicy": "Foreground"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            self._json("DELETE", kind.path(namespace, name), f"delete {kind.plural} {name!r}", body=body)
        except NotFound:
            return

    def log(self, namespace: str, pod: str, *, lines: int | None = None, since_seconds: int | None = None) -> str:
        """Of its only container."""
        query = [("tailLines", str(lines))] if lines else []
        query += [("sinceSeconds", str(since_seconds))] if since_seconds else []
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        return self._send("GET", path, f"read the log of pod {pod!r}", query=query).data.decode(errors="replace")

    def watch(
        self, kind: Kind, namespace: str, version: str, *, labels: Mapping[str, str] | None = None, seconds: float = 30
    ) -> Iterator[Change]:
        """Changes since `version`, for about so many seconds; it may end at any time, whenever the connection does.

        Raises WatchExpired where the server has forgotten that version.
        """
        query = [("watch", "true"), ("allowWatchBookmarks", "true"), ("resourceVersion", version)]
        query += [("timeoutSeconds", str(max(1, round(seconds)))), *_selector(labels)]
        answer = self._send("GET", kind.path(namespace), f"watch {kind.plural}", query=query, stream=True)
        try:
            for line in _lines(answer):
                yield _change(json.loads(line))
        except (OSError, ValueError, *_transport_errors()) as error:  # cut off, perhaps in the middle of a line
            logger.debug("the watch on %s was cut off: %s", kind.plural, error)
        finally:
            answer.close()

    def _json(self, method: str, path: str, what: str, **request: Any) -> Object:
        return json.loads(self._send(method, path, what, **request).data)

    def _send(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
        content: str = "application/json",
        stream: bool = False,
    ) -> Any:
        """The raw answer. What is sent again is safe to be: a second create meets the first one's object."""
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                answer = self._once(method, path, query, body, content)
                if answer.status < 400:
                    if not stream:
                        answer.data  # noqa: B018 reads it, here where a cut is tried again
                    return answer
                error = _error(what, answer.status, answer.data)
                answer.close()
            except (OSError, *_transport_errors()) as failure:
                error, answer = ClusterError(f"cannot {what}: no answer from the API server: {failure}", 0), None
            if last or (error.status and error.status not in _AGAIN):
                raise error
            told = None if answer is None else answer.headers.get("Retry-After")
            self._rest(attempt, told, error)
        raise AssertionError("the last attempt returns or raises")

    def _once(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        body: Mapping[str, Any] | None,
        content: str,
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": content}
        made = self._api.param_serialize(
            method, path, query_params=list(query), header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        return self._api.call_api(*made, _request_timeout=_TIMEOUT).response

    def _rest(self, attempt: int, told: str | None, error: ClusterError) -> None:
        spread = random.uniform(0.5, 1.0) * self._first_wait * 2**attempt
        wait = min(_LONGEST_WAIT, float(told) if told and told.isdigit() else spread)
        logger.warning("%s; trying again in %.1f s", error, wait)
        time.sleep(wait)


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the client and the HTTP library below it raise where there is no answer."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return HTTPError, ApiException


def _selector(labels: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [("labelSelector", ",".join(f"{key}={value}" for key, value in labels.items()))] if labels else []


def _lines(answer: Any) -> Iterator[bytes]:
    rest = b""
    for piece in answer.stream(None, decode_content=False):
        *whole, rest = (rest + piece).split(b"\n")
        yield from filter(None, whole)


def _change(event: Mapping[str, Any]) -> Change:
    thing: Object = event["object"]
    if event["type"] == "ERROR":
        if thing.get("code") == 410:
            raise WatchExpired(f"the watch is too old: {thing.get('message')}", 410, "Expired")
        raise OSError(f"the watch ended: {thing.get('message')}")
    return Change(event["type"], thing, thing["metadata"]["resourceVersion"])


def _error(what: str, status: int, data: bytes) -> ClusterError:
    try:
        told: Mapping[str, Any] = json.loads(data)
        reason, message = str(told.get("reason", "")), str(told.get("message", ""))
    except (ValueError, AttributeError):
        reason, message = "", data[:300].decode(errors="replace")
    kinds = {404: NotFound, 409: Conflict, 410: WatchExpired}
    return kinds.get(status, ClusterError)(f"cannot {what}: {message or reason or f'HTTP {status}'}", status, reason)

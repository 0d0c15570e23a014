"""A small stateful Kubernetes API server, for tests: objects with uid and resourceVersion, selectors, patches, watch.

It knows no kinds and runs no controllers: every object under any group is stored as it comes. Faults are injected by
`fail_next` and `drop_watches`. A real API server takes its place under `pytest -m cluster`.
"""

import copy
import json
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
import yaml

from infra.cluster.client import ClusterClient

Json = dict[str, Any]
_HISTORY = 200


@dataclass(slots=True)
class Fault:
    """The answer to the next request of that method and kind."""

    method: str
    plural: str
    status: int
    reason: str
    message: str = ""
    seconds: int | None = None
    """For Retry-After."""
    after: bool = False
    """The request takes place, and the answer is lost: the connection is cut."""


@dataclass(slots=True)
class Cluster:
    """All objects, and the changes that watches follow."""

    objects: dict[str, Json] = field(default_factory=dict[str, Json])
    """By path."""
    served: set[str] = field(default_factory=set[str])
    """API groups; a path of another one is not found, as where a CRD is missing. Empty serves all."""
    forbidden: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """(verb, plural)."""
    faults: deque[Fault] = field(default_factory=deque[Fault])
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    version: int = 1
    oldest: int = 0
    """A watch from before it is gone (410)."""
    epoch: int = 0
    history: list[tuple[int, str, str, Json]] = field(default_factory=list[tuple[int, str, str, Json]])
    changed: threading.Condition = field(default_factory=threading.Condition)

    def fail_next(self, method: str, plural: str, status: int, reason: str, **more: Any) -> None:
        self.faults.append(Fault(method, plural, status, reason, **more))

    def drop_watches(self) -> None:
        """Cut every open watch in the middle."""
        with self.changed:
            self.epoch += 1
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget all changes: who comes back with an old version must list again."""
        with self.changed:
            self.oldest = self.version
            self.history.clear()

    def put(self, path: str, thing: Json, kind: str) -> Json:
        """Store and tell; bumps resourceVersion. Call it with `changed` held."""
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        self.objects[path] = thing
        self._tell(kind, path, thing)
        return copy.deepcopy(thing)

    def remove(self, path: str) -> Json:
        self.version += 1
        gone = self.objects.pop(path)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", path, gone)
        for child, thing in list(self.objects.items()):  # the garbage collector's work
            owners = thing["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.remove(child)
        return gone

    def _tell(self, kind: str, path: str, thing: Json) -> None:
        self.history.append((self.version, kind, path, copy.deepcopy(thing)))
        if len(self.history) > _HISTORY:
            self.oldest = self.history.pop(0)[0]
        self.changed.notify_all()

    # What tests do as controllers and kubelets do.

    def update(self, path: str, **merged: Any) -> None:
        """Merge into an object, as a controller patches its status."""
        with self.changed:
            self.put(path, merge(copy.deepcopy(self.objects[path]), merged), "MODIFIED")

    def add(self, path: str, thing: Json) -> None:
        with self.changed:
            name = path.rpartition("/")[2]
            thing["metadata"] = {"name": name, "uid": str(uuid4()), **thing.get("metadata", {})}
            self.put(path, thing, "ADDED")

    def drop(self, path: str) -> None:
        with self.changed:
            self.remove(path)


def merge(into: Json, patch: Json) -> Json:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
    return into


def leaves(tree: Json, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


class Refusal(Exception):
    def __init__(self, status: int, reason: str, message: str, seconds: int | None = None) -> None:
        self.status, self.reason, self.message, self.seconds = status, reason, message, seconds


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        address = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        path = address.path
        try:
            with self.cluster.changed:
                self.cluster.requests.append((method, path))
            plural, name = self._target(path)
            fault = self._fault(method, plural)
            if method == "GET" and self.query.get("watch") and fault is None:
                return self._watch(path)
            with self.cluster.changed:
                status, answer = self._answer(method, path, plural, name, body)
            if fault is not None:
                self.close_connection = True
                self.connection.close()
                return
            self._send(status, answer)
        except Refusal as refusal:
            self._refuse(refusal)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _target(self, path: str) -> tuple[str, str | None]:
        """Plural and name; checks that the group is served and the verb allowed."""
        parts = path.strip("/").split("/")
        group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
        if self.cluster.served and group not in self.cluster.served:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        if len(rest) > 2 and rest[0] == "namespaces":
            rest = rest[2:]
        plural, name = rest[0], rest[1] if len(rest) > 1 else None
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        reading = "watch" if self.query.get("watch") else "get" if name else "list"
        verb = verbs.get(self.command, reading)
        if (verb, plural) in self.cluster.forbidden:
            what = f'{plural} is forbidden: User "ana" cannot {verb} resource "{plural}" in API group "{group}"'
            raise Refusal(403, "Forbidden", what)
        return plural, name

    def _fault(self, method: str, plural: str) -> Fault | None:
        with self.cluster.changed:
            for fault in list(self.cluster.faults):
                if (fault.method, fault.plural) == (method, plural):
                    self.cluster.faults.remove(fault)
                    if fault.after:
                        return fault
                    raise Refusal(fault.status, fault.reason, fault.message, fault.seconds)
        return None

    def _answer(self, method: str, path: str, plural: str, name: str | None, body: Json) -> tuple[int, Json]:
        objects = self.cluster.objects
        if path.endswith(("/log", "/status")) and method == "GET":
            return 200, objects.get(path, {})
        if method == "POST" and plural == "selfsubjectaccessreviews":
            wanted = body["spec"]["resourceAttributes"]
            return 201, {"status": {"allowed": (wanted["verb"], wanted["resource"]) not in self.cluster.forbidden}}
        if method == "POST":
            return 201, self._create(path, plural, body)
        if method == "GET" and name is None:
            return 200, self._list(path)
        if method == "PATCH" and self.headers["Content-Type"].startswith("application/apply-patch"):
            return self._apply(path, name or "", body)
        if path not in objects:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
        if method == "GET":
            return 200, copy.deepcopy(objects[path])
        if method == "DELETE":
            self._check_uid(body.get("preconditions", {}), objects[path])
            return 200, self.cluster.remove(path)
        self._check_version(body, objects[path])
        if method == "PUT":
            body["metadata"]["uid"] = objects[path]["metadata"]["uid"]
            return 200, self.cluster.put(path, body, "MODIFIED")
        return 200, self.cluster.put(path, merge(copy.deepcopy(objects[path]), body), "MODIFIED")

    def _create(self, path: str, plural: str, body: Json) -> Json:
        own = f"{path}/{body['metadata']['name']}"
        if own in self.cluster.objects:
            raise Refusal(409, "AlreadyExists", f'{plural} "{body["metadata"]["name"]}" already exists')
        body["metadata"] |= {"uid": str(uuid4()), "generation": 1, "creationTimestamp": _now()}
        if self.query.get("dryRun"):
            return body
        return self.cluster.put(own, body, "ADDED")

    def _apply(self, path: str, name: str, body: Json) -> tuple[int, Json]:
        """Server-side apply on plain fields: a leaf that another manager has set otherwise is a conflict."""
        manager, force = self.query["fieldManager"], self.query.get("force") == "true"
        standing = self.cluster.objects.get(path)
        if standing is None:
            body["metadata"] |= {"name": name, "uid": str(uuid4()), "creationTimestamp": _now()}
            body["metadata"]["managedFields"] = [{"manager": manager, "leaves": [list(key) for key, _ in leaves(body)]}]
            return 201, self.cluster.put(path, body, "ADDED")
        made = copy.deepcopy(standing)
        fields = made["metadata"].setdefault("managedFields", [])
        mine = {key for key, _ in leaves(body)}
        for other in fields:
            taken = {tuple(key) for key in other["leaves"]} & mine
            changed = [key for key in taken if _at(body, key) != _at(standing, key)]
            if other["manager"] != manager and changed:
                if not force:
                    told = ".".join(changed[0])
                    raise Refusal(409, "Conflict", f'conflict with "{other["manager"]}": .{told}')
                other["leaves"] = [key for key in other["leaves"] if tuple(key) not in changed]
        before = next((other for other in fields if other["manager"] == manager), None)
        for key in before["leaves"] if before else []:
            if tuple(key) not in mine:
                _take(made, tuple(key))
        fields[:] = [other for other in fields if other["manager"] != manager]
        fields.append({"manager": manager, "leaves": [list(key) for key in sorted(mine)]})
        return 200, self.cluster.put(path, merge(made, body), "MODIFIED")

    def _check_version(self, body: Json, standing: Json) -> None:
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != standing["metadata"]["resourceVersion"]:
            raise Refusal(
                409, "Conflict", "the object has been modified; please apply your changes to the latest version"
            )

    def _check_uid(self, wanted: Json, standing: Json) -> None:
        if wanted.get("uid", standing["metadata"]["uid"]) != standing["metadata"]["uid"]:
            raise Refusal(409, "Conflict", "the UID in the precondition does not match the UID in record")

    def _list(self, path: str) -> Json:
        items = [
            copy.deepcopy(thing) for own, thing in self.cluster.objects.items() if self._selected(path, own, thing)
        ]
        return {"kind": "List", "metadata": {"resourceVersion": str(self.cluster.version)}, "items": items}

    def _selected(self, path: str, own: str, thing: Json) -> bool:
        if own.rpartition("/")[0] != path:
            return False
        held = thing["metadata"].get("labels", {})
        labels = [part.split("=", 1) for part in filter(None, self.query.get("labelSelector", "").split(","))]
        fields = [part.split("=", 1) for part in filter(None, self.query.get("fieldSelector", "").split(","))]
        return all(held.get(key) == value for key, value in labels) and all(
            _at(thing, tuple(key.split("."))) == value for key, value in fields
        )

    def _watch(self, path: str) -> None:
        since = int(self.query.get("resourceVersion") or 0)
        ends = time.monotonic() + float(self.query.get("timeoutSeconds", 30))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if since < self.cluster.oldest:
            self._event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
            return self._chunk(b"")
        epoch = self.cluster.epoch
        known = {own for own, thing in self.cluster.objects.items() if self._selected(path, own, thing)}
        while (left := ends - time.monotonic()) > 0:
            with self.cluster.changed:
                if epoch != self.cluster.epoch:
                    self.close_connection = True
                    return self.connection.close()
                fresh = [entry for entry in self.cluster.history if entry[0] > since]
                if not fresh:
                    self.cluster.changed.wait(min(left, 0.5))
            for version, kind, own, thing in fresh:
                since = version
                if self._selected(path, own, thing) or (own in known and own.rpartition("/")[0] == path):
                    self._event(kind, thing)
            if not fresh and self.query.get("allowWatchBookmarks"):
                self._event("BOOKMARK", {"kind": "Bookmark", "metadata": {"resourceVersion": str(since)}})
        self._chunk(b"")

    def _event(self, kind: str, thing: Json) -> None:
        self._chunk(json.dumps({"type": kind, "object": thing}).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _refuse(self, refusal: Refusal) -> None:
        status = {"kind": "Status", "status": "Failure", "code": refusal.status, "reason": refusal.reason}
        self._send(refusal.status, {**status, "message": refusal.message}, refusal.seconds)

    def _send(self, status: int, answer: Json, retry_after: int | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(data)


def _at(tree: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _take(tree: Json, key: tuple[str, ...]) -> None:
    for part in key[:-1]:
        tree = tree.get(part, {})
    tree.pop(key[-1], None)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def api_server() -> Generator[tuple[Cluster, str]]:
    """A server of its own, and its address."""
    cluster = Cluster()
    handler = type("BoundHandler", (Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield cluster, f"http://127.0.0.1:{server.server_port}"
    finally:
        cluster.drop_watches()
        server.shutdown()
        server.server_close()
        thread.join()


def kubeconfig(folder: Path, address: str) -> Path:
    path = folder / "kubeconfig"
    tree = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {"token": "a-token"}}],
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def api() -> Iterator[tuple[Cluster, str]]:
    """A server that lives as long as the test, and its address."""
    with api_server() as running:
        yield running


@pytest.fixture
def cluster(api: tuple[Cluster, str]) -> Cluster:
    return api[0]


@pytest.fixture
def client(api: tuple[Cluster, str], tmp_path: Path) -> ClusterClient:
    return ClusterClient.connect(str(kubeconfig(tmp_path, api[1])), first_wait=0.01)

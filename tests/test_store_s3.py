"""What only an S3 server, or the way to it, can do wrong."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.auth  # pyright: ignore[reportMissingTypeStubs]
import pytest

from infra.store.artifacts import (
    AlreadyExists,
    ArtifactStore,
    Conflict,
    OutcomeUnknown,
    StoreFull,
    StoreRefused,
    Versioned,
)
from infra.store.location import open_store
from infra.store.s3_client import S3Access
from infra.store.s3_parts import PART
from tests.chaos.proxy import FaultyLink, Request, Script
from tests.s3_server import S3Server


def test_two_prefixes_of_a_bucket_do_not_meet(s3_server: S3Server) -> None:
    url = s3_server.url()
    one, two = (open_store(f"{url}/{name}", s3_server.access) for name in ("one", "one-more"))
    one.create("a", b"1")
    assert two.list() == []
    two.create("a", b"2")
    assert one.read("a").data == b"1"


def test_a_missing_bucket_is_refused_and_not_made(s3_server: S3Server) -> None:
    for _ in range(2):
        with pytest.raises(StoreRefused, match="there is no bucket 'artifact'"):
            open_store("s3://artifact/runs", s3_server.access)


@pytest.mark.parametrize(
    ("field", "code"), [("access_key", "InvalidAccessKeyId"), ("secret_key", "SignatureDoesNotMatch")]
)
def test_refused_credentials_are_told_and_not_shown(s3_server: S3Server, field: str, code: str) -> None:
    access = replace(s3_server.access, **{field: "mistaken"})
    with pytest.raises(StoreRefused, match=f"refused the credentials .{code}.*AWS_SECRET_ACCESS_KEY"):
        open_store("s3://artifacts/runs", access)
    assert "test-secret-key" not in repr(s3_server.access)


def test_missing_credentials_are_told(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreRefused, match=r"no credentials.*set AWS_ACCESS_KEY_ID"):
        open_store("s3://artifacts/runs", S3Access(s3_server.endpoint))


def test_an_unreachable_server_is_a_connection_error(s3_server: S3Server) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="check the endpoint and the network"):
            open_store("s3://artifacts/runs", replace(s3_server.access, endpoint=endpoint))


class CarelessServer(BaseHTTPRequestHandler):
    """Takes every write, whatever its condition."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(b"<ListBucketResult/>")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_ignores_conditions_is_refused() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), CarelessServer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            access = S3Access(f"http://127.0.0.1:{server.server_port}", "key", "secret", "us-east-1")
            with pytest.raises(StoreRefused, match=r"ignores If-None-Match on writes.*two promotions could both win"):
                open_store("s3://artifacts", access)
        finally:
            server.shutdown()


class FullServer(CarelessServer):
    """MinIO's answer when its disks are full; SeaweedFS has a 500 for it, as for anything else."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b"<Error><Code>XMinioStorageFull</Code><Message>minimum free drive threshold</Message></Error>"
        self.send_response(507)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_server_without_space_is_told() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), FullServer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            access = S3Access(f"http://127.0.0.1:{server.server_port}", "key", "secret", "us-east-1")
            with pytest.raises(StoreFull, match=r"no space left .*XMinioStorageFull.*free some there"):
                open_store("s3://artifacts", access)
        finally:
            server.shutdown()


def test_a_clock_that_is_wrong_is_told(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args: now(*args) - timedelta(hours=1))
    with pytest.raises(StoreRefused, match=r"clocks of this machine and of the server .*GMT.* too far apart.*by NTP"):
        open_store("s3://artifacts/runs", s3_server.access)


@contextmanager
def linked(s3_server: S3Server, script: Script) -> Iterator[tuple[ArtifactStore, ArtifactStore]]:
    """A store on a link that follows the script once it is open, and a rival's on the straight way."""
    with closing(FaultyLink(s3_server.endpoint, script=script)) as link:
        link.calm.set()
        url = s3_server.url()
        store = open_store(url, replace(s3_server.access, endpoint=link.endpoint))
        link.calm.clear()
        yield store, open_store(url, s3_server.access)


def first(method: str, fault: str, then: Callable[[], object] = lambda: None) -> Script:
    """That fault for the first request of that method; `then` runs before the next one passes."""
    waiting = [fault]
    told = [then]

    def script(request: Request) -> str:
        if waiting and request.method == method:
            return waiting.pop()
        if not waiting and told:
            told.pop()()
        return ""

    return script


def test_a_write_whose_answer_is_lost_is_known_as_our_own(s3_server: S3Server) -> None:
    with linked(s3_server, first("PUT", "drop_answer")) as (store, rival):
        created = store.create("ref", b"1")
        assert rival.read("ref").version == created
        with pytest.raises(AlreadyExists):
            store.create("ref", b"1")
    with linked(s3_server, first("PUT", "drop_answer")) as (store, rival):
        swapped = store.swap("ref", b"2", rival.create("ref", b"1"))
        assert rival.read("ref") == Versioned(b"2", swapped)


@pytest.mark.parametrize("fault", ["answer_second", "drop_answer", "500_after"])
def test_a_write_that_a_rival_built_upon_before_its_answer_was_known_is_known_as_our_own(
    s3_server: S3Server, fault: str
) -> None:
    def build_upon_it() -> None:
        written.append(rival.read("ref").version)
        rival.swap("ref", b"3", written[0])

    written: list[str] = []
    with linked(s3_server, first("PUT", fault, build_upon_it)) as (store, rival):
        assert store.swap("ref", b"2", rival.create("ref", b"1")) == written[0]
        assert rival.read("ref").data == b"3"
    written.clear()
    with linked(s3_server, first("PUT", fault, build_upon_it)) as (store, rival):
        assert store.create("ref", b"2") == written[0]


def test_a_write_is_known_as_our_own_under_forty_that_followed(s3_server: S3Server) -> None:
    def build_upon_it() -> None:
        written.append(rival.read("ref").version)
        for number in range(40):
            rival.swap("ref", f"rival {number}".encode(), rival.read("ref").version)

    written: list[str] = []
    with linked(s3_server, first("PUT", "drop_answer", build_upon_it)) as (store, rival):
        assert store.swap("ref", b"2", rival.create("ref", b"1")) == written[0]


def test_a_write_that_more_built_upon_than_the_trail_holds_is_neither_done_nor_refused(s3_server: S3Server) -> None:
    def build_upon_it() -> None:
        for number in range(60):
            rival.swap("ref", f"rival {number}".encode(), rival.read("ref").version)

    with linked(s3_server, first("PUT", "drop_answer", build_upon_it)) as (store, rival):
        version = rival.create("ref", b"1")
        with pytest.raises(OutcomeUnknown, match=r"so many have written since.*look what stands there"):
            store.swap("ref", b"2", version)
        with pytest.raises(Conflict):
            store.swap("ref", b"2", version)
        with pytest.raises(AlreadyExists):
            store.create("ref", b"2")


def test_a_write_that_never_arrived_and_was_overtaken_is_refused(s3_server: S3Server) -> None:
    with linked(s3_server, first("PUT", "drop_request", lambda: rival.swap("ref", b"3", version))) as (store, rival):
        version = rival.create("ref", b"1")
        with pytest.raises(Conflict):
            store.swap("ref", b"2", version)
    create_too = first("PUT", "drop_request", lambda: rival.create("ref", b"3"))
    with linked(s3_server, create_too) as (store, rival), pytest.raises(AlreadyExists):
        store.create("ref", b"2")


def test_a_refusal_that_is_not_so_is_seen_through(s3_server: S3Server) -> None:
    with linked(s3_server, first("PUT", "412")) as (store, rival):
        assert store.create("ref", b"1") == rival.read("ref").version
    with linked(s3_server, first("PUT", "409")) as (store, rival):
        version = rival.create("ref", b"1")
        assert store.swap("ref", b"2", version) == rival.read("ref").version


def a_large_file(folder: Path) -> Path:
    path = folder / "weights"
    path.write_bytes(bytes(PART) + b"of two parts")
    return path


OPENS, SENDS, COMPLETES = "POST uploads", "PUT uploadId", "POST uploadId"


@pytest.mark.parametrize(
    ("message", "fault"),
    [(OPENS, "drop_answer"), (SENDS, "drop_request"), (SENDS, "tear_request"), (SENDS, "503")]
    + [
        (COMPLETES, fault) for fault in ("drop_request", "drop_answer", "send_twice", "tear_answer", "500_after", "409")
    ],
)
def test_a_file_in_parts_survives_a_fault(s3_server: S3Server, tmp_path: Path, message: str, fault: str) -> None:
    method, query = message.split()
    waiting = [fault]

    def script(request: Request) -> str:
        return waiting.pop() if waiting and request.method == method and query in request.target else ""

    with linked(s3_server, script) as (store, rival):
        blob = store.put_file(a_large_file(tmp_path))
        assert not waiting
        assert rival.measure(blob.digest) == blob


def test_a_file_that_comes_in_ranges_survives_torn_ones(s3_server: S3Server, tmp_path: Path) -> None:
    torn = ["tear_answer", "", "tear_answer", "drop_answer"]
    with linked(s3_server, lambda request: torn.pop() if torn and request.method == "GET" else "") as (store, rival):
        blob = rival.put_file(a_large_file(tmp_path))
        store.fetch_file(blob.digest, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "weights").read_bytes() and not torn


def test_an_upload_that_fails_leaves_nothing_behind(s3_server: S3Server, tmp_path: Path) -> None:
    with linked(s3_server, lambda request: "500" if "partNumber=2" in request.target else "") as (store, rival):
        with pytest.raises(ConnectionError, match="the server failed with 500 InternalError"):
            store.put_file(a_large_file(tmp_path))
        assert rival.list() == []
        assert rival.clear_unfinished(timedelta(0)) == 0


def test_a_rival_who_stores_the_same_file_first_spares_us_nothing_but_trouble(
    s3_server: S3Server, tmp_path: Path
) -> None:
    path = a_large_file(tmp_path)
    ahead = [lambda: rival.put_file(path)]

    def script(request: Request) -> str:
        if ahead and request.method == "POST" and "uploadId" in request.target:
            ahead.pop()()
        return ""

    with linked(s3_server, script) as (store, rival):
        blob = store.put_file(path)
        assert not ahead and rival.measure(blob.digest) == blob
        assert rival.clear_unfinished(timedelta(0)) == 0

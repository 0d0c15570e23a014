"""What only an S3 server, or the way to it, can do wrong."""

import socket
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from infra.store.artifacts import AlreadyExists, StoreRefused
from infra.store.location import open_store
from infra.store.s3_client import S3Access
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


class LossyLink:
    """A link to the server; while `lose` is set, the next good answer is lost and the connection with it."""

    def __init__(self, endpoint: str) -> None:
        self.lose = threading.Event()
        self.target = urlsplit(endpoint)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets = [self.listener]
        self.threads: list[threading.Thread] = []
        self.start(self.accept)

    def start(self, work: Callable[..., None], *arguments: object) -> None:
        self.threads.append(threading.Thread(target=work, args=arguments))
        self.threads[-1].start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection((self.target.hostname, self.target.port))
            self.sockets += [client, server]
            self.start(self.forward, client, server, False)
            self.start(self.forward, server, client, True)

    def forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        while data := receive(source):
            if answers and data.startswith(b"HTTP/1.1 200") and self.lose.is_set():
                self.lose.clear()
                break
            sink.sendall(data)
        hang_up(source)
        hang_up(sink)

    def close(self) -> None:
        for end in self.sockets:
            hang_up(end)
        for thread in self.threads:
            thread.join()
        for end in self.sockets:
            end.close()


def receive(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


def hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def test_a_write_whose_answer_is_lost_is_known_as_our_own(s3_server: S3Server) -> None:
    with closing(LossyLink(s3_server.endpoint)) as link:
        store = open_store(s3_server.url(), replace(s3_server.access, endpoint=link.endpoint))
        link.lose.set()
        created = store.create("ref", b"1")
        assert not link.lose.is_set()
        assert store.read("ref").version == created
        link.lose.set()
        swapped = store.swap("ref", b"2", created)
        assert not link.lose.is_set()
        assert store.read("ref").version == swapped
        with pytest.raises(AlreadyExists):
            store.create("ref", b"1")

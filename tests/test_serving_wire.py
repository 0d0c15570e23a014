"""What strangers do on the wire to a real server process: connections that are slow, idle, unread or not HTTP, and
requests made from its own document."""

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.fuzz import SETTINGS, fuzz
from tests.s3_server import free_ports
from tests.server_process import server_process
from tests.tiny_server import KEY

HEAD_TIMEOUT_S, PATIENCE_S = 6.0, 60.0
IDLE, SLOW = 1000, 50


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    (port,) = free_ports(1)
    timeouts = {"head_timeout_s": HEAD_TIMEOUT_S, "body_timeout_s": 1.0, "stall_timeout_s": 1.0}
    with server_process(tmp_path_factory.mktemp("server"), port, **SETTINGS, **timeouts) as process:
        yield port
        assert process.poll() is None, "the server died of what it was sent"


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    connection.sendall(data)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    said = b""
    with connection:
        while part := connection.recv(65536):
            said += part
    return said


def is_open(connection: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False
    return True


def drip(connections: list[socket.socket], over: threading.Event) -> None:
    """A letter of a head to each, a few times a second, for as long as the server listens."""
    while not over.wait(0.2):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"x")


def test_a_thousand_idle_and_many_slow_connections_keep_nobody_waiting(port: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle = [connect(port) for _ in range(IDLE)]
    slow = [connect(port, b"GET /v1/videos HTTP/1.1\r\nx-slow: ") for _ in range(SLOW)]
    over = threading.Event()
    dripping = threading.Thread(target=drip, args=(slow, over))
    dripping.start()
    start = time.monotonic()
    try:
        with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=30) as client:
            client.models.list()
            assert sum(map(is_open, idle + slow)) == IDLE + SLOW or time.monotonic() - start > HEAD_TIMEOUT_S / 2
            done = client.videos.create_and_poll(prompt="a red circle", extra_body={"num_inference_steps": 2})
            assert done.status == "completed"
            assert client.videos.download_content(done.id).read()[4:8] == b"ftyp"
        answers = [answer(connection) for connection in idle]
    finally:
        over.set()
        dripping.join()
    assert all(said.startswith(b"HTTP/1.1 408") for said in answers)
    assert time.monotonic() - start < PATIENCE_S
    for connection in slow:  # reset, where letters came after the close
        with contextlib.suppress(ConnectionResetError):
            assert answer(connection).startswith(b"HTTP/1.1 408")


def test_a_body_that_does_not_come_is_not_waited_for(port: int) -> None:
    head = f"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    said = answer(connect(port, head.encode()))
    assert b" 408 " in said.partition(b"\r\n")[0]
    assert b"request_timeout" in said


def test_an_answer_that_nobody_reads_is_not_kept_for_ever(port: int) -> None:
    asked = 400
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE_S)
    connection.connect(("127.0.0.1", port))
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * asked)
    whole = len(httpx.get(f"http://127.0.0.1:{port}/openapi.json").content)
    time.sleep(3)
    said = 0
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            said += len(part)
    assert 0 < said < asked * whole


def test_what_is_not_http_is_told_so(port: int) -> None:
    for garbage in (b"\x16\x03\x01\x02\r\n\r\n", b"GET /\r\n\r\n", b"x" * 40_000):
        said = answer(connect(port, garbage))
        assert said.startswith(b"HTTP/1.1 400"), garbage[:20]
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_request"


@pytest.mark.filterwarnings("default")  # schemathesis warns of values of its own making
def test_requests_made_from_the_document_are_answered_as_it_says_and_never_with_5xx(port: int) -> None:
    outcome = fuzz(f"http://127.0.0.1:{port}", cases=200)
    assert outcome.cases >= 200
    assert outcome.server_errors == []
    assert outcome.unlike_document == []
    assert outcome.slowest_s < PATIENCE_S

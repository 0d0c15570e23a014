"""A proxy between an S3 client and its server that does what networks and servers do at their worst.

It owns the faults, their chances and their count; it knows nothing of what is stored. Requests are read whole, so that
one can be dropped, sent twice or torn; the bytes of those that pass are left as they are, since they are signed.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO
from urllib.parse import urlsplit

FAULTS: Mapping[str, float] = {
    "drop_request": 0.02,
    "drop_answer": 0.03,
    "send_twice": 0.015,
    "answer_second": 0.015,
    "send_again_later": 0.02,
    "delay": 0.05,
    "arrive_late": 0.01,
    "tear_request": 0.02,
    "tear_answer": 0.02,
    "409": 0.01,
    "412": 0.01,
    "500": 0.01,
    "503": 0.02,
    "500_after": 0.02,
    "503_after": 0.01,
}
"""Chance of each; most requests pass. An `_after` answers so although the server has done what it was asked.

`answer_second` sends twice as well, and tells what the server said to the second, which a condition may have refused.
"""
_GONE = (OSError, http.client.HTTPException)
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_CODES = {409: "ConditionalRequestConflict", 412: "PreconditionFailed", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True, slots=True)
class Request:
    """As it came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def is_conditional(self) -> bool:
        return any(name.lower() in ("if-match", "if-none-match") for name, _ in self.headers)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back; `length` is what the head claims, which is not that of the body where the method is HEAD."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: str

    def encoded(self) -> bytes:
        head = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        head += [f"{name}: {value}" for name, value in self.headers]
        if self.status not in (204, 304):
            head.append(f"Content-Length: {self.length}")
        return "\r\n".join([*head, "", ""]).encode("latin-1") + self.body


Script = Callable[[Request], str]


class FaultyLink:
    """A listener on loopback that passes requests on to `endpoint`, or does one of `faults` to them.

    `late` is the delay in seconds of what arrives after its sender has stopped waiting. While `calm` is set all passes.
    `script` names the fault of each request, or none by "", in place of chance.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        seed: int = 0,
        faults: Mapping[str, float] = FAULTS,
        late: float = 3.0,
        script: Script | None = None,
    ) -> None:
        self.calm = threading.Event()
        self.done: Counter[str] = Counter()
        self._faults = faults
        self._late = late
        self._script = script
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        target = urlsplit(endpoint)
        self._server = (target.hostname or "", target.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closed = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        """Hang up on everybody; nothing is on its way to the server afterwards."""
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for client in self._open:
                _hang_up(client)
        while self._threads:
            self._threads.pop().join()
        self._listener.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # pyright: ignore[reportArgumentType]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = http.client.HTTPConnection(*self._server, timeout=60)
        try:
            with client.makefile("rb") as source:
                while not self._closed and (request := _read(source, client)):
                    if not self._treat(request, client, server):
                        return
        except _GONE:
            return  # one of both sides is gone; the other is told by the end of its connection
        finally:
            server.close()
            with self._lock:
                self._open.discard(client)
            _hang_up(client)
            client.close()

    def _treat(self, request: Request, client: socket.socket, server: http.client.HTTPConnection) -> bool:
        """Whether the connection lives on."""
        fault = self._fault_for(request)
        if fault == "drop_request":
            return _reset(client) if self._chance(0.5) else False
        if fault == "tear_request":
            self._send_alone(request, cut=len(request.body) // 2)
            return False
        if fault in ("409", "412", "500", "503"):
            client.sendall(_injected(int(fault), request).encoded())
            return True
        if fault in ("delay", "arrive_late"):
            time.sleep(self._late if fault == "arrive_late" else self._up_to(0.05))
        if fault == "send_again_later":
            self._start(self._send_later, request)
        answer = _forward(server, request)
        if fault in ("send_twice", "answer_second"):
            second = _forward(server, request)
            answer = second if fault == "answer_second" else answer
        if fault == "drop_answer":
            return _reset(client) if self._chance(0.5) else False
        if fault.endswith("_after"):
            answer = _injected(int(fault.removesuffix("_after")), request)
        data = answer.encoded()
        client.sendall(data[: len(data) - 1 - len(answer.body) // 2] if fault == "tear_answer" else data)
        return fault != "tear_answer"

    def _fault_for(self, request: Request) -> str:
        if self.calm.is_set():
            return ""
        if self._script:
            return self._script(request)
        with self._lock:
            chosen = self._random.choices([*self._faults, ""], [*self._faults.values(), 1 - sum(self._faults.values())])
        fault = chosen[0]
        # A server has nothing to say of conditions where there are none.
        if fault in ("409", "412") and not request.is_conditional:
            return ""
        if fault:
            self.done[fault] += 1
        return fault

    def _send_later(self, request: Request) -> None:
        time.sleep(self._up_to(self._late))
        self._send_alone(request)

    def _send_alone(self, request: Request, cut: int | None = None) -> None:
        """On a connection of its own, and nobody hears the answer."""
        with closing(http.client.HTTPConnection(*self._server, timeout=60)) as server, suppress(*_GONE):
            _forward(server, request, cut)

    def _chance(self, chance: float) -> bool:
        with self._lock:
            return self._random.random() < chance

    def _up_to(self, seconds: float) -> float:
        with self._lock:
            return self._random.uniform(0, seconds)


def _read(source: BinaryIO, client: socket.socket) -> Request | None:
    line = source.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    headers: list[tuple[str, str]] = []
    length = 0
    while (head := source.readline()) not in (b"\r\n", b""):
        name, _, value = head.decode("latin-1").strip().partition(":")
        if name.lower() == "content-length":
            length = int(value)
        if name.lower() == "expect":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        else:
            headers.append((name, value.strip()))
    body = source.read(length)
    return Request(line[0], line[1], headers, body) if len(body) == length else None


def _forward(server: http.client.HTTPConnection, request: Request, cut: int | None = None) -> Answer:
    """Send and read the answer; with `cut`, send that much of the body alone, to which there is none."""
    server.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers:
        server.putheader(name, value)
    server.endheaders(request.body if cut is None else request.body[:cut])
    if cut is not None:
        raise http.client.IncompleteRead(b"")
    answer = server.getresponse()
    body = answer.read()
    kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
    length = answer.getheader("Content-Length") if request.method == "HEAD" else str(len(body))
    return Answer(answer.status, kept, body, length or "0")


_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}


def _injected(status: int, request: Request) -> Answer:
    body = b"" if request.method == "HEAD" else _ERROR.format(code=_CODES[status]).encode()
    return Answer(status, [("Content-Type", "application/xml")], body, str(len(body)))


def _reset(client: socket.socket) -> bool:
    """The other side's next read fails, rather than ends."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return False


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return

"""A real HTTP server that takes webhooks: it checks each as any receiver would, keeps it, and answers as it is told.

It owns the socket and what came in; it knows nothing of registries. It also stands for the webhook source of Argo
Events, which lets in who has its token and passes the body on; the sensor behind it needs a cluster.
"""

import json
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from infra import webhook


class Receiver:
    """What came in, and what is answered next."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.url = ""
        self.taken: list[tuple[str, bytes]] = []
        """(id, body) of every message that was let in and answered 200."""
        self.refusals = 0
        """How many requests were answered otherwise."""
        self.answers: list[int] = []
        """Statuses of the next answers; 200 once there are none."""


Check = Callable[[Mapping[str, str], bytes], str]
"""The id of a message with those headers and that body; a ValueError keeps it out."""


@contextmanager
def receiving(secret: str) -> Generator[Receiver]:
    """Of Standard Webhooks."""
    key = webhook.read_secret(secret)
    with _serving(Receiver(key), partial(webhook.verify, key)) as receiver:
        yield receiver


@contextmanager
def receiving_argo_events(token: str) -> Generator[Receiver]:
    """Of Argo Events, whose `authSecret` holds the token."""

    def check(headers: Mapping[str, str], body: bytes) -> str:
        if headers.get("authorization") != f"Bearer {token}":
            raise ValueError("not authorized")
        return json.loads(body)["payload"]["id"]

    with _serving(Receiver(token.encode()), check) as receiver:
        yield receiver


@contextmanager
def _serving(receiver: Receiver, check: Check) -> Generator[Receiver]:

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = receiver.answers.pop(0) if receiver.answers else 200
            try:
                names = {name.lower(): value for name, value in self.headers.items()}
                message_id = check(names, body)
            except ValueError:
                message_id, status = "", 401
            if status == 200:
                receiver.taken.append((message_id, body))
            else:
                receiver.refusals += 1
            self.send_response(status)
            if status == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/hook?token=hidden"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A real HTTP server that takes webhooks: it checks each as any receiver would, keeps it, and answers as it is told.

It owns the socket and what came in; it knows nothing of registries.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from infra import webhook


class Receiver:
    """What came in, and what is answered next."""

    def __init__(self, secret: str) -> None:
        self.secret = webhook.read_secret(secret)
        self.url = ""
        self.taken: list[tuple[str, bytes]] = []
        """(id, body) of every message that bore our signature and was answered 200."""
        self.refusals = 0
        """How many requests were answered otherwise."""
        self.answers: list[int] = []
        """Statuses of the next answers; 200 once there are none."""


@contextmanager
def receiving(secret: str) -> Generator[Receiver]:
    receiver = Receiver(secret)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = receiver.answers.pop(0) if receiver.answers else 200
            try:
                names = {name.lower(): value for name, value in self.headers.items()}
                message_id = webhook.verify(receiver.secret, names, body)
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

"""A small real HTTP server that speaks OpenAI's chat completions, for captions and audits.

It answers from what it is shown: colours of the JPEGs it gets. It knows nothing of who asks.
"""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = tuple[int, Any, dict[str, str]]
Rule = Callable[[str, list[np.ndarray]], str]


class VisionServer:
    """What was asked of it, and what it shall answer first before it answers by its rule."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.first: list[Answer] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.url = ""
        self.clients: list[Any] = []
        """Closed with the server."""

    def answer(self, body: dict[str, Any], key: str | None) -> Answer:
        with self.lock:
            self.asked.append(body)
            self.keys.add(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            first = self.first.pop(0) if self.first else None
        try:
            if first is not None:
                return first
            parts = body["messages"][0]["content"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            pictures = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            message = {"role": "assistant", "content": self.rule(text, pictures)}
            usage = {"prompt_tokens": 1000, "completion_tokens": 100}
            return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}, {}
        finally:
            with self.lock:
                self.at_once -= 1


def _picture(url: str) -> np.ndarray:
    found = re.fullmatch(r"data:image/jpeg;base64,(.*)", url)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))


@contextmanager
def serving(rule: Rule) -> Generator[VisionServer]:
    server = VisionServer(rule)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            status, told, headers = server.answer(body, self.headers.get("authorization"))
            data = told.encode() if isinstance(told, str) else json.dumps(told).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()

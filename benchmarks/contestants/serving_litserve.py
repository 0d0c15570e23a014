"""LitServe around the tiny DiT; its worker is a process that imports this module, so the class stands at its top.

It owns what LitServe is told; `serving_peers` says what is equal to the others.
"""

import base64
import importlib
from pathlib import Path
from typing import Any

from benchmarks.contestants.serving_peers import MAX_VIDEOS, make_pipeline, make_videos

litserve: Any = importlib.import_module("litserve")
"""By name: it is not among our requirements."""
BATCH_WAIT_S = 0.05
"""Its `batch_timeout`: how long a batch waits for more."""


class Videos(litserve.LitAPI):  # pyright: ignore[reportUntypedBaseClass]
    folder: Path

    def setup(self, device: str) -> None:
        self.pipeline = make_pipeline(self.folder)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[bytes]:
        return make_videos(self.pipeline, x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> dict[str, str]:
        return {"video": base64.b64encode(output).decode()}


def serve(folder: Path, port: int) -> None:
    api = Videos(max_batch_size=MAX_VIDEOS, batch_timeout=BATCH_WAIT_S)
    api.folder = folder
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)

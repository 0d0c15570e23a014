"""The servers that `benchmarks.serving` compares, each a process: `python -m ...serving_peers NAME FOLDER PORT`.

It owns how each is set up around one tiny DiT and what is equal: network, codec, text encoder, sampler, one engine
thread, at most `MAX_ROWS` engine rows a call. It offers no load and counts nothing but calls of the engine, which every
one appends to FOLDER/calls as `began ended bucket rows ids`.

- `ours`, `vllm_omni`, `sglang`: our server, whole, with our scheduler or one of `serving_policies` in its place.
- `naive`: FastAPI and a lock, one request from text to mp4 at a time.
- `litserve`: LitServe itself with its request batching, `MAX_VIDEOS` a batch. It batches what comes, so videos of a
  batch that share a shape are denoised together by our pipeline, whatever their steps and guidance: more than
  its users have.
"""

import base64
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response
from sqlalchemy import select

from benchmarks.contestants.serving_policies import EqualKeys, RequestBatches
from export.engines.torch import TorchEngine
from infra.serving import media
from infra.serving.jobs.table import Job
from infra.serving.limits import VideoRequest
from infra.serving.pipeline import DenoiseRow, VideoPipeline
from infra.serving.process import ServerProcess
from infra.serving.server import make_server
from infra.serving.settings import ServerSettings
from model.recipe import StageRecipe
from monitoring import logs
from tests.tiny_server import WordEncoder, tiny_codec, tiny_network, tiny_recipe, tiny_settings

MAX_VIDEOS = 8
MAX_ROWS = 2 * MAX_VIDEOS
NETWORK = {"hidden_size": 64, "depth": 4, "num_heads": 4, "unmasked_depth": 1}
JOB_SERVERS = ("ours", "vllm_omni", "sglang")
"""Which answer with a job, to be asked for later; the others answer with the video."""


class CountedPipeline(VideoPipeline):
    """Writes every call down."""

    calls: Path

    def advance(self, rows: Sequence[DenoiseRow]) -> None:
        bucket, width, ids = rows[0].cost_key, sum(row.rows for row in rows), ",".join(row.job_id for row in rows)
        began = time.time()
        super().advance(rows)
        with self.calls.open("a") as file:
            file.write(f"{began} {time.time()} {bucket} {width} {ids}\n")


def make_pipeline(folder: Path) -> VideoPipeline:
    torch.set_num_threads(1)
    recipe = tiny_recipe()
    recipe = StageRecipe.model_validate(recipe.model_dump() | {"network": NETWORK})
    text_encoder = WordEncoder()
    engine = TorchEngine(tiny_network(recipe, text_encoder))
    pipeline = CountedPipeline(engine, tiny_codec(recipe), text_encoder, recipe, digest="tiny" * 16)
    pipeline.calls = folder / "calls"
    pipeline.calls.touch()
    return pipeline


def make_videos(pipeline: VideoPipeline, bodies: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """mp4s of `Ask.plain_body`s, those of one shape denoised together."""
    rows: list[DenoiseRow] = []
    for number, body in enumerate(bodies):
        inputs = {"image": base64.b64decode(body["image"])} if body["image"] else {}
        rows.append(pipeline.prepare(str(number), VideoRequest.model_validate(body["request"]), inputs))
    for key in dict.fromkeys(row.key for row in rows):
        while group := [row for row in rows if row.key == key and not row.done]:
            width = 0
            fits = [row for row in group if (width := width + row.rows) <= MAX_ROWS]
            pipeline.advance(fits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        videos: list[bytes] = []
        for row in rows:
            media.write_mp4(path, pipeline.decode(row), row.request.fps)
            videos.append(path.read_bytes())
    return videos


def settings(folder: Path, port: int = 0) -> ServerSettings:
    return tiny_settings(
        folder, port=port, max_rows=MAX_VIDEOS, max_queued=1000, idle_poll_s=0.5, progress_every_s=0.25
    )


def job_server(name: str, folder: Path, port: int) -> ServerProcess:
    server = make_server(settings(folder, port), make_pipeline(folder))
    jobs = server.worker.jobs

    def requests(ids: Iterable[str]) -> dict[str, tuple[VideoRequest, bool]]:
        with jobs.database.read() as session:
            found = session.execute(select(Job.id, Job.request_json, Job.inputs).where(Job.id.in_(list(ids))))
            return {id: (VideoRequest.model_validate(asked), bool(inputs)) for id, asked, inputs in found}

    if name != "ours":
        policy = {"vllm_omni": EqualKeys, "sglang": RequestBatches}[name]
        server.worker.floor.scheduler = policy[DenoiseRow](MAX_ROWS, requests)
    return server


def serve_naively(folder: Path, port: int) -> None:
    app, lock, pipeline = FastAPI(), threading.Lock(), make_pipeline(folder)

    @app.get("/health")
    def health() -> str:  # pyright: ignore[reportUnusedFunction]
        return "ok"

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> Response:  # pyright: ignore[reportUnusedFunction]
        with lock:
            return Response(make_videos(pipeline, [body])[0], media_type="video/mp4")

    uvicorn.run(app, port=port, log_level="warning")


def serve_with_litserve(folder: Path, port: int) -> None:
    importlib.import_module("benchmarks.contestants.serving_litserve").serve(folder, port)  # wants the peers' folder


def main() -> None:
    name, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    plain: dict[str, Callable[[Path, int], None]] = {"naive": serve_naively, "litserve": serve_with_litserve}
    if name in plain:
        plain[name](folder, port)
    else:
        logs.configure()
        job_server(name, folder, port).run()


if __name__ == "__main__":
    main()

"""A tiny server that misbehaves in one way, for a canary to be caught: `python -m tests.canaries.server KIND DIR PORT`.

It owns the ways; it knows nothing of analysis. Everything but the one fault is the real server.
"""

import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from infra.rollout.home import HomeSettings
from infra.serving.http import operations
from infra.serving.pipeline import VideoPipeline
from infra.serving.server import make_server
from model.conditioning import Conditions
from monitoring import logs
from tests.tiny_server import KEY, SteadyEngine, WordEncoder, tiny_network, tiny_pipeline, tiny_recipe, tiny_settings

KINDS = ("good", "slow", "wrong-output", "erring", "crashing", "flapping", "no-traffic", "metrics-down")
ENDS = {kind: "promote" if kind == "good" else "abort" for kind in KINDS}
"""How each must end."""


class SlowEngine(SteadyEngine):
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        time.sleep(0.4)
        return super().denoise(latents, timestep, conditions)


class WrongEngine(SteadyEngine):
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return super().denoise(latents, timestep, conditions) * 1.5


class ErringEngine(SteadyEngine):
    """Once it was probed it draws what is no number every other time."""

    calls = 0

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        self.calls += 1
        velocity = super().denoise(latents, timestep, conditions)
        return velocity * torch.nan if self.calls > 60 else velocity


ENGINES = {"slow": SlowEngine, "wrong-output": WrongEngine, "erring": ErringEngine}


def misbehave(kind: str, after_s: float) -> None:
    """Die `after_s` after the server is ready; a crash is once and for all where `flapping` comes back."""
    if kind in ("crashing", "flapping"):
        threading.Timer(after_s, lambda: os._exit(137)).start()
    if kind == "metrics-down":

        def broken() -> tuple[bytes, str]:
            raise RuntimeError("the metrics are down")

        operations.metrics.render = broken  # pyright: ignore[reportAttributeAccessIssue]


def pipeline_of(kind: str) -> VideoPipeline:
    pipeline = tiny_pipeline()
    if kind in ENGINES:
        recipe, words = tiny_recipe(), WordEncoder()
        engine = ENGINES[kind](tiny_network(recipe, words))
        pipeline = VideoPipeline(engine, pipeline.codec, words, recipe, digest=kind.ljust(64, "0"))
    return pipeline


def serve(kind: str, home: Path, port: int) -> None:
    torch.set_num_threads(1)
    logs.configure()
    track = os.environ.get("STIV_TRACK", "stable")
    settings = tiny_settings(home, port=port, track=track, drain_s=5, keep_latents_steps=2, max_queued=500)
    server = make_server(settings, pipeline_of(kind))
    if track == "canary":
        misbehave(kind, after_s=8.0)
    server.run()


def home_settings(folder: Path, *, scrape_every_s: float = 1.0) -> HomeSettings:
    """A home whose engines are kinds of misbehaviour."""
    return HomeSettings(
        command=lambda kind, port: [sys.executable, "-m", "tests.canaries.server", kind, str(folder), str(port)],
        environment=os.environ,
        database_url=f"sqlite:///{folder}/jobs.db",
        scrape_every_s=scrape_every_s,
        key=KEY,
        drain_s=20,
    )


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

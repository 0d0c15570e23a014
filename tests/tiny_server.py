"""A served model small enough for tests: a real untrained STIV, a fitted codec, a text encoder without weights.

Run as a script it is a server process: `python -m tests.tiny_server FOLDER PORT SETTINGS`, the last one JSON.
"""

import io
import json
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import openai
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from export.engines.torch import TorchEngine
from infra.serving.limits import ServingLimits, VideoRequest
from infra.serving.pipeline import VideoPipeline
from infra.serving.safety.decoding import Wanted, decode
from infra.serving.server import make_server
from infra.serving.settings import ServerSettings
from model.conditioning import Conditions
from model.data import moving_shapes
from model.generation import to_frames
from model.network.stiv import STIV
from model.recipe import StageRecipe
from model.text import TextEmbedding, TextEncoder
from model.vae import PatchPca
from monitoring import logs

KEY = "sk-test"
BODY_LIMIT = 300_000
CLIP = next(iter(moving_shapes.generate(1, num_frames=8, size=32, seed=3))).frames


class SteadyEngine(TorchEngine):
    """Whose calls have four rows at least: a CPU computes its smallest layers by another kernel below that, and then a
    video's last bits would tell whether it had company. ONNX Runtime needs no such care."""

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        rows = latents.shape[0]
        again = torch.arange(max(rows, 4)) % rows
        return super().denoise(latents[again], timestep[again], conditions.rows(again))[:rows]


class WordEncoder:
    """Every word has a random vector of its own; the word NAN has none, and EXPLODE is as wide as no other."""

    hidden_size = 16
    pooled_size = 16

    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        rows = [[self._vector(word) for word in ["<s>", *text.split()]] for text in texts]
        longest = max(len(row) for row in rows)
        width = max(vector.shape[0] for row in rows for vector in row)
        tokens = torch.zeros(len(texts), longest, width)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            for position, vector in enumerate(row):
                tokens[index, position, : vector.shape[0]] = vector
                mask[index, position] = True
        return TextEmbedding(tokens=tokens, mask=mask, pooled=tokens.sum(dim=1)[:, :16])

    def count_tokens(self, text: str) -> int:
        return 1 + len(text.split())

    def to(self, device: torch.device | str, /) -> Self:
        raise ValueError(f"words stay where they are, not on {device}")

    def _vector(self, word: str) -> torch.Tensor:
        if word == "NAN":
            return torch.full((16,), torch.nan)
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        return torch.randn(17 if word == "EXPLODE" else 16, generator=generator)


def request(prompt: str = "a red circle moves right", **changes: object) -> VideoRequest:
    defaults = {"width": 32, "height": 32, "num_frames": 8, "fps": 8, "num_inference_steps": 4}
    return VideoRequest.model_validate(
        {"prompt": prompt, "guidance_scale": 3.0, "flow_shift": 1.0, "seed": 7, **defaults, **changes}
    )


def image(width: int = 32, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(CLIP[0]).save(buffer, "PNG")
    wanted = Wanted(kind="image", width=width, height=height, max_pixels=4096, max_side=4096, max_seconds=5)
    return decode(buffer.getvalue(), wanted)


def tiny_recipe(*, task: str = "ti2v", stochastic: bool = False, solver: str = "heun") -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "network": {"hidden_size": 32, "depth": 2, "num_heads": 2, "unmasked_depth": 1},
            "video": {"num_frames": 8, "height": 32, "width": 32, "fps": 8},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "sampling": {"num_steps": 4, "guidance_scale": 3.0, "stochastic": stochastic, "solver": solver},
            "gate": [{"metric": "loss", "op": "<", "bound": 1.0}],
        }
    )


def tiny_network(recipe: StageRecipe, text_encoder: TextEncoder) -> STIV:
    torch.manual_seed(0)
    network = STIV(
        recipe.network,
        latent_channels=recipe.vae.latent_channels,
        text_size=text_encoder.hidden_size,
        pooled_size=text_encoder.pooled_size,
    )
    with torch.no_grad():
        for parameter in network.parameters():  # a new network's head is zero, and a zero velocity shows nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def tiny_codec(recipe: StageRecipe) -> PatchPca:
    clips = [clip.frames for clip in moving_shapes.generate(16, num_frames=8, size=32, seed=0)]
    return PatchPca.fit(to_frames(clips), recipe.vae.latent_channels, recipe.vae.spatial_factor)


def tiny_pipeline(recipe: StageRecipe | None = None, text_encoder: TextEncoder | None = None) -> VideoPipeline:
    recipe, text_encoder = recipe or tiny_recipe(), text_encoder or WordEncoder()
    engine = SteadyEngine(tiny_network(recipe, text_encoder))
    return VideoPipeline(engine, tiny_codec(recipe), text_encoder, recipe, digest="tiny" * 16)


def tiny_settings(folder: Path, **changes: object) -> ServerSettings:
    return ServerSettings.model_validate(
        {
            "engine": folder / "engine",
            "database_url": f"sqlite:///{folder}/jobs.db",
            "store_url": str(folder / "store"),
            "api_keys": [KEY],
            "idle_poll_s": 0.05,
            "progress_every_s": 0.02,
            **changes,
        }
    )


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@dataclass
class Running:
    url: str
    server: uvicorn.Server

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key=KEY, base_url=f"{self.url}/v1", max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=30)


@contextmanager
def serving(folder: Path, pipeline: VideoPipeline, **settings: object) -> Iterator[Running]:
    limits = ServingLimits.of(pipeline.recipe).model_copy(
        update={"max_body_bytes": BODY_LIMIT, "max_image_pixels": 100_000}
    )
    server = make_server(tiny_settings(folder, **settings), pipeline, limits=limits)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
        finally:  # a test that failed must not leave a thread that nobody stops
            server.should_exit = True
            thread.join()


def swapped_in(folder: Path) -> VideoPipeline:
    """Another engine of the same shape, named by the digest that FOLDER/swap holds."""
    pipeline = tiny_pipeline()
    pipeline.digest = (folder / "swap").read_text()
    with torch.no_grad():
        pipeline.engine.network.patch_embedding.weight.mul_(1.1)  # pyright: ignore
    return pipeline


if __name__ == "__main__":
    torch.set_num_threads(1)
    logs.configure()
    folder, changed = Path(sys.argv[1]), json.loads(sys.argv[3])
    settings = tiny_settings(folder, port=int(sys.argv[2]), **changed)
    make_server(settings, tiny_pipeline(), reload=lambda: swapped_in(folder)).run()

"""The load: what a mixed video service is asked for, and when.

It owns the mix, fixed before anything was measured, and the Poisson arrivals; it knows nothing of servers. The mix: six
of ten videos are small previews, a quarter is wide, the rest is large and twice as long; clients ask for a draft, the
usual number of steps, or twice that; most leave the guidance scale as it is, one in ten has none; a third gives a first
frame, and of these a third guides text and image apart.
"""

import base64
import random
from dataclasses import dataclass
from typing import Any

from infra.serving.limits import VideoRequest
from tests.tiny_server import image

SHAPES = {(32, 32, 8): 60, (64, 32, 8): 25, (64, 64, 16): 15}
"""Width, height and frames -> share in percent."""
STEPS = {10: 40, 20: 40, 40: 20}
SCALES = {3.0: 60, 5.0: 20, 7.5: 10, 1.0: 10}
WITH_IMAGE, GUIDED_APART = 1 / 3, 1 / 3
IMAGE_SCALE = 2.0
FPS = 8


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the load."""

    at: float
    """Seconds after the first, at one request a second on average."""
    width: int
    height: int
    num_frames: int
    steps: int
    guidance_scale: float
    image_guidance_scale: float | None
    has_image: bool
    seed: int

    @property
    def kind(self) -> tuple[int | bool, ...]:
        """Requests of one kind take equally long alone."""
        return self.width, self.height, self.num_frames, self.steps, self.rows, self.has_image

    @property
    def rows(self) -> int:
        return 1 if self.guidance_scale == 1.0 else 3 if self.image_guidance_scale else 2

    def body(self) -> dict[str, Any]:
        """For the videos API."""
        asked: dict[str, Any] = {
            "prompt": f"a red circle moves right, number {self.seed}",
            "size": f"{self.width}x{self.height}",
            "num_frames": self.num_frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }
        if self.image_guidance_scale:
            asked["image_guidance_scale"] = self.image_guidance_scale
        if self.has_image:
            asked["input_reference"] = {"image_url": f"data:image/png;base64,{self._image()}"}
        return asked

    def request(self) -> VideoRequest:
        """As the videos API reads it."""
        return VideoRequest(
            prompt=f"a red circle moves right, number {self.seed}",
            width=self.width,
            height=self.height,
            num_frames=self.num_frames,
            fps=FPS,
            num_inference_steps=self.steps,
            guidance="none" if self.rows == 1 else "separate" if self.rows == 3 else "joint",
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            flow_shift=1.0,
            seed=self.seed,
        )

    def plain_body(self) -> dict[str, Any]:
        """For servers that make a video while the client waits; the image has the video's size already."""
        return {"request": self.request().model_dump(), "image": self._image() if self.has_image else None}

    def _image(self) -> str:
        return base64.b64encode(image(self.width, self.height)).decode()


def trace(count: int, *, seed: int, fewer_steps: int = 1) -> list[Ask]:
    """`count` requests at Poisson times; `fewer_steps` divides their steps, for a quick look."""
    chance, at, asks = random.Random(seed), 0.0, list[Ask]()
    for number in range(count):
        (width, height, frames), steps, scale = (_one_of(chance, among) for among in (SHAPES, STEPS, SCALES))
        has_image = chance.random() < WITH_IMAGE
        apart = has_image and scale != 1.0 and chance.random() < GUIDED_APART
        image_scale = IMAGE_SCALE if apart else None
        asks.append(Ask(at, width, height, frames, steps // fewer_steps, scale, image_scale, has_image, number))
        at += chance.expovariate(1.0)
    return asks


def _one_of(chance: random.Random, shares: dict[Any, int]) -> Any:
    return chance.choices(list(shares), weights=list(shares.values()))[0]

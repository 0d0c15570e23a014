"""Targets: on what an engine runs, and how it is built for that.

It owns their names, ranges and files; it knows nothing of a library's calls. What a video is and how exact the graph is
stands in the stage's recipe, what machine serves it stands here: one checkpoint may be exported for several.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from export.engines.torch import Mode
from export.tensorrt.options import BuildOptions
from model.config import Config, Positive, Precision

Provider = Literal["cpu", "cuda", "tensorrt", "tensorrt_rtx"]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")]
Gpu = Annotated[int, Field(ge=0)]


class TorchTarget(Config):
    """PyTorch itself: nothing is built, and every shape is taken."""

    runtime: Literal["torch"]
    precision: Precision | None = None
    """Of the weights; what the recipe exports with unless said. Norms, time and angles stay float32."""
    device: Device = "cpu"
    mode: Mode = "eager"
    """`compiled`: torch.compile block by block."""
    cuda_graphs: bool = False
    """Record each shape's kernels once and replay them."""


class OnnxTarget(Config):
    """The exported graph on ONNX Runtime."""

    runtime: Literal["onnx_runtime"]
    precision: Precision | None = None
    """Of the graph; what the recipe says unless said. The CPU provider has no bf16."""
    provider: Provider = "cpu"
    gpu: Gpu = 0
    threads: Positive | None = None
    """For one operator on the CPU; as many as PyTorch takes unless said."""


class TensorRtTarget(Config):
    """A plan, built ahead for named GPUs."""

    runtime: Literal["tensorrt", "tensorrt_rtx"]
    precision: Precision | None = None
    """Of the graph the plan is built from; what the recipe says unless said."""
    build: BuildOptions = BuildOptions()
    gpu: Gpu = 0
    contexts: Positive = 1
    """Calls that may run at once, each with a stream and scratch memory of its own."""
    cuda_graphs: bool = True
    weight_budget_bytes: Positive | None = None
    """GPU memory for streamed weights; what the library proposes unless said. Only with `build.weight_streaming`."""


Target = Annotated[TorchTarget | OnnxTarget | TensorRtTarget, Field(discriminator="runtime")]
AnyTarget = TorchTarget | OnnxTarget | TensorRtTarget
DEFAULT = OnnxTarget(runtime="onnx_runtime")

_ADAPTER: TypeAdapter[AnyTarget] = TypeAdapter(Target)


def load_target(path: Path) -> AnyTarget:
    """The target a TOML file describes."""
    try:
        return _ADAPTER.validate_python(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ValueError(f"{path} is not a target: {problems}") from None

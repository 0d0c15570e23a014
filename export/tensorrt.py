"""Exported files to TensorRT plans, by `tensorrt` or `tensorrt_rtx`: their bindings share every name used here.

It owns the builder's settings and its log; it knows nothing of the network, and it does not run plans. Precision is in
the graph: both builders take strongly typed networks.
"""

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from export.profiles import ShapeProfile

Library = Literal["tensorrt", "tensorrt_rtx"]
PACKAGES: dict[Library, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""What to give pip."""


class BuildFailed(Exception):
    """The builder refused a graph; the message holds what it logged."""


@dataclass(slots=True, frozen=True)
class TensorRtPlan:
    """A serialized engine, bound to the library's version and to the GPU architectures it was built for."""

    plan: bytes
    library: Library
    version: str
    architectures: tuple[str, ...]
    """As `sm89`; empty: the one of the building machine."""
    log: tuple[str, ...]
    """The builder's warnings and errors, in order."""
    seconds: float


def build_plan(
    model: Path,
    profile: ShapeProfile,
    *,
    library: Library,
    architectures: Sequence[str] = (),
    workspace_bytes: int | None = None,
    optimization_level: int = 3,
) -> TensorRtPlan:
    """Build `model` for the shapes of `profile`.

    Args:
        architectures: `sm86`, `sm89`, ...: which GPUs to build for where this machine has none (`tensorrt_rtx` only).
        optimization_level: 0 to 5; more is a longer build and a faster plan.
    """
    trt = _load(library)
    start = time.perf_counter()
    log: list[str] = []
    builder = trt.Builder(_collector(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BuildFailed(f"{library} cannot read {model}: {'; '.join([*errors, *log])}")

    config = builder.create_builder_config()
    config.builder_optimization_level = optimization_level
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.add_optimization_profile(_ranges(builder, profile))
    _target(trt, config, architectures)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"{library} cannot build {model}: {'; '.join(log) or 'it logged nothing'}")
    seconds = time.perf_counter() - start
    return TensorRtPlan(bytes(plan), library, str(trt.__version__), tuple(architectures), tuple(log), seconds)


def _load(library: Library) -> Any:
    try:
        return cast(Any, importlib.import_module(library))
    except ImportError as error:
        raise ValueError(f"{library} cannot be imported ({error}); pip install {PACKAGES[library]}") from None


def _collector(trt: Any, log: list[str]) -> Any:
    """A logger of the library's kind that keeps warnings and errors."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                log.append(f"{severity.name.lower()}: {message}")

    return Collector()


def _ranges(builder: Any, profile: ShapeProfile) -> Any:
    ranges = builder.create_optimization_profile()
    low, opt, high = (profile.input_shapes(shape) for shape in (profile.min, profile.opt, profile.max))
    for name in opt:
        ranges.set_shape(name, low[name], opt[name], high[name])
    return ranges


def _target(trt: Any, config: Any, architectures: Sequence[str]) -> None:
    if not architectures:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise ValueError(
            f"{trt.__name__} builds for the GPU it runs on, not for {list(architectures)}; leave architectures out, or"
            " build with tensorrt_rtx"
        )
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    unknown = [name for name in architectures if name not in known]
    if unknown:
        raise ValueError(
            f"{trt.__name__} {trt.__version__} does not build for {unknown}; it builds for {sorted(known)}"
        )
    config.num_compute_capabilities = len(architectures)
    for index, name in enumerate(architectures):
        config.set_compute_capability(known[name], index)

"""Exported files to plans, by `tensorrt` or `tensorrt_rtx`.

It owns the order of a build and what is kept of it; it knows nothing of the network, and it does not run plans.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.profiles import ShapeProfile, ShapeRange
from export.tensorrt.library import Library, architecture, has_driver, load
from export.tensorrt.listeners import BuildLog, OnProgress, Progress, Watch
from export.tensorrt.options import BuildOptions, buildable, measures, refuse

Sizes = tuple[int, ...]
Ends = tuple[Mapping[str, Sizes], Mapping[str, Sizes], Mapping[str, Sizes]]
"""Smallest, usual and largest shape of every input."""


class BuildFailed(Exception):
    """The builder refused a graph; the message holds what it logged."""


@dataclass(slots=True, frozen=True)
class PlanTensor:
    """An input or output as the builder took it from the graph."""

    name: str
    dtype: str
    """As the library names it: FLOAT, HALF, BF16, BOOL."""
    shape: Sizes
    """-1 where a size may change."""
    ranges: tuple[tuple[Sizes, Sizes, Sizes], ...] = ()
    """An input's smallest, usual and largest shape in each optimization profile."""


@dataclass(slots=True, frozen=True)
class TensorRtPlan:
    """A serialized engine, bound to the library's version and to the GPU architectures it was built for."""

    plan: bytes
    library: Library
    version: str
    architectures: tuple[str, ...]
    """As `sm89`; what was asked for, or the one of the building machine, or none where it has no GPU."""
    options: BuildOptions
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    timing_cache: bytes
    """What the builder measured, for the next build with this version on this GPU; empty where it measures nothing."""
    warnings: tuple[str, ...]
    """The builder's warnings and errors, in order."""
    seconds: float


def build_plan(
    model: Path,
    profile: ShapeProfile,
    ranges: Sequence[ShapeRange],
    *,
    library: Library,
    options: BuildOptions | None = None,
    timing_cache: bytes = b"",
    watch: Watch | None = None,
) -> TensorRtPlan:
    """Build `model` for `ranges` of the shapes of its `profile`.

    Args:
        ranges: an optimization profile each; a call takes the first that holds its shape.
        timing_cache: of an earlier build by the same version on the same GPU; only for a library that `measures`.

    Raises:
        ValueError: an option that cannot work with this library or on this machine; nothing was built.
        BuildFailed: the graph cannot be read or built.
    """
    trt, options, start = load(library), options or BuildOptions(), time.perf_counter()
    refuse(options, library, trt, driver=has_driver())
    if timing_cache and not measures(library):
        raise ValueError(f"{library} measures nothing while it builds, so it takes no timing cache")
    watch = watch or Watch()
    messages = BuildLog(watch.log)
    try:
        build = _Build(trt, library, messages, watch.on_progress)
        network = build.read(model)
        config = build.configure([_ends(profile, each) for each in ranges], options, timing_cache)
        plan = build.run(network, config, model)
        return TensorRtPlan(
            plan=plan,
            library=library,
            version=str(trt.__version__),
            architectures=options.architectures or ((architecture(),) if has_driver() else ()),
            options=options,
            inputs=build.inputs(network),
            outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
            timing_cache=bytes(config.get_timing_cache().serialize()) if measures(library) else b"",
            warnings=tuple(messages.warnings),
            seconds=time.perf_counter() - start,
        )
    finally:
        messages.close()


class _Build:
    """One builder, and what must live as long as it does."""

    def __init__(self, trt: Any, library: Library, messages: BuildLog, on_progress: OnProgress | None) -> None:
        self.trt, self.messages = trt, messages
        self.library: Library = library
        self.logger = messages.listener(trt)
        self.builder = trt.Builder(self.logger)
        self.progress = None if on_progress is None else Progress(on_progress)
        self.monitor = None if self.progress is None else self.progress.listener(trt)
        self.profiles: list[Any] = []

    def read(self, model: Path) -> Any:
        flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self.builder.create_network(flags)
        parser = self.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(model)):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise BuildFailed(f"{self.library} cannot read {model}: {'; '.join([*errors, *self.messages.warnings])}")
        return network

    def configure(self, ranges: Sequence[Ends], options: BuildOptions, timing_cache: bytes) -> Any:
        trt, config = self.trt, self.builder.create_builder_config()
        config.builder_optimization_level = options.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector can tell; no plan is slower
        config.clear_flag(trt.BuilderFlag.TF32)  # precision is what the graph says, and fp32 is not 10 bits of mantissa
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        for flag in _flags(trt, options):
            config.set_flag(flag)
        if options.hardware_compatible != "none":
            level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper())
            config.hardware_compatibility_level = level
        _target(trt, config, options.architectures)
        for ends in ranges:
            self.profiles.append(self._optimization_profile(ends))
            config.add_optimization_profile(self.profiles[-1])
        if measures(self.library) and not config.set_timing_cache(config.create_timing_cache(timing_cache), False):
            self.messages.write("warning", "the timing cache is of another GPU or version; not used", warning=True)
            config.set_timing_cache(config.create_timing_cache(b""), False)
        if self.monitor is not None:
            config.progress_monitor = self.monitor
        return config

    def run(self, network: Any, config: Any, model: Path) -> bytes:
        plan = self.builder.build_serialized_network(network, config)
        if self.progress is not None and self.progress.stopped is not None:
            raise self.progress.stopped
        if plan is None:
            said = "; ".join(self.messages.warnings) or "it logged nothing"
            raise BuildFailed(f"{self.library} cannot build {model}: {said}")
        return bytes(plan)

    def inputs(self, network: Any) -> tuple[PlanTensor, ...]:
        return tuple(_tensor(network.get_input(index), self.profiles) for index in range(network.num_inputs))

    def _optimization_profile(self, ends: Ends) -> Any:
        profile = self.builder.create_optimization_profile()
        low, opt, high = ends
        for name in opt:
            profile.set_shape(name, low[name], opt[name], high[name])
        return profile


def merge_timing_caches(library: Library, first: bytes, second: bytes) -> bytes:
    """What two builds by one version on one GPU measured."""
    trt = load(library)
    config = trt.Builder(BuildLog(None).listener(trt)).create_builder_config()
    merged = config.create_timing_cache(first)
    merged.combine(config.create_timing_cache(second), False)
    return bytes(merged.serialize())


def _ends(profile: ShapeProfile, box: ShapeRange) -> Ends:
    low, opt, high = (profile.input_shapes(shape) for shape in (box.min, box.opt, box.max))
    return low, opt, high


def _flags(trt: Any, options: BuildOptions) -> list[Any]:
    chosen = {
        trt.BuilderFlag.REFIT: options.weights != "fixed",
        trt.BuilderFlag.STRIP_PLAN: options.weights == "refit_stripped",
        trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
    }
    return [flag for flag, wanted in chosen.items() if wanted]


def _target(trt: Any, config: Any, architectures: Sequence[str]) -> None:
    if architectures:
        known = buildable(trt)
        config.num_compute_capabilities = len(architectures)
        for index, name in enumerate(architectures):
            config.set_compute_capability(known[name], index)


def _tensor(tensor: Any, profiles: Sequence[Any] = ()) -> PlanTensor:
    ranges = tuple(_range(each.get_shape(tensor.name)) for each in profiles)
    return PlanTensor(tensor.name, tensor.dtype.name, tuple(tensor.shape), ranges)


def _range(shapes: Sequence[Any]) -> tuple[Sizes, Sizes, Sizes]:
    low, opt, high = shapes
    return tuple(low), tuple(opt), tuple(high)

"""Plans as they run: deserialized, inspected, refitted, and contexts to call them in.

It owns the library's runtime objects; it knows nothing of velocities or of requests. Deserializing a plan runs what is
in it, so only a verified one may come here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.tensorrt.library import Library, has_driver, load
from export.tensorrt.listeners import BuildLog

Sizes = tuple[int, ...]


class PlanUnusable(Exception):
    """The library does not take the plan; the message holds what it said."""


@dataclass(slots=True, frozen=True)
class PlanFacts:
    """What the library's inspector says of a plan."""

    layers: int
    profiles: int
    inputs: Mapping[str, str]
    """Name -> type, as the library names it."""
    outputs: Mapping[str, str]
    ranges: Mapping[str, tuple[tuple[Sizes, Sizes, Sizes], ...]]
    """Input -> smallest, usual and largest shape of each optimization profile."""
    refittable: bool
    streamable_bytes: int
    layer_information: Any
    """The inspector's JSON."""


class Plan:
    """A deserialized plan on one GPU."""

    def __init__(self, data: bytes, library: Library, *, gpu: int = 0, host_code: bool = False) -> None:
        """`host_code`: the plan carries the runtime of its version, which is loaded as a library of this process."""
        if not has_driver():
            raise PlanUnusable(f"{library} deserializes a plan with a CUDA driver only and this machine has none")
        self.trt, self.library, self.gpu = load(library), library, gpu
        self._log = BuildLog(None)
        self._logger = self._log.listener(self.trt)
        torch.cuda.set_device(gpu)
        self._runtime = self.trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = host_code
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise PlanUnusable(f"{library} {self.trt.__version__} refuses the plan: {self._said()}")

    @property
    def scratch_bytes(self) -> int:
        """What one context takes beside the weights, for the largest shape of any profile."""
        return int(self.engine.device_memory_size_v2)

    @property
    def num_profiles(self) -> int:
        return int(self.engine.num_optimization_profiles)

    def names(self) -> tuple[list[str], list[str]]:
        """Inputs and outputs, in the graph's order."""
        every = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = [name for name in every if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        return inputs, [name for name in every if name not in inputs]

    def facts(self) -> PlanFacts:
        engine, (inputs, outputs) = self.engine, self.names()
        inspector = engine.create_engine_inspector()
        return PlanFacts(
            layers=int(engine.num_layers),
            profiles=self.num_profiles,
            inputs={name: engine.get_tensor_dtype(name).name for name in inputs},
            outputs={name: engine.get_tensor_dtype(name).name for name in outputs},
            ranges={name: tuple(self._range(name, index) for index in range(self.num_profiles)) for name in inputs},
            refittable=bool(engine.refittable),
            streamable_bytes=int(engine.streamable_weights_size),
            layer_information=json.loads(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)),
        )

    def stream_weights(self, budget_bytes: int | None) -> int:
        """Keep at most `budget_bytes` of weights on the GPU, or what the library proposes; before any context."""
        self.engine.weight_streaming_budget_v2 = budget_bytes or self.engine.get_weight_streaming_automatic_budget()
        return int(self.engine.weight_streaming_budget_v2)

    def refit_from(self, graph: Path) -> None:
        """Give a stripped plan the weights of the exported graph it was built from."""
        refitter = self.trt.Refitter(self.engine, self._logger)
        parser = self.trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise PlanUnusable(f"{self.library} cannot take the weights of {graph}: {self._said()}")

    def serialized(self) -> bytes:
        """The plan with the weights it has now, which can be replaced again."""
        config = self.engine.create_serialization_config()
        config.set_flag(self.trt.SerializationFlag.INCLUDE_REFIT)
        return bytes(self.engine.serialize_with_config(config))

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Put `weights`, float32 by the graph's names, in place of those in the plan, each in the plan's precision.

        Raises:
            PlanUnusable: the plan was built with fixed weights, or holds a weight that is not given.
        """
        if not self.engine.refittable:
            raise PlanUnusable("the plan was built with fixed weights; build it with weights = 'refit'")
        refitter = self.trt.Refitter(self.engine, self._logger)
        kept: list[Tensor] = []  # the library reads them when it refits
        for name in refitter.get_all_weights():
            if name in weights:
                prototype = refitter.get_weights_prototype(name)
                value = weights[name].to("cpu", _torch_type(self.trt, prototype.dtype)).contiguous()
                kept.append(value)
                given = self.trt.Weights(prototype.dtype, value.data_ptr(), value.numel())
                if not refitter.set_named_weights(name, given):
                    raise PlanUnusable(f"{self.library} refuses weight '{name}': {self._said()}")
        missing = list(refitter.get_missing_weights())
        if missing:
            raise PlanUnusable(f"{len(missing)} weights of the plan are not given, such as '{missing[0]}'")
        if not refitter.refit_cuda_engine():
            raise PlanUnusable(f"{self.library} cannot refit the plan: {self._said()}")

    def context(self, profile: int, scratch: Tensor, stream: int) -> Any:
        """An execution context in `scratch` memory, which calls that never overlap may share."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise PlanUnusable(f"{self.library} makes no execution context: {self._said()}")
        context.set_optimization_profile_async(profile, stream)
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        return context

    def _range(self, name: str, profile: int) -> tuple[Sizes, Sizes, Sizes]:
        low, opt, high = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(opt), tuple(high)

    def _said(self) -> str:
        return "; ".join(self._log.warnings) or "it logged nothing"


def _torch_type(trt: Any, dtype: Any) -> torch.dtype:
    types = {trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16}
    if dtype not in types:
        raise PlanUnusable(f"weights of type {dtype} are quantized and cannot be replaced; export anew")
    return types[dtype]


def malformed(data: bytes, library: Library) -> bool:
    """Whether the bytes are no plan at all; the one question that is answered without a GPU."""
    trt = load(library)
    runtime = trt.Runtime(BuildLog(None).listener(trt))
    _, problems = runtime.get_engine_validity(data)
    return bool(int(problems) & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE))

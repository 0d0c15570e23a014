"""A plan as an engine, on TensorRT or TensorRT for RTX: buffers are PyTorch's, calls are CUDA graphs.

It owns lanes (a stream, scratch memory, a context and a recording a shape) and which profile a shape takes; it knows
nothing of how plans are built or checked.
"""

import queue
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor

from export.engines.calls import graph_inputs
from export.engines.cuda_graphs import CudaGraphs
from export.engines.protocol import EngineMismatch
from export.engines.targets import TensorRtTarget
from export.guidance import Combination
from export.onnx import OUTPUT
from export.profiles import ShapeProfile
from export.tensorrt.plans import Plan, PlanUnusable
from model.conditioning import Conditions

SHAPES_A_LANE = 16
"""Contexts and recordings that a lane keeps; the one unused longest goes."""


@dataclass(slots=True)
class _Lane:
    """What one call at a time has for itself."""

    stream: Any
    scratch: Tensor
    calls: OrderedDict[tuple[torch.Size, ...], Any] = field(default_factory=lambda: OrderedDict())
    """By the shapes of the inputs. A recording is of one context in one shape, so each shape has its own."""


class TensorRtEngine:
    """A deserialized plan; latents on its GPU are read and answered there."""

    def __init__(self, data: bytes, target: TensorRtTarget, profile: ShapeProfile) -> None:
        """`data` must be verified: a plan is code."""
        self.target, self.profile = target, profile
        self._data = data if target.build.weights != "fixed" else b""
        self.device = torch.device("cuda", target.gpu)
        try:
            self.plan = Plan(data, target.runtime, gpu=target.gpu, host_code=target.build.version_compatible)
        except PlanUnusable as error:
            raise EngineMismatch(f"{error}; build the engine again for this machine") from None
        self._names = tuple(profile.signature())
        inputs, outputs = self.plan.names()
        if tuple(inputs) != self._names or outputs != [OUTPUT]:
            raise EngineMismatch(
                f"the plan takes {inputs} and gives {outputs}, its profile says {self._names}; build it again"
            )
        if target.build.weight_streaming:
            self.plan.stream_weights(target.weight_budget_bytes)
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for _ in range(target.contexts):
            scratch = torch.empty(self.plan.scratch_bytes, dtype=torch.uint8, device=self.device)
            self._lanes.put(_Lane(cast(Any, torch.cuda).Stream(self.device), scratch))

    def denoise(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, combination: Combination | None = None
    ) -> Tensor:
        """With guidance inside the plan, `combination` says how rows guide one another; none: each is its own."""
        given = graph_inputs(self.profile, latents, timestep, conditions, combination)
        cuda = cast(Any, torch.cuda)
        with self._lane() as lane:
            lane.stream.wait_stream(cuda.current_stream(self.device))
            with cuda.device(self.device), cuda.stream(lane.stream):
                inputs = tuple(given[name].to(self.device).contiguous() for name in self._names)
                velocity = self._call(lane, inputs)(*inputs)
                answer = velocity.to(latents.device)
            cuda.current_stream(self.device).wait_stream(lane.stream)
            answer.record_stream(cuda.current_stream(self.device)) if answer.is_cuda else lane.stream.synchronize()
        return answer

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        if not self._data:
            raise EngineMismatch("the plan was built with fixed weights; build it with weights = 'refit'")
        refitted = type(self)(self._data, self.target, self.profile)
        try:
            refitted.plan.refit(weights)
        except PlanUnusable as error:
            raise EngineMismatch(f"these weights are not the plan's: {error}") from None
        return refitted

    @contextmanager
    def _lane(self) -> Generator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)

    def _call(self, lane: _Lane, inputs: tuple[Tensor, ...]) -> Any:
        key = tuple(each.shape for each in inputs)
        call = lane.calls.get(key)
        if call is None:
            context = self.plan.context(self._profile_of(inputs), lane.scratch, lane.stream.cuda_stream)
            run = _Run(context, self._names)
            call = lane.calls[key] = CudaGraphs(run, limit=1) if self.target.cuda_graphs else run
            if len(lane.calls) > SHAPES_A_LANE:
                lane.calls.popitem(last=False)
        lane.calls.move_to_end(key)
        return call

    def _profile_of(self, inputs: tuple[Tensor, ...]) -> int:
        """The first optimization profile that holds the shapes; they stand from narrow to wide."""
        for index in range(self.plan.num_profiles):
            if all(self._fits(name, each, index) for name, each in zip(self._names, inputs, strict=True)):
                return index
        shapes = {name: tuple(each.shape) for name, each in zip(self._names, inputs, strict=True)}
        raise ValueError(f"no optimization profile of the plan holds {shapes}; build it with a wider profile")

    def _fits(self, name: str, given: Tensor, profile: int) -> bool:
        low, _, high = self.plan.engine.get_tensor_profile_shape(name, profile)
        return all(least <= size <= most for least, size, most in zip(low, given.shape, high, strict=True))


class _Run:
    """One context, called on PyTorch's current stream."""

    def __init__(self, context: Any, names: tuple[str, ...]) -> None:
        self._context, self._names = context, names

    def __call__(self, *inputs: Tensor) -> Tensor:
        velocity = torch.empty_like(inputs[0])
        for name, value in zip((*self._names, OUTPUT), (*inputs, velocity), strict=True):
            if name != OUTPUT and not self._context.set_input_shape(name, tuple(value.shape)):
                raise ValueError(
                    f"the plan refuses {name} of shape {tuple(value.shape)}; build it with a wider profile"
                )
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._context.execute_async_v3(cast(Any, torch.cuda).current_stream().cuda_stream):
            raise RuntimeError("the plan's call could not be queued; its log says why")
        return velocity

"""An exported file as an engine, on ONNX Runtime.

It owns the session and the weights in it; it knows nothing of who made the file or of how providers are set up.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from export.engines.calls import graph_inputs
from export.engines.fusions import fuse
from export.engines.protocol import EngineMismatch
from export.engines.providers import open_session
from export.engines.targets import DEFAULT, OnnxTarget
from export.engines.weights import metadata, profile_of, read_graph, replace_weights
from export.guidance import Combination
from export.onnx import OUTPUT
from model.conditioning import Conditions

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


class OnnxEngine:
    """An exported file on the provider of its target; latents on that GPU are read and answered there."""

    def __init__(
        self,
        path: Path,
        *,
        target: OnnxTarget = DEFAULT,
        threads: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`threads` for one operator on the CPU; what the target says, or as many as PyTorch uses, unless said."""
        self.path, self.target = path, target
        self._threads = threads or target.threads or torch.get_num_threads()
        graph = read_graph(path)
        self.metadata: Mapping[str, str] = metadata(graph)
        self.profile = profile_of(graph, path)
        if target.provider == "cpu" and self.metadata["stiv.precision"] == "bf16":
            logger.warning("%s: bf16 is emulated on a CPU, which is slow; export it in fp32 to serve it here", path)
            graph = _emulated(graph)
        replaced = {} if weights is None else replace_weights(graph, path, weights)
        if target.provider == "cpu":
            graph = fuse(graph)
        self._session = open_session(graph, path.parent, target, self.profile, threads=self._threads, weights=replaced)
        names = tuple(each.name for each in self._session.get_inputs())
        if names != tuple(self.profile.signature()):
            raise EngineMismatch(
                f"{path} takes {names}, its profile {tuple(self.profile.signature())}; export it again"
            )

    def denoise(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, combination: Combination | None = None
    ) -> Tensor:
        """With guidance inside the graph, `combination` says how rows guide one another; none: each is its own."""
        given = graph_inputs(self.profile, latents, timestep, conditions, combination)
        if self.target.provider != "cpu":
            return self._run_on_gpu(given).to(latents.device)
        feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in given.items()}
        (velocity,) = self._session.run([OUTPUT], feeds)
        return torch.as_tensor(velocity, device=latents.device)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        return type(self)(self.path, target=self.target, threads=self._threads, weights=weights)

    def _run_on_gpu(self, given: Mapping[str, Tensor]) -> Tensor:
        """Inputs and output in PyTorch's GPU memory: nothing passes through the host."""
        index = self.target.gpu
        device = torch.device("cuda", index)
        buffers = {name: value.to(device).contiguous() for name, value in given.items()}
        velocity = torch.empty_like(buffers["latents"])
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            dtype = _NUMPY[buffer.dtype]
            binding.bind_input(name, "cuda", index, dtype, tuple(buffer.shape), buffer.data_ptr())
        binding.bind_output(OUTPUT, "cuda", index, _NUMPY[velocity.dtype], tuple(velocity.shape), velocity.data_ptr())
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return velocity


_NUMPY = {torch.float32: "float32", torch.bool: "bool", torch.int64: "int64"}


def run_part(path: Path) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The file of a frozen part on the CPU: inputs by name -> outputs in order."""
    session = open_session(read_graph(path), path.parent, DEFAULT, None, threads=torch.get_num_threads(), weights={})

    def run(given: Mapping[str, Tensor]) -> list[Tensor]:
        feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in given.items()}
        return [torch.as_tensor(each) for each in session.run(None, feeds)]

    return run


def _emulated(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    from export.precision import emulated  # brings the exporter in

    return emulated(graph)

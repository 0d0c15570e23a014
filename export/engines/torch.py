"""The network itself as an engine: PyTorch, eager or compiled block by block, with or without CUDA graphs.

It owns where and how PyTorch runs it; it knows nothing of exported files.
"""

import copy
from collections.abc import Mapping
from typing import Literal, Self, cast

import torch
from torch import Tensor

from export.engines.cuda_graphs import CudaGraphs
from export.engines.protocol import EngineMismatch, require_same_weights
from model.conditioning import Conditions
from model.network.recompute import compile_blocks
from model.network.stiv import STIV

Mode = Literal["eager", "compiled"]


class TorchEngine:
    """The network, without gradients, on the device its weights are on; it takes any shape."""

    def __init__(self, network: STIV, *, mode: Mode = "eager", cuda_graphs: bool = False) -> None:
        """`compiled` compiles at the first call of every shape: seconds on a GPU, minutes on a CPU."""
        self.network = network.eval()
        self.device = network.patch_embedding.weight.device
        if cuda_graphs and self.device.type != "cuda":
            raise EngineMismatch(f"CUDA graphs need a network on a GPU, it is on {self.device}; leave cuda_graphs out")
        self._mode: Mode = mode
        self._graphs = cuda_graphs
        if mode == "compiled":
            compile_blocks(network)
        self._call = CudaGraphs(self._run) if cuda_graphs else self._run

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        given = conditions.to(self.device)
        image = [] if given.image is None or given.image_given is None else [given.image, given.image_given]
        inputs = [latents.to(self.device), timestep.to(self.device), given.text, given.text_mask, given.pooled]
        return self._call(*inputs, given.micro, *image).to(latents.device)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        require_same_weights({name: held.shape for name, held in self.network.state_dict().items()}, weights)
        network = copy.deepcopy(self.network)
        network.load_state_dict(weights)
        return type(self)(network, mode=self._mode, cuda_graphs=self._graphs)

    def _run(self, *inputs: Tensor) -> Tensor:
        image = dict(zip(("image", "image_given"), inputs[6:], strict=False))
        return cast(Tensor, self.network(*inputs[:6], **image))

"""Real ranks, over gloo, that share clips: what each of them computes, written where a test can read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.network.recompute import compile_blocks, recompute_blocks
from model.network.sequence import SequenceGroup
from model.network.stiv import STIV
from tests.ranks import run_ranks
from tests.test_network import CHANNELS, inputs, network, opened

FRAMES, SIDE, TOKENS, KEPT = 8, 8, 16, 8  # token frames are 4


@dataclass(slots=True, frozen=True)
class Case:
    """A network, its clips, and how many ranks share one."""

    ranks: int
    masked: bool = False
    recompute: bool = False
    compile: bool = False
    dtype: torch.dtype = torch.float32
    choices: dict[str, Any] = field(default_factory=dict[str, Any])

    def network(self) -> STIV:
        net = opened(network(**self.choices)).to(self.dtype).train()
        if self.recompute:
            recompute_blocks(net)
        if self.compile:
            compile_blocks(net, "aot_eager")
        return net

    def clips(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """The `number`-th micro-batch of two clips, and what is to be learnt of it."""
        generator = torch.Generator().manual_seed(100 + number)
        given = inputs(frames=FRAMES, side=SIDE, seed=number)
        if self.masked:
            given["keep"] = torch.rand(2, TOKENS, generator=generator).argsort(dim=1)[:, :KEPT].sort(dim=1).values
        if "image_cross_attention" in self.choices:
            given |= {"image": given["latents"][:, 0], "image_given": torch.tensor([True, False])}
        return given, torch.randn(2, FRAMES, CHANNELS, SIDE, SIDE, generator=generator)

    def train(self, net: STIV, number: int) -> dict[str, Tensor]:
        """Velocity, loss and gradients by name after one backward pass."""
        net.zero_grad()
        given, target = self.clips(number)
        velocity = net(**given)
        loss = (velocity - target).square().mean()
        loss.backward()
        gradients = {
            f"gradient {name}": parameter.grad
            for name, parameter in net.named_parameters()
            if parameter.grad is not None
        }
        return {"velocity": velocity.detach(), "loss": loss.detach(), **gradients}


def shared(world_size: int, cases: Sequence[Case], folder: Path) -> list[list[dict[str, Tensor]]]:
    """Of each case and rank, what it computed; losses and gradients are means over all ranks."""
    run_ranks(world_size, _rank, cases, folder)
    return [[load_file(folder / f"{case}-{rank}") for rank in range(world_size)] for case in range(len(cases))]


def alone(world_size: int, case: Case) -> list[dict[str, Tensor]]:
    """The same of one process for every group's clips: each with its velocity, and the mean loss and gradients."""
    net = case.network()
    runs = [case.train(net, number) for number in range(world_size // case.ranks)]
    means = {name: torch.stack([run[name] for run in runs]).mean(dim=0) for name in runs[0] if name != "velocity"}
    return [{**means, "velocity": run["velocity"]} for run in runs]


def _rank(cases: Sequence[Case], folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for number, case in enumerate(cases):
        net = case.network()
        net.share_clips(SequenceGroup.join(case.ranks))
        result = case.train(net, rank // case.ranks)
        for name, value in result.items():
            if name != "velocity":
                torch.distributed.all_reduce(value)
                value /= world_size
        save_file({name: value.contiguous() for name, value in result.items()}, folder / f"{number}-{rank}")
    torch.distributed.destroy_process_group()

"""What one rank puts into a checkpoint: its pieces of the run's tensors, its generators, and where the run stands.

It knows nothing of files.
"""

import logging
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor

from model.recipe import StageRecipe

logger = logging.getLogger(__name__)

Part = Literal["model", "ema", "optimizer"]
PARTS: tuple[Part, ...] = ("model", "ema", "optimizer")


@dataclass(slots=True, frozen=True, eq=False)
class Piece:
    """Values `start` to `start + numel` of a flattened tensor: those this rank keeps."""

    shape: torch.Size
    """The whole tensor's."""
    start: int
    values: Tensor
    """[numel] or, where it is the whole tensor, of any shape."""

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        return cls(tensor.shape, 0, tensor)

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


@dataclass(slots=True, frozen=True, eq=False)
class RankState:
    """All that a rank needs to go on as if it had never stopped.

    Over all ranks the pieces of a name tile the tensor exactly once.
    """

    step: int
    """Optimizer steps done."""
    rank: int
    world_size: int
    tensors: Mapping[Part, Mapping[str, Piece]]
    """`model` are the fp32 masters; keys are parameter names, in `optimizer` those of its state."""
    random: Mapping[str, Tensor]
    """This rank's generators, see `random_state`."""
    loader: Mapping[str, Any]
    """The same on every rank; rank 0's is kept."""
    inputs: Mapping[str, str]
    """Digest of each thing the run was started from; it may not change under a run."""
    recipe: StageRecipe


def random_state() -> dict[str, Tensor]:
    """The process-wide generators of python, numpy, torch and, where there is one, the GPU, as plain tensors."""
    _, words, _ = random.getstate()
    _, keys, position, *_ = cast(tuple[str, np.ndarray[Any, Any], int, int, float], np.random.get_state(legacy=True))
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, Tensor]) -> None:
    """Put the process-wide generators back to what `random_state` saw."""
    words = tuple(int(word) for word in state["python"].numpy())
    random.setstate((3, words, None))
    *keys, position = (int(word) for word in state["numpy"].numpy())
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) != torch.cuda.is_available():
        logger.warning(
            "saved %s a GPU and resumed otherwise: what a GPU draws differs", "on" if "cuda" in state else "off"
        )
    elif "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])

"""Ways to spread a stage over cards: the settings of `training` that change its memory and speed, not its result.

It knows nothing of what a layout costs.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Self

from pydantic import ValidationError

from model.config import TrainingConfig
from model.recipe import StageRecipe


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of `training` that a plan may choose."""

    world_size: int
    zero_stage: int
    sequence_parallel: int
    activation_checkpointing: bool
    micro_batch_size: int

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        return cls(
            training.world_size,
            training.zero_stage,
            training.sequence_parallel,
            training.activation_checkpointing,
            training.micro_batch_size,
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {str(value).lower()}" for name, value in asdict(self).items())


def spread(recipe: StageRecipe, layout: Layout) -> StageRecipe:
    """The same stage in another layout; a ValueError says why it cannot be."""
    tree = recipe.model_dump()
    tree["training"] |= asdict(layout)
    try:
        return StageRecipe.model_validate(tree)
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ValueError(f"stage '{recipe.name}' on {layout.world_size} ranks: {reasons}") from None


def layouts(recipe: StageRecipe, gpus: int, node: int) -> Iterator[StageRecipe]:
    """The stage in every layout its recipe allows on so many cards, `node` of them in a machine.

    Ranks that share a clip sit in one machine; micro-batches double from one clip on.
    """
    shares = [ranks for ranks in (1, 2, 4, 8, 16) if ranks <= node and gpus % ranks == 0]
    for ranks, zero_stage, checkpointing in product(shares, (0, 1, 2, 3), (False, True)):
        clips, rest = divmod(recipe.training.global_batch_size, gpus // ranks)
        if rest:
            continue
        micro_batch_size = 1
        while micro_batch_size <= clips:
            with suppress(ValueError):  # the recipe refuses this one, as ZeRO 3 with AdaFactor
                yield spread(recipe, Layout(gpus, zero_stage, ranks, checkpointing, micro_batch_size))
            micro_batch_size *= 2

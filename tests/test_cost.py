"""A batch's cost follows from its shapes, its masking and from what is computed again."""

from typing import Any

import pytest

from model.network.cost import Cost, training_cost
from model.network.flops import training_flops
from tests.tiny_stage import stage


def cost(*, clips: int = 2, masked: bool = False, **training: Any) -> Cost:
    recipe = stage(**training)
    return training_cost(
        recipe.network,
        recipe.training,
        latents=(clips, 4, 4, 4, 4),
        text=(clips, 9, 384),
        pooled_size=384,
        masked=masked,
    )


def test_a_batch_costs_its_clips() -> None:
    recipe = stage()
    one = training_flops(recipe.network, (4, 4, 4, 4), 9, text_size=384, pooled_size=384)
    assert cost(clips=3) == Cost(tokens=3 * 2 * 4, model_flops=3 * one, hardware_flops=3 * one)
    assert cost(clips=3) == cost() + cost(clips=1) == cost(clips=1) * 3


def test_masking_saves_operations_but_no_tokens() -> None:
    assert cost(masked=True).tokens == cost().tokens
    assert cost(masked=True).model_flops < cost().model_flops
    assert cost(masked=True, mask_ratio=0.0) == cost()


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_computed_again_is_the_hardwares_cost_alone(masked: bool) -> None:
    plain, again = cost(masked=masked), cost(masked=masked, activation_checkpointing=True)
    assert again.model_flops == plain.model_flops == plain.hardware_flops
    assert 1.1 < again.hardware_flops / plain.hardware_flops < 4 / 3, "at most one more forward"

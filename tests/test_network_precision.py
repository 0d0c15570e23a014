"""A network in bf16: what it takes, what it gives, and that what must stay fine does."""

import pytest
import torch

from tests.test_network import inputs, network, opened
from tests.test_network_recompute import CHOICES

MORE_CHOICES = CHOICES | {
    "sinusoids": {"positions": "rope_sinusoid"},
    "a table": {"positions": "learned", "learned_grid": (2, 4, 4)},
    "an image": {"image_cross_attention": "resnet"},
}


@pytest.mark.parametrize("choices", MORE_CHOICES)
def test_a_bf16_network_takes_and_gives_float32_and_stays_near_the_float32_one(choices: str) -> None:
    given, net = inputs(), opened(network(**MORE_CHOICES[choices]))
    if "image_cross_attention" in MORE_CHOICES[choices]:
        given |= {"image": given["latents"][:, 0], "image_given": torch.tensor([True, False])}
    fine = net(**given)
    coarse = net.bfloat16()(**given)
    assert coarse.dtype == torch.float32
    assert (coarse - fine).norm() < 0.02 * fine.norm()


def test_a_bf16_network_tells_times_apart_that_bf16_could_not() -> None:
    net, given = opened(network()).bfloat16(), inputs()
    early, late = (net(**given | {"timestep": torch.full((2,), time)}) for time in (0.901, 0.902))
    assert torch.tensor(0.901).bfloat16() == torch.tensor(0.902).bfloat16()
    assert (early - late).norm() > 0.01 * early.norm()

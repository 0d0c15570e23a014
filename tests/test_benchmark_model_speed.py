"""The speed benchmark compares like with like, and its figures are of what they say."""

import pytest
import torch

from benchmarks.contestants.model_mfu import flops_a_second, peak_of, step_seconds, sweep, training_step
from benchmarks.contestants.model_step import Shape, latte, ours
from benchmarks.model_speed import against_latte, masked_step, ratio, take_turns
from model.network.flops import training_flops

SMALL = Shape(hidden=32, depth=2, heads=2, frames=3, side=4, text=5)


def test_both_networks_see_the_same_tokens_and_have_the_same_layers() -> None:
    ours_, latte_ = ours(SMALL), latte(SMALL)
    assert ours_.call().shape == (1, 3, 4, 8, 8) and latte_.call().shape == (1, 4, 3, 8, 8)
    assert len(ours_.blocks) == 2 and len(latte_.blocks) == 4, "Latte's layer is a spatial and a temporal block"
    # Ours has a third attention and Latte a second feed-forward a layer: 20 and 28 squares of the width.
    squares = [
        sum(p.numel() for block in model.blocks for p in block.parameters()) / 32**2 for model in (ours_, latte_)
    ]
    assert 40 < squares[0] < 42 and 56 < squares[1] < 60


def test_counted_operations_are_those_that_the_network_is_known_to_need() -> None:
    counted = ours(SMALL).flops()
    assert 3 * counted == training_flops(SMALL.config(), SMALL.latents, SMALL.text)


@pytest.mark.slow
def test_every_figure_against_latte_is_there() -> None:
    figures = against_latte("cpu", SMALL, turns=1)
    assert {f"cpu_{name}_ratio_to_latte" for name in ("forward", "fwdbwd", "memory", "flops")} < set(figures)
    assert all(value > 0 for value in figures.values())
    assert figures["cpu_flops_ratio_to_latte"] < 1


def test_masking_half_of_the_tokens_halves_what_masked_blocks_compute() -> None:
    whole, masked = ours(SMALL), ours(SMALL, mask_ratio=0.5)
    assert masked.flops() < whole.flops()
    assert set(masked_step("_256", SMALL, turns=1)) == {"whole_step_256_seconds", "masked_step_ratio_256"}


def test_models_take_turns_and_a_ratio_is_of_one_turn() -> None:
    order: list[str] = []
    seconds = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=2)
    assert order == ["a", "b"] * 3 and {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert ratio({"a": [1.0, 30.0, 2.0], "b": [2.0, 10.0, 4.0]}, "a", "b") == 0.5


def test_a_card_without_a_known_peak_is_refused() -> None:
    assert peak_of("NVIDIA H200") == 989.4e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    with pytest.raises(ValueError, match="no peak is known for 'Voodoo 2'"):
        peak_of("Voodoo 2")


def test_the_training_step_in_bfloat16_moves_every_kind_of_weight() -> None:
    step, network = training_step(SMALL, device="cpu", compiled=False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    step()
    still = [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])]
    assert still == ["mask_token"]
    assert flops_a_second(SMALL, step_seconds(SMALL, device="cpu", steps=1, compiled=False)) > 0


@pytest.mark.gpu
def test_a_compiled_step_on_a_gpu_is_measured_at_every_batch_size() -> None:
    shape = Shape(hidden=256, depth=2, heads=4, frames=4, side=16, temporal_patch=2)
    measured = sweep(shape, (1, 2))
    assert set(measured) == {1, 2} and all(seconds > 0 for seconds in measured.values())

"""Ranks that share clips train as one process does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.network.sequence import SequenceGroup
from tests.sequence_ranks import KEPT, SIDE, Case, alone, shared
from tests.test_network import inputs, network

WORLD = 4
OTHER_CHOICES = {
    "shared_modulation": False,
    "temporal_modulation": True,
    "positions": "rope_sinusoid",
    "image_cross_attention": "resnet",
}
CASES = {
    "all tokens": Case(4),
    "masked": Case(4, masked=True),
    "two groups of two": Case(2, masked=True),
    "recomputed": Case(2, recompute=True),
    "masked and recomputed": Case(4, masked=True, recompute=True),
    "other choices of network": Case(2, choices=OTHER_CHOICES, dtype=torch.float64),
    "double precision": Case(4, masked=True, dtype=torch.float64),
    "bf16": Case(2, masked=True, recompute=True, dtype=torch.bfloat16),
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-5}

Results = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of each case, what every rank computed."""
    results = shared(WORLD, list(CASES.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(CASES, results, strict=True))


def assert_as_alone(case: Case, ranks: list[dict[str, Tensor]]) -> None:
    groups = alone(len(ranks), case)
    for rank, result in enumerate(ranks):
        expected = groups[rank // case.ranks]
        assert result.keys() == expected.keys()
        for name, value in result.items():
            difference = (value - expected[name]).abs().max()
            assert difference <= TOLERANCE[case.dtype] * expected[name].abs().max(), (rank, name)


@pytest.mark.parametrize("name", CASES)
def test_velocity_loss_and_mean_gradients_are_those_of_one_process(name: str, ranks: Results) -> None:
    assert_as_alone(CASES[name], ranks[name])


def test_all_parameters_get_their_gradient_on_ranks_that_share_clips(ranks: Results) -> None:
    names = {f"gradient {name}" for name, _ in network().named_parameters()}
    assert names | {"velocity", "loss"} == ranks["masked"][0].keys()


@pytest.mark.slow
def test_compiled_blocks_share_clips_too(tmp_path: Path) -> None:
    cases = [Case(2, masked=True, recompute=recompute, dtype=torch.float64) for recompute in (False, True)]
    compiled = shared(2, [replace(case, compile=True) for case in cases], tmp_path)
    for case, result in zip(cases, compiled, strict=True):
        assert_as_alone(case, result)


def test_clips_that_ranks_cannot_share_evenly_are_refused() -> None:
    net = network()
    net.share_clips(SequenceGroup(None, size=3, rank=0))
    with pytest.raises(ValueError, match="4 token frames cannot be shared evenly by 3 ranks"):
        net(**inputs(frames=8, side=SIDE))
    with pytest.raises(ValueError, match="8 tokens a frame cannot be shared evenly by 3 ranks"):
        net(**inputs(frames=6, side=SIDE), keep=torch.arange(KEPT)[None].repeat(2, 1))


def test_dropping_frames_is_refused_where_ranks_share_them() -> None:
    net = network()
    net.share_clips(SequenceGroup(None, size=2, rank=0))
    with pytest.raises(ValueError, match="temporal_mask_ratio 0 or sequence_parallel 1"):
        net(**inputs(frames=8), keep_frames=torch.tensor([[0, 1], [0, 1]]))

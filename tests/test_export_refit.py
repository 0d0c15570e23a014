"""New weights in a live engine: proven before they answer, and taken back to the bit."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from export.engines.live import LiveEngine
from export.engines.protocol import EngineMismatch, RefittableEngine
from export.engines.torch import TorchEngine
from export.engines.weights import read_weights
from export.parity.check import check_parity
from export.parity.report import ParityFailed, ParityReport
from export.tracing import weights_digest
from model.network.stiv import STIV
from tests.tiny_export import Exported, make_network, make_recipe


@pytest.fixture(scope="module")
def retrained(exported: Exported) -> STIV:
    return make_network(exported.recipe, seed=1)


def start(exported: Exported, runtime: str) -> RefittableEngine:
    return exported.engine if runtime == "onnx" else TorchEngine(exported.network)


def weights_of(network: STIV) -> Mapping[str, Tensor]:
    return network.state_dict()


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_refitted_engine_computes_with_the_new_weights_and_goes_back_to_the_bit(
    exported: Exported, retrained: STIV, runtime: str
) -> None:
    profile, wanted = exported.profile, weights_digest(weights_of(retrained))
    inputs = exported.inputs.call(profile.opt, seed=0)
    live = LiveEngine(start(exported, runtime), weights_sha256="before")
    before = live.denoise(*inputs)

    def proof(engine: RefittableEngine) -> ParityReport:
        return check_parity(TorchEngine(retrained), engine, exported.inputs, subject=wanted)

    report = live.refit(weights_of(retrained), weights_sha256=wanted, verify=proof)
    assert report.passed and live.weights_sha256 == wanted
    after = live.denoise(*inputs)
    assert (after - before).abs().max() > 0.01
    assert torch.allclose(after, TorchEngine(retrained).denoise(*inputs), atol=1e-4)
    assert live.verify(proof).passed

    assert live.revert() == "before" == live.weights_sha256
    assert torch.equal(live.denoise(*inputs), before)
    with pytest.raises(ValueError, match="nothing to go back to"):
        live.revert()


def test_a_refit_that_is_wrong_never_answers(exported: Exported, retrained: STIV) -> None:
    profile = exported.profile
    inputs = exported.inputs.call(profile.min, seed=0)
    live = LiveEngine(exported.engine, weights_sha256="before")
    before = live.denoise(*inputs)
    broken = {name: weight.clone() for name, weight in weights_of(retrained).items()}
    broken["blocks.2.cross.key_value.bias"][0] += 0.05

    def proof(engine: RefittableEngine) -> ParityReport:
        return check_parity(TorchEngine(retrained), engine, exported.inputs, subject="")

    with pytest.raises(ParityFailed, match=r"fp32 allows 0\.0001"):
        live.refit(broken, weights_sha256="broken", verify=proof)
    assert live.weights_sha256 == "before" and not live.can_revert
    assert torch.equal(live.denoise(*inputs), before)


def test_what_was_kept_cannot_be_taken_back(exported: Exported, retrained: STIV) -> None:
    live = LiveEngine(TorchEngine(exported.network), weights_sha256="before")

    def proof(engine: RefittableEngine) -> ParityReport:
        return check_parity(engine, engine, exported.inputs, subject="")

    live.refit(weights_of(retrained), weights_sha256="after", verify=proof)
    assert live.can_revert
    live.keep()
    with pytest.raises(ValueError, match="no refit was made, or it was kept"):
        live.revert()
    assert live.weights_sha256 == "after"


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_weights_of_another_network_are_refused_by_name(exported: Exported, runtime: str) -> None:
    engine = start(exported, runtime)
    shallow = make_network(make_recipe(network={"hidden_size": 32, "depth": 2, "num_heads": 2, "unmasked_depth": 1}))
    with pytest.raises(EngineMismatch, match=r"\d+ of \d+ are missing, such as 'blocks\.2\."):
        engine.with_weights(weights_of(shallow))
    wide = make_network(make_recipe(network={"hidden_size": 48, "depth": 3, "num_heads": 2}))
    with pytest.raises(EngineMismatch, match=r"have another shape, such as 'blocks\.0\..* export that checkpoint"):
        engine.with_weights(weights_of(wide))


def test_no_constant_of_the_graph_is_folded_from_an_old_weight(exported: Exported) -> None:
    """The network's own weights, put in from outside, answer as the file does: every one of them is replaced."""
    inputs = exported.inputs.call(exported.profile.opt, seed=0)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights_of(exported.network).items()}
    assert not exported.engine.with_weights(zeros).denoise(*inputs).any()
    again = exported.engine.with_weights(weights_of(exported.network)).denoise(*inputs)
    assert torch.equal(again, exported.engine.denoise(*inputs))


def test_a_files_weights_are_those_of_its_network(exported: Exported) -> None:
    held, expected = read_weights(exported.file.path), dict(weights_of(exported.network))
    del expected["mask_token"]
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())

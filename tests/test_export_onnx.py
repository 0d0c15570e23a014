"""The exported file: what it computes, what it says about itself, and which networks it is made from."""

import copy
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from export.bundle import MODEL
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine, EngineCorrupt
from export.engines.torch import TorchEngine
from export.guidance import Combination
from export.onnx import export_onnx, recipe_digest
from export.parity.check import check_calls, compare_trajectories
from export.parity.inputs import ParityInputs
from export.parity.report import BOUNDS
from export.profiles import Shape, ShapeProfile
from export.tracing import weights_digest
from model.conditioning import Conditions
from model.recipe import StageRecipe
from tests.tiny_export import Exported, make_network, make_recipe

TIGHT = 2e-5
"""Five times below what a float32 engine is allowed."""


def largest_error(reference: Engine, engine: OnnxEngine, recipe: StageRecipe, *shapes: Shape) -> float:
    inputs = ParityInputs(engine.profile, recipe)
    report = check_calls(reference, engine, inputs, shapes=shapes or engine.profile.corners())
    return report.worst_call.max_abs_error


@pytest.mark.parametrize("axis", ["batch", "frames", "height", "width", "text_tokens"])
def test_no_size_was_taken_for_a_constant(exported: Exported, axis: str) -> None:
    low, odd = exported.profile.min, {"batch": 3, "frames": 6, "height": 10, "width": 14, "text_tokens": 11}
    alone = low.model_copy(update={axis: odd[axis]})
    others = Shape(**{**odd, axis: getattr(low, axis)})
    error = largest_error(TorchEngine(exported.network), exported.engine, exported.recipe, alone, others)
    assert error < TIGHT


def test_the_file_says_what_it_was_made_from(exported: Exported) -> None:
    metadata = exported.engine.metadata
    assert metadata["stiv.stage"] == "tiny"
    assert metadata["stiv.recipe_sha256"] == recipe_digest(exported.recipe)
    assert metadata["stiv.weights_sha256"] == weights_digest(exported.network.state_dict())
    assert metadata["stiv.weights_sha256"] != weights_digest(make_network(exported.recipe, seed=1).state_dict())
    assert exported.profile == ShapeProfile.of(exported.recipe, exported.network)
    facts = [metadata[f"stiv.{name}"] for name in ("precision", "guidance", "opset", "torch")]
    assert facts == ["fp32", "outside", "20", torch.__version__]


def test_the_graph_is_opset_20_names_its_sizes_and_holds_each_weight_under_its_own_name(exported: Exported) -> None:
    model = onnx.load(exported.file.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    found = {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    assert found == {**exported.profile.signature(), "velocity": ("batch", "frames", 6, "height", "width")}
    held = {each.name for each in model.graph.initializer}
    assert set(exported.network.state_dict()) - held == {"mask_token"}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # paths of this machine


def test_an_image_network_exports_too_whatever_its_weights_are_and_large_ones_lie_beside_the_graph(
    tmp_path: Path,
) -> None:
    recipe = make_recipe(
        task="t2i",
        network={"hidden_size": 32, "depth": 2, "num_heads": 2, "unmasked_depth": 1, "temporal_patch_size": 1}
        | {"temporal_attention": False},
        video={"num_frames": 1, "height": 32, "width": 32},
    )
    network = make_network(recipe)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith("blocks.0.") and weight.ndim == 1:  # the block that is traced
                weight.fill_(1.0 if "norm" in name else 0.0)
    file = export_onnx(network, tmp_path / MODEL, recipe=recipe, external_above=0)
    beside = tmp_path / f"{MODEL}.data"
    assert beside.stat().st_size > 0.9 * sum(4 * weight.numel() for weight in network.parameters())
    assert file.bytes == beside.stat().st_size + file.path.stat().st_size
    assert largest_error(TorchEngine(network), OnnxEngine(file.path, threads=1), recipe) < TIGHT

    beside.unlink()
    with pytest.raises(EngineCorrupt, match="cannot be loaded, export it again"):
        OnnxEngine(file.path)


@pytest.mark.slow
def test_a_network_of_other_choices_with_an_image_and_its_guidance_inside_exports_too(tmp_path: Path) -> None:
    unlike = {"qk_norm", "sandwich_norm", "condition_norm", "shared_modulation", "micro_conditions"}
    network = {"hidden_size": 32, "depth": 3, "num_heads": 2, **dict.fromkeys(unlike, False)}
    network |= {"causal_temporal_attention": True, "temporal_modulation": True, "image_cross_attention": "linear"}
    recipe = make_recipe(
        network=network | {"positions": "learned", "learned_grid": (4, 4, 8)}, export={"guidance_in_graph": True}
    )
    trained = make_network(recipe)
    file = export_onnx(trained, tmp_path / MODEL, recipe=recipe)
    engine = OnnxEngine(file.path, threads=1)
    assert file.metadata["stiv.guidance"] == "inside" and len(engine.profile.signature()) == 12
    largest = engine.profile.max
    assert (largest.frames, largest.height, largest.width) == (8, 8, 16)  # where the learned positions end
    held = {each.name for each in onnx.load(file.path).graph.initializer}
    assert set(trained.state_dict()) - held == {"mask_token"}, "weights keep their names"
    reference, inputs = TorchEngine(trained), ParityInputs(engine.profile, recipe)
    assert largest_error(reference, engine, recipe) < TIGHT
    shape = engine.profile.opt.model_copy(update={"batch": 8})
    for kind in ("joint", "separate", "none"):
        sampling = recipe.sampling.model_copy(update={"guidance": kind, "num_steps": 2})
        drawn, _ = compare_trajectories(
            reference, engine, replace(inputs, recipe=recipe.model_copy(update={"sampling": sampling})), shape, 0, None
        )
        assert drawn.errors[-1] < TIGHT, kind

    class Careless:
        """Guides, but not over the frames that count."""

        profile = engine.profile

        def denoise(
            self, latents: Tensor, timestep: Tensor, conditions: Conditions, combination: Combination | None = None
        ) -> Tensor:
            assert combination is not None
            blind = replace(combination, frame_mask=torch.zeros_like(combination.frame_mask))
            return engine.denoise(latents, timestep, conditions, blind)

    drawn, _ = compare_trajectories(reference, Careless(), inputs, shape, 0, None)
    assert drawn.errors[-1] > 10 * BOUNDS["fp32"].trajectory_error


def test_a_network_of_another_recipe_or_already_lowered_is_refused(tmp_path: Path, exported: Exported) -> None:
    other = make_recipe(network={"hidden_size": 32, "depth": 4, "num_heads": 2})
    with pytest.raises(ValueError, match=r"depth=3.*the recipe 'tiny' says.*depth=4"):
        export_onnx(exported.network, tmp_path / MODEL, recipe=other)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16; a graph is made from float32 weights"):
        export_onnx(copy.deepcopy(exported.network).bfloat16(), tmp_path / MODEL, recipe=exported.recipe)
    assert not list(tmp_path.iterdir())

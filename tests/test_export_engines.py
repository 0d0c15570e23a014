"""From a network to an engine bundle: the file computes what the network computes, and what is wrong is caught.

One export serves the whole module.
"""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from export.bundle import INDEX, MODEL, PARITY, RECIPE, load_bundle, load_engine, write_bundle
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import Engine, EngineCorrupt, EngineMismatch
from export.engines.torch import TorchEngine
from export.onnx import OnnxExport, export_onnx, recipe_digest, weights_digest
from export.parity import BOUND, ParityFailed, ParityReport, check_parity, draw_inputs
from export.profiles import Shape, ShapeProfile
from model.conditioning import Conditions
from model.config import SamplingConfig
from model.network.stiv import STIV
from model.recipe import StageRecipe
from model.sampler import Guidance, no_image, sample_steps
from model.vae import PatchPca

TEXT, POOLED = 24, 20


def make_recipe(**changes: object) -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "name": "tiny",
            "task": "ti2v",
            "network": {"hidden_size": 32, "depth": 3, "num_heads": 2},
            "video": {"num_frames": 8, "height": 32, "width": 32},
            "vae": {"latent_channels": 6, "spatial_factor": 4},
            "text": {"max_tokens": 12},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "gate": [{"metric": "loss", "op": "<", "bound": 1.0}],
            **changes,
        }
    )


def make_network(recipe: StageRecipe, seed: int = 0) -> STIV:
    """A network in which no two weights are equal and no branch is closed."""
    torch.manual_seed(seed)
    network = STIV(recipe.network, latent_channels=6, text_size=TEXT, pooled_size=POOLED)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@dataclass(slots=True, frozen=True)
class Exported:
    recipe: StageRecipe
    network: STIV
    file: OnnxExport
    engine: OnnxEngine

    @property
    def profile(self) -> ShapeProfile:
        return self.engine.profile


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    recipe = make_recipe()
    network = make_network(recipe)
    file = export_onnx(network, tmp_path_factory.mktemp("export") / MODEL, recipe=recipe)
    return Exported(recipe, network, file, OnnxEngine(file.path, threads=1))


@pytest.fixture(scope="module")
def report(exported: Exported) -> ParityReport:
    return check_parity(TorchEngine(exported.network), exported.engine, exported.profile, subject=exported.file.sha256)


@pytest.fixture(scope="module")
def codec() -> PatchPca:
    frames = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return PatchPca.fit(frames, 6, 4)


@pytest.fixture
def bundle(tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport) -> Path:
    folder = tmp_path / "engine"
    write_bundle(folder, model=exported.file.path, codec=codec, recipe=exported.recipe, parity=report)
    return folder


# --- the file


def test_the_engine_equals_the_network_at_every_corner_of_the_profile(report: ParityReport) -> None:
    assert report.passed and report.worst.max_abs_error < 2e-5 < BOUND
    assert {each.shape.batch for each in report.shapes} == {1, 2, 32}
    assert all(each.reference_seconds > 0 and each.candidate_seconds > 0 for each in report.shapes)


@pytest.mark.parametrize("axis", ["batch", "frames", "height", "width", "text_tokens"])
def test_no_size_was_taken_for_a_constant(exported: Exported, axis: str) -> None:
    low, odd = exported.profile.min, {"batch": 3, "frames": 6, "height": 10, "width": 14, "text_tokens": 11}
    alone = low.model_copy(update={axis: odd[axis]})
    others = Shape(**{**odd, axis: getattr(low, axis)})
    reference = TorchEngine(exported.network)
    check_parity(reference, exported.engine, exported.profile, subject="", shapes=[alone, others], bound=2e-5)


def test_the_file_says_what_it_was_made_from(exported: Exported) -> None:
    metadata = exported.engine.metadata
    assert metadata["stiv.stage"] == "tiny"
    assert metadata["stiv.recipe_sha256"] == recipe_digest(exported.recipe)
    assert metadata["stiv.weights_sha256"] == weights_digest(exported.network.state_dict())
    assert exported.profile == ShapeProfile.of(exported.recipe, exported.network)
    assert metadata["stiv.weights_sha256"] != weights_digest(make_network(exported.recipe, seed=1).state_dict())


def test_the_graph_is_opset_20_names_its_sizes_and_holds_each_weight_under_its_own_name(exported: Exported) -> None:
    model = onnx.load(exported.file.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    latents = model.graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_param or each.dim_value for each in latents] == ["batch", "frames", 6, "height", "width"]
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
    engine = OnnxEngine(file.path, threads=1)
    check_parity(TorchEngine(network), engine, engine.profile, subject="", bound=2e-5)

    beside.unlink()
    with pytest.raises(EngineCorrupt, match="cannot be loaded, export it again"):
        OnnxEngine(file.path)


def test_a_network_of_other_choices_exports_too(tmp_path: Path) -> None:
    unlike = {"qk_norm", "sandwich_norm", "condition_norm", "shared_modulation", "micro_conditions"}
    network = {"hidden_size": 32, "depth": 3, "num_heads": 2, **dict.fromkeys(unlike, False)}
    network |= {"causal_temporal_attention": True, "temporal_modulation": True}
    recipe = make_recipe(network=network | {"positions": "learned", "learned_grid": (4, 4, 8)})
    trained = make_network(recipe)
    file = export_onnx(trained, tmp_path / MODEL, recipe=recipe)
    engine = OnnxEngine(file.path, threads=1)
    largest = engine.profile.max
    assert (largest.frames, largest.height, largest.width) == (8, 8, 16)  # where the learned positions end
    check_parity(TorchEngine(trained), engine, engine.profile, subject="", bound=2e-5)


def test_a_network_that_takes_the_image_beside_the_latents_is_refused(tmp_path: Path) -> None:
    network = {"hidden_size": 32, "depth": 3, "num_heads": 2, "image_cross_attention": "linear"}
    recipe = make_recipe(network=network)
    with pytest.raises(ValueError, match=r"image_cross_attention 'linear' takes the image as an input of its own"):
        export_onnx(make_network(recipe), tmp_path / MODEL, recipe=recipe)


def test_a_network_of_another_recipe_or_precision_is_refused(tmp_path: Path, exported: Exported) -> None:
    other = make_recipe(network={"hidden_size": 32, "depth": 4, "num_heads": 2})
    with pytest.raises(ValueError, match=r"depth=3.*the recipe 'tiny' says.*depth=4"):
        export_onnx(exported.network, tmp_path / MODEL, recipe=other)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16; the graph is float32, so export network\.float\(\)"):
        export_onnx(copy.deepcopy(exported.network).bfloat16(), tmp_path / MODEL, recipe=exported.recipe)
    assert not list(tmp_path.iterdir())


# --- the engines


def test_both_engines_draw_the_same_video(exported: Exported) -> None:
    shape = exported.profile.opt
    noise, _, conditions = draw_inputs(exported.profile, shape, seed=3)
    _, _, null = draw_inputs(exported.profile, shape, seed=4)
    guidance = Guidance(conditions, null, torch.tensor([2.0, 5.0]), renormalize=True)
    config = SamplingConfig(num_steps=3, stochastic=False)
    expected, found = (
        list(sample_steps(engine.denoise, noise, guidance, no_image(noise), config, shift=1.0))[-1]
        for engine in (TorchEngine(exported.network), exported.engine)
    )
    assert (expected - noise).std() > 0.1
    assert torch.allclose(expected, found, atol=1e-4)


def test_a_torch_engine_keeps_no_graph_for_gradients(exported: Exported) -> None:
    inputs = draw_inputs(exported.profile, exported.profile.min, seed=0)
    assert not TorchEngine(exported.network).denoise(*inputs).requires_grad


def test_padding_of_the_text_and_batch_mates_change_nothing(exported: Exported) -> None:
    latents, timestep, conditions = draw_inputs(exported.profile, exported.profile.opt, seed=0)
    one = conditions.rows(slice(1, 2))
    longer = Conditions(
        torch.cat([one.text, torch.full((1, 4, TEXT), 9.0)], dim=1),
        torch.cat([one.text_mask, torch.zeros(1, 4, dtype=torch.bool)], dim=1),
        one.pooled,
        one.micro,
    )
    together = exported.engine.denoise(latents, timestep, conditions)[1:]
    assert torch.allclose(together, exported.engine.denoise(latents[1:], timestep[1:], longer), atol=1e-5)


def test_an_engine_refuses_what_it_was_not_proven_for(exported: Exported) -> None:
    latents, timestep, conditions = draw_inputs(exported.profile, exported.profile.opt, seed=0)
    denoise = exported.engine.denoise
    with pytest.raises(ValueError, match="frames 7 of the latents is not a multiple"):
        denoise(latents[:, :7], timestep, conditions)
    with pytest.raises(ValueError, match="batch 34 is outside the engine's profile, 1 to 32"):
        denoise(latents[:1].expand(34, -1, -1, -1, -1), timestep, conditions)
    with pytest.raises(ValueError, match=r"pooled has shape \(2, 19\), this engine takes \(2, 20\)"):
        denoise(latents, timestep, replace(conditions, pooled=conditions.pooled[:, :19]))
    with pytest.raises(ValueError, match=r"timestep is torch\.float64, this engine takes torch\.float32"):
        denoise(latents, timestep.double(), conditions)
    with pytest.raises(ValueError, match="text_mask is all False"):
        denoise(latents, timestep, replace(conditions, text_mask=torch.zeros_like(conditions.text_mask)))
    with pytest.raises(ValueError, match=r"must be \[B, T, C, H, W\]"):
        denoise(latents[0], timestep, conditions)


def test_a_file_that_is_no_engine_is_refused(tmp_path: Path, exported: Exported) -> None:
    with pytest.raises(ValueError, match="no such file; export a checkpoint to it"):
        OnnxEngine(tmp_path / "absent.onnx")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(exported.file.path.read_bytes()[:-1000])
    with pytest.raises(EngineCorrupt, match="cannot be loaded, export it again"):
        OnnxEngine(cut)
    foreign = onnx.load(exported.file.path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(EngineMismatch, match="it was not written by export_onnx"):
        OnnxEngine(tmp_path / "foreign.onnx")


# --- parity


class Changed:
    """An engine whose velocity or inputs something changes."""

    def __init__(self, engine: Engine, fault: str) -> None:
        self.engine, self.fault = engine, fault

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        if self.fault == "rows swapped":
            conditions = conditions.rows(torch.arange(latents.shape[0]).flip(0))
        if self.fault == "time runs backwards":
            timestep = 1 - timestep
        if self.fault == "height and width swapped":
            return self.engine.denoise(latents.transpose(3, 4), timestep, conditions).transpose(3, 4)
        if self.fault == "text mask ignored":
            conditions = replace(conditions, text_mask=torch.ones_like(conditions.text_mask))
        velocity = self.engine.denoise(latents, timestep, conditions)
        return velocity * torch.nan if self.fault == "not a number" else velocity


@pytest.mark.parametrize(
    "fault",
    ["rows swapped", "time runs backwards", "height and width swapped", "text mask ignored", "not a number"],
)
def test_an_engine_with_a_fault_is_caught(exported: Exported, fault: str) -> None:
    with pytest.raises(ParityFailed):
        check_parity(
            TorchEngine(exported.network),
            Changed(exported.engine, fault),
            exported.profile,
            subject="",
            shapes=exported.profile.corners()[:2],
        )


@pytest.mark.parametrize(
    "name", ["blocks.2.temporal.query_norm.weight", "blocks.1.cross.key_value.bias", "patch_embedding.weight"]
)
def test_one_perturbed_value_of_one_weight_is_caught(exported: Exported, name: str) -> None:
    network = copy.deepcopy(exported.network)
    with torch.no_grad():
        network.get_parameter(name).view(-1)[0] += 0.05
    with pytest.raises(ParityFailed, match=r"batch 2.*the engine is off by .* above the bound 0.0001"):
        check_parity(TorchEngine(network), exported.engine, exported.profile, subject="", shapes=[exported.profile.opt])


def test_a_failure_carries_its_report_and_the_report_survives_its_json(exported: Exported) -> None:
    broken = Changed(exported.engine, "not a number")
    with pytest.raises(ParityFailed, match=r"2 of 2 shapes fail") as caught:
        check_parity(
            TorchEngine(exported.network), broken, exported.profile, subject="ab", shapes=exported.profile.corners()[:2]
        )
    text = caught.value.report.model_dump_json()
    again = ParityReport.model_validate_json(text)
    assert json.loads(text)["shapes"][0]["max_abs_error"] == "NaN"
    assert again.subject == "ab" and not again.passed
    with pytest.raises(ParityFailed, match="no shape was compared"):
        ParityReport(subject="", bound=1.0, seed=0, shapes=()).require_passed()


def test_parity_inputs_are_seeded_and_like_those_of_sampling(exported: Exported) -> None:
    shape = Shape(batch=8, frames=8, height=8, width=8, text_tokens=12)
    latents, timestep, conditions = draw_inputs(exported.profile, shape, seed=0)
    assert torch.equal(latents, draw_inputs(exported.profile, shape, seed=0)[0])
    assert not torch.equal(latents, draw_inputs(exported.profile, shape, seed=1)[0])
    assert abs(float(latents.std()) - 1) < 0.05
    assert timestep[0] == 0 and timestep.max() > 0.8 and timestep.max() < 1
    lengths = conditions.text_mask.sum(1)
    assert lengths[0] == 12 and 1 <= lengths.min() < 12
    assert conditions.micro[0].tolist() == [32, 32, 0, 0, 1, 8]


# --- the bundle


def test_a_bundle_holds_all_that_serving_takes(bundle: Path, exported: Exported, report: ParityReport) -> None:
    loaded = load_bundle(bundle)
    assert set(loaded.files) == {MODEL, "codec.safetensors", "codec.json", RECIPE, PARITY, INDEX}
    assert set(loaded.files.values()) == set(bundle.iterdir())
    assert loaded.recipe == exported.recipe and loaded.parity == report
    assert [path.name for path in bundle.parent.iterdir()] == ["engine"]
    inputs = draw_inputs(exported.profile, exported.profile.min, seed=0)
    assert torch.equal(load_engine(bundle, threads=1).denoise(*inputs), exported.engine.denoise(*inputs))


@pytest.mark.parametrize("name", [MODEL, "codec.safetensors", "codec.json", RECIPE, PARITY])
def test_one_flipped_byte_anywhere_in_a_bundle_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(EngineCorrupt, match=rf"{name} has {len(data)} bytes and sha256 .*fetch the bundle again"):
        load_engine(bundle)


def test_a_bundle_with_a_file_or_its_index_missing_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "codec.json").unlink()
    with pytest.raises(EngineCorrupt, match=r"codec\.json is missing"):
        load_bundle(bundle)
    (bundle / INDEX).write_text("{}")
    with pytest.raises(EngineCorrupt, match=r"bundle\.json cannot be read"):
        load_bundle(bundle)
    with pytest.raises(EngineCorrupt, match=r"holds no bundle\.json"):
        load_bundle(tmp_path)


def test_an_index_cannot_point_outside_its_folder(bundle: Path) -> None:
    index = json.loads((bundle / INDEX).read_text())
    index["files"]["../engine/model.onnx"] = index["files"][MODEL]
    (bundle / INDEX).write_text(json.dumps(index))
    with pytest.raises(EngineCorrupt, match=r"bundle\.json cannot be read"):
        load_bundle(bundle)


def test_an_engine_of_another_recipe_is_refused(
    tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport
) -> None:
    other = make_recipe(video={"num_frames": 16, "height": 32, "width": 32})
    write_bundle(tmp_path / "engine", model=exported.file.path, codec=codec, recipe=other, parity=report)
    with pytest.raises(EngineMismatch, match=r"was exported from recipe .* export the checkpoint again"):
        load_engine(tmp_path / "engine")


def test_an_unproven_model_is_not_bundled_and_nothing_is_left(
    tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport
) -> None:
    folder = tmp_path / "engine"
    failed = report.model_copy(update={"bound": 0.0})
    with pytest.raises(ParityFailed):
        write_bundle(folder, model=exported.file.path, codec=codec, recipe=exported.recipe, parity=failed)
    with pytest.raises(EngineMismatch, match="the parity report is about file"):
        other = report.model_copy(update={"subject": "0" * 64})
        write_bundle(folder, model=exported.file.path, codec=codec, recipe=exported.recipe, parity=other)
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_never_overwritten(bundle: Path, exported: Exported, codec: PatchPca, report: ParityReport) -> None:
    with pytest.raises(ValueError, match="a bundle never changes, so name a new folder"):
        write_bundle(bundle, model=exported.file.path, codec=codec, recipe=exported.recipe, parity=report)
    load_bundle(bundle)


def test_importing_the_room_brings_in_no_exporter_and_no_runtime() -> None:
    heavy = "{'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'torch._dynamo', 'tensorrt', 'tensorrt_rtx'}"
    program = f"import sys, export.bundle, export.tensorrt; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

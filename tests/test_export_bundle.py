"""An engine bundle: whole or not at all, proven, and never of another recipe."""

import json
from pathlib import Path

import pytest
import torch

from export.bundle import INDEX, MODEL, PARITY, RECIPE, load_bundle, write_bundle
from export.engines.card import CARD
from export.engines.opening import open_bundle
from export.engines.protocol import EngineCorrupt, EngineMismatch
from export.engines.torch import TorchEngine
from export.parity.check import check_calls
from export.parity.report import ParityFailed, ParityReport
from model.vae import PatchPca
from tests.tiny_export import Exported, make_recipe


@pytest.fixture(scope="module")
def report(exported: Exported) -> ParityReport:
    shapes = [exported.profile.min]
    reference = TorchEngine(exported.network)
    return check_calls(reference, exported.engine, exported.inputs, shapes=shapes, subject=exported.file.sha256)


@pytest.fixture(scope="module")
def codec() -> PatchPca:
    frames = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return PatchPca.fit(frames, 6, 4)


@pytest.fixture
def bundle(tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport) -> Path:
    folder = tmp_path / "engine"
    write_bundle(folder, model=exported.file.path, codec=codec, recipe=exported.recipe, parity=report)
    return folder


def test_a_bundle_holds_all_that_serving_takes(bundle: Path, exported: Exported, report: ParityReport) -> None:
    loaded = load_bundle(bundle)
    assert set(loaded.files) == {MODEL, "codec.safetensors", "codec.json", RECIPE, PARITY, CARD, INDEX}
    assert set(loaded.files.values()) == set(bundle.iterdir())
    assert loaded.recipe == exported.recipe and loaded.parity == report
    assert [path.name for path in bundle.parent.iterdir()] == ["engine"]
    inputs = exported.inputs.call(exported.profile.min, seed=0)
    assert torch.equal(open_bundle(bundle, threads=1)[1].denoise(*inputs), exported.engine.denoise(*inputs))


@pytest.mark.parametrize("name", [MODEL, "codec.safetensors", "codec.json", RECIPE, PARITY, CARD])
def test_one_flipped_byte_anywhere_in_a_bundle_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(EngineCorrupt, match=rf"{name} has {len(data)} bytes and sha256 .*fetch the bundle again"):
        open_bundle(bundle)


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
        open_bundle(tmp_path / "engine")


def test_an_unproven_model_is_not_bundled_and_nothing_is_left(
    tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport
) -> None:
    folder = tmp_path / "engine"
    failed = report.model_copy(update={"bounds": report.bounds.model_copy(update={"max_abs_error": 1e-12})})
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


def test_extra_files_are_part_of_a_bundle_and_cannot_take_the_place_of_another(
    tmp_path: Path, exported: Exported, codec: PatchPca, report: ParityReport
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("built by hand")
    common = {"model": exported.file.path, "codec": codec, "recipe": exported.recipe, "parity": report}
    written = write_bundle(tmp_path / "engine", **common, extra={"notes.json": note})
    assert written.files["notes.json"].read_text() == "built by hand"
    with pytest.raises(ValueError, match=r"a bundle has a parity\.json of its own"):
        write_bundle(tmp_path / "other", **common, extra={PARITY: note})
    assert not (tmp_path / "other").exists()

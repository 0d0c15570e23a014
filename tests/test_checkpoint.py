"""Checkpoints: written whole or not at all, read by any number of ranks, and never used where a byte differs."""

import json
import math
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.checkpoint.folder import CheckpointCorrupt, digest_of, latest, load_weights, save_weights, verify
from model.checkpoint.reader import Reader
from model.checkpoint.state import PARTS, random_state, restore_random
from tests.checkpoints import flip, same, save, save_cut, state, tensors
from tests.tiny_stage import stage

FILES = [f"{part}-{rank:05d}-of-00002.safetensors" for part in (*PARTS, "random") for rank in range(2)]
FILES += ["state.json", "recipe.json", "manifest.json"]


def use(folder: Path) -> None:
    """As a run that resumes does."""
    reader = Reader(folder)
    for part in PARTS:
        reader.whole(part)
    for rank in range(reader.world_size):
        reader.random(rank)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    saved = state()
    folder = save(tmp_path, saved, keep=2)
    reader = Reader(folder)
    assert folder == latest(tmp_path) == tmp_path / "step-00000005"
    assert (reader.step, reader.world_size, reader.loader, reader.inputs) == (5, 1, {"position": 40}, {"data": "d1"})
    assert reader.recipe == saved.recipe
    for part, whole in tensors(5).items():
        assert same(reader.whole(part), whole), part
        assert same(load_weights(folder, part), whole), part
    assert same(reader.random(0), dict(saved.random))
    assert not any(path.suffix in {".pt", ".pkl", ".bin"} for path in folder.iterdir())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, world_size: int) -> None:
    whole = tensors(5, size=40)
    folder = save_cut(tmp_path, whole, 5, world_size)
    reader = Reader(folder)
    for part in PARTS:
        assert same(reader.whole(part), whole[part]), part
    assert sorted(path.name for path in folder.glob("*-of-*")) == sorted(
        f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
        for part in (*PARTS, "random")
        for rank in range(world_size)
    )
    weight = whole["model"]["a.weight"].reshape(-1)
    for readers in (1, 2, 5):
        bounds = [weight.numel() * rank // readers for rank in range(readers + 1)]
        read = [reader.read("model", "a.weight", *bounds[rank : rank + 2]) for rank in range(readers)]
        assert torch.equal(torch.cat(read), weight)
    assert [torch.equal(reader.random(rank)["torch"], random_state()["torch"]) for rank in (0, 7)] == [True, True]


@given(st.integers(1, 4), st.integers(1, 30), st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_run_of_values_is_read(
    tmp_path_factory: pytest.TempPathFactory, world_size: int, size: int, data: st.DataObject
) -> None:
    whole = tensors(5, size)
    reader = Reader(save_cut(tmp_path_factory.mktemp("run"), whole, 5, world_size))
    for part in PARTS:
        for name, tensor in whole[part].items():
            start = data.draw(st.integers(0, tensor.numel()))
            stop = data.draw(st.integers(start, tensor.numel()))
            read = reader.read(part, name, start, stop)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor.reshape(-1)[start:stop])


def test_each_file_says_by_itself_what_it_holds(tmp_path: Path) -> None:
    """Whole tensors in their shape, runs flat with their start: readable by anybody's safetensors."""
    whole = tensors(5, size=40)
    single = load_file(save(tmp_path / "one", state(size=40), keep=1) / "model-00000-of-00001.safetensors")
    assert same(single, whole["model"])
    folder = save_cut(tmp_path / "two", whole, 5, 2)
    from safetensors import safe_open

    joined: dict[int, torch.Tensor] = {}
    for rank in range(2):
        with safe_open(folder / f"model-{rank:05d}-of-00002.safetensors", framework="pt") as file:
            joined[int(file.metadata()["a.weight"])] = file.get_tensor("a.weight")
    flat = torch.cat([joined[start] for start in sorted(joined)])
    assert torch.equal(flat, whole["model"]["a.weight"].reshape(-1))


def test_a_rank_reads_and_checks_only_the_files_its_values_lie_in(tmp_path: Path) -> None:
    folder = save_cut(tmp_path, tensors(5, size=40), 5, 2)
    reader = Reader(folder)
    flip(folder / FILES[1], -1)
    size = math.prod(reader.shapes("model")["a.weight"])
    assert reader.read("model", "a.weight", 0, 1).numel() == 1
    with pytest.raises(CheckpointCorrupt, match=FILES[1]):
        reader.read("model", "a.weight", size - 1, size)


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    first, again = save(tmp_path / "a", state(), keep=1), save(tmp_path / "b", state(), keep=1)
    other = save(tmp_path / "c", state(step=6), keep=1)
    assert digest_of(first) == verify(first) == verify(again) != verify(other)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 5 and 9 of two ranks."""
    root = tmp_path_factory.mktemp("two")
    save_cut(root, tensors(5), 5, 2, keep=3)
    save_cut(root, tensors(9), 9, 2, keep=3)
    return root


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_found_and_named(two: Path, name: str) -> None:
    folder = two / "step-00000009"
    path = folder / name
    size = path.stat().st_size
    places = {0, 7, 8, size // 2, size - 1, *random.Random(name).sample(range(size), k=min(size, 12))}
    for place in sorted(places):
        flip(path, place)
        for read in (verify, use):
            with pytest.raises(CheckpointCorrupt) as caught:
                read(folder)
            assert name in str(caught.value)
            assert f"write step-00000005 into {two / 'latest'}" in str(caught.value)
        flip(path, place)
    use(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_swapped_file_is_found(two: Path, name: str) -> None:
    folder = two / "step-00000009"
    path = folder / name
    data = path.read_bytes()
    others = [two / "step-00000005" / name, folder / FILES[0 if name != FILES[0] else 1]]
    wrong = [data[:-1], b"", data + b"\0", *(other.read_bytes() for other in others if other.read_bytes() != data)]
    try:
        for content in wrong:
            path.write_bytes(content)
            for read in (verify, use):
                with pytest.raises(CheckpointCorrupt, match=rf"{name}|its manifest says"):
                    read(folder)
        path.unlink()
        for read in (verify, use):
            with pytest.raises(CheckpointCorrupt, match=f"{name} is missing"):
                read(folder)
    finally:
        path.write_bytes(data)
    use(folder)


def test_the_error_states_both_digests(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)
    name = "ema-00000-of-00001.safetensors"
    expected = json.loads((folder / "manifest.json").read_text())["files"][name]["sha256"]
    flip(folder / name, -1)
    found = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True).stdout.split()[0]
    with pytest.raises(CheckpointCorrupt, match=f"(?s){name} has sha256 {found}.*says {expected}"):
        load_weights(folder, "ema")
    with pytest.raises(CheckpointCorrupt, match="no other checkpoint there is intact"):
        use(folder)


@pytest.mark.parametrize("name", ["../step-00000005/state.json", "/etc/passwd"])
def test_a_manifest_that_leaves_a_file_out_or_reaches_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    from model.checkpoint.manifest import write_manifest

    folder = save(tmp_path, state(), keep=1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for text in ('{"files": {}, "sha256": ""}', '{"files": []}', "[]", "null", '{"files": {"a": 1}, "sha256": 3}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            verify(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder, {**files, name: files["state.json"]})
    with pytest.raises(CheckpointCorrupt, match="which is no file of this folder"):
        verify(folder)


def test_intact_ones_are_named_even_if_several_are_not(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step=step), keep=3)
    flip(tmp_path / "step-00000002" / "manifest.json", 20)
    flip(tmp_path / "step-00000003" / "manifest.json", 20)
    with pytest.raises(CheckpointCorrupt, match=r"write step-00000001 .*\(intact: step-00000001\)"):
        use(tmp_path / "step-00000003")


@pytest.mark.parametrize("text", ["", "step-00000099\n", "../elsewhere\n", "\xff"])
def test_a_pointer_to_nothing_is_an_error_with_a_way_out(tmp_path: Path, text: str) -> None:
    assert latest(tmp_path) is None
    save(tmp_path, state(), keep=1)
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointCorrupt, match="write step-00000005 into"):
        latest(tmp_path)


def test_what_is_not_in_it_is_an_error_that_names_it(tmp_path: Path) -> None:
    reader = Reader(save(tmp_path, state(), keep=1))
    shapes = reader.shapes("model")
    reader.require("model", shapes)
    with pytest.raises(ValueError, match=r"no model tensor 'b\.weight'"):
        reader.read("model", "b.weight")
    with pytest.raises(ValueError, match=r"values 3 to 99 were asked of model tensor 'a\.weight', which has 24"):
        reader.read("model", "a.weight", 3, 99)
    with pytest.raises(ValueError, match=r"has 1 names that this one has not \['scale'\] and lacks 1 \['other'\]"):
        reader.require("model", {"other" if name == "scale" else name: shape for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=r"'a.weight' has shape \(6, 4\), here \(4, 6\)"):
        reader.require("model", {**shapes, "a.weight": torch.Size((4, 6))})


def test_weights_alone_are_read_but_not_resumed_from(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(4, 3).T, "a.bias": torch.zeros(0)}
    save_weights(tmp_path / "imported", weights, stage())
    assert same(load_weights(tmp_path / "imported", "ema"), weights)
    assert digest_of(tmp_path / "imported")
    for read in (verify, Reader):
        with pytest.raises(
            CheckpointCorrupt, match=r"lists no state\.json \(an imported checkpoint has weights only\)"
        ):
            read(tmp_path / "imported")
    flip(tmp_path / "imported" / "ema.safetensors", -1)
    with pytest.raises(CheckpointCorrupt, match=r"ema\.safetensors has sha256"):
        load_weights(tmp_path / "imported", "ema")


def test_process_wide_generators_come_back(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    expected = drawn()
    os.urandom(1)
    drawn()
    restore_random(Reader(folder).random(0))
    assert drawn() == expected


@pytest.mark.gpu
def test_a_gpus_generator_comes_back() -> None:
    saved = random_state()
    expected = torch.rand(4, device="cuda")
    torch.rand(4, device="cuda")
    restore_random(saved)
    assert torch.equal(torch.rand(4, device="cuda"), expected)

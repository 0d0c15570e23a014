"""Stored latents: what training reads from them is what the codec would have given it, and nothing else is taken."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.latents import encode_dataset
from infra.launch.stage import fetch_inputs
from infra.registry.names import CODEC, DATASET, latents
from infra.registry.registry import Registry
from infra.store.folder import FolderStore
from model.config import GateRule
from model.data.clips import shape_samples
from model.data.latents import codec_digest, encode_shards, require_fit
from model.data.loader import ClipLoader
from model.data.moving_shapes import generate
from model.data.shard_writer import ShardWriter
from model.data.shards import LatentsOf, Sample, SampleCorrupt, ShardSet
from model.recipe import StageRecipe
from model.vae import load_codec
from tests.tiny_stage import Inputs, stage, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), clips=12)


def with_form(form: str, recipe: StageRecipe | None = None) -> StageRecipe:
    tree = (recipe or stage()).model_dump()
    return StageRecipe.model_validate({**tree, "data": {**tree["data"], "form": form}})


def encoded(inputs: Inputs, folder: Path, *, size: int = 32, dtype: str = "float32") -> ShardSet:
    of = LatentsOf.model_validate({"codec": codec_digest(inputs.codec), "height": size, "width": size, "dtype": dtype})
    return encode_shards(ShardSet(inputs.data / "train"), folder, load_codec(inputs.codec, stage().vae), of)


def loader(shards: ShardSet, recipe: StageRecipe) -> ClipLoader:
    return ClipLoader(
        shards,
        video=recipe.video,
        data=recipe.data,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=3,
        task=recipe.task,
        temporal_patch_size=recipe.network.temporal_patch_size,
    )


def test_batches_of_latents_are_what_the_codec_makes_of_batches_of_clips(inputs: Inputs, tmp_path: Path) -> None:
    codec = load_codec(inputs.codec, stage().vae)
    of_clips = loader(ShardSet(inputs.data / "train"), stage())
    exact = loader(encoded(inputs, tmp_path / "exact"), with_form("latents"))
    half = loader(encoded(inputs, tmp_path / "half", dtype="float16"), with_form("latents"))
    for _ in range(5):
        wanted, found, rounded = next(of_clips), next(exact), next(half)
        assert (found.keys, found.captions, found.numbers) == (wanted.keys, wanted.captions, wanted.numbers)
        assert torch.equal(found.micro, wanted.micro)
        assert torch.allclose(found.latents(codec), wanted.latents(codec), atol=1e-6)
        assert torch.allclose(rounded.latents(codec), wanted.latents(codec), atol=4e-3)
        assert rounded.latents(codec).dtype == torch.float32


def test_the_middle_of_a_wide_picture_is_encoded_and_its_place_told(inputs: Inputs, tmp_path: Path) -> None:
    pixels = np.zeros((3, 40, 120, 3), np.uint8)
    pixels[:, :, 40:80] = 255
    wide = Sample("wide", pixels, "white between black", "film", "CC0", "nobody", 25.0, 400, 1200)
    with ShardWriter(tmp_path / "clips") as writer:
        writer.write(wide)
    codec = load_codec(inputs.codec, stage().vae)
    of = LatentsOf(codec=codec_digest(inputs.codec), height=32, width=32, dtype="float32")
    found = encode_shards(ShardSet(tmp_path / "clips"), tmp_path / "latents", codec, of).latents(0, [2, 0])
    assert found.latents.shape == (2, 4, 4, 4) and (found.top, found.left) == (0.0, 400.0)
    white = codec.encode(torch.ones(1, 2, 3, 32, 32))[0].numpy()
    assert np.allclose(found.latents, white, atol=1e-5), "the white middle was encoded, not the black sides"


def test_a_set_of_latents_takes_a_fraction_of_the_clips_bytes(inputs: Inputs, tmp_path: Path) -> None:
    clips = sum(shard.size for shard in ShardSet(inputs.data / "train").index.shards)
    stored = sum(shard.size for shard in encoded(inputs, tmp_path / "half", dtype="float16").index.shards)
    assert stored < clips / 3


def test_a_flipped_bit_in_stored_latents_is_found_before_they_are_used(inputs: Inputs, tmp_path: Path) -> None:
    shards = encoded(inputs, tmp_path / "latents")
    entry = shards.entries[5]
    path = shards.folder / shards.index.shards[entry.shard].name
    data = bytearray(path.read_bytes())
    data[entry.offset + (entry.size or 0) - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleCorrupt, match=entry.key):
        ShardSet(shards.folder).latents(5, [0])


def test_latents_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    sample = next(iter(shape_samples(generate(1, num_frames=2, size=16, seed=0))))
    of = LatentsOf(codec="0" * 64, height=16, width=16, dtype="float16")
    with pytest.raises(ValueError, match="70000 do not fit float16"), ShardWriter(tmp_path, latents=of) as writer:
        writer.write_latents(sample, np.full((2, 4, 2, 2), 7e4, np.float32), top=0, left=0)
    assert not list(tmp_path.glob("*.tar"))


def test_a_stage_refuses_data_in_another_form_size_or_codec(inputs: Inputs, tmp_path: Path) -> None:
    clips, small = ShardSet(inputs.data / "train"), encoded(inputs, tmp_path / "small", size=16)
    with pytest.raises(ValueError, match=r"holds clips, stage 't2v' has data\.form 'latents'"):
        require_fit(clips, with_form("latents"), inputs.codec)
    with pytest.raises(ValueError, match=r"holds latents, stage 't2v' has data\.form 'clips'"):
        require_fit(small, stage(), inputs.codec)
    with pytest.raises(ValueError, match="latents of 16x16 pixels, stage 't2v' trains on 32x32"):
        require_fit(small, with_form("latents"), inputs.codec)
    other = write_inputs(tmp_path / "other", clips=4)
    with pytest.raises(ValueError, match="holds latents of codec"):
        require_fit(encoded(inputs, tmp_path / "right"), with_form("latents"), other.codec)


def test_buckets_of_another_size_are_refused_where_latents_are_read() -> None:
    tree = with_form("latents").model_dump()
    tree["data"]["buckets"] = [{"num_frames": 4, "height": 16, "width": 16}]
    with pytest.raises(ValueError, match=r"buckets\.0.*'latents' holds one size, video's 32x32"):
        StageRecipe.model_validate(tree)


def test_a_published_set_of_latents_is_what_stages_are_given_until_the_data_set_changes(
    inputs: Inputs, tmp_path: Path
) -> None:
    registry = Registry(FolderStore(tmp_path / "store"))

    rules = [GateRule(metric="version", op=">=", bound=1)]

    def publish(ref: str, kind: str, files: dict[str, Path], **facts: float) -> None:
        manifest = registry.publish(kind, files, rules=rules, metrics=facts)  # pyright: ignore[reportArgumentType]
        registry.promote(ref, manifest.digest, who="test", why="test")

    train = {f"train/{path.name}": path for path in (inputs.data / "train").iterdir()}
    data = train | {f"heldout/{name.removeprefix('train/')}": path for name, path in train.items()}
    publish(DATASET, "dataset", data, version=1.0)
    publish(CODEC, "codec", {path.name: path for path in inputs.codec.iterdir()}, version=1.0)
    recipe = with_form("latents", stage().model_copy(update={"parent": None}))
    with pytest.raises(ValueError, match="latents_32x32/promoted"):
        fetch_inputs(recipe, registry, tmp_path / "early")

    seen: list[tuple[int, int]] = []
    done = encode_dataset(registry, recipe, tmp_path / "work", who="test", on_clip=lambda *at: seen.append(at))
    assert seen[-1] == (12, 12) and done.metrics["ratio_to_clips"] < 1 / 3
    folders, parents = fetch_inputs(recipe, registry, tmp_path / "stage")
    assert parents["dataset"] == done.digest == registry.resolve(latents(32, 32)).digest
    require_fit(ShardSet(folders.data / "train"), recipe, folders.codec)
    assert len(ShardSet(folders.data / "heldout").sample(0).frames) == 4, "held-out clips are still pixels"

    publish(DATASET, "dataset", data, version=2.0)
    with pytest.raises(ValueError, match=r"encoded from dataset .*run `stiv encode` again"):
        fetch_inputs(recipe, registry, tmp_path / "later")

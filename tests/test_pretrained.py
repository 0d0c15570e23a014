"""Weight interchange: a diffusers-style folder gives back what was saved, others can read it, damage is refused."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows import cli
from infra.engines.export import export_engine
from infra.pretrained import export_pretrained, import_pretrained
from infra.registry.gate import PromotionRefused
from infra.registry.names import CODEC, DATASET
from infra.registry.registry import Registry
from infra.store.location import open_store
from model.checkpoint import folder as checkpoint
from model.checkpoint.reader import Reader
from model.config import FlowConfig, GateRule, NetworkConfig, VaeConfig
from model.network.stiv import STIV
from model.pretrained import checksums, load_pretrained, load_transformer, save_pretrained, scheduler_config
from model.recipe import StageRecipe
from model.sampler import timestep_schedule
from model.training.evaluate import load_network, make_generator
from model.training.prepare import begin
from model.vae import AutoencoderKlCodec, PatchPca, load_codec
from tests.checkpoints import Whole, cut, save
from tests.tiny_stage import Inputs, stage, write_inputs

TEXT = 384
"""Width of MiniLM, tokens and pooled."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"


def make_network(recipe: StageRecipe, seed: int = 0, text_size: int = TEXT) -> STIV:
    """A network in which no branch is closed."""
    torch.manual_seed(seed)
    channels = recipe.vae.latent_channels
    network = STIV(recipe.network, latent_channels=channels, text_size=text_size, pooled_size=text_size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def changed(recipe: StageRecipe, **sections: dict[str, Any]) -> StageRecipe:
    tree = recipe.model_dump(mode="json")
    for name, values in sections.items():
        tree[name] |= values
    return StageRecipe.model_validate(tree)


@pytest.fixture(scope="module")
def recipe() -> StageRecipe:
    return changed(stage("ti2v"), sampling={"num_steps": 3}, flow={"shift": 3.0})


@pytest.fixture(scope="module")
def network(recipe: StageRecipe) -> STIV:
    return make_network(recipe)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"), clips=12)


@pytest.fixture
def saved(tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs) -> Path:
    folder = tmp_path / "saved"
    save_pretrained(folder, network, recipe, load_codec(inputs.codec, recipe.vae), source="checkpoint abc")
    return folder


@pytest.fixture
def loose(saved: Path) -> Path:
    """A folder whose files may be changed: as one that was made without checksums."""
    (saved / "SHA256SUMS").unlink()
    return saved


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- there and back


def test_what_was_saved_is_loaded_to_the_bit(saved: Path, network: STIV, recipe: StageRecipe) -> None:
    held = load_pretrained(saved)
    assert same(held.network.state_dict(), network.state_dict())
    assert (held.network.config, held.recipe) == (recipe.network, recipe)
    assert not held.network.training and not any(p.requires_grad for p in held.network.parameters())
    assert sorted(path.name for path in saved.iterdir()) == [
        "SHA256SUMS",
        "model_index.json",
        "recipe.json",
        "scheduler",
        "text_encoder",
        "transformer",
        "vae",
    ]


def test_a_loaded_folder_draws_the_clips_of_the_original(
    saved: Path, network: STIV, recipe: StageRecipe, inputs: Inputs
) -> None:
    held = load_pretrained(saved)
    captions = ["a red circle moves left", "a blue square moves up"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    original = make_generator(recipe, network, inputs.codec)(captions, images=images, seed=3)
    again = make_generator(held.recipe, held.network, held.codec)(captions, images=images, seed=3)
    assert original[0].std() > 1 and not np.array_equal(original[0], original[1])
    assert all(np.array_equal(a, b) for a, b in zip(original, again, strict=True))


def test_loading_draws_nothing_from_the_process_wide_generator(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    load_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), expected)


CHOICES: list[dict[str, Any]] = [
    {"positions": "learned", "learned_grid": (2, 2, 2)},
    {"positions": "rope_sinusoid", "micro_conditions": False, "qk_norm": False},
    {"image_cross_attention": "resnet", "temporal_modulation": True},
    {"shared_modulation": False, "sandwich_norm": False},
]


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: next(iter(choices)))
def test_the_transformers_folder_alone_builds_any_network(
    tmp_path: Path, inputs: Inputs, choices: dict[str, Any]
) -> None:
    recipe = changed(stage("t2v"), network=choices)
    network = make_network(recipe, text_size=24)
    save_pretrained(tmp_path / "saved", network, recipe, load_codec(inputs.codec, recipe.vae))
    alone = shutil.move(tmp_path / "saved" / "transformer", tmp_path / "elsewhere")
    loaded = load_transformer(Path(alone))
    assert loaded.config == recipe.network
    assert same(loaded.state_dict(), network.state_dict())


def test_weights_are_split_above_a_size_and_come_back_whole(
    tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs
) -> None:
    folder = tmp_path / "saved"
    codec = load_codec(inputs.codec, recipe.vae)
    save_pretrained(folder, network, recipe, codec, max_shard_size="100KB")
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "transformer" / SHARDS).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in network.state_dict().values())
    assert index["weight_map"].keys() == network.state_dict().keys()
    assert same(load_pretrained(folder).network.state_dict(), network.state_dict())
    # Another library that knows the layout reads the same.
    other = make_network(recipe, seed=1)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    load_torch_model(other, folder / "transformer", filename_pattern=pattern, strict=True)
    assert same(other.state_dict(), network.state_dict())


def test_half_precision_halves_the_file_and_loads_as_asked(
    tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs
) -> None:
    folder = tmp_path / "half"
    save_pretrained(folder, network, recipe, load_codec(inputs.codec, recipe.vae), dtype=torch.bfloat16)
    stored = load_file(folder / "transformer" / WEIGHTS)
    assert same(stored, {name: x.bfloat16() for name, x in network.state_dict().items()})
    widened = load_pretrained(folder).network.state_dict()
    assert same(widened, {name: x.float() for name, x in stored.items()})
    half = load_pretrained(folder, dtype=torch.bfloat16).network
    assert same(half.state_dict(), stored)
    given = (torch.randn(2, 4, 4, 4, 4), torch.rand(2), torch.randn(2, 5, TEXT), torch.ones(2, 5, dtype=torch.bool))
    given = (*given, torch.randn(2, TEXT), torch.rand(2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(half(*given).float(), network(*given).float(), atol=0.3)
    assert network(*given).std() > 0.5


def test_an_existing_folder_is_never_written_over(
    saved: Path, recipe: StageRecipe, network: STIV, inputs: Inputs
) -> None:
    before = checksums(saved)
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))} exists; .* name a new folder"):
        save_pretrained(saved, network, recipe, load_codec(inputs.codec, recipe.vae))
    assert checksums(saved) == before
    load_pretrained(saved)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs) -> None:
    codec = load_codec(inputs.codec, recipe.vae)
    for wrong in ({"dtype": torch.int8}, {"max_shard_size": "a lot"}):
        with pytest.raises(ValueError):
            save_pretrained(tmp_path / "saved", network, recipe, codec, **cast(Any, wrong))
    other = changed(recipe, network={"depth": 4})
    with pytest.raises(ValueError, match=r"recipe\.json calls for depth 4, the network has 3"):
        save_pretrained(tmp_path / "saved", network, other, codec)
    assert list(tmp_path.iterdir()) == []


# --- what others make of it


def test_sha256sum_checks_the_folder(saved: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True)
    assert done.returncode == 0 and f"transformer/{WEIGHTS}: OK" in done.stdout
    listed = {line.split("  ")[1] for line in (saved / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}


def test_others_may_read_the_files(saved: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (saved, *saved.rglob("*")) if path.is_dir()} == {0o755}


def test_diffusers_reads_the_configs(saved: Path, recipe: StageRecipe) -> None:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    class Transformer(ConfigMixin):
        config_name = "config.json"

    config = cast(dict[str, Any], Transformer.load_config(saved, subfolder="transformer"))
    assert config["_class_name"] == "STIV"
    assert NetworkConfig(**{key: config[key] for key in NetworkConfig.model_fields}) == recipe.network
    index = cast(dict[str, Any], DiffusionPipeline.load_config(saved))
    assert index["transformer"] == ["model.network.stiv", "STIV"]
    assert index["_source"] == "checkpoint abc"


def test_diffusers_scheduler_walks_the_samplers_times(saved: Path) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = cast(Any, FlowMatchEulerDiscreteScheduler).from_pretrained(saved, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    times = timestep_schedule(4, shift=3.0)
    assert torch.allclose(1 - scheduler.sigmas, times, atol=1e-6)
    x, velocity = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    stepped = scheduler.step(-velocity, scheduler.timesteps[0], x).prev_sample
    assert torch.allclose(stepped, x + (times[1] - times[0]) * velocity, atol=1e-6)


def test_diffusers_scheduler_of_the_diffusion_baseline_has_its_schedule(tmp_path: Path) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from model.flow_matching import path

    flow = FlowConfig(objective="diffusion")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler_config(flow)))
    scheduler = cast(Any, DDIMScheduler).from_pretrained(tmp_path)
    data, noise = torch.randn(3, 1, 2, 2, 2), torch.randn(3, 1, 2, 2, 2)
    steps = torch.tensor([0, 500, 999])
    noisy, target = path(flow, data, noise, 1 - steps / 999)
    assert torch.allclose(scheduler.add_noise(data, noise, steps), noisy, atol=1e-4)
    assert torch.allclose(scheduler.get_velocity(data, noise, steps), target, atol=1e-4)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKlCodec:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8],
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    folder = tmp_path_factory.mktemp("autoencoder")
    cast(Any, AutoencoderKL.from_config(settings)).save_pretrained(folder)
    return AutoencoderKlCodec.from_pretrained(folder)


def test_an_autoencoder_is_saved_as_diffusers_reads_it(
    tmp_path: Path, recipe: StageRecipe, network: STIV, autoencoder: AutoencoderKlCodec
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    recipe = changed(recipe, vae={"type": "autoencoder_kl", "path": "/where/it/was/trained"})
    save_pretrained(tmp_path / "saved", network, recipe, autoencoder)
    folder = shutil.move(tmp_path / "saved", tmp_path / "moved")
    theirs = cast(Any, AutoencoderKL).from_pretrained(folder, subfolder="vae", use_safetensors=True)
    assert same(theirs.state_dict(), autoencoder.network.state_dict())
    assert theirs.config.scaling_factor == 0.5
    held = load_pretrained(Path(folder))
    frames = torch.rand(1, 2, 3, 32, 32) * 2 - 1
    assert torch.equal(load_codec(held.codec, held.recipe.vae).encode(frames), autoencoder.encode(frames))
    index = json.loads((Path(folder) / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


# --- damage


def test_one_flipped_byte_of_any_file_is_found(saved: Path) -> None:
    for path in sorted(path for path in saved.rglob("*") if path.is_file() and path.name != "SHA256SUMS"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has sha256 {found}, SHA256SUMS says"):
            load_pretrained(saved)
        path.write_bytes(data)
    load_pretrained(saved)


@pytest.mark.parametrize("line", ["abc", "0" * 64 + "  ../outside", "0" * 64 + "  /etc/passwd"])
def test_checksums_name_files_of_the_folder_only(saved: Path, line: str) -> None:
    with (saved / "SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    number = len((saved / "SHA256SUMS").read_text().splitlines())
    with pytest.raises(ValueError, match=rf"SHA256SUMS line {number} is not 'sha256  path'"):
        load_pretrained(saved)


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"someone/stiv is no local folder .*hf download"):
        load_pretrained(Path("someone/stiv"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(loose: Path, share: float) -> None:
    path = loose / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is cut off or not safetensors"):
        load_pretrained(loose)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "stiv.ckpt"])
def test_a_pickle_is_refused_unread(loose: Path, network: STIV, name: str) -> None:
    (loose / "transformer" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"neither {re.escape(WEIGHTS)} nor"):
        load_pretrained(loose)
    torch.save(network.state_dict(), loose / "transformer" / name)
    with pytest.raises(ValueError, match=f"no safetensors but {re.escape(name)}; pickled weights can run code"):
        load_pretrained(loose)
    (loose / "transformer" / name).rename(loose / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match="cut off or not safetensors"):
        load_pretrained(loose)


def rename_one(weights: dict[str, Tensor]) -> None:
    weights["module.mask_token"] = weights.pop("mask_token")


def reshape_one(weights: dict[str, Tensor]) -> None:
    weights["mask_token"] = torch.zeros(33)


def quantize_one(weights: dict[str, Tensor]) -> None:
    weights["mask_token"] = torch.zeros(32, dtype=torch.int8)


def drop_one(weights: dict[str, Tensor]) -> None:
    del weights["mask_token"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"the weights lack 1 that config\.json calls for, first \['mask_token'\]; names must"),
        (rename_one, r"lack 1 .*\['mask_token'\] and have 1 that it does not know, first \['module\.mask_token'\]"),
        (reshape_one, r"'mask_token' is \(33,\), config\.json calls for \(32,\)"),
        (quantize_one, r"'mask_token' is torch\.int8; weights are interchanged as one of"),
    ],
)
def test_weights_of_another_network_are_refused(
    loose: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = loose / "transformer" / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(loose)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(hiden_size=64), r"hiden_size: .*\(known: .*did you mean 'hidden_size'\?\)"),
        (lambda c: c.pop("latent_channels"), r"latent_channels: Field required"),
        (lambda c: c.update(depth="deep"), r"depth: Input should be a valid integer"),
        (lambda c: c.update(num_heads=5), r"hidden_size 32 is not a multiple of num_heads 5"),
        (lambda c: c.update(_class_name="DiTTransformer2DModel"), r"_class_name 'DiTTransformer2DModel', not 'STIV'"),
        (lambda c: c.update(depth=4), r"recipe\.json calls for depth 3, .*config\.json has 4"),
        (lambda c: c.update(qk_norm=False), r"calls for qk_norm True, .*config\.json has False"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    loose: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(loose / "transformer" / "config.json", change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(loose)


def test_diffusers_own_notes_in_a_config_are_let_be(loose: Path, network: STIV) -> None:
    edit(loose / "transformer" / "config.json", lambda c: c.update(_diffusers_version="0.35.0", _name_or_path="x"))
    assert same(load_pretrained(loose).network.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"shift": 1.0}, r"calls for shift 3\.0, .*scheduler_config\.json has 1\.0"),
        ("text_encoder/config.json", {"type": "clip"}, r"calls for type 'minilm', .*config\.json has 'clip'"),
        ("text_encoder/config.json", {"hidden_size": 768}, r"hidden_size 384, .*config\.json has 768"),
        ("transformer/config.json", {"rope_theta": 5.0}, r"calls for rope_theta 10000\.0, .*config\.json has 5\.0"),
    ],
)
def test_parts_that_contradict_the_recipe_are_refused(
    loose: Path, file: str, change: dict[str, Any], message: str
) -> None:
    edit(loose / file, lambda content: content.update(change))
    with pytest.raises(ValueError, match=message):
        load_pretrained(loose)


@pytest.mark.parametrize("file", ["transformer/config.json", "recipe.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe{"])
def test_damaged_json_is_named(loose: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (loose / file).unlink()
    else:
        (loose / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(loose / file))):
        load_pretrained(loose)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["weight_map"].update(mask_token="../other.safetensors"),
            r"names the file '\.\./other\.safetensors'",
        ),
        (lambda c: c["weight_map"].update(mask_token="other.bin"), r"names the file 'other\.bin' for mask_token"),
        (lambda c: c["weight_map"].update(mask_token="gone.safetensors"), r"gone\.safetensors is missing"),
        (lambda c: c["weight_map"].pop("mask_token"), r"differ in 1 weights, first \['mask_token'\]"),
        (lambda c: c.pop("weight_map"), r"has no weight_map"),
    ],
)
def test_a_wrong_index_of_shards_is_refused(
    tmp_path: Path,
    recipe: StageRecipe,
    network: STIV,
    inputs: Inputs,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    folder = tmp_path / "saved"
    save_pretrained(folder, network, recipe, load_codec(inputs.codec, recipe.vae), max_shard_size="100KB")
    edit(folder / "transformer" / SHARDS, change)
    with pytest.raises(ValueError, match=message):
        load_transformer(folder / "transformer")


def test_a_config_and_weights_that_differ_are_refused_without_a_recipe(loose: Path) -> None:
    edit(loose / "transformer" / "config.json", lambda content: content.update(depth=4))
    with pytest.raises(ValueError, match=r"lack \d+ that config\.json calls for, first \['blocks\.3\."):
        load_transformer(loose / "transformer")


def test_a_file_beside_shards_is_ambiguous(loose: Path) -> None:
    (loose / "transformer" / SHARDS).write_text("{}")
    with pytest.raises(ValueError, match=r"has both .* remove the one that is out of date"):
        load_pretrained(loose)


# --- from a store and into one


RULES = (GateRule(metric="heldout_loss", op="<", bound=1),)
FIGURES = {"heldout_loss": 0.5}


@pytest.fixture
def registry(tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs) -> Registry:
    """A store with a data set, a codec and a trained checkpoint, all promoted."""
    registry = Registry(open_store(str(tmp_path / "store")))
    data = {
        f"{split}/{path.name}": path for split in ("train", "heldout") for path in (inputs.data / "train").iterdir()
    }
    dataset = registry.publish("dataset", data, rules=RULES, metrics=FIGURES)
    codec = registry.publish(
        "codec", {path.name: path for path in inputs.codec.iterdir()}, rules=RULES, metrics=FIGURES
    )
    tensors: Whole = {"model": make_network(recipe, seed=9).state_dict(), "ema": network.state_dict(), "optimizer": {}}
    folder = save(tmp_path / "run", replace(cut(tensors, 1), recipe=recipe), keep=1)
    files = {path.name: path for path in folder.iterdir()}
    parents = {"dataset": dataset.digest, "codec": codec.digest}
    tree = json.loads((folder / "recipe.json").read_text())
    trained = registry.publish("checkpoint", files, rules=RULES, recipe=tree, metrics=FIGURES, parents=parents)
    for ref, manifest in ((DATASET, dataset), (CODEC, codec), ("ti2v/promoted", trained)):
        registry.promote(ref, manifest.digest, who="tests", why="to test")
    return registry


def export(registry: Registry, folder: Path, work: Path) -> None:
    export_pretrained(registry, "ti2v/promoted", folder, work, dtype=torch.float32, max_shard_size="5GB")


def test_a_checkpoint_goes_out_and_comes_back_as_one(
    registry: Registry, tmp_path: Path, recipe: StageRecipe, network: STIV
) -> None:
    export(registry, tmp_path / "folder", tmp_path / "work")
    source = registry.resolve("ti2v/promoted")
    assert (
        json.loads((tmp_path / "folder" / "model_index.json").read_text())["_source"] == f"checkpoint {source.digest}"
    )
    done = import_pretrained(registry, tmp_path / "folder", tmp_path / "work", measured=False)
    fetched = registry.fetch(registry.resolve(done.manifest.digest), tmp_path / "fetched")
    assert same(load_network(recipe, fetched).state_dict(), network.state_dict())
    assert done.manifest.recipe == source.recipe
    assert done.manifest.metrics["imported"] == 1 and done.manifest.parents == {"codec": registry.ref(CODEC).digest}
    assert done.codec_is_promoted
    origin = (fetched / "imported" / "SHA256SUMS").read_bytes()
    assert origin == (tmp_path / "folder" / "SHA256SUMS").read_bytes()
    assert done.origin == hashlib.sha256(origin).hexdigest()


def test_a_stage_grows_from_an_imported_checkpoint_and_none_resumes_it(
    registry: Registry, tmp_path: Path, recipe: StageRecipe, network: STIV
) -> None:
    export(registry, tmp_path / "folder", tmp_path / "work")
    done = import_pretrained(registry, tmp_path / "folder", tmp_path / "work", measured=False)
    fetched = registry.fetch(done.manifest, tmp_path / "fetched")
    child = make_network(recipe, seed=4)
    begin(child, recipe, fetched)
    assert same(child.state_dict(), network.state_dict())
    assert checkpoint.digest_of(fetched)
    with pytest.raises(checkpoint.CheckpointCorrupt, match=r"no state\.json .*weights only"):
        Reader(fetched)


@pytest.mark.slow
# torch's own exporter calls what torch deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_an_imported_checkpoint_is_exported_as_an_engine(registry: Registry, tmp_path: Path) -> None:
    export(registry, tmp_path / "folder", tmp_path / "work")
    done = import_pretrained(registry, tmp_path / "folder", tmp_path / "work", measured=False)
    engine = export_engine(registry, done.manifest.digest, tmp_path / "engine", who="tests")
    assert engine.manifest.parents["checkpoint"] == done.manifest.digest


def test_another_codec_is_published_and_said_to_be_another(
    registry: Registry, tmp_path: Path, recipe: StageRecipe, network: STIV
) -> None:
    frames = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_pretrained(tmp_path / "folder", network, recipe, PatchPca.fit(frames, 4, 8))
    before = registry.ref(CODEC)
    done = import_pretrained(registry, tmp_path / "folder", tmp_path / "work", measured=False)
    assert not done.codec_is_promoted and registry.ref(CODEC) == before
    folder = registry.fetch(registry.resolve(done.manifest.parents["codec"]), tmp_path / "codec")
    kept = load_codec(folder, VaeConfig(latent_channels=4, spatial_factor=8))
    assert torch.equal(kept.encode(frames[None]), PatchPca.fit(frames, 4, 8).encode(frames[None]))


def test_an_import_passes_its_gate_only_when_it_is_measured(
    registry: Registry, tmp_path: Path, recipe: StageRecipe, network: STIV, inputs: Inputs
) -> None:
    """The held-out loss is measured on the store's own clips; the recipe's rule then says yes or no."""
    small = changed(recipe, evaluation={"heldout_clips": 8, "sample_prompts": 4}, sampling={"num_steps": 2})
    small = small.model_copy(update={"gate": (GateRule(metric="heldout_loss", op="<", bound=1000.0),)})
    save_pretrained(tmp_path / "folder", network, small, load_codec(inputs.codec, recipe.vae))
    unmeasured = import_pretrained(registry, tmp_path / "folder", tmp_path / "a", measured=False).manifest
    with pytest.raises(PromotionRefused, match="heldout_loss is missing"):
        registry.promote("ti2v/promoted", unmeasured.digest, who="tests", why="imported")
    measured = import_pretrained(registry, tmp_path / "folder", tmp_path / "b", measured=True).manifest
    assert measured.parents["dataset"] == registry.ref(DATASET).digest
    registry.promote("ti2v/promoted", measured.digest, who="tests", why="imported")
    assert registry.resolve("ti2v/promoted") == measured


def test_only_a_checkpoint_has_weights_to_save(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'codec/promoted' is of kind 'codec'; this takes a checkpoint"):
        export_pretrained(registry, CODEC, tmp_path / "a", tmp_path / "b", dtype=torch.float32, max_shard_size="5GB")


def test_the_commands_save_load_and_say_what_is_wrong(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stiv(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stiv", *arguments, "--store", registry.store.url, "--work", "work"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    monkeypatch.chdir(tmp_path)
    code, out, _ = stiv("save-pretrained", "ti2v/promoted", "folder", "--dtype", "bfloat16")
    assert code == 0 and registry.resolve("ti2v/promoted").digest in out.replace("\n", "")
    code, out, _ = stiv("load-pretrained", "folder")
    digest = re.findall(r"checkpoint ([0-9a-f]{64})", out)[0]
    assert code == 0 and registry.resolve(digest).metrics["imported"] == 1
    for arguments, words in (
        (("save-pretrained", "ti2v/promoted", "other", "--dtype", "int4"), "dtype 'int4' is not one of"),
        (("save-pretrained", "ti2v/promoted", "folder"), "folder exists"),
        (("load-pretrained", "nowhere"), "nowhere is no local folder"),
    ):
        code, _, err = stiv(*arguments)
        assert code == 1 and words in err and err.count("\n") == 1

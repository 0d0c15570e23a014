"""Weight interchange: a trained stage as a folder laid out like a diffusers pipeline, written and read back.

It owns the layout, and that what lies side by side in it agrees. It knows nothing of stores, checkpoints or training,
downloads nothing and unpickles nothing. Names of weights are those of `STIV.state_dict()`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from model import diffusion
from model.config import Config, FlowConfig, NetworkConfig, Positive
from model.network.stiv import STIV
from model.recipe import StageRecipe, dumps, loads_stage
from model.vae import AutoencoderKlCodec, FrameCodec

INDEX = "model_index.json"
RECIPE = "recipe.json"
SUMS = "SHA256SUMS"
"""Digest of every file, as `sha256sum -c SHA256SUMS` checks them."""
TRANSFORMER, SCHEDULER, VAE, TEXT = "transformer", "scheduler", "vae", "text_encoder"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformerConfig(NetworkConfig):
    """`transformer/config.json`: enough to build the network."""

    latent_channels: Positive
    text_size: Positive
    pooled_size: Positive

    @classmethod
    def of(cls, network: STIV) -> "TransformerConfig":
        return cls(
            **network.config.model_dump(),
            latent_channels=network.latent_channels,
            text_size=network.text_projection.hidden.in_features,
            pooled_size=network.pooled_projection.in_features,
        )

    def build(self) -> STIV:
        """The network on the meta device: names and shapes, no memory, no random draw."""
        config = NetworkConfig(**self.model_dump(include=set(NetworkConfig.model_fields)))
        sizes = self.model_dump(include={"latent_channels", "text_size", "pooled_size"})
        with torch.device("meta"):
            return STIV(config, **sizes)


@dataclass(slots=True, frozen=True)
class Pretrained:
    """What a folder holds; `make_generator(recipe, network, codec)` draws clips from it."""

    network: STIV
    recipe: StageRecipe
    """As written, but an `autoencoder_kl` is that of the folder."""
    codec: Path


def save_pretrained(
    folder: Path,
    network: STIV,
    recipe: StageRecipe,
    codec: FrameCodec,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    source: str | None = None,
) -> None:
    """Write a stage into `folder`, which must not exist yet and appears whole or not at all.

    Weights above `max_shard_size` are split as diffusers splits them. `source` says what the weights were taken from.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; a saved stage is never mixed with older files, so name a new folder")
    settings = TransformerConfig.of(network)
    _require_same(RECIPE, _network_facts(recipe), "the network", settings.model_dump(mode="json"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_json(draft / TRANSFORMER / CONFIG, {"_class_name": "STIV", **settings.model_dump(mode="json")})
        _write_weights(draft / TRANSFORMER, network, dtype, max_shard_size)
        _write_json(draft / SCHEDULER / SCHEDULER_CONFIG, scheduler_config(recipe.flow))
        _write_codec(draft / VAE, codec)
        _write_json(draft / TEXT / CONFIG, _text_facts(recipe, settings))
        _write_json(draft / INDEX, _model_index(recipe, codec, source))
        (draft / RECIPE).write_text(dumps(recipe))
        (draft / SUMS).write_text(checksums(draft))
        for path in (draft, *draft.rglob("*")):  # both mkdtemp and safetensors write for this user alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_pretrained(folder: Path, *, dtype: torch.dtype = torch.float32) -> Pretrained:
    """A stage from a local folder, frozen; the weights in `dtype`, whatever they were saved in.

    Below float32 the network computes under `torch.autocast`.

    Raises:
        ValueError: a file is missing, damaged, differs from `SHA256SUMS` where there is one, or contradicts another.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is no local folder with a {INDEX}; only local folders are read: download a hub repository first"
            " (`hf download OWNER/NAME --local-dir FOLDER`)"
        )
    if (folder / SUMS).exists():
        _verify(folder)
    try:
        recipe = loads_stage(_read(folder / RECIPE))
    except ValidationError as error:
        raise ValueError(f"{folder / RECIPE} is no resolved stage recipe: {_problems(error)}") from None
    settings = _read_config(folder / TRANSFORMER / CONFIG)
    for path, facts, found in (
        (folder / TRANSFORMER / CONFIG, _network_facts(recipe), settings.model_dump(mode="json")),
        (folder / SCHEDULER / SCHEDULER_CONFIG, scheduler_config(recipe.flow), None),
        (folder / TEXT / CONFIG, _text_facts(recipe, settings), None),
    ):
        _require_same(f"{folder / RECIPE}", facts, f"{path}", _read_json(path) if found is None else found)
    network = load_transformer(folder / TRANSFORMER, dtype=dtype)
    if recipe.vae.type == "autoencoder_kl":
        vae = recipe.vae.model_copy(update={"path": str(folder / VAE)})
        recipe = recipe.model_copy(update={"vae": vae})
    return Pretrained(network, recipe, folder / VAE)


def load_transformer(folder: Path, *, dtype: torch.dtype = torch.float32) -> STIV:
    """The network from `config.json` and the safetensors beside it alone, frozen; no recipe is needed."""
    network = _read_config(folder / CONFIG).build()
    weights = _read_weights(folder)
    _check_weights(folder, {name: x.shape for name, x in network.state_dict().items()}, weights)
    # A copy each: what was read may be a map of the file, which somebody may change under us.
    owned = {name: weights.pop(name).to(dtype, copy=True) for name in sorted(weights)}
    network.load_state_dict(owned, assign=True)
    return network.eval().requires_grad_(False)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name, of those that weights are interchanged in."""
    if name not in DTYPES:
        raise ValueError(f"dtype '{name}' is not one of {sorted(DTYPES)}")
    return DTYPES[name]


def scheduler_config(flow: FlowConfig) -> dict[str, object]:
    """The scheduler of diffusers that walks the same path from noise to data.

    Its times run the other way: sigma is 1 - t, and its flow prediction is noise - data where ours is data - noise.
    """
    if flow.objective == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": flow.shift}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.STEPS,
        "beta_start": diffusion.BETA_FIRST,
        "beta_end": diffusion.BETA_LAST,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def checksums(folder: Path) -> str:
    """One line `sha256  path` for every file of the layout, by path; its own digest names the folder's content."""
    paths = [folder / INDEX, folder / RECIPE]
    for part in (TRANSFORMER, SCHEDULER, VAE, TEXT):
        paths += [path for path in (folder / part).rglob("*") if path.is_file()]
    return "".join(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(paths))


# --- writing


def _write_weights(folder: Path, network: STIV, dtype: torch.dtype, max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    _require_dtype(dtype)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in network.state_dict().items()}
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / SHARDS, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_codec(folder: Path, codec: FrameCodec) -> None:
    if isinstance(codec, AutoencoderKlCodec):
        codec.network.save_pretrained(folder, safe_serialization=True)
    else:
        codec.save(folder)


def _model_index(recipe: StageRecipe, codec: FrameCodec, source: str | None) -> dict[str, object]:
    kl = isinstance(codec, AutoencoderKlCodec)
    return {
        "_class_name": "STIVPipeline",
        "_source": source,
        "_stage": recipe.name,
        "transformer": ["model.network.stiv", "STIV"],
        "scheduler": ["diffusers", scheduler_config(recipe.flow)["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"] if kl else ["model.vae", type(codec).__name__],
        "text_encoder": [None, None],
    }


def _network_facts(recipe: StageRecipe) -> dict[str, object]:
    return {**recipe.network.model_dump(mode="json"), "latent_channels": recipe.vae.latent_channels}


def _text_facts(recipe: StageRecipe, settings: TransformerConfig) -> dict[str, object]:
    """Which encoder it is; the weights of a frozen third-party encoder are not copied."""
    sizes = {"hidden_size": settings.text_size, "pooled_size": settings.pooled_size}
    return {"_class_name": "TextEncoder", **recipe.text.model_dump(mode="json"), **sizes}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# --- reading


def _read_config(path: Path) -> TransformerConfig:
    content = _read_json(path)
    if content.get("_class_name") != "STIV":
        raise ValueError(
            f"{path} says _class_name {content.get('_class_name')!r}, not 'STIV': another network's config"
        )
    try:
        # Keys that begin with `_` are diffusers' own notes, such as the version that wrote the file.
        return TransformerConfig.model_validate({key: x for key, x in content.items() if not key.startswith("_")})
    except ValidationError as error:
        raise ValueError(f"{path}: {_problems(error, TransformerConfig)}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of one file, or of the shards that the index names."""
    whole, index = folder / WEIGHTS, folder / SHARDS
    if whole.exists() and index.exists():
        raise ValueError(f"{folder} has both {WEIGHTS} and {SHARDS}; remove the one that is out of date")
    if whole.exists():
        return _read_safetensors(whole)
    if index.exists():
        return _read_shards(index)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{folder} has no safetensors but {pickled[0]}; pickled weights can run code when they are read and are"
            f" refused: convert them to {WEIGHTS} where you trust them"
        )
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {SHARDS}; copy the weights there")


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from names of weights to files; copy it again")
    named: dict[str, set[str]] = {}
    for name, file in cast("dict[str, object]", weight_map).items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {file!r} for {name}; only .safetensors files beside it are read")
        named.setdefault(file, set()).add(name)
    gone = [file for file in sorted(named) if not (index.parent / file).is_file()]
    if gone:
        raise ValueError(f"{index.parent / gone[0]} is missing, which {index.name} names; copy it there")
    weights: dict[str, Tensor] = {}
    for file, names in sorted(named.items()):
        found = _read_safetensors(index.parent / file)
        odd = sorted(names ^ set(found))
        if odd:
            raise ValueError(
                f"{index.parent / file} and {index.name} differ in {len(odd)} weights, first {odd[:3]}; copy both again"
            )
        weights |= found
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or not safetensors: {error}; copy it again") from None


def _check_weights(folder: Path, wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    odd = [f"lack {len(missing)} that {CONFIG} calls for, first {missing[:3]}"] if missing else []
    odd += [f"have {len(extra)} that it does not know, first {extra[:3]}"] if extra else []
    if odd:
        raise ValueError(f"{folder}: the weights {' and '.join(odd)}; names must be those of STIV.state_dict()")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{folder}: '{name}' is {tuple(found[name].shape)}, {CONFIG} calls for {tuple(shape)}; the weights"
                " are of another network"
            )
        _require_dtype(found[name].dtype, f"{folder}: '{name}'")


def _verify(folder: Path) -> None:
    for number, line in enumerate(_read(folder / SUMS).splitlines(), start=1):
        digest, _, name = line.partition("  ")
        path = folder / name
        if not name or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / SUMS} line {number} is not 'sha256  path' of a file in the folder: {line!r}")
        found = _sha256(path) if path.is_file() else "no file"
        if found != digest:
            raise ValueError(
                f"{path} has sha256 {found}, {SUMS} says {digest}; copy the folder again, or if the change is"
                f" meant, remove {SUMS}"
            )


def _require_same(one: str, facts: Mapping[str, object], other: str, found: Mapping[str, object]) -> None:
    """Every fact must stand in both; `found` may say more."""
    for key, value in facts.items():
        if key not in found or found[key] != value:
            raise ValueError(f"{one} calls for {key} {value!r}, {other} has {found.get(key)!r}; they must agree")


def _require_dtype(dtype: torch.dtype, what: str = "dtype") -> None:
    """A quantized weight means nothing without its scale."""
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"{what} is {dtype}; weights are interchanged as one of {sorted(DTYPES)}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy the folder again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text: the file is damaged; copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; copy it again")
    return cast("dict[str, Any]", content)


def _problems(error: ValidationError, section: type[Config] | None = None) -> str:
    """One line; a key that is not known comes with the one that was probably meant."""
    lines: list[str] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "the whole"
        hint = ""
        if section is not None and item["type"] == "extra_forbidden":
            close = get_close_matches(key, section.model_fields, n=1)
            hint = (
                f" (known: {', '.join(sorted(section.model_fields))}{f', did you mean {close[0]!r}?' if close else ''})"
            )
        lines.append(f"{key}: {item['msg']}{hint}")
    return "; ".join(lines)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

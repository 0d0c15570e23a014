"""The recipe: one frozen configuration tree a stage, and the curriculum that orders stages.

It owns names, types, ranges and cross-field rules; it knows nothing of files other than recipes, and derives no
DeepSpeed, Kubernetes or engine setting (those rooms derive theirs from it).
"""

import json
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Task = Literal["t2i", "t2v", "ti2v"]


class Config(BaseModel):
    """A section of the recipe: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkConfig(Config):
    """STIV's shape (paper Table 1, section 2)."""

    hidden_size: Positive
    depth: Positive
    num_heads: Positive
    patch_size: Positive = 2
    """Latent pixels a token covers in height and in width."""
    temporal_patch_size: Positive = 2
    """Latent frames a token covers: 2 for video, 1 for images (paper App. B)."""
    temporal_attention: bool = True
    """Off in the T2I stage, which has one frame."""
    mlp_ratio: Positive = 4
    unmasked_depth: Annotated[int, Field(ge=0)] = 2
    """Last blocks that see every token when training masks (paper 2.2); counted in `depth`."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    rope_spatial_scale: Annotated[float, Field(gt=0)] = 1.0
    """Position interpolation: old grid side / new grid side (paper 2.4)."""
    rope_temporal_scale: Annotated[float, Field(gt=0)] = 1.0
    absolute_positions: bool = False
    """Also add a fixed sinusoid of row, column and frame to the tokens; the paper has RoPE alone."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} = {self.hidden_size // self.num_heads}"
                " channels a head; 2-D RoPE needs a multiple of 4"
            )
        if self.unmasked_depth >= self.depth:
            raise ValueError(f"unmasked_depth {self.unmasked_depth} must be below depth {self.depth}")
        return self


class VideoConfig(Config):
    """The clip a stage trains on, in pixels."""

    num_frames: Positive
    height: Positive
    width: Positive
    fps: Positive = 8
    frame_stride: Positive = 1
    """Every n-th source frame is taken (paper App. B: 3)."""


class VaeConfig(Config):
    """The frozen per-frame codec between pixels and latents."""

    type: Literal["patch_pca", "autoencoder_kl"] = "patch_pca"
    latent_channels: Positive = 8
    spatial_factor: Positive = 8
    whitening: Ratio = 1.0
    """`patch_pca`: 1 gives every channel unit variance, 0 keeps the variances that pixels have."""
    path: str | None = None
    """Folder of a diffusers `AutoencoderKL` (sd-vae-ft-ema layout); required by that type."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "autoencoder_kl" and self.path is None:
            raise ValueError(
                "vae.type 'autoencoder_kl' needs vae.path, a folder with config.json and safetensors weights"
            )
        if self.type == "patch_pca" and self.latent_channels > 3 * self.spatial_factor**2:
            raise ValueError(
                f"vae.latent_channels {self.latent_channels} exceeds the {3 * self.spatial_factor**2} values of a"
                f" {self.spatial_factor}x{self.spatial_factor} RGB patch"
            )
        return self


class TextConfig(Config):
    """Which frozen text encoder conditions the network."""

    type: Literal["minilm", "clip", "t5_clip"] = "minilm"
    max_tokens: Positive = 77
    path: str | None = None
    """Local folder or hub name of the CLIP text tower; `minilm` carries its own weights."""
    t5_path: str | None = None
    """Local folder or hub name of the T5 encoder; only `t5_clip`."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type in ("clip", "t5_clip") and self.path is None:
            raise ValueError(f"text.type '{self.type}' needs text.path, a CLIP text model folder or hub name")
        if self.type == "t5_clip" and self.t5_path is None:
            raise ValueError("text.type 't5_clip' needs text.t5_path, a T5 encoder folder or hub name")
        return self


class ConditioningConfig(Config):
    """Training-time dropout of each condition (paper App. B)."""

    text_dropout: Ratio = 0.1
    image_dropout: Ratio = 0.08


class FlowConfig(Config):
    """How training draws flow time t (0 = noise, 1 = data)."""

    timestep_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0
    """SD3's shift towards noise: 1 is none, above 1 spends more of training and sampling near t = 0."""


class OptimizerConfig(Config):
    """AdaFactor with the paper's setting (3.1): no weight decay, no parameter scaling."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """Last steps over which the rate falls linearly to zero; 0 keeps it constant, as the paper does."""


class TrainingConfig(Config):
    """One stage's training run."""

    steps: Positive
    """Optimizer steps with `mask_ratio` of the spatial tokens dropped."""
    unmasked_steps: Annotated[int, Field(ge=0)] = 0
    """Further steps on all tokens (paper: 50k T2I, 100k T2V and TI2V)."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    global_batch_size: Positive
    micro_batch_size: Positive
    world_size: Positive = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    seed: int = 0
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    log_every: Positive = 10

    @property
    def total_steps(self) -> int:
        return self.steps + self.unmasked_steps

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size} x world_size {self.world_size}"
            )
        if self.zero_stage != 0:
            raise ValueError(
                f"zero_stage {self.zero_stage} would flatten parameters, and AdaFactor's row and column statistics"
                " would silently be wrong; use zero_stage = 0"
            )
        return self


class DataConfig(Config):
    """Which parts of the data set a stage draws from, and how often."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"moving_shapes": 1.0})
    """Source name in the shards -> relative sampling weight."""


class SamplingConfig(Config):
    """How videos are drawn from the trained flow (paper 2.1, App. A)."""

    solver: Literal["euler", "heun"] = "heun"
    stochastic: bool = True
    """Reverse-time SDE (the paper's choice) instead of the ODE."""
    num_steps: Positive = 50
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    renormalize: bool = True
    """CFG-Renorm: keep the guided velocity's norm at the conditional one's."""


class GateRule(Config):
    """One bound a checkpoint must hold to be promoted."""

    metric: str
    op: Literal["<", "<=", ">", ">="]
    bound: float


class EvaluationConfig(Config):
    """What is measured on the EMA weights once a stage has trained."""

    heldout_clips: Positive = 64
    sample_prompts: Positive = 8
    """Captions drawn for the sample grid and, on moving shapes, for the checker."""


class StageRecipe(Config):
    """One node of the curriculum, complete for what it decides."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    task: Task
    parent: str | None = None
    """Stage whose promoted checkpoint this one grows from."""
    network: NetworkConfig
    video: VideoConfig
    vae: VaeConfig = VaeConfig()
    text: TextConfig = TextConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: tuple[GateRule, ...] = ()

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        side = self.vae.spatial_factor * self.network.patch_size
        for axis, value in (("height", self.video.height), ("width", self.video.width)):
            if value % side:
                raise ValueError(
                    f"video.{axis} {value} is not a multiple of vae.spatial_factor {self.vae.spatial_factor} x"
                    f" network.patch_size {self.network.patch_size} = {side}"
                )
        if self.video.num_frames % self.network.temporal_patch_size:
            raise ValueError(
                f"video.num_frames {self.video.num_frames} is not a multiple of"
                f" network.temporal_patch_size {self.network.temporal_patch_size}"
            )
        if self.task == "t2i" and self.video.num_frames != 1:
            raise ValueError(f"task 't2i' trains on images: video.num_frames must be 1, not {self.video.num_frames}")
        if self.task != "t2i" and not self.network.temporal_attention:
            raise ValueError(f"task '{self.task}' needs network.temporal_attention = true")
        if not self.gate:
            raise ValueError("gate is empty: a stage without a rule could never be refused; add at least one [[gate]]")
        return self


class CorpusConfig(Config):
    """The captioned corpus that is drawn: moving shapes for training and for measuring."""

    shapes: Positive = 2400
    heldout_shapes: Positive = 192
    size: Annotated[int, Field(ge=16)] = 32
    num_frames: Positive = 8
    seed: Annotated[int, Field(ge=0)] = 0
    gate: tuple[GateRule, ...] = (
        GateRule(metric="train_samples", op=">=", bound=1),
        GateRule(metric="psnr_db_moving_shapes", op=">=", bound=25),
    )
    """What the data set and the codec must hold to be promoted."""


class Curriculum(Config):
    """The stage graph: stages in the order they run, each grown from an earlier one or from scratch."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    corpus: CorpusConfig = CorpusConfig()
    stages: tuple[StageRecipe, ...]

    def stage(self, name: str) -> StageRecipe:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"curriculum '{self.name}' has no stage '{name}'; it has {[s.name for s in self.stages]}")

    @model_validator(mode="after")
    def _parents_come_first(self) -> Self:
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"stage '{stage.name}' is named twice")
            if stage.parent is not None and stage.parent not in seen:
                raise ValueError(
                    f"stage '{stage.name}' grows from '{stage.parent}', which is not an earlier stage {seen}"
                )
            if (stage.vae, stage.text) != (self.stages[0].vae, self.stages[0].text):
                raise ValueError(f"stage '{stage.name}' has another vae or text section than '{self.stages[0].name}'")
            seen.append(stage.name)
        return self


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names file, key, value and limit."""


def load(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum: `curriculum.toml` lists the stage files beside it.

    An override is `stage.section.key=value` (or `*.section.key=value` for every stage); the value is TOML.
    """
    top = _read_toml(path)
    files = cast(object, top.get("stages"))
    if not isinstance(files, list) or not files:
        raise RecipeError(f"{path}: stages must list at least one stage file")
    stages = [_read_toml(path.parent / f"{name}.toml") for name in cast(list[object], files)]
    for override in overrides:
        _apply(override, stages)
    try:
        return Curriculum.model_validate({**top, "stages": stages})
    except ValidationError as error:
        lines = [
            f"{_where(item['loc'], stages)}: {item['msg']}{_hint(item['type'], item['loc'])}" for item in error.errors()
        ]
        raise RecipeError(f"{path}: " + "; ".join(lines)) from None


def dumps(config: Config) -> str:
    """The resolved tree as JSON, stable from run to run."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True)


def loads_stage(text: str | bytes) -> StageRecipe:
    """A stage from its resolved JSON."""
    return StageRecipe.model_validate_json(text)


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder, not a recipe; name the curriculum.toml in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def _apply(override: str, stages: list[dict[str, object]]) -> None:
    key, separator, text = override.partition("=")
    stage_name, *path = key.strip().split(".")
    if not separator or not path:
        raise RecipeError(f"override '{override}' is not stage.section.key=value (stage may be *)")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise RecipeError(f"override '{override}': '{text.strip()}' is not a TOML value (quote strings)") from None
    targets = [s for s in stages if stage_name in ("*", s.get("name"))]
    if not targets:
        raise RecipeError(f"override '{override}': no stage '{stage_name}'; stages: {[s.get('name') for s in stages]}")
    for node in targets:
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise RecipeError(f"override '{override}': '{part}' is a value, not a section")
            node = cast(dict[str, object], child)
        node[path[-1]] = value


def _where(location: tuple[int | str, ...], stages: list[dict[str, object]]) -> str:
    parts = [str(part) for part in location]
    if len(location) > 1 and location[0] == "stages" and isinstance(location[1], int):
        parts = [str(stages[location[1]].get("name", location[1])), *parts[2:]]
    return ".".join(parts) or "curriculum"


def _hint(kind: str, location: tuple[int | str, ...]) -> str:
    """For a key that is not known: the ones that are."""
    if kind != "extra_forbidden":
        return ""
    section: type[BaseModel] = Curriculum
    path = list(location[:-1])
    if path[:1] == ["stages"]:
        section, path = StageRecipe, path[2:]
    for part in path:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return ""
        section = field.annotation
    close = get_close_matches(str(location[-1]), section.model_fields, n=1)
    meant = f", did you mean '{close[0]}'?" if close else ""
    return f" (known here: {', '.join(sorted(section.model_fields))}{meant})"

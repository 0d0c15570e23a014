"""The recipe: one frozen configuration tree a stage, and the curriculum that orders stages.

It owns how sections agree with one another and how recipe files are read; the sections themselves are `config`'s.
"""

import json
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Annotated, Self, cast

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from model.config import (
    RULE_TAGS,
    BucketConfig,
    ConditioningConfig,
    Config,
    CorpusConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    FlowConfig,
    NetworkConfig,
    OptimizerConfig,
    Rule,
    SamplingConfig,
    Task,
    TextConfig,
    TrainingConfig,
    VaeConfig,
    VideoConfig,
)


class StageRecipe(Config):
    """One node of the curriculum, complete for what it decides."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    task: Task
    parent: str | None = None
    """Stage whose promoted checkpoint this one grows from; "" is none, as TOML has no null."""
    temporal_parent: str | None = None
    """Stage that gives the temporal attention where `parent` gives the rest (paper Fig. 4: T2I-512 with T2V-256)."""
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
    export: ExportConfig = ExportConfig()
    gate: tuple[Rule, ...] = ()

    @field_validator("parent", "temporal_parent", mode="before")
    @classmethod
    def _empty_is_none(cls, name: object) -> object:
        return None if name == "" else name

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        self._check_clip()
        if self.task == "t2i" and self.video.num_frames != 1:
            raise ValueError(f"task 't2i' trains on images: video.num_frames must be 1, not {self.video.num_frames}")
        if not self.network.temporal_attention and (self.task != "t2i" or self.temporal_parent is not None):
            what = f"task '{self.task}'" if self.task != "t2i" else f"temporal_parent '{self.temporal_parent}'"
            raise ValueError(f"{what} needs network.temporal_attention = true")
        self._check_conditioning()
        self._check_grid()
        self._check_parallel()
        self._check_buckets()
        if not self.gate:
            raise ValueError("gate is empty: a stage without a rule could never be refused; add at least one [[gate]]")
        return self

    def in_shape(self, bucket: BucketConfig) -> Self:
        """This recipe for the steps that train on `bucket`; of an image, frames until a token is full."""
        image = bucket.num_frames == 1
        size = {"height": bucket.height, "width": bucket.width}
        num_frames = self.network.temporal_patch_size if image else bucket.num_frames
        changed: dict[str, object] = {"video": self.video.model_copy(update={**size, "num_frames": num_frames})}
        if image:
            changed |= {"task": "t2i", "conditioning": self.conditioning.model_copy(update={"mix": {}})}
        return self.model_copy(update=changed)

    @property
    def trains_on_stills(self) -> bool:
        """Whether some of its steps are on single frames."""
        return self.video.num_frames == 1 or any(bucket.num_frames == 1 for bucket in self.data.buckets)

    def _check_clip(self) -> None:
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

    @property
    def tasks(self) -> dict[Task, float]:
        """Weight of each task that clips are trained as."""
        return self.conditioning.mix or {self.task: 1.0}

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Token frames, rows and columns of a clip."""
        side = self.vae.spatial_factor * self.network.patch_size
        frames = self.video.num_frames // self.network.temporal_patch_size
        return frames, self.video.height // side, self.video.width // side

    def _check_conditioning(self) -> None:
        if "t2i" in self.tasks and len(self.tasks) > 1:
            raise ValueError(f"conditioning.mix {sorted(self.tasks)} mixes 't2i' with clips; images are a stage's own")
        given = sorted(set(self.tasks) - {"t2i", "t2v"})
        if not self.conditioning.frame_replacement and self.network.image_cross_attention == "off":
            raise ValueError(
                "conditioning.frame_replacement = false leaves the image no way in; set network.image_cross_attention"
            )
        further = sorted(set(given) - {"ti2v", "keyframes"})
        if not self.conditioning.frame_replacement and further:
            raise ValueError(f"task '{further[0]}' gives frames that only conditioning.frame_replacement carries")
        if self.flow.objective == "diffusion" and given:
            raise ValueError(f"flow.objective 'diffusion' has no frame replacement, which task '{given[0]}' needs")
        if self.flow.objective == "diffusion" and self.export.guidance_in_graph:
            raise ValueError(
                "export.guidance_in_graph combines flow velocities, and flow.objective 'diffusion' predicts something"
                " else; set guidance_in_graph = false"
            )
        if "prediction" in self.tasks and self.conditioning.prediction_frames >= self.video.num_frames:
            raise ValueError(
                f"conditioning.prediction_frames {self.conditioning.prediction_frames} leaves nothing to predict of"
                f" video.num_frames {self.video.num_frames}"
            )

    def _check_grid(self) -> None:
        grid, learned = self.token_grid, self.network.learned_grid
        if learned is not None and any(own > most for own, most in zip(grid, learned, strict=True)):
            raise ValueError(f"network.learned_grid {learned} is smaller than the clip's token grid {grid}")

    def _check_buckets(self) -> None:
        """A bucket must hold what the stage's own shape holds, and one clip of it fit into a micro-batch's tokens."""
        budget = self.training.micro_batch_size * prod(self.token_grid)
        own_size = (self.video.height, self.video.width)
        for place, bucket in enumerate(self.data.buckets):
            shaped, where = self.in_shape(bucket), f"data.buckets.{place} ({bucket})"
            if self.data.form == "latents" and (bucket.height, bucket.width) != own_size:
                raise ValueError(
                    f"{where}: data.form 'latents' holds one size, video's {own_size[0]}x{own_size[1]}; use that size,"
                    " or data.form 'clips'"
                )
            if bucket.num_frames > 1 and self.task == "t2i":
                raise ValueError(f"{where}: task 't2i' trains on images, num_frames must be 1; or use another task")
            try:
                shaped._check_clip()
                shaped._check_conditioning()
                shaped._check_grid()
                shaped._check_parallel()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            tokens = prod(shaped.token_grid)
            if tokens > budget:
                raise ValueError(
                    f"{where}: one clip has {tokens} tokens, a micro-batch holds {budget} (training.micro_batch_size"
                    f" {self.training.micro_batch_size} clips of `video`); raise it or use a smaller shape"
                )

    def _check_parallel(self) -> None:
        training = self.training
        if training.zero_stage == 3 and self.optimizer.type == "adafactor":
            raise ValueError(
                "training.zero_stage 3 cuts every parameter across ranks, where AdaFactor's row and column statistics"
                " are not exact; use zero_stage 2, or optimizer.type 'adamw'"
            )
        if training.zero_stage == 3 and training.compile:
            raise ValueError("training.zero_stage 3 gathers weights by hooks that compile breaks; set compile = false")
        ranks = training.sequence_parallel
        if ranks == 1:
            return
        if training.zero_stage == 3:
            raise ValueError(f"training.sequence_parallel {ranks} is proven up to zero_stage 2; lower one of them")
        if training.temporal_mask_ratio:
            raise ValueError(f"training.sequence_parallel {ranks} and temporal_mask_ratio both cut frames; drop one")
        frames, rows, columns = self.token_grid
        places = rows * columns
        kept = max(1, round(places * (1 - training.mask_ratio)))
        for what, count in (("token frames", frames), ("tokens a frame", places), ("kept tokens a frame", kept)):
            if count % ranks:
                raise ValueError(f"training.sequence_parallel {ranks} does not divide the clip's {count} {what}")


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
            if stage.temporal_parent is not None and (stage.parent is None or stage.temporal_parent not in seen):
                raise ValueError(
                    f"stage '{stage.name}' takes temporal attention from '{stage.temporal_parent}'; that must be an"
                    f" earlier stage {seen}, and parent must name the one that gives the rest"
                )
            if stage.temporal_parent is not None and not self.stage(stage.temporal_parent).network.temporal_attention:
                raise ValueError(
                    f"stage '{stage.name}' takes temporal attention from '{stage.temporal_parent}', which has none;"
                    " name a stage that trains on videos"
                )
            if (stage.vae, stage.text) != (self.stages[0].vae, self.stages[0].text):
                raise ValueError(f"stage '{stage.name}' has another vae or text section than '{self.stages[0].name}'")
            seen.append(stage.name)
        return self


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names file, key, value and limit."""


def load(path: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Read a curriculum: `curriculum.toml` lists the stage files, by their paths from its own folder without `.toml`.

    Its `[defaults]` stand below every stage: what a stage file leaves out comes from there. An override is
    `stage.section.key=value` (or `*.section.key=value` for every stage) and stands above both; the value is TOML.
    """
    top = _read_toml(path)
    files = cast(object, top.get("stages"))
    if not isinstance(files, list) or not files:
        raise RecipeError(f"{path}: stages must list at least one stage file")
    defaults = top.pop("defaults", {})
    if not isinstance(defaults, dict):
        raise RecipeError(f"{path}: defaults must be a table of sections and keys, not {defaults!r}")
    below = cast(dict[str, object], defaults)
    stages = [_stacked(below, _read_toml(path.parent / f"{name}.toml")) for name in cast(list[object], files)]
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


def _stacked(defaults: dict[str, object], stage: dict[str, object]) -> dict[str, object]:
    """A stage above the defaults: sections key by key; a key's value as a whole, also where it is a list or a table."""
    stacked = {**deepcopy(defaults), **stage}
    for name, section in stage.items():
        below = defaults.get(name)
        if isinstance(section, dict) and isinstance(below, dict):
            stacked[name] = {**deepcopy(cast(dict[str, object], below)), **cast(dict[str, object], section)}
    return stacked


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
    parts = [part for part in parts if part not in RULE_TAGS]
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

"""The recipe of a curation: one frozen tree, read from TOML, in which an unknown key is an error.

It owns names, ranges and defaults; it knows nothing of how a step does its work.
"""

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from infra.curate.filters import Filter
from model.config import Config, Positive, Ratio
from model.data.encoding import Encoding

Seconds = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(pattern=r"\S")]
SOURCE = r"^[a-z0-9_]+$"


class LimitsConfig(Config):
    """What an item may ask of a machine, and how often it is tried."""

    attempts: Positive = 3
    """Tries of an item that fails for no reason of its own to tell, before it is quarantined."""
    max_bytes: Positive = 64 * 2**30
    max_seconds: Seconds = 4 * 3600
    """Of a file's declared length."""
    max_side: Positive = 8192
    """Pixels; decoding a picture needs memory by its area."""
    min_fps: Annotated[float, Field(ge=0)] = 5.0
    """A slower stream is a slide show."""


class OriginConfig(Config):
    """What holds for items that say nothing of themselves, by a sidecar or in the manifest."""

    source: Annotated[str, Field(pattern=SOURCE)] = "videos"
    """Part of the data set, the name that a recipe's `data.weights` uses."""
    licence: Text | None = None
    """None drops items that state no licence."""
    credit: Text | None = None


class CutConfig(Config):
    """How a video becomes segments (paper 3.1; its settings are not published, these are PySceneDetect's)."""

    detector: Literal["content", "adaptive"] = "content"
    threshold: Annotated[float, Field(gt=0)] = 27.0
    """`content`: mean change of hue, saturation and brightness (0 to 255) that makes a cut."""
    adaptive_threshold: Annotated[float, Field(gt=0)] = 3.0
    """`adaptive`: that change by its neighbours' average."""
    fade_threshold: Annotated[float, Field(ge=0, le=255)] = 12.0
    """Mean brightness under which a picture has faded out; 0 looks for no fades."""
    min_scene_len: Positive = 15
    """Frames between two cuts, at least."""
    min_seconds: Seconds = 1.0
    max_seconds: Seconds = 10.0
    """A longer scene is cut into pieces of this length."""
    crop_borders: bool = True
    """Cut off letterbox, pillarbox and static plain borders."""
    short_side: Annotated[int, Field(ge=16, multiple_of=2)] = 256
    """Stored pixels along the shorter side of the whole picture; smaller pictures are not made larger."""
    max_fps: Annotated[float, Field(gt=0)] = 30.0
    """Stored frames a second; a faster stream loses frames, a slower one keeps its own rate."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds {self.max_seconds} is below min_seconds {self.min_seconds}")
        return self


class ScoresConfig(Config):
    """Networks of a user's own in place of the classical scorers; paths of ONNX files, nothing is downloaded."""

    aesthetic_network: Path | None = None
    """Pictures [N, 3, 224, 224], normalised as CLIP's, -> one number each (LAION's predictor over CLIP, exported)."""
    text_network: Path | None = None
    """A DB text detector (DBNet, DBNet++) as OpenCV's `TextDetectionModel_DB` reads it."""
    embedding_network: Path | None = None
    """Pictures [N, 3, 224, 224] -> features [N, D] (CLIP, DINOv2): consistency and near-duplicates use them."""


class DuplicatesConfig(Config):
    """When two segments are the same picture in motion."""

    enabled: bool = True
    max_bits: Annotated[int, Field(ge=0, le=64)] = 10
    """Of the 192 bits of three difference hashes, at most so many differ."""
    min_cosine: Annotated[float, Field(gt=0, le=1)] = 0.985
    """Between embeddings."""


class EndpointConfig(Config):
    """A server that speaks OpenAI's chat completions: vLLM, SGLang, a vendor."""

    url: Text
    """Up to and without `/chat/completions`, such as `http://localhost:8000/v1`."""
    model: Text
    concurrency: Positive = 8
    attempts: Positive = 5
    timeout: Seconds = 120.0
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    max_tokens: Positive = 400
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """For a million tokens; what is spent is counted in the same money."""
    price_out: Annotated[float, Field(ge=0)] = 0.0
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """The run stops before it asks for more."""


class CaptionsConfig(Config):
    """Who captions, and what becomes of captions that came with the videos."""

    vision: EndpointConfig | None = None
    """None takes sidecar texts, and words for colours and motion where there is none."""
    frames: Annotated[int, Field(ge=1, le=8)] = 4
    prompt: Path | None = None
    """File with the instruction; the built-in one unless said."""
    original_share: Ratio = 0.0
    """Of segments with an original caption, those that keep it; which, is a function of the segment."""
    language: EndpointConfig | None = None
    """Names a category of each caption; also writes the audit's questions."""
    categories: tuple[Text, ...] = ()


class AuditConfig(Config):
    """DSG-Video (paper App. I): objects of the caption that no frame shows."""

    enabled: bool = False
    frames: Annotated[int, Field(ge=1, le=8)] = 8
    """Uniformly sampled; the paper does not say how many."""
    max_hallucinated: Ratio = 0.0
    """Largest share of hallucinated objects of a caption that is kept."""


class CurationRecipe(Config):
    """Everything that decides what comes out, but the videos."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] = "curated"
    items_per_unit: Positive = 64
    origin: OriginConfig = OriginConfig()
    limits: LimitsConfig = LimitsConfig()
    cut: CutConfig = CutConfig()
    scores: ScoresConfig = ScoresConfig()
    filters: tuple[Filter, ...] = ()
    """Expressions over scores and facts, all of which a segment must hold, in order."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    audit: AuditConfig = AuditConfig()
    encoding: Encoding = Encoding()

    @model_validator(mode="after")
    def _judges_are_there(self) -> Self:
        if self.audit.enabled and (self.captions.language is None or self.captions.vision is None):
            raise ValueError("audit asks captions.language for questions and captions.vision for answers; set both")
        if self.captions.categories and self.captions.language is None:
            raise ValueError("captions.categories are named by captions.language; set it")
        return self

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_recipe(path: Path) -> CurationRecipe:
    """The recipe in a TOML file; ValueError names the key that is wrong."""
    try:
        return CurationRecipe.model_validate(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path}: {problems}") from None

"""The sections of a recipe: names, types, ranges and rules within a section, each a frozen model.

They know nothing of files, of stages or of how sections must agree (`recipe` does), and derive no DeepSpeed, Kubernetes
or engine setting (those rooms derive theirs).
"""

from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16", "fp16"]
"""Of an exported graph."""
Quantization = Literal["none", "int8", "fp8"]
PartName = Literal["decoder", "encoder", "text_encoder"]
Task = Literal["t2i", "t2v", "ti2v", "prediction", "interpolation", "upsampling", "multiview", "keyframes"]
"""Which frames of a clip are given clean (`tasks`); one network can be trained on several."""


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
    positions: Literal["rope", "rope_sinusoid", "learned"] = "rope"
    """RoPE alone is the paper's; `rope_sinusoid` also adds a fixed sinusoid of row, column and frame to the tokens;
    `learned` adds a learned table instead of RoPE (paper Table 2, the row before `+RoPE`)."""
    learned_grid: tuple[Positive, Positive, Positive] | None = None
    """Token frames, rows and columns of the `learned` table; only with it."""
    causal_temporal_attention: bool = False
    """A frame attends to itself and earlier ones only (paper Fig. 6a: much worse)."""
    temporal_modulation: bool = False
    """Scale, shift and gate on temporal attention as well (paper Fig. 6a: slightly worse)."""
    qk_norm: bool = True
    sandwich_norm: bool = True
    """Also norm what each sub-layer gives, not only what it takes (paper 2.2)."""
    condition_norm: bool = True
    """Norm each embedding of the condition before they are summed (paper 2.1)."""
    shared_modulation: bool = True
    """One AdaLN for all layers (paper 2.1); off gives every block its own."""
    micro_conditions: bool = True
    """Original size, crop, frame stride and number of frames condition the network (paper 2.1)."""
    image_cross_attention: Literal["off", "linear", "resnet"] = "off"
    """Cross-attention also sees the first frame (paper Table 3): CA projects it linearly, CA + LP by a ResNet."""

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

    @model_validator(mode="after")
    def _choices_agree(self) -> Self:
        if (self.positions == "learned") != (self.learned_grid is not None):
            raise ValueError(
                f"positions '{self.positions}' with learned_grid {self.learned_grid}: give the grid (token frames,"
                " rows, columns) with positions 'learned', and only then"
            )
        temporal = [name for name in ("causal_temporal_attention", "temporal_modulation") if getattr(self, name)]
        if temporal and not self.temporal_attention:
            raise ValueError(f"{temporal[0]} = true needs temporal_attention = true")
        return self


class VideoConfig(Config):
    """The clip a stage trains on, in pixels."""

    num_frames: Positive
    height: Positive
    width: Positive
    fps: Positive = 8
    frame_stride: Positive = 1
    """Every n-th source frame is taken (paper App. B: 3)."""
    keyframe_stride: Positive = 20
    """The same for clips trained as task `keyframes` (paper 5, long video)."""


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
    """How clean frames and captions are given in training (paper 2.3, App. B)."""

    text_dropout: Ratio = 0.1
    image_dropout: Ratio = 0.08
    frame_replacement: bool = True
    """Given frames stand clean among the noisy ones (paper 2.3.1, FR); off needs network.image_cross_attention."""
    first_frame_loss: bool = False
    """Given frames count in the loss too (paper Table 3, FFL)."""
    mix: dict[Task, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[Task, float])
    """Tasks a clip is trained as, by weight (paper 2.3.1: one model, several tasks); empty is the stage's `task`."""
    prediction_frames: Positive = 4
    """Frames given by task `prediction` (paper App. J.1)."""


class FlowConfig(Config):
    """What the network learns, and how training draws time t (0 = noise, 1 = data)."""

    objective: Literal["flow", "diffusion"] = "flow"
    """`diffusion` is Table 2's baseline: v-prediction on Stable Diffusion's scaled-linear schedule."""
    timestep_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0
    """SD3's shift towards noise: 1 is none, above 1 spends more of training and sampling near t = 0."""


class OptimizerConfig(Config):
    """AdaFactor with the paper's setting (3.1), or AdamW, Table 2's baseline; no weight decay, no parameter scaling."""

    type: Literal["adafactor", "adamw"] = "adafactor"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0
    """AdaFactor's limit on the root mean square of an update."""
    momentum: Literal["fp32", "bf16"] = "fp32"
    """Precision in which AdaFactor keeps its momentum, the one part of its state as large as the weights."""
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
    temporal_mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the token frames dropped as well in those steps (paper Fig. 6a: it hurts)."""
    global_batch_size: Positive
    micro_batch_size: Positive
    world_size: Positive = 1
    sequence_parallel: Positive = 1
    """Ranks that share a clip: each holds a part of its frames, or of its places while attention runs along time."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share: 0 nothing, 1 masters and optimizer state, 2 gradients too, 3 weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights, activations and gradients; masters, optimizer state and average are fp32 either way."""
    activation_checkpointing: bool = False
    """Compute a block's activations again in backward, all but self-attention's outputs (paper App. A 2.2)."""
    compile: bool = False
    """Run each block through torch.compile."""
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
    def data_parallel(self) -> int:
        """Groups of ranks that see clips of their own."""
        return self.world_size // self.sequence_parallel

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.world_size % self.sequence_parallel:
            raise ValueError(
                f"world_size {self.world_size} is not a multiple of sequence_parallel {self.sequence_parallel}"
            )
        if self.precision == "bf16" and self.zero_stage < 2 and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"precision 'bf16' at zero_stage {self.zero_stage} would add up {self.gradient_accumulation_steps}"
                " micro-batches' gradients in bf16; zero_stage 2 adds them up in fp32, or raise micro_batch_size to"
                f" {self.global_batch_size // self.data_parallel}"
            )
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel):
            ranks = "world_size" if self.sequence_parallel == 1 else "world_size / sequence_parallel"
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size} x {ranks} {self.data_parallel}"
            )
        return self


RESUMABLE = frozenset(
    {"world_size", "sequence_parallel", "zero_stage", "micro_batch_size", "activation_checkpointing", "compile"}
    | {"checkpoint_every", "keep_checkpoints", "log_every"}
)
"""Fields of `training` that may change when a run is resumed: the weights depend on them by rounding at most."""


class BucketConfig(Config):
    """A shape that some steps train on."""

    num_frames: Positive
    """1 is an image: its caption is a still's, its task t2i, and it is repeated where a token covers more frames."""
    height: Positive
    width: Positive
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative share of the steps."""

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


class DataConfig(Config):
    """Which parts of the data set a stage draws from, how often, in which shapes, and by how many processes."""

    form: Literal["clips", "latents"] = "clips"
    """Clips that the codec encodes in every step, or their latents, which `stiv encode` has stored at the stage's
    height and width (docs/data.md)."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"moving_shapes": 1.0})
    """Source name in the shards -> relative sampling weight."""
    buckets: tuple[BucketConfig, ...] = ()
    """Shapes to train on, one a step on all ranks; empty is the stage's `video` alone. A micro-batch holds as many
    clips of a shape as fit into the tokens of `micro_batch_size` clips of `video`."""
    shuffle_shards: Annotated[int, Field(ge=0)] = 0
    """Shards whose clips are mixed at a time; 0 mixes the whole set. Keep it below what the shard cache holds."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes a rank has for reading, decoding and cutting clips ahead; 0 does it between steps."""
    max_corrupt: Annotated[int, Field(ge=0)] = 0
    """Different clips that a rank may find unreadable; each is replaced by the next of its source."""


class SamplingConfig(Config):
    """How videos are drawn from the trained flow (paper 2.1, App. A)."""

    solver: Literal["euler", "heun"] = "heun"
    stochastic: bool = True
    """Reverse-time SDE (the paper's choice) instead of the ODE."""
    num_steps: Positive = 50
    guidance: Literal["joint", "separate", "none"] = "joint"
    """JIT-CFG (two passes a step), SIT-CFG (three; text by `guidance_scale`, image by its own), or one plain pass."""
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    image_guidance_scale: Annotated[float, Field(ge=1)] = 1.5
    """SIT-CFG's scale of the image (paper 3.4.2); unused by the other guidances."""
    null_frames: Literal["noised", "zeros"] = "noised"
    """What given frames are in a pass without them: on their noisy path, or zero latents (paper App. J.3)."""
    renormalize: bool = True
    """CFG-Renorm: keep the guided velocity's norm at the conditional one's."""
    step_cache: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share by which a row's prediction may have moved before it is computed again (`step_cache`); 0 is off."""


class ExportConfig(Config):
    """How the stage's checkpoint becomes an engine."""

    precision: Precision = "fp32"
    """Of matrix products and their weights in the exported graph; norms, RoPE, softmax and the condition stay fp32."""
    quantization: Quantization = "none"
    """Of the blocks' linear layers, calibrated on the stage's own videos; parity refuses what is too coarse."""
    guidance_in_graph: bool = False
    """The graph also combines the passes of guidance and renormalises; off leaves that to the sampler."""
    parts: tuple[PartName, ...] = ()
    """Of the codec and the text encoder, what is exported beside the network, as float32 files of their own."""
    max_rows: Positive = 32
    """Rows of one call: a video takes one a pass of guidance, so two with `joint`."""


class GateRule(Config):
    """One bound a checkpoint must hold to be promoted."""

    metric: str
    op: Literal["<", "<=", ">", ">="]
    bound: Annotated[float, Field(allow_inf_nan=False)]

    @property
    def wanted(self) -> str:
        """What the rule asks of its metric."""
        return f"{self.op} {self.bound:g}"


class ChampionRule(Config):
    """Not worse than what the ref points at now: the far end of a paired bootstrap interval must stay within a margin.

    It needs the metric sample by sample (`evaluation/samples.json`). With no champion yet it passes, and says so.
    """

    metric: str
    not_worse_by: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """How much worse the mean may be, in the metric's own unit."""
    better: Literal["lower", "higher"]
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the two-sided interval of the mean difference."""
    resamples: Annotated[int, Field(ge=1000, le=1_000_000)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def wanted(self) -> str:
        return f"worse than the champion by at most {self.not_worse_by:g}"


RULE_TAGS = ("rule with a bound", "rule beside the champion")
"""Stand in the place of an error in a rule, where a recipe has no key."""


def _rule_tag(rule: object) -> str:
    keys = cast(dict[str, object], rule) if isinstance(rule, dict) else {}
    return RULE_TAGS[isinstance(rule, ChampionRule) or bool(keys.keys() & {"not_worse_by", "better"})]


Rule = Annotated[
    Annotated[GateRule, Tag(RULE_TAGS[0])] | Annotated[ChampionRule, Tag(RULE_TAGS[1])], Discriminator(_rule_tag)
]


class EvaluationConfig(Config):
    """What is measured on the EMA weights once a stage has trained."""

    heldout_clips: Positive = 64
    sample_prompts: Positive = 8
    """Captions drawn for the sample grid and, on moving shapes, for the checker."""


class CorpusConfig(Config):
    """The captioned corpus that is drawn: moving shapes for training and for measuring."""

    shapes: Positive = 2400
    heldout_shapes: Positive = 192
    size: Annotated[int, Field(ge=16)] = 32
    num_frames: Positive = 8
    seed: Annotated[int, Field(ge=0)] = 0
    gate: tuple[Rule, ...] = (
        GateRule(metric="train_samples", op=">=", bound=1),
        GateRule(metric="psnr_db_moving_shapes", op=">=", bound=25),
    )
    """What the data set and the codec must hold to be promoted."""

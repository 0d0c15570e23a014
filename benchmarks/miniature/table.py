"""The rows of the miniature, in the order of the paper's tables.

It owns which designs are run and from which row each grows; sizes are `rows`', what the rows should show is
`findings`'.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.miniature.rows import (
    BASE,
    FRAMES,
    GRID,
    IMAGE,
    IMAGE_STEPS,
    IMAGE_TO_VIDEO,
    IMAGE_TO_VIDEO_STEPS,
    LOW,
    LOW_SIDE,
    SIDE,
    VIDEO,
    VIDEO_STEPS,
    Row,
    Sections,
    merged,
)

QUICK_ROWS = ("t2i", "t2i_diffusion", "t2i_scale_7_plain", "t2v", "t2v_causal", "ti2v", "ti2v_ca", "ti2v_dropout")

MASKED_SHARE = 0.7
"""Of the steps of a row that masks; the rest sees all tokens. The base masks nothing."""


def _steps(total: int, *, masked: bool = False) -> Sections:
    """Steps, and the rate's fall over the last 30 % of them."""
    first = round(MASKED_SHARE * total) if masked else 1
    return {
        "training": {"steps": first, "unmasked_steps": total - first},
        "optimizer": {"decay_steps": round(0.3 * total)},
    }


def _row(name: str, title: str, *trees: Sections) -> Row:
    tree = merged(BASE, *trees, {"name": name})
    parents = tuple(tree[key] for key in ("parent", "temporal_parent") if tree.get(key))
    return Row(name, title, tree, parents=parents)


def _image(name: str, title: str, *trees: Sections) -> Row:
    return _row(name, title, IMAGE, _steps(IMAGE_STEPS), *trees)


def _video(name: str, title: str, *trees: Sections, steps: int = VIDEO_STEPS, parent: str | None = "t2i") -> Row:
    return _row(name, title, VIDEO, {"parent": parent}, _steps(steps), *trees)


def _given(name: str, title: str, *trees: Sections) -> Row:
    """Text and image to video."""
    return _row(name, title, VIDEO, IMAGE_TO_VIDEO, _steps(IMAGE_TO_VIDEO_STEPS), *trees)


def _drawn(row: Row, name: str, title: str, **sampling: Any) -> Row:
    tree = merged(row.sections, {"sampling": sampling})
    return Row(name, title, tree, drawn_from=row.name, parents=(row.name,))


def _network(**choices: Any) -> Sections:
    return {"network": choices}


def _image_rows() -> list[Row]:
    """Paper Table 2."""
    uniform = {"timestep_distribution": "uniform", "shift": 1.0}
    base = _image("t2i", "base: flow, AdaFactor, all norms, shared AdaLN, no mask")
    return [
        base,
        _image("t2i_flow_uniform", "flow, times uniform as in diffusion", {"flow": uniform}),
        _image(
            "t2i_diffusion", "diffusion (v-prediction), times uniform", {"flow": {**uniform, "objective": "diffusion"}}
        ),
        _image("t2i_adamw", "AdamW at the same rate", {"optimizer": {"type": "adamw"}}),
        _image("t2i_no_qk_norm", "no QK-norm", _network(qk_norm=False)),
        _image("t2i_no_sandwich_norm", "no sandwich norm", _network(sandwich_norm=False)),
        _image("t2i_no_condition_norm", "no condition norm", _network(condition_norm=False)),
        _image("t2i_block_adaln", "AdaLN a block instead of a shared one", _network(shared_modulation=False)),
        _image("t2i_rope", "RoPE alone", _network(positions="rope")),
        _image("t2i_learned", "learned positions", _network(positions="learned", learned_grid=[1, *GRID])),
        _image("t2i_masked", "spatial masking", {"training": {"mask_ratio": 0.5}}, _steps(IMAGE_STEPS, masked=True)),
        _drawn(base, "t2i_unguided", "base, drawn without guidance", guidance="none"),
        _drawn(base, "t2i_scale_7", "base, guidance scale 7.5", guidance_scale=7.5),
        _drawn(base, "t2i_scale_7_plain", "base, scale 7.5, no renorm", guidance_scale=7.5, renormalize=False),
    ]


def _video_rows() -> list[Row]:
    """Paper Fig. 6a."""
    masked, half = _steps(VIDEO_STEPS, masked=True), {"mask_ratio": 0.5}
    base = _video("t2v", "base: from t2i, bidirectional, temporal patch 2, no mask")
    return [
        base,
        _video("t2v_causal", "causal temporal attention", _network(causal_temporal_attention=True)),
        _video("t2v_modulation", "temporal scale, shift and gate", _network(temporal_modulation=True)),
        _video("t2v_masked", "spatial masking", masked, {"training": half}),
        _video(
            "t2v_masked_temporal",
            "spatial and temporal masking",
            masked,
            {"training": {**half, "temporal_mask_ratio": 0.5}},
        ),
        _video("t2v_patch_1", "temporal patch 1", _network(temporal_patch_size=1)),
        _video("t2v_patch_4", "temporal patch 4", _network(temporal_patch_size=4)),
        _drawn(base, "t2v_unguided", "base, drawn without guidance", guidance="none"),
        _drawn(base, "t2v_scale_7", "base, guidance scale 7.5", guidance_scale=7.5),
        _drawn(base, "t2v_scale_7_plain", "base, scale 7.5, no renorm", guidance_scale=7.5, renormalize=False),
    ]


def _resolution_rows() -> list[Row]:
    """Paper Fig. 6b and Table 13: the final resolution at the training FLOPs of t2i and t2v together."""
    still = _image("t2i_low", "t2i at 16 px", LOW, _steps(IMAGE_STEPS // 2))
    low = _video("t2v_low", "t2v at 16 px", LOW, steps=round(0.6 * VIDEO_STEPS), parent="t2i_low")
    interpolated = _network(rope_spatial_scale=LOW_SIDE / SIDE)
    image, video = _image("t2i", ""), _video("t2v", "")
    budget = image.flops + video.flops

    def left(*spent: Row) -> int:
        return round(VIDEO_STEPS * (budget - sum(row.flops for row in spent)) / video.flops)

    return [
        still,
        low,
        _video("t2v_scratch", "from scratch, equal FLOPs", steps=left(), parent=None),
        _video("t2v_from_low", "from t2v_low, equal FLOPs", interpolated, steps=left(still, low), parent="t2v_low"),
        _video(
            "t2v_joint",
            "from t2i, temporal attention from t2v_low, equal FLOPs",
            {"temporal_parent": "t2v_low"},
            steps=left(image, still, low),
        ),
    ]


def _length_rows() -> list[Row]:
    """Paper Fig. 6c and Table 14: twice the frames, at the training FLOPs of t2i and t2v together."""
    short: Sections = {"video": {"num_frames": FRAMES // 2}}
    wide: Sections = {"video": {"num_frames": FRAMES // 2, "frame_stride": 2}}
    half, interpolated = VIDEO_STEPS // 2, _network(rope_temporal_scale=0.5)
    return [
        _video("t2v_short", "4 frames", short),
        _video("t2v_short_stride_2", "4 frames, stride 2", wide),
        _video(
            "t2v_long", "from t2v_short, RoPE interpolated, equal FLOPs", interpolated, steps=half, parent="t2v_short"
        ),
        _video(
            "t2v_long_extrapolated", "from t2v_short, RoPE extrapolated, equal FLOPs", steps=half, parent="t2v_short"
        ),
        _video(
            "t2v_long_stride_2",
            "from t2v_short_stride_2, RoPE interpolated, equal FLOPs",
            interpolated,
            steps=half,
            parent="t2v_short_stride_2",
        ),
    ]


def _given_rows() -> list[Row]:
    """Paper Tables 3 to 6."""
    instead: Sections = {"conditioning": {"frame_replacement": False}}
    kept: Sections = {"conditioning": {"first_frame_loss": True}}
    linear, resnet = _network(image_cross_attention="linear"), _network(image_cross_attention="resnet")
    dropout = _given("ti2v_dropout", "FR, image dropout 0.08 (JIT)", {"conditioning": {"image_dropout": 0.08}})
    return [
        _given("ti2v", "FR: frame replacement"),
        _given("ti2v_ca", "CA: cross-attention to the image", instead, linear),
        _given("ti2v_ca_ffl", "CA + FFL: first frame in the loss", instead, linear, kept),
        _given("ti2v_ca_lp", "CA + LP: large projection", instead, resnet),
        _given("ti2v_fr_ca", "FR + CA", linear),
        _given("ti2v_fr_ca_lp", "FR + CA + LP", resnet),
        _given("ti2v_fr_ca_lp_ffl", "FR + CA + LP + FFL", resnet, kept),
        _given("ti2v_from_t2i", "FR from t2i instead of t2v", {"parent": "t2i"}),
        dropout,
        _drawn(dropout, "ti2v_unguided", "dropout row, drawn without guidance", guidance="none"),
        _drawn(dropout, "ti2v_separate", "dropout row, SIT-CFG: text 3, image 1.5", guidance="separate"),
        _drawn(dropout, "ti2v_null_zeros", "dropout row, zero latents as null frames", null_frames="zeros"),
    ]


def all_rows() -> dict[str, Row]:
    """By name; parents before their children."""
    return {row.name: row for make in _GROUPS.values() for row in make()}


_GROUPS: dict[str, Callable[[], list[Row]]] = {
    "Images": _image_rows,
    "Videos": _video_rows,
    "Starting from a lower resolution": _resolution_rows,
    "Starting from shorter clips": _length_rows,
    "Image and text to video": _given_rows,
}
GROUPS: dict[str, tuple[str, ...]] = {name: tuple(row.name for row in make()) for name, make in _GROUPS.items()}
"""The page's sections and their rows."""


def quick(rows: dict[str, Row]) -> dict[str, Row]:
    """A few rows with a few steps: enough to see every part work, too little to see a difference."""
    few = {
        "training": {"steps": 1, "unmasked_steps": 3, "log_every": 1},
        "optimizer": {"decay_steps": 2, "warmup_steps": 1},
        "sampling": {"num_steps": 2},
        "evaluation": {"heldout_clips": 8, "sample_prompts": 8},
    }
    return {name: replace(rows[name], sections=merged(rows[name].sections, few)) for name in QUICK_ROWS}

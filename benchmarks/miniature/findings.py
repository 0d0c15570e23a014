"""What the rows should show: the paper's findings as claims, each with the one measure that decides it.

It owns the choice of measures and margins, made before the runs; the verdict's rule is `claims`'.
"""

from benchmarks.miniature.claims import Claim
from model.measures.features import PixelMotionFeatures

FREE = 0.10
"""What "nearly free" and "no worse" may cost: a tenth of the other row's Fréchet distance."""

FRECHET = f"frechet_{PixelMotionFeatures().name}"
IMAGE, VIDEO, GIVEN = f"t2i_{FRECHET}", f"t2v_{FRECHET}", f"ti2v_{FRECHET}"
# A clip that stands still has a speed error of 1, and noise that flickers is not taken for motion.
PSNR, MOTION = "ti2v_first_frame_psnr_db", "ti2v_speed_error"


def _lower(name: str, says: str, paper: str, rows: tuple[str, str], measure: str, margin: float = 0.0) -> Claim:
    row, than = rows
    return Claim(
        name=name, says=says, paper=paper, row=row, than=than, measure=measure, higher_is_better=False, margin=margin
    )


def _higher(name: str, says: str, paper: str, rows: tuple[str, str], measure: str, margin: float = 0.0) -> Claim:
    row, than = rows
    return Claim(
        name=name, says=says, paper=paper, row=row, than=than, measure=measure, higher_is_better=True, margin=margin
    )


CLAIMS = (
    # Images, paper Table 2.
    _lower("flow", "Flow matching beats diffusion", "Table 2: FID 26.35 → 24.96", ("t2i", "t2i_diffusion"), IMAGE),
    _lower(
        "flow_uniform",
        "Flow matching beats diffusion with the same distribution of times",
        "Table 2: FID 26.35 → 24.96",
        ("t2i_flow_uniform", "t2i_diffusion"),
        IMAGE,
    ),
    _lower("qk_norm", "QK-norm helps", "Table 2: FID 26.17 → 25.60", ("t2i", "t2i_no_qk_norm"), IMAGE),
    _lower(
        "sandwich_norm",
        "Sandwich norm is no worse",
        "Table 2: FID 25.60 → 25.76, GenEval .372 → .366",
        ("t2i", "t2i_no_sandwich_norm"),
        IMAGE,
        FREE,
    ),
    _lower(
        "condition_norm", "Condition norm helps", "Table 2: FID 25.76 → 25.58", ("t2i", "t2i_no_condition_norm"), IMAGE
    ),
    _lower("adafactor", "AdaFactor beats AdamW", "Table 2: FID 21.16 → 20.26", ("t2i", "t2i_adamw"), IMAGE),
    _lower(
        "shared_adaln",
        "One shared AdaLN is no worse than one a block",
        "Table 2: FID 23.85 → 22.83, with fewer weights",
        ("t2i", "t2i_block_adaln"),
        IMAGE,
        FREE,
    ),
    _lower(
        "rope",
        "RoPE alone beats learned positions",
        "Table 2: FID 20.02 → 18.40",
        ("t2i_rope", "t2i_learned"),
        IMAGE,
    ),
    _lower(
        "mask_images",
        "Spatial masking is nearly free for images",
        "Table 2: GenEval .474 → .499, but FID 20.26 → 23.85",
        ("t2i_masked", "t2i"),
        IMAGE,
        FREE,
    ),
    _lower("guidance", "Classifier-free guidance helps images", "App. D", ("t2i", "t2i_unguided"), IMAGE),
    _lower(
        "renorm_images",
        "CFG-Renorm helps images at the paper's scale 7.5",
        "Table 2: FID 24.96 → 21.16",
        ("t2i_scale_7", "t2i_scale_7_plain"),
        IMAGE,
    ),
    # Videos, paper Fig. 6a.
    _lower(
        "renorm_videos",
        "CFG-Renorm helps videos at the paper's scale 7.5",
        "App. A",
        ("t2v_scale_7", "t2v_scale_7_plain"),
        VIDEO,
    ),
    _lower(
        "bidirectional",
        "Bidirectional temporal attention beats causal",
        "Fig. 6a: VBench total 78.25 against 74.30",
        ("t2v", "t2v_causal"),
        VIDEO,
    ),
    _lower(
        "temporal_modulation",
        "Temporal attention needs no scale, shift and gate",
        "Fig. 6a: 78.25 against 78.04",
        ("t2v", "t2v_modulation"),
        VIDEO,
        FREE,
    ),
    _lower(
        "temporal_mask",
        "Temporal masking hurts",
        "Fig. 6a: 78.25 against 75.25",
        ("t2v_masked", "t2v_masked_temporal"),
        VIDEO,
    ),
    _lower(
        "mask_videos",
        "Spatial masking is nearly free for videos",
        "Fig. 6a: 78.25 against 78.52",
        ("t2v_masked", "t2v"),
        VIDEO,
        FREE,
    ),
    _lower(
        "patch_1",
        "Temporal patch 1 beats 2 (at twice the compute)",
        "Fig. 6a: 79.07 against 78.25",
        ("t2v_patch_1", "t2v"),
        VIDEO,
    ),
    _lower("patch_4", "Temporal patch 2 beats 4", "Fig. 6a: 78.25 against 77.61", ("t2v", "t2v_patch_4"), VIDEO),
    # Where a stage starts, paper Fig. 6b and 6c, at equal FLOPs.
    _lower("init_t2i", "T2I init beats none", "Fig. 6b: FVD 401.8 against 418.0", ("t2v", "t2v_scratch"), VIDEO),
    _lower(
        "init_joint_t2i",
        "Joint init is no worse than T2I init alone",
        "Fig. 6b: VBench 78.83 against 78.13, FVD 405.1 against 401.8",
        ("t2v_joint", "t2v"),
        VIDEO,
        FREE,
    ),
    _lower(
        "init_joint_low",
        "Joint init is no worse than low-resolution T2V init alone",
        "Fig. 6b: VBench 78.83 against 78.49",
        ("t2v_joint", "t2v_from_low"),
        VIDEO,
        FREE,
    ),
    _lower(
        "init_short",
        "For longer clips, init from shorter clips beats T2I init",
        "Fig. 6c: FVD 407.9 against 549.1",
        ("t2v_long", "t2v"),
        VIDEO,
    ),
    _lower(
        "init_stride",
        "Init from short clips of twice the stride is no worse than of the same stride",
        "Fig. 6c: FVD 401.9 against 407.9",
        ("t2v_long_stride_2", "t2v_long"),
        VIDEO,
        FREE,
    ),
    _lower(
        "rope_extrapolation",
        "RoPE extrapolated gives the lower Fréchet distance than interpolated",
        "Fig. 6c: FVD 397.9 against 407.9 (VBench says the opposite)",
        ("t2v_long_extrapolated", "t2v_long"),
        VIDEO,
    ),
    _higher(
        "rope_interpolation",
        "RoPE interpolated follows the caption better than extrapolated",
        "Fig. 6c: VBench semantic 65.42 against 64.63",
        ("t2v_long", "t2v_long_extrapolated"),
        "t2v_joint_accuracy",
    ),
    # Text and image to video, paper Tables 3 to 6.
    _higher(
        "fr_first_frame",
        "FR keeps the first frame better than CA",
        "Table 3: I2V subject 96.8 against 88.9",
        ("ti2v", "ti2v_ca"),
        PSNR,
    ),
    _higher(
        "fr_first_frame_lp",
        "FR keeps the first frame better than CA + LP",
        "Table 3: 96.8 against 96.9, I2V 75.8 against 72.3",
        ("ti2v", "ti2v_ca_lp"),
        PSNR,
    ),
    _higher(
        "ffl_first_frame",
        "First-frame loss helps CA to keep the first frame",
        "Table 3: 88.9 → 91.5",
        ("ti2v_ca_ffl", "ti2v_ca"),
        PSNR,
    ),
    _lower(
        "fr_motion_lp",
        "FR keeps more motion than FR + CA + LP",
        "Table 3: dynamic degree 36.6 against 22.4",
        ("ti2v", "ti2v_fr_ca_lp"),
        MOTION,
    ),
    _lower(
        "fr_motion_ffl",
        "FR keeps more motion than FR + CA + LP + FFL",
        "Table 3: dynamic degree 36.6 against 22.2",
        ("ti2v", "ti2v_fr_ca_lp_ffl"),
        MOTION,
    ),
    _lower(
        "fr_alone",
        "FR alone is no worse than FR + CA",
        "Table 3: average 77.3 against 77.1",
        ("ti2v", "ti2v_fr_ca"),
        GIVEN,
        FREE,
    ),
    _higher(
        "dropout_t2v",
        "Image dropout keeps T2V in the same model",
        "Table 4: T2V total 80.7 against 66.1",
        ("ti2v_dropout", "ti2v"),
        "t2v_joint_accuracy",
    ),
    _lower(
        "dropout_t2v_frechet",
        "Image dropout keeps T2V in the same model, by distribution",
        "Table 4: T2V total 80.7 against 66.1",
        ("ti2v_dropout", "ti2v"),
        VIDEO,
    ),
    _lower(
        "dropout_ti2v",
        "Image dropout costs TI2V nearly nothing",
        "Table 4: I2V total 89.8 against 90.1",
        ("ti2v_dropout", "ti2v"),
        GIVEN,
        FREE,
    ),
    _lower(
        "dropout_motion",
        "Image dropout gives TI2V more motion",
        "Table 5: dynamic degree 24.0 against 10.2 (8.7 B, 512 px)",
        ("ti2v_dropout", "ti2v"),
        MOTION,
    ),
    _lower("jit", "JIT-CFG beats no guidance", "Fig. 7", ("ti2v_dropout", "ti2v_unguided"), GIVEN),
    _lower(
        "jit_sit",
        "JIT-CFG is no worse than SIT-CFG, with two passes for three",
        "Fig. 7: FVD 94.1 against 95.2",
        ("ti2v_dropout", "ti2v_separate"),
        GIVEN,
        FREE,
    ),
    _lower(
        "init_t2v",
        "T2V init beats T2I init for TI2V",
        "Table 6: average 77.9 against 77.2",
        ("ti2v", "ti2v_from_t2i"),
        GIVEN,
    ),
)

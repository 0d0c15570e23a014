"""What the frozen codec costs a training step: it turns every clip's pixels into latents on the rank that trains on it.

It knows nothing of the network. Figures are of Stable Diffusion's autoencoder, whose shape the paper's recipes have;
the fitted patch codec is one matrix product and counts as nothing.
"""

from model.recipe import StageRecipe

PARAMETERS = 83_653_863
FLOPS_A_PIXEL = 4_128_642
"""Of encoding, all but its one attention layer; counted by torch for 128 to 512 pixels a side."""
ATTENTION_WIDTH, SPATIAL_FACTOR = 512, 8
FRAMES_AT_ONCE = 8
"""As `vae.AutoencoderKlCodec` takes them."""
WIDEST, LIVE = 128, 4
"""Channels at full resolution, and such maps that live together: a layer's input, its norm, its output, a copy."""
FP32 = 4


def codec_bytes(recipe: StageRecipe) -> int:
    """Of its weights, which stay on the device."""
    return FP32 * PARAMETERS if recipe.vae.type == "autoencoder_kl" else 0


def encoding_bytes(recipe: StageRecipe, clips: int) -> int:
    """What encoding a micro-batch takes for a moment, before the network runs."""
    if recipe.vae.type != "autoencoder_kl":
        return 0
    video = recipe.video
    frames = min(clips * video.num_frames, FRAMES_AT_ONCE)
    return FP32 * WIDEST * LIVE * frames * video.height * video.width


def encoding_flops(recipe: StageRecipe) -> int:
    """Of one clip."""
    if recipe.vae.type != "autoencoder_kl":
        return 0
    pixels = recipe.video.height * recipe.video.width
    places = pixels // SPATIAL_FACTOR**2
    return recipe.video.num_frames * (FLOPS_A_PIXEL * pixels + 4 * places**2 * ATTENTION_WIDTH)

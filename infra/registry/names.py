"""The names of refs, so that those who read and those who move them agree; nothing else."""

DATASET = "dataset/promoted"
CODEC = "codec/promoted"
CANDIDATE = "engine/candidate"
"""The engine that was exported and proven last."""


def latents(height: int, width: int) -> str:
    """The data set's latents of pictures of that size."""
    return f"latents_{height}x{width}/promoted"


def promoted(stage: str) -> str:
    """The checkpoint of a stage that passed its gate last."""
    return f"{stage}/promoted"

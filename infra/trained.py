"""A published checkpoint in folders of this machine, with the codec it was trained with.

It owns what is fetched to use a checkpoint and where it computes; what it is used for is the caller's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from infra.registry.records import Manifest
from infra.registry.registry import Registry
from model.generation import ClipGenerator
from model.network.stiv import STIV
from model.recipe import StageRecipe, loads_stage
from model.training.evaluate import load_network, make_generator
from model.vae import FrameCodec, load_codec


@dataclass(slots=True, frozen=True)
class Trained:
    """A published checkpoint in folders of this machine, every digest verified."""

    manifest: Manifest
    recipe: StageRecipe
    folder: Path
    codec_manifest: Manifest
    codec_folder: Path

    def network(self) -> STIV:
        """With the EMA weights, frozen."""
        return load_network(self.recipe, self.folder)

    def codec(self) -> FrameCodec:
        return load_codec(self.codec_folder, self.recipe.vae)

    def generator(self, device: str) -> ClipGenerator:
        """Draws clips with the network on `device`; the codec and the text encoder stay on the CPU."""
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device '{device}' is not there: this machine shows no CUDA GPU; use cpu")
        return make_generator(self.recipe, self.network().to(device), self.codec_folder)


def fetch_trained(registry: Registry, ref: str, work: Path) -> Trained:
    """The checkpoint at `ref`, fetched below `work`."""
    manifest = registry.verified(ref)
    if manifest.kind != "checkpoint":
        raise ValueError(f"'{ref}' is of kind '{manifest.kind}'; this takes a checkpoint, such as ti2v/promoted")
    folder = registry.fetch(manifest, work / "inputs" / manifest.digest[:16])
    codec = registry.manifest(manifest.parents["codec"])  # named by its digest in what was verified
    return Trained(
        manifest=manifest,
        recipe=loads_stage((folder / "recipe.json").read_bytes()),
        folder=folder,
        codec_manifest=codec,
        codec_folder=registry.fetch(codec, work / "inputs" / codec.digest[:16]),
    )

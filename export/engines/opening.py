"""From a bundle's folder to an engine that may be called.

It owns the order of checks: whole, for this recipe, for this machine, and only then loaded; it knows nothing of where
the folder came from, nor who signed it.
"""

from pathlib import Path

import torch

from export.bundle import MODEL, EngineBundle, load_bundle
from export.engines.card import (
    CARD,
    PLAN,
    EngineCard,
    architecture_here,
    builder_here,
    read_card,
    require_runs_here,
)
from export.engines.onnx_runtime import OnnxEngine
from export.engines.protocol import EngineCorrupt, EngineMismatch, RefittableEngine
from export.engines.targets import OnnxTarget, TensorRtTarget, TorchTarget
from export.engines.tensorrt import TensorRtEngine
from export.engines.torch import TorchEngine
from export.engines.weights import profile_of, read_graph, read_weights
from export.onnx import UNUSED, recipe_digest
from export.profiles import ShapeProfile
from model.network.stiv import STIV
from model.recipe import StageRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_bundle(folder: Path, *, threads: int | None = None) -> tuple[EngineBundle, RefittableEngine, ShapeProfile]:
    """The bundle in `folder`, its engine, and the shapes that was proven for.

    `threads` for one operator on the CPU; what the target says unless said.

    Raises:
        EngineCorrupt: bytes that are not what was exported. EngineMismatch: the wrong engine for this machine or for
        its own recipe; the message says what to export again.
    """
    bundle = load_bundle(folder)
    card = read_card(folder / CARD)
    expected = recipe_digest(bundle.recipe)
    if card.recipe_sha256 != expected:
        raise EngineMismatch(
            f"{folder}: the engine was exported from recipe {card.recipe_sha256[:12]}, the folder's is {expected[:12]};"
            " export the checkpoint again"
        )
    require_runs_here(card, version=builder_here(card.target)[1], architecture=architecture_here(card.target))
    return bundle, load_engine(folder, card, bundle.recipe, threads=threads), read_profile(folder)


def load_engine(folder: Path, card: EngineCard, recipe: StageRecipe, *, threads: int | None = None) -> RefittableEngine:
    """The engine of verified files; nothing is checked here."""
    if isinstance(card.target, OnnxTarget):
        return OnnxEngine(folder / MODEL, target=card.target, threads=threads)
    if isinstance(card.target, TensorRtTarget):
        engine = TensorRtEngine((folder / PLAN).read_bytes(), card.target, read_profile(folder))
        if card.target.build.weights == "refit_stripped":
            engine.plan.refit_from(folder / MODEL)
        return engine
    return torch_engine(_network(folder, recipe), card.target, card)


def torch_engine(network: STIV, target: TorchTarget, card: EngineCard) -> TorchEngine:
    if target.device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineMismatch(
            f"the engine is for device '{target.device}' and this machine shows no CUDA GPU; serve it there, or export"
            " for target 'cpu'"
        )
    placed = network.to(target.device, DTYPES[card.precision])
    return TorchEngine(placed, mode=target.mode, cuda_graphs=target.cuda_graphs)


def read_profile(folder: Path) -> ShapeProfile:
    """The shapes of the bundle's graph, which every target is proven for."""
    return profile_of(read_graph(folder / MODEL), folder / MODEL)


def _network(folder: Path, recipe: StageRecipe) -> STIV:
    """The network around the weights of the bundle's graph."""
    profile, weights = read_profile(folder), read_weights(folder / MODEL)
    network = STIV(
        recipe.network,
        latent_channels=profile.latent_channels,
        text_size=profile.text_size,
        pooled_size=profile.pooled_size,
    )
    missing = sorted(network.state_dict().keys() - weights.keys() - set(UNUSED))
    if missing:
        raise EngineCorrupt(f"{folder / MODEL} lacks weights of its network, {missing[:3]}; export it again")
    network.load_state_dict(weights, strict=False)
    return network

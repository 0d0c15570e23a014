"""One tiny network, exported once for all tests that look at its file: no two of its weights are equal, no branch is
closed, and one video is drawn in six steps. Test processes of one run share what is traced."""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from export.bundle import MODEL
from export.engines.onnx_runtime import OnnxEngine
from export.engines.weights import metadata, profile_of, read_graph
from export.onnx import OnnxExport, export_onnx, graph_weights, recipe_digest
from export.parity.inputs import ParityInputs
from export.profiles import ShapeProfile
from export.tracing import file_digest, weights_digest
from model.network.stiv import STIV
from model.recipe import StageRecipe

TEXT, POOLED = 24, 20


def make_recipe(**changes: object) -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "name": "tiny",
            "task": "ti2v",
            "network": {"hidden_size": 32, "depth": 3, "num_heads": 2},
            "video": {"num_frames": 8, "height": 32, "width": 32},
            "vae": {"latent_channels": 6, "spatial_factor": 4},
            "text": {"max_tokens": 12},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "sampling": {"solver": "euler", "stochastic": False, "num_steps": 6, "guidance_scale": 3.0},
            "gate": [{"metric": "loss", "op": "<", "bound": 1.0}],
            **changes,
        }
    )


def make_network(recipe: StageRecipe, seed: int = 0, *, text: int = TEXT, pooled: int = POOLED) -> STIV:
    torch.manual_seed(seed)
    network = STIV(recipe.network, latent_channels=recipe.vae.latent_channels, text_size=text, pooled_size=pooled)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@dataclass(slots=True, frozen=True)
class Exported:
    recipe: StageRecipe
    network: STIV
    file: OnnxExport
    engine: OnnxEngine

    @property
    def profile(self) -> ShapeProfile:
        return self.engine.profile

    @property
    def inputs(self) -> ParityInputs:
        return ParityInputs(self.profile, self.recipe)


Trace = Callable[[STIV, StageRecipe], OnnxExport]


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Exports a network, or gives the file that a test process of this run has written of the same one."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"

    def export(network: STIV, recipe: StageRecipe) -> OnnxExport:
        folder = shared / f"{recipe_digest(recipe)[:16]}-{weights_digest(graph_weights(network))[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                exported = export_onnx(network, folder / MODEL, recipe=recipe)
                (folder / "done").touch()
                return exported
        return _read(folder / MODEL)

    return export


def _read(path: Path) -> OnnxExport:
    graph = read_graph(path)
    return OnnxExport(path, file_digest(path), path.stat().st_size, 0.0, profile_of(graph, path), metadata(graph))


@pytest.fixture(scope="session")
def exported(trace: Trace) -> Exported:
    recipe = make_recipe()
    network = make_network(recipe)
    file = trace(network, recipe)
    return Exported(recipe, network, file, OnnxEngine(file.path, threads=1))

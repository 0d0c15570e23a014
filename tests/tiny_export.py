"""One tiny network, exported once for all tests that look at its file: no two of its weights are equal, no branch is
closed, and one video is drawn in six steps."""

from dataclasses import dataclass

import pytest
import torch

from export.bundle import MODEL
from export.engines.onnx_runtime import OnnxEngine
from export.onnx import OnnxExport, export_onnx
from export.parity.inputs import ParityInputs
from export.profiles import ShapeProfile
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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    recipe = make_recipe()
    network = make_network(recipe)
    file = export_onnx(network, tmp_path_factory.mktemp("export") / MODEL, recipe=recipe)
    return Exported(recipe, network, file, OnnxEngine(file.path, threads=1))

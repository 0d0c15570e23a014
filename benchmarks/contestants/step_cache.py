"""Videos of a briefly trained network with and without a step cache, at equal seeds.

It owns the network, trained here on moving shapes unless a store holds one, and the clips; it knows nothing of engines.
"""

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from infra.registry.registry import Registry
from infra.store.location import open_store
from infra.trained import fetch_trained
from model.checkpoint import folder as checkpoint
from model.conditioning import Conditions
from model.config import CorpusConfig
from model.data.corpus import build_corpus, fit_codec
from model.generation import Clip, ClipGenerator
from model.measures.similarity import psnr
from model.recipe import StageRecipe
from model.training.evaluate import load_network, make_generator
from model.training.loop import train
from model.training.run import RunFolders

CAPTIONS = tuple(
    f"a {color} {shape} moves {way}"
    for color in ("red", "green", "blue")
    for shape in ("circle", "square")
    for way in ("left", "right")
)
THRESHOLD = 0.12
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""The one rank that trains, in this process."""
STEPS = 400
"""Of training: enough for shapes and their ways, so that a trajectory bends as a trained network's does."""


def trained_generator(store: Path | None, work: Path, *, quick: bool) -> ClipGenerator:
    """Of `t2v/promoted` in `store`; without one, of a network trained in `work`, in a few minutes on two cores."""
    if store is not None:
        return fetch_trained(Registry(open_store(str(store))), "t2v/promoted", work).generator("cpu")
    recipe = _recipe(4 if quick else STEPS)
    corpus = build_corpus(work / "corpus", CorpusConfig(shapes=64 if quick else 1200, heldout_shapes=16))
    fit_codec(corpus, recipe.vae, recipe.video, work / "codec")
    folders = RunFolders(data=work / "corpus", codec=work / "codec", run=work / "run")
    os.environ.update(RANK)
    train(recipe, folders)
    weights = checkpoint.latest(folders.checkpoints)
    assert weights is not None, "a finished run has a checkpoint"
    return make_generator(recipe, load_network(recipe, weights), work / "codec")


def step_cache_figures(generator: ClipGenerator, *, clips: int, turns: int) -> dict[str, float]:
    """Speed-up in seconds and in rows of the network, and PSNR against the sampler without a cache."""
    steps, captions = generator.recipe.sampling.num_steps, CAPTIONS[:clips]
    both = [(drawn(generator, captions), drawn(generator, captions, step_cache=THRESHOLD)) for _ in range(turns)]
    (plain, rows, _), (cached, fewer_rows, _) = both[0]
    shorter, _, _ = drawn(generator, captions, num_steps=round(steps * fewer_rows / rows))
    return {
        "step_cache_threshold": THRESHOLD,
        "step_cache_speedup": statistics.median(without[2] / with_cache[2] for without, with_cache in both),
        "step_cache_call_ratio": rows / fewer_rows,
        "step_cache_psnr_db": _psnr(cached, plain),
        "fewer_steps_psnr_db": _psnr(shorter, plain),
    }


def drawn(generator: ClipGenerator, captions: tuple[str, ...], **sampling: float) -> tuple[list[Clip], int, float]:
    """Clips, the rows that the network saw, and seconds."""
    recipe, rows = generator.recipe, 0
    changed = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=sampling)})
    network = generator.velocity

    def counted(latents: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        nonlocal rows
        rows += len(latents)
        return network(latents, t, conditions)  # pyright: ignore[reportCallIssue, reportUnknownVariableType]

    began = time.perf_counter()
    found = replace(generator, velocity=counted, recipe=changed)(captions, seed=1)
    return found, rows, time.perf_counter() - began


def _psnr(found: list[Clip], wanted: list[Clip]) -> float:
    """Mean over clips, dB."""
    return statistics.fmean(psnr(a, b) for a, b in zip(found, wanted, strict=True))


def _recipe(steps: int) -> StageRecipe:
    """The tiny curriculum's network and sampling (`flows/recipes/tiny`), trained on its own and more briefly."""
    network = {"hidden_size": 160, "depth": 4, "num_heads": 5, "positions": "rope_sinusoid"}
    batch = {"global_batch_size": 16, "micro_batch_size": 16, "ema_decay": 0.97, "checkpoint_every": steps}
    return StageRecipe.model_validate(
        {
            "name": "t2v",
            "task": "t2v",
            "network": network,
            "video": {"num_frames": 8, "height": 32, "width": 32},
            "vae": {"latent_channels": 13, "spatial_factor": 4, "whitening": 0.25},
            "text": {"max_tokens": 32},
            "flow": {"shift": 4.0, "logit_std": 1.4},
            "optimizer": {"lr": 2.5e-3, "warmup_steps": min(30, steps), "decay_steps": steps // 2},
            "training": {"steps": steps, "mask_ratio": 0.25, **batch},
            "sampling": {"solver": "euler", "stochastic": False, "num_steps": 32, "guidance_scale": 3.0},
            "gate": [{"metric": "heldout_loss", "op": "<", "bound": 1.0}],
        }
    )

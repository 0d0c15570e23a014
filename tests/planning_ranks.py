"""A rank of test_planning_memory, started by torchrun's variables: trains a few steps of each case and tells the most
bytes that tensors held at once, as torch counts them on a CPU."""

import gc
import json
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from model.network.stiv import STIV
from model.optim.choice import make_optimizer
from model.optim.ema import Ema
from model.planning.phase import latents_of, text_widths
from model.recipe import StageRecipe
from model.training.parallel import ParallelEngine, Place, join, leave, parameter_groups


def train(recipe: StageRecipe, place: Place, steps: int = 2) -> None:
    text, pooled = text_widths(recipe)
    network = STIV(recipe.network, latent_channels=recipe.vae.latent_channels, text_size=text, pooled_size=pooled)
    optimizer = make_optimizer(parameter_groups(network), recipe.optimizer)
    engine = ParallelEngine(network, optimizer, recipe.training, place)
    ema = Ema(engine.masters, recipe.training.ema_decay)
    clip = torch.randn(1, *latents_of(recipe))
    words, mask = torch.randn(1, 8, text), torch.ones(1, 8, dtype=torch.bool)
    for step in range(steps):
        velocity = engine(clip, torch.rand(1), words, mask, torch.randn(1, pooled), torch.ones(1, 6))
        engine.backward((velocity - clip).square().mean())
        engine.step()
        ema.update(step)


def main() -> None:
    recipes = [StageRecipe.model_validate(tree) for tree in json.loads(sys.argv[1])]
    place = join(recipes[0].training)
    peaks: list[int] = []
    for recipe in recipes:
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            train(recipe, place)
        held = peak = 0
        profiler: Any = profiled.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    print(json.dumps(peaks))
    leave()


if __name__ == "__main__":
    main()

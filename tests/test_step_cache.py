"""Step caching: off it changes nothing, a row's cache is its own, and what is not computed is foretold well."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.conditioning import Conditions, first_frames
from model.config import SamplingConfig
from model.sampler import Guidance, ImageCondition, Step, cached_step, no_image, sample_steps, timestep_schedule
from model.step_cache import StepCache

FRAME = (3, 2, 4, 4)


class Flow:
    """A denoiser whose data bends with time; it treats every element alone, so rows cannot see each other."""

    def __init__(self, bend: float = 1.0) -> None:
        self.bend = bend
        self.calls: list[tuple[Tensor, int]] = []

    def __call__(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        self.calls.append((t, len(x)))
        at = t.view(-1, 1, 1, 1, 1)
        asked = given.text.mean((1, 2)).view(-1, 1, 1, 1, 1)
        data = asked.sin() + self.bend * (0.1 * torch.tanh(x) + (2 * at + asked).sin())
        return (data - x) / (1 - at)

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.calls)


def conditions(values: Tensor) -> Conditions:
    rows = len(values)
    return Conditions(
        values.view(-1, 1, 1), torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 1), torch.zeros(rows, 6)
    )


def guidance(rows: int) -> Guidance:
    return Guidance(conditions(torch.arange(rows) / 3), conditions(-torch.ones(rows)), 1.5 + torch.arange(rows))


def normal(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *FRAME, generator=torch.Generator().manual_seed(seed))


def drawn(flow: Flow, config: SamplingConfig, rows: int = 2, *, image: bool = False) -> Tensor:
    noise = normal(rows)
    given = ImageCondition(normal(rows, 1), first_frames(rows, 3), noise) if image else no_image(noise)
    generator = torch.Generator().manual_seed(5)
    *_, latents = sample_steps(flow, noise, guidance(rows), given, config, generator=generator)
    return latents


def sampling(threshold: float = 0.0, steps: int = 24, **changes: object) -> SamplingConfig:
    chosen = {"solver": "euler", "stochastic": False, "num_steps": steps, "step_cache": threshold}
    chosen |= {"renormalize": False, **changes}
    return SamplingConfig.model_validate(chosen)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_threshold_of_zero_computes_everything_to_the_bit(solver: str, stochastic: bool) -> None:
    config = sampling(solver=solver, stochastic=stochastic, steps=6)
    flow, plain = Flow(), Flow()
    wanted = drawn(plain, config)
    noise = normal(2)
    generator = torch.Generator().manual_seed(5)
    latents, cache = noise, StepCache.empty(noise, torch.zeros(2))
    for start, end in pairwise(timestep_schedule(6)):
        added = torch.randn(noise.shape, generator=generator) if stochastic and end < 1 else None
        step = Step(start.expand(2), end.expand(2), config.solver, added)
        latents, cache = cached_step(flow, latents, step, guidance(2).configured(config), no_image(noise), cache)
    assert torch.equal(latents, wanted)
    assert flow.rows == plain.rows and cache.foretold.sum() == 0


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_cache_calls_the_network_less_and_stays_near(solver: str, stochastic: bool) -> None:
    config = sampling(solver=solver, stochastic=stochastic)
    plain, cached = Flow(), Flow()
    wanted = drawn(plain, config, image=True)
    found = drawn(cached, config.model_copy(update={"step_cache": 0.1}), image=True)
    assert cached.rows < 0.6 * plain.rows
    assert (found - wanted).square().mean().sqrt() < 0.1 * wanted.std()
    assert torch.equal(found[:, 0], wanted[:, 0]), "given frames come back as they were given"
    assert torch.equal(found, drawn(Flow(), config.model_copy(update={"step_cache": 0.1}), image=True))


def test_a_higher_threshold_computes_less_and_strays_further() -> None:
    exact = drawn(Flow(), sampling())
    rows: list[int] = []
    errors: list[float] = []
    for threshold in (0.01, 0.05, 0.3):
        flow = Flow()
        errors.append((drawn(flow, sampling(threshold)) - exact).abs().max().item())
        rows.append(flow.rows)
    assert rows == sorted(rows, reverse=True) and errors == sorted(errors)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_first_two_velocities_and_the_last_step_are_computed_whatever_the_threshold(solver: str) -> None:
    flow = Flow(bend=0.0)
    drawn(flow, sampling(0.999, steps=10, solver=solver))
    asked = [round(float(t[0]), 6) for t, _ in flow.calls]
    assert asked[:2] == [0.0, 0.1] and asked[-1] == 0.9 and len(asked) < 6


def test_data_that_moves_on_a_line_is_foretold_exactly() -> None:
    start, speed = normal(2, 7), 0.3 * normal(2, 8)
    rows = 0

    def velocity(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        nonlocal rows
        rows += len(x)
        at = t.view(-1, 1, 1, 1, 1)
        passes = len(x) // 2
        return (start.repeat(passes, 1, 1, 1, 1) + at * speed.repeat(passes, 1, 1, 1, 1) - x) / (1 - at)

    found: list[Tensor] = []
    for threshold in (0.0, 0.9):
        rows = 0
        *_, latents = sample_steps(velocity, normal(2), guidance(2), no_image(normal(2)), sampling(threshold))
        found.append(latents)
    assert rows == 4 * 3, "two rows, two passes each, at the two first and at the last step"
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_rows_that_are_all_foretold_make_no_call() -> None:
    flow = Flow(bend=0.1)
    noise, given = normal(2), no_image(normal(2))
    cache = StepCache.empty(noise, torch.tensor([0.9, 0.9]))
    latents = noise
    seen: list[int] = []
    for start, end in pairwise(timestep_schedule(8)):
        before = len(flow.calls)
        step = Step(start.expand(2), end.expand(2))
        latents, cache = cached_step(flow, latents, step, replace(guidance(2), renormalize=False), given, cache)
        seen.append(len(flow.calls) - before)
    assert seen == [1, 1, 0, 0, 0, 0, 0, 1]
    assert cache.computed.tolist() == [3, 3] and cache.foretold.tolist() == [5, 5]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0, 0.5), st.integers(2, 9), st.integers(0, 3)), min_size=2, max_size=4),
    solver=st.sampled_from(["euler", "heun"]),
)
def test_a_row_does_not_depend_on_its_batch_mates_nor_on_when_they_join(
    rows: list[tuple[float, int, int]], solver: str
) -> None:
    """Rows of (threshold, steps, the step of the batch at which they join) together, and each alone."""
    whole = guidance(len(rows))
    noise = normal(len(rows))
    schedules = [timestep_schedule(steps) for _, steps, _ in rows]

    def advanced(places: list[int], latents: list[Tensor], caches: list[StepCache], at: list[int]) -> int:
        index = torch.tensor(places)
        flow = Flow()
        step = Step(
            torch.stack([schedules[place][at[place]] for place in places]),
            torch.stack([schedules[place][at[place] + 1] for place in places]),
            solver,  # pyright: ignore[reportArgumentType]
        )
        moved, cache = cached_step(
            flow,
            torch.cat([latents[place] for place in places]),
            step,
            whole.rows(index),
            no_image(noise[index]),
            StepCache.stack([caches[place] for place in places]),
        )
        for order, place in enumerate(places):
            latents[place], caches[place] = moved[order : order + 1], cache.rows(slice(order, order + 1))
            at[place] += 1
        return flow.rows

    def start() -> tuple[list[Tensor], list[StepCache], list[int]]:
        latents = [noise[place : place + 1] for place in range(len(rows))]
        caches = [StepCache.empty(latents[place], torch.tensor([rows[place][0]])) for place in range(len(rows))]
        return latents, caches, [0] * len(rows)

    latents, caches, at = start()
    turn = network_rows = 0
    while any(at[place] < steps for place, (_, steps, _) in enumerate(rows)):
        there = [place for place, (_, steps, joins) in enumerate(rows) if joins <= turn and at[place] < steps]
        network_rows += advanced(there, latents, caches, at) if there else 0
        turn += 1

    alone, own_caches, own_at = start()
    own_rows = 0
    for place, (_, steps, _) in enumerate(rows):
        for _ in range(steps):
            own_rows += advanced([place], alone, own_caches, own_at)
    for place in range(len(rows)):
        assert torch.equal(latents[place], alone[place])
        asked = rows[place][1] * (2 if solver == "heun" else 1)
        assert caches[place].computed + caches[place].foretold == asked
    assert network_rows == own_rows == 2 * sum(int(cache.computed) for cache in caches)


def test_an_estimate_that_is_no_number_is_not_relied_on() -> None:
    flow = Flow()
    noise = normal(1)
    cache = replace(
        StepCache.empty(noise, torch.tensor([0.9])),
        computed=torch.tensor([5]),
        rate=torch.tensor([torch.nan]),
    )
    step = Step(torch.tensor([0.5]), torch.tensor([0.6]))
    _, after = cached_step(flow, noise, step, guidance(1), no_image(noise), cache)
    assert after.computed == 6 and len(flow.calls) == 1

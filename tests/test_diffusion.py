"""Diffusion as a flow: its schedule and target against diffusers, DDIM, and Gaussian data with the answer known."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from model.conditioning import Conditions
from model.config import FlowConfig, SamplingConfig
from model.diffusion import as_flow, flow_time, flow_velocity, network_time
from model.flow_matching import interpolate, path, velocity_target
from model.sampler import Guidance, Step, denoise_step, no_image, sample_steps

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

SHAPE = (2, 3, 4, 4, 4)
DIFFUSION = FlowConfig(objective="diffusion", timestep_distribution="uniform")


def scheduler(**choices: Any) -> Any:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        **choices,
    )


def step_of(t: Tensor) -> Tensor:
    """The schedule's step, 0 to 999, that the network is told as time t."""
    return ((1 - t) * 999).round().long()


def time_of(step: Tensor) -> Tensor:
    return 1 - step / 999


def guidance(rows: int) -> Guidance:
    given = Conditions(
        torch.zeros(rows, 1, 1), torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 1), torch.zeros(rows, 6)
    )
    return Guidance(given, given, torch.ones(rows), kind="none")


def test_the_noisy_latents_and_the_target_are_those_of_diffusers() -> None:
    data, noise = torch.randn(4, 3, 2, 4, 4), torch.randn(4, 3, 2, 4, 4)
    steps = torch.tensor([0, 17, 500, 999])
    noisy, target = path(DIFFUSION, data, noise, time_of(steps))
    torch.testing.assert_close(noisy, scheduler().add_noise(data, noise, steps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target, scheduler().get_velocity(data, noise, steps), atol=1e-5, rtol=1e-5)


def test_without_the_choice_the_path_is_the_flow() -> None:
    data, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.1, 0.7])
    noisy, target = path(FlowConfig(), data, noise, t)
    assert torch.equal(noisy, interpolate(data, noise, t)) and torch.equal(target, velocity_target(data, noise))
    predict = as_flow(lambda x, t, _: x)
    assert flow_velocity(FlowConfig(), predict) is predict
    assert flow_velocity(DIFFUSION, predict) is not predict


def test_times_go_to_flow_times_and_back_and_stop_where_the_schedule_does() -> None:
    t = torch.rand(500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network_time(flow_time(t)), t, atol=2e-6, rtol=0)
    ends = flow_time(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.0640, 0.9717], abs=1e-4)
    assert network_time(torch.tensor([0.0, 0.05, 0.98, 1.0])).tolist() == [0, 0, 1, 1]
    assert flow_time(torch.linspace(0, 1, 5000)).diff().min() > 0


def test_the_exact_prediction_becomes_the_exact_flow_velocity() -> None:
    data, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.3, 0.8])
    x = interpolate(data, noise, flow_time(t))
    seen: list[Tensor] = []

    def network(z: Tensor, told: Tensor, _: Conditions) -> Tensor:
        seen.extend([z, told])
        return path(DIFFUSION, data, noise, t)[1]

    velocity = as_flow(network)(x, flow_time(t), guidance(2).conditional)
    torch.testing.assert_close(velocity, data - noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0], path(DIFFUSION, data, noise, t)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[1], t, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [5, 20])
def test_euler_steps_are_those_of_ddim(steps: int) -> None:
    """A network that is no exact answer, so that every step counts."""
    ddim = scheduler(set_alpha_to_one=True, timestep_spacing="leading")
    ddim.set_timesteps(steps)

    def predict(z: Tensor, step: Tensor) -> Tensor:
        return torch.sin(2 * z + step.reshape(-1, 1, 1, 1, 1) / 300).roll(1, dims=-1)

    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    kept = ddim.alphas_cumprod[ddim.timesteps].double()
    a, s = kept.sqrt(), (1 - kept).sqrt()
    times = torch.cat([a / (a + s), torch.ones(1)]).float()
    x = z / (a[0] + s[0]).float()

    velocity = as_flow(lambda x, t, _: predict(x, step_of(t)))
    for place, step in enumerate(ddim.timesteps):
        z = ddim.step(predict(z, step), step, z, eta=0.0).prev_sample
        start, end = times[place].expand(2), times[place + 1].expand(2)
        x = denoise_step(velocity, x, Step(start, end), guidance(2), no_image(x))
        left = 1.0 if place + 1 == steps else (a[place + 1] + s[place + 1]).item()
        torch.testing.assert_close(x * left, z, atol=2e-4, rtol=1e-4)


def best_prediction(mean: float, deviation: float) -> Any:
    """E[v | z] where data is N(mean, deviation^2): what a network that has learnt everything says."""

    def network(z: Tensor, t: Tensor, _: Conditions) -> Tensor:
        kept = scheduler().alphas_cumprod[step_of(t)].reshape(-1, 1, 1, 1, 1)
        a, s = kept.sqrt(), (1 - kept).sqrt()
        off = (z - a * mean) / (a**2 * deviation**2 + s**2)
        data, noise = mean + a * deviation**2 * off, s * off
        return a * noise - s * data

    return network


@pytest.mark.parametrize(("solver", "stochastic"), [("euler", False), ("heun", False), ("euler", True), ("heun", True)])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.0, 0.4), (1.5, 0.5)])
def test_samples_have_the_mean_and_spread_of_the_data(
    solver: str, stochastic: bool, mean: float, deviation: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 8, 8, 8, generator=rng)
    config = SamplingConfig(solver=solver, stochastic=stochastic, num_steps=60, guidance="none")  # pyright: ignore[reportArgumentType]
    velocity = as_flow(best_prediction(mean, deviation))
    *_, drawn = sample_steps(velocity, noise, guidance(4), no_image(noise), config, generator=rng)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.05)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.08)

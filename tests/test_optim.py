"""AdaFactor against the paper's rule written out slowly, AdamW as torch's, their state, the schedule, the average."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from model.config import OptimizerConfig
from model.optim.adafactor import AdaFactor
from model.optim.choice import learning_rate, make_optimizer
from model.optim.ema import Ema
from model.optim.fragment import Fragment
from model.optim.optimizer import AdamW, StageOptimizer
from model.optim.rule import corrected_beta2

SHAPES = [(6, 5), (6, 5), (7,), (3, 2, 2, 2), (), (1, 4), (5, 6)]


def slow_adafactor(
    weight: np.ndarray, gradients: list[np.ndarray], *, lr: float, beta1: float, beta2: float, clip: float
) -> np.ndarray:
    """The rule as it stands in the literature, one tensor, float64."""
    matrix = weight.reshape(weight.shape[0], -1) if weight.ndim >= 2 else weight.reshape(-1)
    row = column = momentum = 0.0
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.reshape(matrix.shape)
        b2 = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        square = g * g + 1e-30
        if g.ndim == 2:
            row = b2 * row + (1 - b2) * square.mean(axis=1, keepdims=True)
            column = b2 * column + (1 - b2) * square.mean(axis=0, keepdims=True)
            u = g / np.sqrt(row / row.mean()) / np.sqrt(column)
        else:
            column = b2 * column + (1 - b2) * square
            u = g / np.sqrt(column)
        u = u / max(1.0, np.sqrt((u * u).mean()) / clip)
        momentum = beta1 * momentum + (1 - beta1) * lr * u
        matrix = matrix - momentum
    return matrix.reshape(weight.shape)


def make_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make_gradients(steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    """Uneven on purpose: scales differ between tensors, rows and steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator) * 10 ** (place - 3) * (1 + step) for place, shape in enumerate(SHAPES)]
        for step in range(steps)
    ]


def whole(parameters: Mapping[str, nn.Parameter]) -> dict[torch.Tensor, list[Fragment]]:
    return {p: [Fragment(name, p.shape, 0, p.detach().view(-1))] for name, p in parameters.items()}


def named_state(optimizer: StageOptimizer) -> dict[str, torch.Tensor]:
    kept = [run for runs in optimizer._held.values() for run in runs]
    pieces = optimizer.state_of(kept)
    return {piece.name: piece.values for piece in pieces}


def run(optimizer: StageOptimizer, parameters: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_adafactor_is_the_rule_written_out(beta1: float, clip: float) -> None:
    parameters, gradients = make_parameters(), make_gradients(12)
    begun = [p.detach().double().numpy().copy() for p in parameters]
    run(AdaFactor(parameters, lr=0.01, beta1=beta1, beta2=0.99, clip_threshold=clip), parameters, gradients)
    for place, (parameter, start) in enumerate(zip(parameters, begun, strict=True)):
        given = [step[place].double().numpy() for step in gradients]
        expected = slow_adafactor(start, given, lr=0.01, beta1=beta1, beta2=0.99, clip=clip)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_the_first_step_moves_a_vector_by_the_sign_of_its_gradient() -> None:
    vector = nn.Parameter(torch.zeros(3))
    vector.grad = torch.tensor([1e-6, -5.0, 0.0])
    AdaFactor([vector], lr=0.5, beta1=0.0).step()
    torch.testing.assert_close(vector.detach(), torch.tensor([-0.5, 0.5, 0.0]))


def test_a_gradient_of_zero_moves_nothing_and_breaks_nothing() -> None:
    matrix = nn.Parameter(torch.ones(4, 3))
    optimizer = AdaFactor([matrix], lr=0.1)
    for _ in range(3):
        matrix.grad = torch.zeros_like(matrix)
        optimizer.step()
    assert torch.equal(matrix.detach(), torch.ones(4, 3))
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert torch.isfinite(matrix).all()


def test_the_second_moment_of_a_matrix_is_its_rows_and_columns() -> None:
    matrix, vector = nn.Parameter(torch.zeros(64, 48)), nn.Parameter(torch.zeros(10))
    optimizer = AdaFactor([matrix, vector], lr=0.1)
    optimizer.hold(whole({"w": matrix, "b": vector}))
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    optimizer.step()
    state = named_state(optimizer)
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    assert sizes == {"row:w": 64, "column:w": 48, "momentum:w": 64 * 48, "column:b": 10, "momentum:b": 10}
    second_moment = sum(t.numel() * t.element_size() for name, t in state.items() if not name.startswith("momentum"))
    assert second_moment == 4 * (64 + 48 + 10)


def test_parameters_of_one_shape_step_as_each_would_alone() -> None:
    gradients = make_gradients(5)
    together, alone = make_parameters(), make_parameters()
    run(AdaFactor(together, lr=0.01), together, gradients)
    for place, parameter in enumerate(alone):
        run(AdaFactor([parameter], lr=0.01), [parameter], [[step[place]] for step in gradients])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_a_gradient_rests_and_keeps_its_state() -> None:
    first, second = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = AdaFactor([first, second], lr=0.1, beta1=0.5)
    optimizer.hold(whole({"a": first, "b": second}))
    first.grad, second.grad = torch.ones(4, 3), torch.ones(4, 3)
    optimizer.step()
    held = second.detach().clone()
    momentum = named_state(optimizer)["momentum:b"].clone().view(4, 3)
    second.grad = None
    optimizer.step()
    assert torch.equal(second.detach(), held)
    second.grad = torch.zeros(4, 3)
    optimizer.step()
    torch.testing.assert_close(held - second.detach(), 0.5 * momentum)


@pytest.mark.parametrize("kind", ["adafactor", "adamw"])
def test_saved_state_goes_on_bit_for_bit(kind: str) -> None:
    gradients = make_gradients(6)
    config = OptimizerConfig(type=kind, lr=0.01)  # pyright: ignore[reportArgumentType]
    straight = make_parameters()
    run(make_optimizer(straight, config), straight, gradients)

    first = make_parameters()
    optimizer = make_optimizer(first, config)
    optimizer.hold(whole({str(n): p for n, p in enumerate(first)}))
    run(optimizer, first, gradients[:3])
    saved = {name: values.clone() for name, values in named_state(optimizer).items()}
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = make_optimizer(second, config)
    resumed.hold(whole({str(n): p for n, p in enumerate(second)}))
    resumed.load_state(lambda name, start, stop: saved[name][start:stop], 3)
    run(resumed, second, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_half_precision_momentum_halves_the_state_and_stays_close() -> None:
    gradients = make_gradients(12)
    states: dict[str, int] = {}
    ends: dict[str, list[nn.Parameter]] = {}
    for precision in ("fp32", "bf16"):
        parameters = ends[precision] = make_parameters()
        config = OptimizerConfig(lr=0.01, momentum=precision)
        optimizer = make_optimizer(parameters, config)
        optimizer.hold(whole({str(n): p for n, p in enumerate(parameters)}))
        run(optimizer, parameters, gradients)
        momentum = [x for name, x in named_state(optimizer).items() if name.startswith("momentum")]
        states[precision] = sum(x.numel() * x.element_size() for x in momentum)
    assert states["bf16"] * 2 == states["fp32"]
    for a, b, begun in zip(ends["fp32"], ends["bf16"], make_parameters(), strict=True):
        moved = (a - begun).abs().max().item()
        assert 0 < (a - b).abs().max().item() < 0.02 * moved


def test_the_recipe_names_the_optimizer_and_its_betas() -> None:
    gradients, config = make_gradients(4), OptimizerConfig(type="adamw", lr=0.02, beta1=0.8, beta2=0.95)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(ours, config)
    assert isinstance(optimizer, AdamW)
    run(optimizer, ours, gradients)
    plain = torch.optim.Adam(theirs, lr=0.02, betas=(0.8, 0.95))
    for step in gradients:
        for parameter, gradient in zip(theirs, step, strict=True):
            parameter.grad = gradient.clone()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate == 0.5 == optimizer.param_groups[0]["lr"]
    factored = make_optimizer(ours, OptimizerConfig(beta1=0.7, beta2=0.9, clip_threshold=2.0))
    assert isinstance(factored, AdaFactor)
    assert factored.defaults == {"lr": 2e-4, "beta1": 0.7, "beta2": 0.9, "clip_threshold": 2.0, "step": 0}


def test_a_cut_parameter_without_ranks_for_the_rest_is_refused() -> None:
    flat = nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match="'w' is cut"):
        AdaFactor([flat], lr=0.1).hold({flat: [Fragment("w", torch.Size((4, 3)), 2, flat.detach()[:6])]})


def test_state_by_position_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="state_of"):
        AdaFactor([nn.Parameter(torch.zeros(2))], lr=0.1).state_dict()


def test_beta2_is_corrected_to_the_mean_of_what_was_seen() -> None:
    assert corrected_beta2(0.999, 1) == 0.0
    assert corrected_beta2(0.999, 2) == pytest.approx(0.5, abs=1e-3)
    assert corrected_beta2(0.999, 10**6) == pytest.approx(0.999)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay_steps=5)
    rates = [learning_rate(config, step, 20) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14:] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    paper = OptimizerConfig(lr=2e-4, warmup_steps=0)
    assert {learning_rate(paper, step, 10) for step in range(10)} == {2e-4}


def test_the_average_follows_the_declared_decay() -> None:
    weight = torch.ones(1)
    ema = Ema([Fragment("weight", weight.shape, 0, weight)], decay=0.9)
    weight.fill_(2.0)
    expected = 1.0
    for step in range(200):
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * 2.0
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(1000) == 0.9
    assert ema.averages[0].values.item() == pytest.approx(expected, rel=1e-5)


def test_averages_are_taken_up_run_by_run() -> None:
    saved = torch.arange(12.0)
    runs = [Fragment("w", torch.Size((4, 3)), 5, torch.zeros(4))]
    ema = Ema(runs, decay=0.9)
    ema.load(lambda name, start, stop: saved[start:stop])
    assert ema.averages[0].values.tolist() == [5.0, 6.0, 7.0, 8.0]
    assert runs[0].values.tolist() == [0.0] * 4

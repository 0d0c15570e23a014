"""Recomputed and compiled blocks: the same numbers under the same names, with less kept."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.network import recompute
from model.network.recompute import ATTENTIONS, compile_blocks, recompute_blocks
from model.network.stiv import STIV
from tests.test_network import inputs, network, opened

SIDE, TOKENS, WIDTH = 24, 144, 64
"""Enough that a CPU's spatial attention is SDPA; attention along the few frames is written out."""
CHOICES: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "images": {"temporal_attention": False},
    "every other choice": {
        "shared_modulation": False,
        "temporal_modulation": True,
        "causal_temporal_attention": True,
        "sandwich_norm": False,
        "qk_norm": False,
    },
}


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    # The compiler looks at `.grad` of what it is given, and PyTorch warns of that.
    quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    return pytest.mark.usefixtures("compiler")(quiet(test))


def kept(batch: int, count: int = TOKENS // 2) -> Tensor:
    draw = torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(3))
    return draw.argsort(dim=1)[:, :count].sort(dim=1).values


def train(net: STIV, *, masked: bool, frames: int = 4, length: int = 5) -> dict[str, Tensor]:
    """Loss and gradients by name after one backward pass."""
    net.zero_grad()
    velocity = net(**inputs(frames=frames, side=SIDE, length=length), keep=kept(2) if masked else None)
    loss = velocity.square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """To within `tolerance` of each tensor's largest value."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * other[name].abs().max(), name


class Watch(TorchDispatchMode):
    """Counts calls of attention kernels, and the bytes of activations alive."""

    def __init__(self, net: STIV) -> None:
        super().__init__()
        self.attentions: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: dict[int, object] = {weight.untyped_storage()._cdata: weight for weight in net.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTIONS:
            self.attentions["self" if args[0].shape[-2] == args[1].shape[-2] else "cross"] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def held(depth: int, *, recomputed: bool, masked: bool) -> tuple[int, int]:
    """Bytes of activations after the forward pass, and at the most until the end of backward."""
    net = opened(network(depth=depth, unmasked_depth=0, hidden_size=WIDTH)).train()
    if recomputed:
        recompute_blocks(net)
    with Watch(net) as watch:
        velocity = net(**inputs(1, side=SIDE), keep=kept(1) if masked else None)
        after = watch.live
        velocity.square().mean().backward()
    return after, watch.peak


@pytest.fixture
def compiler() -> Iterator[None]:
    limit = torch.compiler.config.recompile_limit
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.compiler.config.recompile_limit = limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("choices", CHOICES)
def test_recomputed_gradients_are_the_plain_ones_to_the_bit(choices: str, masked: bool, dtype: torch.dtype) -> None:
    net = opened(network(**CHOICES[choices])).to(dtype).train()
    plain = train(net, masked=masked)
    recompute_blocks(net)
    assert_same(train(net, masked=masked), plain, tolerance=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_recomputed_block_keeps_its_input_and_what_self_attention_gave(masked: bool) -> None:
    tokens = 2 * (TOKENS // 2 if masked else TOKENS) * WIDTH * 4  # bytes of a clip's tokens, 2 frames
    one, two = (held(depth, recomputed=True, masked=masked)[0] for depth in (2, 4))
    assert 2 <= (two - one) / (2 * tokens) < 2.1  # 2, and the softmax's scale of each row
    one, two = (held(depth, recomputed=False, masked=masked)[0] for depth in (2, 4))
    assert (two - one) / (2 * tokens) > 25


def test_recomputing_cuts_the_peak_of_a_deep_network_to_less_than_a_third() -> None:
    assert held(12, recomputed=True, masked=False)[1] < held(12, recomputed=False, masked=False)[1] / 3


def test_self_attention_is_computed_once_and_cross_attention_again() -> None:
    net = opened(network(depth=3)).train()
    recompute_blocks(net)
    with Watch(net) as watch:
        train(net, masked=True, length=70)
    assert watch.attentions == {"self": 3, "cross": 6}


def test_what_hooks_compute_in_between_need_not_come_again_as_it_came() -> None:
    """Such as weights that ZeRO 3 puts together."""
    net, calls = opened(network()).train(), count()
    plain = train(net, masked=True, length=70)
    recompute_blocks(net)

    def hook(*arguments: object) -> None:
        for _ in range(next(calls)):
            torch.cat([torch.ones(1), torch.ones(1)])

    for block in net.blocks:
        block.get_submodule("feed_forward").register_forward_pre_hook(hook)
    assert_same(train(net, masked=True, length=70), plain, tolerance=0)


def test_recomputing_changes_nothing_where_no_gradient_is_wanted() -> None:
    net, given = opened(network()), inputs()
    plain = net(**given).detach()
    recompute_blocks(net)
    with torch.no_grad():
        assert torch.equal(net(**given), plain)


@compiles
def test_compiled_blocks_train_as_plain_ones_under_the_same_names() -> None:
    net = opened(network()).train()
    plain, names = [train(net, masked=masked) for masked in (True, False)], list(net.state_dict())
    recompute_blocks(net)
    compile_blocks(net, "aot_eager")
    for masked, expected in zip((True, False), plain, strict=True):
        assert_same(train(net, masked=masked), expected, tolerance=2e-6)
    assert list(net.state_dict()) == names


@compiles
def test_a_graph_is_compiled_for_each_shape_and_one_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "GRAPHS", 2)
    net = opened(network(depth=4)).train()
    compile_blocks(net, "eager")
    train(net, masked=True)  # two shapes in four blocks
    train(net, masked=False)
    with pytest.raises(FailOnRecompileLimitHit):
        train(net, masked=True, frames=6)


@pytest.mark.slow
@compiles
def test_inductor_trains_as_plain_blocks_do() -> None:
    net = opened(network(depth=4)).train()
    plain = [train(net, masked=masked) for masked in (True, False)]
    recompute_blocks(net)
    compile_blocks(net)
    for masked, expected in zip((True, False), plain, strict=True):
        assert_same(train(net, masked=masked), expected, tolerance=5e-6)

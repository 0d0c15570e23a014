"""Quantised graphs: linear layers of the blocks in int8 or fp8, by scales calibrated on real latents.

It owns which products are quantised, their scales and the Q/DQ nodes around them, which ONNX Runtime and TensorRT both
fuse; it knows nothing of runtimes or of whether the result is good enough (`parity` proves that).

Weights are symmetric: int8 a scale for each output channel, fp8 one for all. Activations have one scale a layer, fixed
when the graph is written: scales found anew in each call would let a video depend on its batch mates. Norms, RoPE,
softmax, attention's own products, the condition and the network's two ends stay as they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.engines.torch import TorchEngine
from export.guidance import velocity_of
from export.parity.inputs import ParityInputs
from export.precision import load, tensor
from export.tracing import EXTERNAL_ABOVE, save
from model.network.stiv import STIV
from model.sampler import PASSES, sample_steps

Kind = Literal["int8", "fp8"]
LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TYPES: dict[Kind, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
CALIBRATION_VIDEOS = 4
CALIBRATION_SEED = 1009
"""Not the proof's: what is calibrated on is not what is measured."""
KEPT = 4096
"""Values of a layer's input that are kept a call, beside its largest."""
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the largest value that int8 is tried to end at; what lies above is clipped."""


@dataclass(slots=True)
class Seen:
    """What a layer was given."""

    largest: float = 0.0
    values: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, x: Tensor) -> None:
        flat = x.detach().float().flatten()
        self.largest = max(self.largest, float(flat.abs().max()))
        self.values.append(flat[:: max(1, len(flat) // KEPT)].cpu())

    def scale(self, kind: Kind) -> float:
        """Of one step of `kind`: for int8 the one of least squared error, for fp8 the one that clips nothing."""
        if not self.largest > 0:
            return 1.0 / LARGEST[kind]
        if kind == "fp8":
            return self.largest / LARGEST[kind]
        values, tried = torch.cat(self.values), [share * self.largest / LARGEST[kind] for share in SHRINK]
        return min(tried, key=lambda step: float((_rounded(values, step) - values).square().mean()))


class _Watch(TorchFunctionMode):
    """Notes what is given to the linear layers whose weights it knows, however they are called."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self.seen = {name: Seen() for name in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1].data_ptr() in self._names:
            self.seen[self._names[args[1].data_ptr()]].add(args[0])
        return func(*args, **(kwargs or {}))


def quantized_layers(network: STIV) -> dict[str, Tensor]:
    """Weights, by name, of the products that are quantised."""
    modules = cast(Iterable[tuple[str, nn.Module]], network.named_modules())
    return {
        f"{layer}.weight": module.weight
        for layer, module in modules
        if isinstance(module, nn.Linear) and layer.startswith("blocks.") and not layer.endswith(".modulation")
    }


def calibrate(network: STIV, inputs: ParityInputs, kind: Kind) -> dict[str, float]:
    """Weight name -> scale of its layer's input, from a trajectory at the usual shape and a call at each corner."""
    passes = len(PASSES[inputs.recipe.sampling.guidance])
    rows = max(1, min(CALIBRATION_VIDEOS, inputs.profile.max.batch // passes)) * passes
    videos = inputs.videos(inputs.profile.opt.model_copy(update={"batch": rows}), CALIBRATION_SEED)
    engine, watch = TorchEngine(network), _Watch(quantized_layers(network))
    recipe, generator = inputs.recipe, torch.Generator().manual_seed(CALIBRATION_SEED)
    velocity = velocity_of(engine, recipe.flow)
    steps = sample_steps(
        velocity,
        videos.noise,
        videos.guidance,
        videos.image,
        recipe.sampling,
        shift=recipe.flow.shift,
        generator=generator,
    )
    with watch:
        for _ in steps:
            pass
        for shape in inputs.profile.corners():
            engine.denoise(*inputs.call(shape, CALIBRATION_SEED))
    unseen = [name for name, seen in watch.seen.items() if not seen.values]
    assert not unseen, f"layers that no call reached: {unseen}"
    return {name: seen.scale(kind) for name, seen in watch.seen.items()}


def quantize_file(source: Path, target: Path, kind: Kind, scales: Mapping[str, float]) -> None:
    """The file at `source`, of any precision, again with the layers that `scales` names quantised."""
    model = load(source)
    for name, scale in scales.items():
        _quantize(model.graph, name, kind, scale)
    common.RemoveUnusedNodesPass()(model)
    model.metadata_props["stiv.quantization"] = kind
    save(model, target, EXTERNAL_ABOVE)


def _quantize(graph: ir.Graph, name: str, kind: Kind, scale: float) -> None:
    weight = graph.initializers[name]
    (transposed,) = [use.node for use in weight.uses()]
    (product,) = [use.node for use in transposed.outputs[0].uses()]
    if (transposed.op_type, product.op_type) != ("Transpose", "MatMul") or weight.const_value is None:
        raise ValueError(f"weight '{name}' is used by {transposed.op_type} and {product.op_type}; export the file anew")
    precision, given = weight.dtype, product.inputs[0]
    assert precision is not None and given is not None
    values = (
        torch.tensor(weight.const_value.numpy().astype("float32")).t().contiguous()
    )  # [in, out], as MatMul takes it
    steps = (values.abs().amax(0) if kind == "int8" else values.abs().max()).clamp_min(1e-12) / LARGEST[kind]
    low = _low(values / steps, kind)

    def constant(suffix: str, value: Tensor, dtype: ir.DataType) -> ir.Value:
        made = ir.Value(name=f"{name}/{suffix}", shape=ir.Shape(value.shape), type=ir.TensorType(dtype))
        made.const_value = tensor(f"{name}/{suffix}", value)
        graph.initializers.add(made)
        return made

    wide = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
    zero = constant("zero", torch.zeros((), dtype=DTYPES[kind]), TYPES[kind])
    zeros = constant("zeros", torch.zeros(steps.shape, dtype=DTYPES[kind]), TYPES[kind]) if steps.ndim else zero
    step = constant("input_scale", torch.tensor(scale, dtype=wide[precision]), precision)
    step_of_weight = constant("scale", steps.to(wide[precision]), precision)
    del graph.initializers[name]
    held = ir.Value(name=name, shape=ir.Shape(low.shape), type=ir.TensorType(TYPES[kind]))
    held.const_value = tensor(name, low)
    graph.initializers.add(held)

    quantised = _node(graph, product, "QuantizeLinear", [given, step, zero], TYPES[kind])
    widened = _node(graph, product, "DequantizeLinear", [quantised, step, zero], precision)
    matrix = _node(graph, product, "DequantizeLinear", [held, step_of_weight, zeros], precision, "weight", axis=1)
    product.replace_input_with(0, widened)
    product.replace_input_with(1, matrix)


def _node(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: list[ir.Value],
    dtype: ir.DataType,
    what: str = "input",
    **attributes: int,
) -> ir.Value:
    name = f"{before.name}/{what}/{operator}"
    node = ir.node(operator, inputs, attributes=attributes, name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, dtype
    graph.insert_before(before, node)
    return node.outputs[0]


def _low(values: Tensor, kind: Kind) -> Tensor:
    limited = values.clamp(-LARGEST[kind], LARGEST[kind])
    return (limited.round() if kind == "int8" else limited).to(DTYPES[kind])


def _rounded(values: Tensor, step: float) -> Tensor:
    return _low(values / step, "int8").float() * step

"""Weights in an exported graph: read by name, or taken out so that a session can be given other ones.

It owns how a file holds them; it knows nothing of sessions or of where new weights come from.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from export.engines.protocol import EngineCorrupt, EngineMismatch, require_same_weights
from export.profiles import ShapeProfile

if TYPE_CHECKING:
    import onnx

WEIGHT = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+")
"""How a network names its weights; constants of the graph are named otherwise."""
DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
"""By ONNX's number."""


def read_graph(path: Path) -> "onnx.ModelProto":
    """The graph without what lies beside it."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ValueError(f"{path}: no such file; export a checkpoint to it")
    try:
        return cast(Any, onnx).load(path, load_external_data=False)
    except DecodeError as error:
        raise EngineCorrupt(f"{path} cannot be loaded, export it again: {error}") from None


def metadata(graph: "onnx.ModelProto") -> dict[str, str]:
    return {each.key: each.value for each in graph.metadata_props}


def profile_of(graph: "onnx.ModelProto", path: Path) -> ShapeProfile:
    """The shapes that the file at `path` was exported for."""
    said = metadata(graph)
    if "stiv.profile" not in said:
        raise EngineMismatch(f"{path} says no stiv.profile: it was not written by export_onnx; export it again")
    return ShapeProfile.model_validate_json(said["stiv.profile"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every weight of the file by the network's name, float32."""
    import onnx_ir as ir

    held: dict[str, Tensor] = {}
    for name, value in cast(Any, ir).load(path).graph.initializers.items():
        if WEIGHT.fullmatch(name):
            bits = value.const_value.numpy()
            held[name] = torch.tensor(bits.astype("float32"))  # a copy; bf16 and fp16 widen without loss
    return held


def write_refitted(source: Path, to: Path, weights: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
    """Write the graph of `source` around other weights, float32 by the network's names, with its metadata as `said`."""
    import onnx_ir as ir

    from export.precision import tensor
    from export.tracing import EXTERNAL_ABOVE, save

    model = cast(Any, ir).load(source)
    held = {name: value for name, value in model.graph.initializers.items() if WEIGHT.fullmatch(name)}
    _require_whole({name: int(value.dtype) for name, value in held.items()}, source)
    require_same_weights({name: torch.Size(value.shape.numpy()) for name, value in held.items()}, weights)
    for name, value in held.items():
        value.const_value = tensor(name, weights[name].to(DTYPES[int(value.dtype)]).contiguous())
    model.metadata_props.update(said)
    save(model, to, EXTERNAL_ABOVE)


def replace_weights(graph: "onnx.ModelProto", path: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Take its weights out of `graph`; OrtValues of `weights`, in its precision, to open it with instead.

    ONNX Runtime replaces initializers before it optimizes only where they lie outside the graph, so the graph says of
    each that it does. An initializer that is merely overridden would live on in every constant folded from it.
    """
    from onnx import external_data_helper

    held = {each.name: each for each in graph.graph.initializer if WEIGHT.fullmatch(each.name)}
    if not held:
        raise EngineMismatch(f"{path} holds no weight under its network's name, so none can be replaced; export anew")
    _require_whole({name: each.data_type for name, each in held.items()}, path)
    require_same_weights({name: torch.Size(each.dims) for name, each in held.items()}, weights)
    for each in graph.graph.initializer:
        if each.name not in held and external_data_helper.uses_external_data(each):
            external_data_helper.load_external_data_for_tensor(each, str(path.parent))
            each.data_location = each.DEFAULT
            del each.external_data[:]
    values: dict[str, Any] = {}
    for name, each in held.items():
        values[name] = _value(weights[name].to(DTYPES[each.data_type]), each.data_type)
        _move_outside(each)
    return values


def _require_whole(types: Mapping[str, int], path: Path) -> None:
    """Scales are calibrated for the weights and the activations they give, so quantized weights go with their graph."""
    quantized = [name for name, dtype in types.items() if dtype not in DTYPES]
    if quantized:
        raise EngineMismatch(f"weight '{quantized[0]}' of {path} is quantized and cannot be replaced; export anew")


def _move_outside(initializer: Any) -> None:
    for field in ("raw_data", "float_data", "int32_data", "external_data"):
        initializer.ClearField(field)
    initializer.data_location = initializer.EXTERNAL
    entry = initializer.external_data.add()
    entry.key, entry.value = "location", "given-at-load"  # never read: a value of that name is given to the session


def _value(weight: Tensor, onnx_type: int) -> Any:
    """An OrtValue of its own memory; numpy has no bf16, so that goes as its bits."""
    ort_value = cast(Any, import_module("onnxruntime")).OrtValue
    if weight.dtype == torch.bfloat16:
        bits = weight.contiguous().view(torch.uint16).numpy()
        return ort_value.ortvalue_from_numpy_with_onnx_type(bits, onnx_type)
    return ort_value.ortvalue_from_numpy(weight.contiguous().numpy())

"""Other weights for an exported graph: its initializers by name, taken out so that a session can be given new ones.

It owns the replacement within an ONNX graph; it knows nothing of sessions or of where the new weights come from.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from export.engines.protocol import EngineMismatch, require_same_weights

if TYPE_CHECKING:
    import onnx

WEIGHT = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+")
"""How a network names its weights; constants of the graph are named otherwise."""
DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
"""By ONNX's number."""


def replace_weights(
    graph: "onnx.ModelProto", path: Path, weights: Mapping[str, Tensor]
) -> tuple[bytes, dict[str, Any]]:
    """The graph without its weights, and OrtValues of `weights` in its precision to open it with.

    ONNX Runtime replaces initializers before it optimizes only where they lie outside the graph, so the graph says of
    each that it does. An initializer that is merely overridden would live on in every constant folded from it.
    """
    from onnx import external_data_helper

    held = {each.name: each for each in graph.graph.initializer if WEIGHT.fullmatch(each.name)}
    if not held:
        raise EngineMismatch(f"{path} holds no weight under its network's name, so none can be replaced; export anew")
    require_same_weights({name: torch.Size(each.dims) for name, each in held.items()}, weights)
    for each in graph.graph.initializer:
        if each.name not in held and external_data_helper.uses_external_data(each):
            external_data_helper.load_external_data_for_tensor(each, str(path.parent))
            each.data_location = each.DEFAULT
            del each.external_data[:]
    values: dict[str, Any] = {}
    for name, each in held.items():
        if each.data_type not in DTYPES:
            raise EngineMismatch(f"weight '{name}' of {path} is quantized and cannot be replaced; export anew")
        values[name] = _value(weights[name].to(DTYPES[each.data_type]), each.data_type)
        _move_outside(each)
    return graph.SerializeToString(), values


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

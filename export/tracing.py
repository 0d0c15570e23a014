"""From a PyTorch module to a labelled ONNX file: tracing with sizes that may change, names, metadata, large weights.

It owns what every exported file has in common; it knows nothing of what a module computes or of runtimes.
"""

import hashlib
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from model.config import Precision

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import Dim

Sizes = Mapping[str, tuple[int | str, ...]]
"""The sizes of each input or output by its name; one that may change by the name of its axis."""
OPSET = 20
"""Opset 23 would fuse attention, which ONNX Runtime's CPU provider then refuses."""
EXTERNAL_ABOVE = 2**31 - 2**24
"""Bytes of weights that still fit into the file itself: protobuf ends at 2 GiB."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def trace(
    module: nn.Module,
    example: Mapping[str, Tensor],
    sizes: Sizes,
    *,
    outputs: list[str],
    multiples: Mapping[str, int],
    limits: Mapping[str, int] | None = None,
    opset: int = OPSET,
) -> "ir.Model":
    """The graph of `module`, called with `example` by keyword.

    Args:
        example: no size in it may be 1 and no two equal, or the tracer would take them for constants.
        outputs: names of the first outputs.
        multiples: axis -> what its size is a multiple of, where that is not 1.
        limits: axis -> its largest size, where the module has one.
    """
    import torch.export
    import torch.onnx

    with _quiet():
        traced = torch.export.export(module, (), dict(example), dynamic_shapes=_dynamic(sizes, multiples, limits or {}))
        program = cast(Any, torch.onnx).export(
            traced,
            input_names=list(sizes),
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    return cast("ir.Model", program.model)


def label(model: "ir.Model", name: str, metadata: Mapping[str, str], inputs: Sizes, outputs: Sizes) -> None:
    """Give the file its metadata and its ends readable sizes; sizes in between go, the tracer's names say nothing."""
    import onnx_ir as ir

    model.metadata_props.clear()
    model.metadata_props.update(
        {**metadata, "stiv.opset": str(model.opset_imports[""]), "stiv.torch": torch.__version__}
    )
    model.producer_name, model.producer_version = "stiv-platform", None
    model.graph.name = name
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    for value in model.graph.inputs:
        assert value.name is not None
        value.shape = ir.Shape(inputs[value.name])
    for value, (output, shape) in zip(model.graph.outputs, outputs.items(), strict=True):
        value.name, value.shape = output, ir.Shape(shape)


def save(model: "ir.Model", path: Path, external_above: int) -> int:
    """Bytes written; a graph above `external_above` keeps its weights in a second file, named in the first."""
    import onnx_ir as ir

    beside = path.with_name(path.name + ".data")
    beside.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    cast(Any, ir).save(model, path, external_data=beside.name if total > external_above else None)
    return sum(file.stat().st_size for file in (path, beside) if file.exists())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """One digest over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dynamic(sizes: Sizes, multiples: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, dict[int, "Dim"]]:
    axes = {axis for shape in sizes.values() for axis in shape if isinstance(axis, str)}
    dims = {axis: _dim(axis, multiples.get(axis, 1), limits.get(axis)) for axis in axes}
    return {
        name: {place: dims[axis] for place, axis in enumerate(shape) if isinstance(axis, str)}
        for name, shape in sizes.items()
    }


def _dim(axis: str, multiple: int, limit: int | None) -> "Dim":
    from torch.export import Dim

    return multiple * Dim(f"{axis}_parts", min=1) if multiple > 1 else Dim(axis, min=1, max=limit)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the tracer's remarks on its own internals and on packages that nobody needs here."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)

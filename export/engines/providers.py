"""ONNX Runtime sessions: a graph by the one provider that was asked for.

It owns the names, packages and settings of providers and that none stands in for another; it knows nothing of what the
graph computes.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from export.engines.protocol import EngineCorrupt, EngineMismatch
from export.engines.targets import OnnxTarget, Provider
from export.engines.weights import metadata
from export.profiles import ShapeProfile

if TYPE_CHECKING:
    import onnx

NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
PACKAGES: dict[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu in place of onnxruntime",
    "tensorrt": "onnxruntime-gpu in place of onnxruntime, and tensorrt",
    "tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx",
}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The provider that is a package of its own."""
KEEP_QDQ = "session.disable_quant_qdq"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    graph: "onnx.ModelProto",
    folder: Path,
    target: OnnxTarget,
    profile: ShapeProfile | None,
    *,
    threads: int,
    weights: Mapping[str, Any],
) -> Any:
    """An `onnxruntime.InferenceSession`, which has no types.

    Args:
        folder: where weights lie that are not in the graph.
        profile: what the TensorRT providers build for.
        weights: OrtValues that take the place of the graph's initializers of that name, which lie outside the graph.
    """
    runtime = cast(Any, import_module("onnxruntime"))
    states = cast(Any, import_module("onnxruntime.capi.onnxruntime_pybind11_state"))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    if metadata(graph).get("stiv.quantization") == "fp8":
        options.add_session_config_entry(KEEP_QDQ, "1")  # its fused operators know int8 alone
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    providers = _choose(runtime, options, target, profile)
    try:
        session = runtime.InferenceSession(graph.SerializeToString(), options, providers=providers)
    except (states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.RuntimeException) as error:
        raise EngineCorrupt(f"the graph in {folder} cannot be loaded, export it again: {error}") from None
    except (states.NotImplemented, states.EPFail) as error:
        raise EngineMismatch(f"provider '{target.provider}' cannot run the graph in {folder}: {error}") from None
    chosen = session.get_providers()
    if not chosen or chosen[0] != NAMES[target.provider]:
        raise EngineMismatch(
            f"asked for {NAMES[target.provider]}, ONNX Runtime chose {chosen}: its CUDA libraries or the GPU are"
            f" missing; install what {PACKAGES[target.provider]} needs, or choose provider 'cpu'"
        )
    return session


def _choose(runtime: Any, options: Any, target: OnnxTarget, profile: ShapeProfile | None) -> list[Any] | None:
    """The `providers` of a session; None where the provider is a plugin, which `options` carries."""
    if target.provider == "cpu":
        return [NAMES["cpu"]]
    if target.provider == "tensorrt_rtx":
        _add_plugin(runtime, options, target, profile)
        return None
    name = NAMES[target.provider]
    if name not in runtime.get_available_providers():
        raise EngineMismatch(
            f"ONNX Runtime {runtime.__version__} has no provider '{target.provider}' here, it has"
            f" {runtime.get_available_providers()}; pip install {PACKAGES[target.provider]}"
        )
    settings: dict[str, str] = {"device_id": str(target.gpu)}
    if target.provider == "tensorrt":
        # No cache of engines on disk: it would be loaded, and run, without anyone having signed it.
        settings |= {"trt_engine_cache_enable": "0"} | _shape_options("trt_profile", profile)
    else:
        settings |= {"use_tf32": "0"}
    return [(name, settings)]


def _add_plugin(runtime: Any, options: Any, target: OnnxTarget, profile: ShapeProfile | None) -> None:
    name = _register_plugin(runtime)
    devices = [each for each in runtime.get_ep_devices() if each.ep_name == name]
    if len(devices) <= target.gpu:
        raise EngineMismatch(
            f"{name} finds {len(devices)} GPUs it supports (RTX 30, 40 and 50 series), and gpu {target.gpu} is asked"
            " for; choose provider 'cuda', or another machine"
        )
    options.add_provider_for_devices([devices[target.gpu]], _shape_options("nv_profile", profile))


@cache
def _register_plugin(runtime: Any) -> str:
    """The plugin's own name of its provider; registering it twice is an error of ONNX Runtime."""
    if find_spec(PLUGIN) is None:
        raise EngineMismatch(f"{PLUGIN} is not installed; pip install {PACKAGES['tensorrt_rtx']}")
    plugin = cast(Any, import_module(PLUGIN))
    runtime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    return str(plugin.get_ep_name())


def _shape_options(prefix: str, profile: ShapeProfile | None) -> dict[str, str]:
    """What the TensorRT providers build for: the whole profile at once, instead of a new plan whenever a size grows."""
    if profile is None:
        return {}
    ends = {"min": profile.min, "opt": profile.opt, "max": profile.max}

    def spelt(shapes: Mapping[str, tuple[int, ...]]) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())

    return {f"{prefix}_{end}_shapes": spelt(profile.input_shapes(shape)) for end, shape in ends.items()}

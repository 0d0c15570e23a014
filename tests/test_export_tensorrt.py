"""TensorRT plans: real builds by TensorRT for RTX, which needs no GPU to build, and the refusals before a build.

Without a CUDA driver no plan can be deserialized, so its inspector says nothing here: what a plan takes is read off the
network it was built from and off the plan's own bytes. The inspector itself is asked where there is a GPU.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from export.onnx import INPUTS, graph_weights
from export.precision import lower_file
from export.profiles import ShapeRange
from export.tensorrt.builder import BuildFailed, TensorRtPlan, build_plan
from export.tensorrt.library import architecture, has_driver
from export.tensorrt.listeners import BuildStep, Watch
from export.tensorrt.options import BuildOptions
from export.tensorrt.plans import Plan, PlanUnusable, malformed
from model.config import Precision
from tests.tiny_export import Exported

no_driver = pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
MINIMAL: dict[str, object] = {"architectures": ("sm89",), "optimization_level": 0}


@pytest.fixture(scope="module")
def ranges(exported: Exported) -> Sequence[ShapeRange]:
    """The stage's own shape alone, and one box of many."""
    return exported.profile.ranges(exported.recipe)[:2]


def build(
    graph: Path, exported: Exported, ranges: Sequence[ShapeRange], watch: Watch | None = None, **options: object
) -> TensorRtPlan:
    chosen = BuildOptions.model_validate({**MINIMAL, **options})
    return build_plan(graph, exported.profile, ranges, library="tensorrt_rtx", options=chosen, watch=watch)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_plan_is_built_in_every_precision_with_dynamic_shapes_and_its_log_is_kept(
    exported: Exported, ranges: Sequence[ShapeRange], precision: Precision, tmp_path: Path
) -> None:
    graph, log, steps = exported.file.path, tmp_path / "builder.log", list[BuildStep]()
    low = [name for name, weight in graph_weights(exported.network, precision).items() if weight.dtype != torch.float32]
    if precision != "fp32":
        lower_file(graph, tmp_path / "model.onnx", precision, low)
        graph = tmp_path / "model.onnx"
    built = build(graph, exported, ranges, Watch(log, steps.append), architectures=("sm89",))
    assert (built.library, built.architectures) == ("tensorrt_rtx", ("sm89",))
    shapes = [[exported.profile.input_shapes(end) for end in (box.min, box.opt, box.max)] for box in ranges]
    assert {each.name: each.ranges for each in built.inputs} == {
        name: tuple(tuple(end[name] for end in ends) for ends in shapes) for name in INPUTS
    }
    assert [each.dtype for each in built.inputs] == ["FLOAT", "FLOAT", "FLOAT", "BOOL", "FLOAT", "FLOAT"]
    assert [(each.name, each.dtype, each.shape) for each in built.outputs] == [
        ("velocity", "FLOAT", (-1, -1, 6, -1, -1))
    ]
    for each in (*built.inputs, *built.outputs):  # as the plan spells a name: its length, then its letters
        assert len(each.name).to_bytes(8, "little") + each.name.encode() in built.plan, each.name
    assert not malformed(built.plan, "tensorrt_rtx") and malformed(built.plan[64:], "tensorrt_rtx")
    assert built.warnings == () and built.timing_cache == b""
    assert "Detected 6 inputs and 1 output" in log.read_text()
    assert steps[0] == BuildStep("Building engine", None, 0, steps[0].total)
    assert steps[-1] == BuildStep("Building engine", None, steps[0].total, steps[0].total)


def test_what_the_progress_raises_stops_the_build(exported: Exported, ranges: Sequence[ShapeRange]) -> None:
    def stop(step: BuildStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(exported.file.path, exported, ranges, Watch(on_progress=stop))


def test_a_file_that_is_no_graph_is_refused_and_named(
    exported: Exported, ranges: Sequence[ShapeRange], tmp_path: Path
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BuildFailed, match=r"tensorrt_rtx cannot read .*model\.onnx"):
        build(broken, exported, ranges, Watch(tmp_path / "logs" / "builder.log"))
    assert "error" in (tmp_path / "logs" / "builder.log").read_text()


@no_driver
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "refit"}, "makes a plan with weights = 'refit' on a machine with a CUDA driver only"),
        ({"weights": "refit_stripped"}, "weights = 'refit_stripped' on a machine with a CUDA driver only"),
        ({"version_compatible": True}, "comes without the lean runtime"),
        ({"hardware_compatible": "ampere_plus"}, "list the GPUs in architectures"),
        ({"architectures": ("sm90",)}, r"does not build for \['sm90'\]; it builds for \['sm120', .*'sm89'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_a_build(
    options: dict[str, object], said: str, exported: Exported, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "no_such_graph.onnx", exported, (), Watch(tmp_path / "builder.log"), **options)
    assert not (tmp_path / "builder.log").exists()


def test_a_stripped_plan_cannot_be_version_compatible_too() -> None:
    with pytest.raises(ValueError, match="loaded by the version that built it"):
        BuildOptions(weights="refit_stripped", version_compatible=True)


def test_a_timing_cache_is_refused_where_nothing_is_timed(exported: Exported) -> None:
    with pytest.raises(ValueError, match="measures nothing while it builds"):
        build_plan(exported.file.path, exported.profile, (), library="tensorrt_rtx", timing_cache=b"cache")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_a_library_that_is_not_installed_is_named_with_its_package(exported: Exported) -> None:
    with pytest.raises(ValueError, match=r"tensorrt cannot be imported \(.*\); pip install tensorrt"):
        build_plan(exported.file.path, exported.profile, (), library="tensorrt")


@no_driver
def test_without_a_driver_a_plan_is_not_deserialized_and_no_architecture_is_made_up() -> None:
    with pytest.raises(PlanUnusable, match="with a CUDA driver only and this machine has none"):
        Plan(b"", "tensorrt_rtx")
    with pytest.raises(ValueError, match="no CUDA driver that finds a GPU"):
        architecture()


@pytest.mark.gpu
def test_the_inspector_names_types_and_profiles_of_a_plan(exported: Exported, ranges: Sequence[ShapeRange]) -> None:
    pytest.importorskip("tensorrt")

    def build_here(timing_cache: bytes) -> TensorRtPlan:
        options = BuildOptions(weights="refit")
        return build_plan(
            exported.file.path,
            exported.profile,
            ranges,
            library="tensorrt",
            options=options,
            timing_cache=timing_cache,
        )

    built = build_here(b"")
    facts = Plan(built.plan, "tensorrt").facts()
    assert facts.inputs == {each.name: each.dtype for each in built.inputs}
    assert facts.outputs == {each.name: each.dtype for each in built.outputs}
    assert facts.ranges == {each.name: each.ranges for each in built.inputs}
    assert facts.refittable and facts.layers > 0 and facts.profiles == len(ranges)
    assert built.timing_cache and built.architectures == (architecture(),)
    assert not [line for line in build_here(built.timing_cache).warnings if "timing cache" in line]

"""TensorRT plans: real builds by TensorRT for RTX, which needs no GPU to build, and the refusals before a build.

Without a CUDA driver no plan can be deserialized, so its inspector says nothing here: what a plan takes is read off the
network it was built from and off the plan's own bytes. The inspector itself is asked where there is a GPU.
"""

import importlib.util
from pathlib import Path

import pytest

from export.onnx import INPUTS, export_onnx
from export.profiles import ShapeProfile
from export.tensorrt.builder import BuildFailed, TensorRtPlan, build_plan
from export.tensorrt.library import architecture, has_driver
from export.tensorrt.listeners import BuildStep
from export.tensorrt.options import BuildOptions
from export.tensorrt.plans import Plan, PlanUnusable, malformed
from tests.tiny_export import make_network, make_recipe

no_driver = pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
LIMIT = {"max_batch": 4, "stretch": 2}


@pytest.fixture(scope="module")
def profile() -> ShapeProfile:
    recipe = make_recipe(network={"hidden_size": 32, "depth": 1, "num_heads": 2, "unmasked_depth": 0})
    return ShapeProfile.of(recipe, make_network(recipe), **LIMIT)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, profile: ShapeProfile) -> Path:
    recipe = make_recipe(network={"hidden_size": 32, "depth": 1, "num_heads": 2, "unmasked_depth": 0})
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    return export_onnx(make_network(recipe), path, recipe=recipe, profile=profile).path


def build(graph: Path, profile: ShapeProfile, log: Path | None = None, **options: object) -> TensorRtPlan:
    chosen = BuildOptions.model_validate({"architectures": ("sm89",), "optimization_level": 0, **options})
    return build_plan(graph, profile, library="tensorrt_rtx", options=chosen, log=log)


def test_a_plan_is_built_with_dynamic_shapes_and_its_log_is_kept(
    graph: Path, profile: ShapeProfile, tmp_path: Path
) -> None:
    steps: list[BuildStep] = []
    built = build_plan(
        graph,
        profile,
        library="tensorrt_rtx",
        options=BuildOptions(architectures=("sm89", "sm120"), weight_streaming=True),
        log=tmp_path / "builder.log",
        on_progress=steps.append,
    )
    assert (built.library, built.architectures) == ("tensorrt_rtx", ("sm89", "sm120"))
    low, opt, high = (profile.input_shapes(shape) for shape in (profile.min, profile.opt, profile.max))
    assert [each.name for each in built.inputs] == list(INPUTS)
    assert [each.dtype for each in built.inputs] == ["FLOAT", "FLOAT", "FLOAT", "BOOL", "FLOAT", "FLOAT"]
    assert {each.name: each.ranges for each in built.inputs} == {
        name: ((low[name], opt[name], high[name]),) for name in INPUTS
    }
    assert [(each.name, each.dtype, each.shape) for each in built.outputs] == [
        ("velocity", "FLOAT", (-1, -1, 6, -1, -1))
    ]
    for each in (*built.inputs, *built.outputs):  # as the plan spells a name: its length, then its letters
        assert len(each.name).to_bytes(8, "little") + each.name.encode() in built.plan, each.name
    assert not malformed(built.plan, "tensorrt_rtx") and malformed(built.plan[64:], "tensorrt_rtx")
    assert built.warnings == () and built.timing_cache == b""
    assert "Detected 6 inputs and 1 output" in (tmp_path / "builder.log").read_text()
    assert steps[0] == BuildStep("Building engine", None, 0, steps[0].total)
    assert steps[-1] == BuildStep("Building engine", None, steps[0].total, steps[0].total)


def test_what_the_progress_raises_stops_the_build(graph: Path, profile: ShapeProfile) -> None:
    def stop(step: BuildStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(graph, profile, library="tensorrt_rtx", on_progress=stop)


def test_a_file_that_is_no_graph_is_refused_and_named(profile: ShapeProfile, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BuildFailed, match=r"tensorrt_rtx cannot read .*model\.onnx"):
        build(broken, profile, tmp_path / "logs" / "builder.log")
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
    options: dict[str, object], said: str, profile: ShapeProfile, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "no_such_graph.onnx", profile, tmp_path / "builder.log", **options)
    assert not (tmp_path / "builder.log").exists()


def test_a_stripped_plan_cannot_be_version_compatible_too() -> None:
    with pytest.raises(ValueError, match="loaded by the version that built it"):
        BuildOptions(weights="refit_stripped", version_compatible=True)


def test_a_timing_cache_is_refused_where_nothing_is_timed(graph: Path, profile: ShapeProfile) -> None:
    with pytest.raises(ValueError, match="measures nothing while it builds"):
        build_plan(graph, profile, library="tensorrt_rtx", timing_cache=b"cache")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_a_library_that_is_not_installed_is_named_with_its_package(profile: ShapeProfile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensorrt cannot be imported \(.*\); pip install tensorrt"):
        build_plan(tmp_path / "model.onnx", profile, library="tensorrt")


@no_driver
def test_without_a_driver_a_plan_is_not_deserialized_and_no_architecture_is_made_up() -> None:
    with pytest.raises(PlanUnusable, match="with a CUDA driver only and this machine has none"):
        Plan(b"", "tensorrt_rtx")
    with pytest.raises(ValueError, match="no CUDA driver that finds a GPU"):
        architecture()


@pytest.mark.gpu
def test_the_inspector_names_types_and_profiles_of_a_plan(graph: Path, profile: ShapeProfile) -> None:
    pytest.importorskip("tensorrt")
    built = build_plan(graph, profile, library="tensorrt", options=BuildOptions(weights="refit"))
    facts = Plan(built.plan, "tensorrt").facts()
    assert facts.inputs == {each.name: each.dtype for each in built.inputs}
    assert facts.outputs == {each.name: each.dtype for each in built.outputs}
    assert facts.ranges == {each.name: each.ranges for each in built.inputs}
    assert facts.refittable and facts.layers > 0 and facts.profiles == 1
    assert built.timing_cache and built.architectures == (architecture(),)
    again = build_plan(graph, profile, library="tensorrt", timing_cache=built.timing_cache)
    assert not [line for line in again.warnings if "timing cache" in line]

"""Engines in the registry: made once from the same inputs, with provenance, proven where they run, refitted."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from export.bundle import MODEL
from export.engines.card import EngineCard, describe, require_runs_here
from export.engines.protocol import EngineMismatch
from export.engines.targets import TensorRtTarget, load_target
from export.parity.report import BOUNDS
from flows.catalog import target_path
from infra.engines.export import export_engine, recipe_for
from infra.engines.graph import export_graph, graph_inputs
from infra.engines.index import EngineIndex
from infra.engines.inputs import EngineInputs
from infra.engines.listing import inspect_engine, list_engines
from infra.engines.provenance import BuildRecord, keys_of, parameters_of, statement
from infra.engines.refit import refit_engine
from infra.engines.timing import TimingCaches
from infra.engines.verify import is_proven, prove_plan, verify_engine
from infra.registry.names import CANDIDATE
from infra.registry.records import Code, Manifest
from infra.registry.registry import Registry
from infra.serving.golden import check_golden
from infra.serving.pipeline import GOLDEN, VideoPipeline
from infra.store.location import open_store
from model.checkpoint.folder import save_weights
from model.network.stiv import STIV
from model.recipe import StageRecipe, dumps
from model.vae import PatchPca
from tests.tiny_export import Exported, make_network, make_recipe

CODE = Code(version="1")
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(open_store(str(tmp_path / "store")), code=CODE)


def publish_graph(registry: Registry, exported: Exported, inputs: EngineInputs) -> Manifest:
    """An engine that holds the exported graph, as an export leaves it in a store."""
    graph = graph_inputs(registry, exported.network, exported.recipe)
    files = {MODEL: exported.file.path}
    record = BuildRecord(graph, inputs, parents={}, started=STARTED, gpu=None, timing_cache=None)
    return registry.publish("engine", files, provenance=statement(record, files))


def inputs_of(exported: Exported) -> EngineInputs:
    return EngineInputs.of(describe(exported.file.path), exported.profile, CODE)


# --- reuse


def test_a_stored_graph_is_not_traced_again_and_a_changed_weight_is(
    registry: Registry, exported: Exported, tmp_path: Path
) -> None:
    made = publish_graph(registry, exported, inputs_of(exported))
    key = graph_inputs(registry, exported.network, exported.recipe).digest
    assert EngineIndex(registry).remember(key, made) == made
    graph = export_graph(registry, exported.network, exported.recipe, tmp_path, lambda _: exported.inputs)
    assert graph.seconds == 0 and graph.model.read_bytes() == exported.file.path.read_bytes()

    changed = make_network(exported.recipe)
    with torch.no_grad():
        changed.get_parameter("blocks.1.cross.key_value.bias")[0] += 1e-3
    others = [
        graph_inputs(registry, changed, exported.recipe),
        graph_inputs(registry, exported.network, make_recipe(export={"precision": "fp16"})),
        graph_inputs(registry, exported.network, make_recipe(export={"max_rows": 4})),
        graph_inputs(Registry(registry.store, code=Code(version="2")), exported.network, exported.recipe),
    ]
    assert [EngineIndex(registry).find(each.digest) for each in others] == [None] * 4
    assert len({key, *(each.digest for each in others)}) == 5


def test_every_part_of_an_engines_inputs_makes_another_engine(exported: Exported) -> None:
    inputs = inputs_of(exported)
    changes: dict[str, object] = {
        "onnx_sha256": "0" * 64,
        "weights_sha256": "0" * 64,
        "version": "0",
        "architectures": ("sm89",),
        "precision": "bf16",
        "profile": exported.profile.model_copy(update={"max_area": 1}),
        "target": {"runtime": "torch"},
    }
    digests = {inputs.model_copy(update={name: value}).digest for name, value in changes.items()}
    assert len(digests | {inputs.digest}) == len(changes) + 1


def test_of_two_that_made_the_same_at_once_both_use_the_one_noted_first(registry: Registry, exported: Exported) -> None:
    inputs, index = inputs_of(exported), EngineIndex(registry)
    first, second = (publish_graph(registry, exported, inputs) for _ in range(2))
    assert first.digest != second.digest
    assert [index.remember(inputs.digest, each) for each in (first, second)] == [first, first]


def test_an_entry_whose_engine_is_gone_or_another_is_made_again(registry: Registry, exported: Exported) -> None:
    inputs, index, store = inputs_of(exported), EngineIndex(registry), registry.store
    made = publish_graph(registry, exported, inputs)
    other = inputs.model_copy(update={"version": "0"})
    index.remember(other.digest, made)  # points at an engine that was made from other inputs
    assert index.find(other.digest) is None
    index.remember(inputs.digest, made)
    store.delete(f"manifests/{made.digest}.json")
    assert index.find(inputs.digest) is None
    again = publish_graph(registry, exported, inputs)
    assert index.remember(inputs.digest, again) == again == index.find(inputs.digest)


def test_timing_caches_of_rivals_are_merged_and_kept_by_gpu(registry: Registry) -> None:
    caches, gpu = TimingCaches(registry.store), "NVIDIA GeForce RTX 4090"

    def merge(standing: bytes, own: bytes) -> bytes:
        return bytes(sorted(set(standing) | set(own)))

    assert caches.read("tensorrt", "11.4.0", gpu) == b""
    caches.add("tensorrt", "11.4.0", gpu, b"ab", merge)
    digest = caches.add("tensorrt", "11.4.0", gpu, b"bc", merge)
    assert caches.read("tensorrt", "11.4.0", gpu) == b"abc" and len(digest) == 64
    assert caches.read("tensorrt", "11.3.0", gpu) == caches.read("tensorrt", "11.4.0", "NVIDIA L4") == b""


# --- provenance


def test_a_manifest_says_where_its_engine_comes_from(registry: Registry, exported: Exported) -> None:
    inputs = inputs_of(exported)
    made = registry.manifest(publish_graph(registry, exported, inputs).digest)
    told = json.loads(json.dumps(made.provenance))
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["predicateType"] == "https://slsa.dev/provenance/v1"
    assert told["subject"] == [{"name": MODEL, "digest": {"sha256": made.files[MODEL].digest}}]
    definition = told["predicate"]["buildDefinition"]
    digests = {each["name"]: each["digest"]["sha256"] for each in definition["resolvedDependencies"]}
    assert digests["onnx"] == exported.file.sha256
    assert digests["weights"] == exported.file.metadata["stiv.weights_sha256"]
    assert definition["externalParameters"]["target"]["runtime"] == "onnx_runtime"
    builder = told["predicate"]["runDetails"]["builder"]["version"]
    assert {"onnxruntime", "torch", "onnx", "stiv-platform"} <= builder.keys()
    assert inputs.digest in keys_of(made)


# --- checks before an engine is loaded


def card(exported: Exported, target: str, version: str, *architectures: str) -> EngineCard:
    described = describe(exported.file.path).model_dump()
    chosen = load_target(target_path(target))
    return EngineCard.model_validate(
        {**described, "target": chosen, "builder": target, "version": version, "architectures": architectures}
    )


def test_a_plan_runs_on_the_gpus_and_the_version_it_was_built_for(exported: Exported) -> None:
    rtx = card(exported, "rtx", "1.7.1.116", "sm89", "sm120")
    require_runs_here(rtx, version="1.7.1.116", architecture="sm120")
    with pytest.raises(EngineMismatch, match=r"no CUDA driver that finds a GPU; serve it there, or export for target"):
        require_runs_here(rtx, version="1.7.1.116", architecture=None)
    with pytest.raises(EngineMismatch, match=r"this GPU is sm86; export again with build\.architectures"):
        require_runs_here(rtx, version="1.7.1.116", architecture="sm86")
    with pytest.raises(EngineMismatch, match=r"this GPU is sm90; tensorrt_rtx supports no sm90, so export for target"):
        require_runs_here(rtx, version="1.7.1.116", architecture="sm90")
    with pytest.raises(EngineMismatch, match=r"built by rtx 1\.7\.1\.116, here is 1\.8\.0\.1; export it again"):
        require_runs_here(rtx, version="1.8.0.1", architecture="sm89")


def test_a_compatible_plan_runs_on_later_versions_and_on_other_gpus_of_its_kind(exported: Exported) -> None:
    plain = card(exported, "tensorrt", "11.2.0", "sm90")
    assert isinstance(plain.target, TensorRtTarget)
    build = plain.target.build.model_copy(update={"version_compatible": True, "hardware_compatible": "ampere_plus"})
    wide = plain.model_copy(update={"target": plain.target.model_copy(update={"build": build})})
    require_runs_here(wide, version="11.4.0", architecture="sm80")
    for version in ("12.0.0", "11.1.0"):
        with pytest.raises(EngineMismatch, match="export it again"):
            require_runs_here(wide, version=version, architecture="sm90")
    with pytest.raises(EngineMismatch, match="export it again"):
        require_runs_here(plain, version="11.4.0", architecture="sm90")


def test_a_target_that_cannot_be_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "target.toml"
    file.write_text('runtime = "tensorrt"\n[build]\nfast = true\n')
    with pytest.raises(ValueError, match=r"target\.toml is not a target: .*build\.fast: Extra inputs"):
        load_target(file)
    with pytest.raises(ValueError, match=r"target 'gpu' is neither a file nor a built-in target; built in: \['cpu'"):
        target_path("gpu")


# --- the whole way


def publish_checkpoint(registry: Registry, recipe: StageRecipe, network: STIV, folder: Path) -> Manifest:
    codec = folder / "codec"
    frames = torch.rand(8, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if not codec.exists():
        PatchPca.fit(frames, recipe.vae.latent_channels, recipe.vae.spatial_factor).save(codec)
    parent = registry.publish("codec", {path.name: path for path in codec.iterdir()})
    checkpoint = folder / f"checkpoint-{network.mask_token.sum().item()}"
    save_weights(checkpoint, network.state_dict(), recipe)
    files = {path.name: path for path in sorted(checkpoint.iterdir())}
    tree = json.loads(dumps(recipe))
    return registry.publish("checkpoint", files, recipe=tree, parents={"codec": parent.digest})


@pytest.mark.slow
def test_an_engine_is_made_once_refitted_and_built_for_a_gpu_elsewhere(registry: Registry, tmp_path: Path) -> None:
    recipe = make_recipe(
        network={"hidden_size": 32, "depth": 1, "num_heads": 2, "unmasked_depth": 0}, export={"parts": ["decoder"]}
    )
    first, second = (
        publish_checkpoint(registry, recipe, make_network(recipe, seed, text=384, pooled=384), tmp_path)
        for seed in (0, 1)
    )
    made = export_engine(registry, first.digest, tmp_path / "one", who="tests")
    assert not made.reused and made.export_seconds > 0 and made.proof.passed
    assert {GOLDEN, "decoder.onnx", "parts.json"} <= made.manifest.files.keys()
    check_golden(VideoPipeline.load(tmp_path / "one" / "engine"))
    again = export_engine(registry, first.digest, tmp_path / "two", who="tests")
    assert again == replace(made, reused=True, export_seconds=0.0)

    refitted = refit_engine(registry, CANDIDATE, second.digest, tmp_path / "three", who="tests")
    assert not refitted.reused and refitted.proof.passed and refitted.export_seconds == 0
    assert refitted.manifest.parents["checkpoint"] == second.digest
    assert registry.resolve(CANDIDATE) == refitted.manifest
    assert verify_engine(registry, CANDIDATE, tmp_path / "four").passed

    torch_target = tmp_path / "torch.toml"
    torch_target.write_text('runtime = "torch"')
    eager = export_engine(registry, first.digest, tmp_path / "five", who="tests", target=load_target(torch_target))
    assert not eager.reused and eager.export_seconds == 0 and eager.proof.passed

    rtx = tmp_path / "rtx.toml"
    rtx.write_text('runtime = "tensorrt_rtx"\n[build]\narchitectures = ["sm89"]\noptimization_level = 0\n')
    plan = export_engine(registry, first.digest, tmp_path / "six", who="tests", target=load_target(rtx))
    assert plan.parity is None and not is_proven(registry, plan.manifest.digest)
    assert registry.resolve(CANDIDATE) == eager.manifest, "what is not proven is not promoted"
    with pytest.raises(EngineMismatch, match="no CUDA driver that finds a GPU"):
        prove_plan(registry, plan.manifest.digest, tmp_path / "seven", who="tests")
    rows = {row.digest: row for row in list_engines(registry)}
    assert rows[plan.manifest.digest].error_over_bound is None and rows[eager.manifest.digest].refs == (CANDIDATE,)
    facts = inspect_engine(registry, plan.manifest.digest, tmp_path / "eight")
    assert not facts.runs_here and facts.card.architectures == ("sm89",)


@pytest.mark.slow
def test_a_recipe_in_bf16_is_exported_on_a_cpu_and_one_in_fp8_says_so(registry: Registry, tmp_path: Path) -> None:
    network = {"hidden_size": 32, "depth": 1, "num_heads": 2, "unmasked_depth": 0}
    bf16, fp8 = (
        make_recipe(network=network, export=export) for export in ({"precision": "bf16"}, {"quantization": "fp8"})
    )
    checkpoint = publish_checkpoint(registry, bf16, make_network(bf16, 0, text=384, pooled=384), tmp_path)
    made = export_engine(registry, checkpoint.digest, tmp_path / "bf16", who="tests")
    assert made.proof.precision == "bf16" and made.proof.passed
    assert made.proof.worst_call.max_abs_error > BOUNDS["fp16"].max_abs_error / 10, "bf16 is rounded to"
    check_golden(VideoPipeline.load(tmp_path / "bf16" / "engine"))

    checkpoint = publish_checkpoint(registry, fp8, make_network(fp8, 1, text=384, pooled=384), tmp_path)
    quantized = export_engine(registry, checkpoint.digest, tmp_path / "fp8", who="tests")
    assert quantized.proof.precision == "fp8"
    assert quantized.manifest.provenance is not None and parameters_of(quantized.manifest)["quantization"] == "fp8"
    (row,) = [row for row in list_engines(registry) if row.digest == quantized.manifest.digest]
    assert row.precision == "fp32, fp8"
    with pytest.raises(ValueError, match=r"export\.quantization 'fp8' stands in the exported graph"):
        recipe_for(fp8, load_target(target_path("torch")))

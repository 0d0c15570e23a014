"""Publishing, fetching, gates and promotion, on a folder and on a real S3 server."""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.registry.gate import PromotionRefused, evaluate_gate
from infra.registry.records import GateReport, Manifest
from infra.registry.registry import Registry
from infra.store.artifacts import (
    AlreadyExists,
    ArtifactCorrupt,
    ArtifactNotFound,
    ArtifactStore,
    Blob,
    Conflict,
    blob_key,
)
from infra.store.folder import FolderStore
from model.config import GateRule

RULES = (GateRule(metric="heldout_loss", op="<", bound=0.5), GateRule(metric="loads", op=">=", bound=1))
GOOD = {"heldout_loss": 0.4, "loads": 1.0}
BAD = {"heldout_loss": 0.6, "loads": 1.0}
PASSED = evaluate_gate(RULES, GOOD)
FAILED = evaluate_gate(RULES, BAD)
ABSENT = "0" * 64


@pytest.fixture
def registry(store: ArtifactStore) -> Registry:
    return Registry(store)


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path / "store"))


def sources(folder: Path, mark: str = "one") -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    texts = {"model.safetensors": f"weights {mark}", "text/recipe.json": "{}"}
    for name, text in texts.items():
        (folder / f"{mark}-{Path(name).name}").write_text(text)
    return {name: folder / f"{mark}-{Path(name).name}" for name in texts}


def publish(registry: Registry, folder: Path, mark: str = "one", metrics: Mapping[str, float] = GOOD) -> Manifest:
    return registry.publish("checkpoint", sources(folder, mark), rules=RULES, metrics=metrics)


def files_under(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_is_fetched_as_it_was(registry: Registry, tmp_path: Path) -> None:
    manifest = registry.publish(
        "checkpoint",
        sources(tmp_path / "in"),
        recipe={"name": "t2v", "network": {"depth": 2}, "gate": [{"bound": 0.5}], "path": None},
        metrics={"heldout_loss": 0.1 + 0.2, "psnr": math.inf},
    )
    found = registry.resolve(manifest.digest)
    assert found == manifest
    assert found.digest == manifest.digest
    assert registry.store.list("manifests/") == [f"manifests/{manifest.digest}.json"]
    assert registry.fetch(found, tmp_path / "out") == tmp_path / "out"
    assert files_under(tmp_path / "out") == {"model.safetensors": "weights one", "text/recipe.json": "{}"}


def test_a_manifest_is_json_with_sorted_keys_that_its_digest_names(local: Registry, tmp_path: Path) -> None:
    manifest = local.publish("codec", sources(tmp_path / "in"), metrics={"b": math.nan, "a": 1.0})
    text = local.store.read(f"manifests/{manifest.digest}.json").data
    tree = json.loads(text)
    assert list(tree) == sorted(tree)
    assert tree["metrics"] == {"a": 1.0, "b": "NaN"}
    assert tree["kind"] == "codec"
    assert tree["code"] == local.code.model_dump()
    assert tree["files"]["text/recipe.json"]["size"] == 2
    assert math.isnan(local.resolve(manifest.digest).metrics["b"])


def test_parents_are_recorded_and_must_be_published(local: Registry, tmp_path: Path) -> None:
    parent = publish(local, tmp_path / "in")
    child = local.publish("engine", sources(tmp_path / "in", "two"), parents={"checkpoint": parent.digest})
    assert local.resolve(child.digest).parents == {"checkpoint": parent.digest}
    with pytest.raises(ArtifactNotFound, match=f"parent 'dataset' of the engine to publish: no manifest {ABSENT}"):
        local.publish("engine", sources(tmp_path / "in"), parents={"dataset": ABSENT})


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", ""])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(local: Registry, tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(ValueError, match="is not a store key"):
        local.publish("checkpoint", {name: path})
    manifest = publish(local, tmp_path / "in")
    forged = manifest.canonical().replace(b'"model.safetensors"', json.dumps(name).encode())
    with pytest.raises(ValueError, match="is not a store key"):
        Manifest.model_validate_json(forged)


def test_nothing_is_sent_when_a_file_to_publish_is_missing(local: Registry, tmp_path: Path) -> None:
    files = sources(tmp_path / "in") | {"vae.safetensors": tmp_path / "none"}
    with pytest.raises(ValueError, match=r"file 'vae.safetensors' of the checkpoint to publish: .*none is not a file"):
        local.publish("checkpoint", files)
    with pytest.raises(ValueError, match="a dataset without files"):
        local.publish("dataset", {})
    assert local.store.list() == []


def test_a_publication_broken_off_before_its_manifest_is_invisible(registry: Registry, tmp_path: Path) -> None:
    # Reading the last one fails like a bad sector does.
    broken = sources(tmp_path / "in") | {"z": Path("/proc/self/mem")}
    with pytest.raises(OSError, match="Input/output error"):
        registry.publish("checkpoint", broken)
    assert registry.store.list() == []
    manifest = publish(registry, tmp_path / "in")
    assert registry.store.list("manifests/") == [f"manifests/{manifest.digest}.json"]


def test_a_fetch_that_lacks_a_blob_leaves_no_folder(registry: Registry, tmp_path: Path) -> None:
    manifest = publish(registry, tmp_path / "in")
    files = manifest.files | {"z.safetensors": Blob(ABSENT, 3)}
    with pytest.raises(ArtifactNotFound, match=rf"file 'z.safetensors' of checkpoint .*{ABSENT}: no such object"):
        registry.fetch(manifest.model_copy(update={"files": files}), tmp_path / "out" / "checkpoint")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fetch_of_a_corrupt_blob_names_the_file_and_leaves_no_folder(registry: Registry, tmp_path: Path) -> None:
    manifest = publish(registry, tmp_path / "in")
    digest = manifest.files["model.safetensors"].digest
    key = f"cas/sha256/{digest[:2]}/{digest}"
    registry.store.swap(key, b"weights onf", registry.store.read(key).version)
    with pytest.raises(ArtifactCorrupt, match=rf"file 'model.safetensors' of checkpoint .*expected sha256 {digest}"):
        registry.fetch(manifest, tmp_path / "out" / "checkpoint")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_complete_copy_is_left_as_it_is_and_a_damaged_one_is_told(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    folder = local.fetch(manifest, tmp_path / "out")
    copy = folder / "model.safetensors"
    before = copy.stat()
    (folder / "cache.bin").write_text("mine")
    assert local.fetch(manifest, folder) == folder
    assert copy.stat().st_ino == before.st_ino
    copy.write_text("weights onf")
    with pytest.raises(
        ArtifactCorrupt, match=r"out/model.safetensors is not the file of checkpoint .*delete the folder"
    ):
        local.fetch(manifest, folder)


def test_a_folder_in_use_is_not_fetched_into(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out is in use and is no copy .*it lacks \['model.safetensors'"):
        local.fetch(manifest, tmp_path / "out")
    assert files_under(tmp_path / "out") == {"thesis.txt": "mine"}


def test_rival_fetches_into_one_folder_all_succeed(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    folder = tmp_path / "out" / "checkpoint"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(local.fetch, [manifest] * 8, [folder] * 8)) == {folder}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    assert len(files_under(folder)) == 2


def test_an_edited_manifest_is_corrupt(registry: Registry, tmp_path: Path) -> None:
    manifest = publish(registry, tmp_path / "in")
    key = f"manifests/{manifest.digest}.json"
    stored = registry.store.read(key)
    registry.store.swap(key, stored.data.replace(b"0.4", b"0.3"), stored.version)
    with pytest.raises(ArtifactCorrupt, match=f"{key} is corrupt: expected sha256 {manifest.digest}, found"):
        registry.resolve(manifest.digest)


def test_what_was_never_published_or_promoted_is_named(registry: Registry) -> None:
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        registry.resolve(ABSENT)
    with pytest.raises(ArtifactNotFound, match=r"refs/t2v/promoted\.json"):
        registry.resolve("t2v/promoted")
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        registry.promote("t2v/promoted", ABSENT, who="tests", why="never published")
    assert registry.store.list() == []


def test_a_promotion_moves_the_ref_and_history_tells_why(registry: Registry, tmp_path: Path) -> None:
    one, two = (publish(registry, tmp_path / "in", mark) for mark in ("one", "two"))
    first = registry.promote("t2v/promoted", one.digest, who="ann", why="first")
    second = registry.promote("t2v/promoted", two.digest, who="bob", why="better")
    assert registry.resolve("t2v/promoted") == two
    assert registry.ref("t2v/promoted") == second
    assert registry.history("t2v/promoted") == (second, first)
    assert [(move.generation, move.previous, move.who, move.why) for move in (first, second)] == [
        (1, None, "ann", "first"),
        (2, one.digest, "bob", "better"),
    ]
    assert first.when <= second.when
    assert second.gate == PASSED
    assert registry.store.list("reflog/") == [
        "reflog/t2v/promoted/00000001.json",
        "reflog/t2v/promoted/00000002.json",
    ]


def test_the_same_promotion_again_changes_nothing(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    first = local.promote("t2v/promoted", manifest.digest, who="ann", why="first")
    assert local.promote("t2v/promoted", manifest.digest, who="ann", why="retried") == first
    assert local.history("t2v/promoted") == (first,)


def test_a_failed_gate_is_refused_and_the_ref_unchanged(registry: Registry, tmp_path: Path) -> None:
    one = publish(registry, tmp_path / "in")
    two = publish(registry, tmp_path / "in", "two", {"heldout_loss": 0.61234})
    first = registry.promote("t2v/promoted", one.digest, who="ann", why="first")
    with pytest.raises(PromotionRefused) as caught:
        registry.promote("t2v/promoted", two.digest, who="bob", why="hope")
    assert "'t2v/promoted' is not moved" in str(caught.value)
    assert "heldout_loss = 0.61234, must be < 0.5; loads is missing, must be >= 1" in str(caught.value)
    assert caught.value.gate == evaluate_gate(RULES, two.metrics)
    assert registry.history("t2v/promoted") == (first,)
    assert registry.store.list("reflog/") == ["reflog/t2v/promoted/00000001.json"]


def test_an_override_lets_a_failed_gate_through_and_stays_on_record(local: Registry, tmp_path: Path) -> None:
    one = publish(local, tmp_path / "in", "one", BAD)
    two = publish(local, tmp_path / "in", "two")
    local.promote("t2v/promoted", one.digest, who="ann", why="demo", override="the demo must go on")
    local.promote("t2v/promoted", two.digest, who="bob", why="better")
    newest, oldest = local.history("t2v/promoted")
    assert newest.override is None
    assert (oldest.override, oldest.gate) == ("the demo must go on", FAILED)


@pytest.mark.parametrize("field", ["who", "why", "override"])
def test_a_promotion_without_a_name_or_a_reason_is_refused(local: Registry, tmp_path: Path, field: str) -> None:
    manifest = publish(local, tmp_path / "in", metrics=BAD)
    said = {"who": "ann", "why": "first", "override": "urgent"} | {field: " "}
    with pytest.raises(ValueError, match=field):
        local.promote("t2v/promoted", manifest.digest, **said)
    assert local.store.list("ref") == []


def test_of_rival_promotions_one_wins_and_the_others_are_told(registry: Registry, tmp_path: Path) -> None:
    standing = publish(registry, tmp_path / "in", "standing")
    registry.promote("t2v/promoted", standing.digest, who="ann", why="first")
    rivals = [publish(registry, tmp_path / "in", str(number)) for number in range(6)]
    barrier = threading.Barrier(len(rivals))

    def promote(manifest: Manifest) -> str | None:
        barrier.wait()
        try:
            return registry.promote("t2v/promoted", manifest.digest, who="rival", why="race").digest
        except Conflict as error:
            assert "was moved by somebody else" in str(error)
            return None

    with ThreadPoolExecutor(len(rivals)) as pool:
        winners = [digest for digest in pool.map(promote, rivals) if digest]
    history = registry.history("t2v/promoted")
    assert winners
    assert registry.resolve("t2v/promoted").digest == history[0].digest
    assert sorted(move.digest for move in history) == sorted([standing.digest, *winners])
    assert [move.previous for move in history] == [*(move.digest for move in history[1:]), None]


def test_a_rollback_goes_back_and_stays_on_record(registry: Registry, tmp_path: Path) -> None:
    one = publish(registry, tmp_path / "in", "one", BAD)
    two = publish(registry, tmp_path / "in", "two")
    first = registry.promote("t2v/promoted", one.digest, who="ann", why="first", override="the demo must go on")
    registry.promote("t2v/promoted", two.digest, who="bob", why="better")
    back = registry.rollback("t2v/promoted", who="eve", why="two draws squares")
    assert registry.resolve("t2v/promoted") == one
    assert (back.generation, back.restores, back.previous, back.why) == (3, 1, two.digest, "two draws squares")
    assert (back.gate, back.override) == (first.gate, "the demo must go on"), "it stands by the override it came with"
    assert [move.generation for move in registry.history("t2v/promoted")] == [3, 2, 1]


def test_going_back_twice_goes_back_two_promotions(local: Registry, tmp_path: Path) -> None:
    made = [publish(local, tmp_path / "in", str(number)) for number in range(4)]
    for manifest in made[:3]:
        local.promote("r", manifest.digest, who="ann", why="next")
    assert local.rollback("r", who="ann", why="back").digest == made[1].digest
    assert local.rollback("r", who="ann", why="further").digest == made[0].digest
    with pytest.raises(ValueError, match="nothing before generation 1"):
        local.rollback("r", who="ann", why="too far")
    local.promote("r", made[3].digest, who="ann", why="new")
    assert local.rollback("r", who="ann", why="back").digest == made[0].digest, "what stood before, not what was last"


def test_a_rollback_to_a_generation_that_is_not_there_names_those_that_are(local: Registry, tmp_path: Path) -> None:
    one, two = (publish(local, tmp_path / "in", mark) for mark in ("one", "two"))
    for each in (one, two):
        local.promote("r", each.digest, who="ann", why="next")
    with pytest.raises(ValueError, match=r"'r' has no generation 7; it has \[1, 2\]"):
        local.rollback("r", who="ann", why="back", to=7)
    with pytest.raises(ValueError, match="points at generation 2 already"):
        local.rollback("r", who="ann", why="back", to=2)
    with pytest.raises(ValueError, match="why"):
        local.rollback("r", who="ann", why=" ", to=1)
    assert local.rollback("r", who="ann", why="back", to=1).digest == one.digest


def test_an_unknown_ref_is_told_with_the_near_ones(local: Registry, tmp_path: Path) -> None:
    local.promote("t2v/promoted", publish(local, tmp_path / "in").digest, who="ann", why="first")
    for attempt in (
        lambda: local.resolve("t2v/promotd"),
        lambda: local.history("t2v/promotd"),
        lambda: local.rollback("t2v/promotd", who="ann", why="back"),
    ):
        with pytest.raises(ArtifactNotFound, match=r"no ref 't2v/promotd': .* did you mean 't2v/promoted'"):
            attempt()


def test_an_artifact_without_rules_or_with_a_lost_file_is_not_promoted(local: Registry, tmp_path: Path) -> None:
    ungated = local.publish("checkpoint", sources(tmp_path / "in"))
    with pytest.raises(ValueError, match="publish the artifact with at least one"):
        local.promote("r", ungated.digest, who="ann", why="first")
    lost = publish(local, tmp_path / "in", "two")
    local.store.delete(blob_key(lost.files["model.safetensors"].digest))
    with pytest.raises(ArtifactNotFound, match=r"has lost its files \['model.safetensors'\]"):
        local.promote("r", lost.digest, who="ann", why="first")
    assert not local.refs()


def test_a_move_broken_off_before_the_pointer_is_no_part_of_history(local: Registry, tmp_path: Path) -> None:
    one, two = (publish(local, tmp_path / "in", mark) for mark in ("one", "two"))
    first = local.promote("t2v/promoted", one.digest, who="ann", why="first")
    lost = first.model_copy(update={"generation": 2, "digest": two.digest, "who": "crashed"})
    local.store.create("reflog/t2v/promoted/00000002.json", lost.canonical())
    assert local.resolve("t2v/promoted") == one
    second = local.promote("t2v/promoted", two.digest, who="bob", why="better")
    assert second.generation == 3
    assert local.history("t2v/promoted") == (second, first)


def test_a_log_entry_is_never_written_over(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    move = local.promote("t2v/promoted", manifest.digest, who="ann", why="first")
    with pytest.raises(AlreadyExists):
        local.store.create("reflog/t2v/promoted/00000001.json", move.canonical())


@pytest.mark.parametrize("name", ["../x", "", "a b", ABSENT])
def test_a_ref_name_that_is_a_path_or_a_digest_is_refused(local: Registry, tmp_path: Path, name: str) -> None:
    manifest = publish(local, tmp_path / "in")
    with pytest.raises(ValueError, match=r"is not a store key|is a digest"):
        local.promote(name, manifest.digest, who="ann", why="first")


def test_a_ref_edited_by_hand_is_corrupt(local: Registry, tmp_path: Path) -> None:
    manifest = publish(local, tmp_path / "in")
    local.promote("t2v/promoted", manifest.digest, who="ann", why="first")
    stored = local.store.read("refs/t2v/promoted.json")
    local.store.swap(
        "refs/t2v/promoted.json", stored.data.replace(b'"generation":1', b'"generation":0'), stored.version
    )
    with pytest.raises(ArtifactCorrupt, match=r"refs/t2v/promoted.json is not a ref: generation: Input"):
        local.resolve("t2v/promoted")


@pytest.mark.parametrize(
    ("op", "value", "passed"),
    [
        ("<", 0.5, False),
        ("<=", 0.5, True),
        (">", 0.5, False),
        (">=", 0.5, True),
        ("<", 0.4, True),
        (">", math.inf, True),
    ],
)
def test_a_rule_compares_as_it_is_written(op: str, value: float, passed: bool) -> None:
    rule = GateRule.model_validate({"metric": "m", "op": op, "bound": 0.5})
    assert evaluate_gate([rule], {"m": value}).passed is passed


@pytest.mark.parametrize(("metrics", "word"), [({}, "missing"), ({"heldout_loss": math.nan}, "nan")])
@pytest.mark.parametrize("op", ["<", "<=", ">", ">="])
def test_a_metric_that_is_missing_or_nan_fails(metrics: dict[str, float], word: str, op: str) -> None:
    rule = GateRule.model_validate({"metric": "heldout_loss", "op": op, "bound": 0.5})
    report = evaluate_gate([rule], metrics)
    assert not report.passed
    assert report.rules[0].value is None
    assert report.rules[0].reason == f"heldout_loss is {word}, must be {op} 0.5"


def test_a_report_survives_json_and_cannot_contradict_itself() -> None:
    assert GateReport.model_validate_json(FAILED.canonical()) == FAILED
    with pytest.raises(ValueError, match="contradicts the rules"):
        GateReport(passed=True, rules=FAILED.rules)


@pytest.mark.parametrize("rules", [[], ()])
def test_a_gate_without_rules_is_refused(rules: Sequence[GateRule]) -> None:
    with pytest.raises(ValueError, match="could never refuse"):
        evaluate_gate(rules, {"heldout_loss": 0.1})
    with pytest.raises(ValueError, match="at least 1 item"):
        GateReport(passed=True, rules=())

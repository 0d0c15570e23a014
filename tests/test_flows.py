"""The curriculum as a user runs it: Metaflow's own command line, real ranks, a kill in the middle, a resume."""

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.catalog import RECIPES
from infra.ingest import ingest
from infra.launch.stage import run_stage
from infra.registry.gate import PromotionRefused
from infra.registry.names import promoted
from infra.registry.registry import Registry
from infra.store.location import open_store
from model.recipe import Curriculum, load
from model.training.run import read_progress

ROOT = Path(__file__).parents[1]
SMALL = [
    "*.training.world_size=1",
    "*.training.global_batch_size=8",
    "*.training.micro_batch_size=8",
    "*.training.steps=4",
    "*.training.unmasked_steps=4",
    "*.training.checkpoint_every=2",
    "*.training.log_every=1",
    "*.network.hidden_size=32",
    "*.network.num_heads=2",
    "*.network.depth=3",
    "*.data.weights={moving_shapes = 1.0}",
    "*.evaluation.heldout_clips=8",
    "*.evaluation.sample_prompts=4",
    "*.sampling.num_steps=2",
    "*.gate=[{metric = 'heldout_loss', op = '<', bound = 100.0}]",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny curriculum on a corpus of a few clips."""
    folder = tmp_path_factory.mktemp("recipe")
    for path in (RECIPES / "tiny").glob("*.toml"):
        shutil.copy(path, folder)
    curriculum = folder / "curriculum.toml"
    text = curriculum.read_text()
    for key, value in (("shapes = 2400", "shapes = 48"), ("heldout_shapes = 192", "heldout_shapes = 12")):
        assert key in text, "the tiny recipe changed: mend this fixture"
        text = text.replace(key, value)
    curriculum.write_text(text)
    return curriculum


@pytest.fixture(scope="module")
def curriculum(recipe: Path) -> Curriculum:
    return load(recipe, SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, curriculum: Curriculum) -> Path:
    """A store with a promoted data set and codec."""
    root = tmp_path_factory.mktemp("store")
    work = tmp_path_factory.mktemp("ingest")
    ingest(Registry(open_store(str(root))), curriculum, work, videos=None, who="tests")
    return root


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a Metaflow of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (tmp_path / ".metaflow").mkdir()
    yield {**os.environ, "METAFLOW_USER": "tests", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path), "PATH": path}


def flow(*arguments: str, home: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "flows.curriculum_flow", "--no-pylint", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=home, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)


def content_of(card: Path) -> str:
    """What a card's page shows: JSON that the page carries in base64."""
    data = re.search(r'__MF_DATA__\[.*?\]\s*=\s*"([A-Za-z0-9+/=]+)"', card.read_text())
    assert data is not None
    return base64.b64decode(data[1]).decode()


def kill_family(process: "subprocess.Popen[bytes]") -> None:
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.mark.timeout(600)
def test_a_killed_curriculum_resumes_where_it_was_and_promotes_every_stage(
    recipe: Path, store: Path, home: dict[str, str], tmp_path: Path
) -> None:
    registry, log = Registry(open_store(str(store))), tmp_path / "flow.log"
    run = ["run", "--recipe", str(recipe), "--set", ";".join([*SMALL, "t2v.training.unmasked_steps=120"])]
    first = flow(*run, "--store", str(store), "--work", str(tmp_path / "work"), home=home, log=log)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "work").glob("*/t2v/checkpoints/latest")):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    kill_family(first)
    after_t2i = registry.ref(promoted("t2i"))
    assert not registry.store.exists("refs/t2v/promoted.json")

    resumed = flow("resume", home=home, log=log)
    # The t2v stage is long on purpose; it is cut short once it is seen to go on from its checkpoint, not from step 0.
    assert resumed.wait(400) == 0, log.read_text()
    t2v = next((tmp_path / "work").glob("*/t2v"))
    assert "resumed after step" in (t2v / "logs" / "rank-0.log").read_text()
    steps = [line.step for line in read_progress(t2v / "progress.jsonl")]
    assert steps == list(range(1, 125)), "every step is there once, in order"
    assert registry.ref(promoted("t2i")) == after_t2i, "a finished stage is not trained again"
    t2v_manifest, ti2v = registry.resolve(promoted("t2v")), registry.resolve(promoted("ti2v"))
    assert t2v_manifest.parents["checkpoint"] == after_t2i.digest
    assert ti2v.parents["checkpoint"] == t2v_manifest.digest
    assert {"evaluation/samples.png", "ema-00000-of-00001.safetensors"} <= set(ti2v.files)

    for stage in ("t2v", "ti2v"):
        cards = (tmp_path / ".metaflow" / "mf.cards").glob(f"CurriculumFlow/runs/*/steps/{stage}/tasks/*/cards/*.html")
        shown = content_of(max(cards, key=lambda card: card.stat().st_mtime))
        assert "Gate: promoted" in shown and "data:image/png" in shown and "heldout_loss" in shown


def test_the_flow_explains_itself(home: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "show.log"
    assert flow("show", home=home, log=log).wait(120) == 0
    shown = log.read_text()
    for words in ("Text to image: appearance", "Text to video: motion", "Text and image to video"):
        assert words in shown


def test_a_flow_without_its_data_set_stops_at_once_and_says_what_is_missing(
    recipe: Path, home: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "flow.log"
    started = flow("run", "--recipe", str(recipe), "--store", str(tmp_path / "empty"), home=home, log=log)
    assert started.wait(120) != 0
    assert "dataset/promoted" in log.read_text()


def test_a_refused_gate_publishes_the_checkpoint_but_moves_no_ref(
    curriculum: Curriculum, store: Path, tmp_path: Path
) -> None:
    registry = Registry(open_store(str(store)))
    tree = curriculum.stage("t2i").model_dump()
    tree |= {"name": "hopeless", "gate": [{"metric": "heldout_loss", "op": "<", "bound": 0.001}]}
    hopeless = type(curriculum.stage("t2i")).model_validate(tree)
    with pytest.raises(PromotionRefused, match=r"heldout_loss = .*must be < 0.001"):
        run_stage(hopeless, registry, tmp_path / "work", who="tests", on_progress=lambda _: None)
    assert not registry.store.exists("refs/hopeless/promoted.json")
    kinds = [
        registry.resolve(key.split("/")[1].removesuffix(".json")).kind for key in registry.store.list("manifests/")
    ]
    assert "checkpoint" in kinds

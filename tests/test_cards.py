"""A training step's card follows the run in place and ends with gate, checkpoint and samples; read as users read it."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FLOW = '''
import json
import time
from pathlib import Path

from metaflow import FlowSpec, card, current, step
from metaflow.cards import get_cards
from metaflow.plugins.cards.exception import CardNotPresentException

from flows.cards import TrainingCard
from flows.catalog import recipe_path
from model.recipe import load
from model.training.run import ProgressLine


class CardFlow(FlowSpec):
    """A step that shows a stage it did not train, and one that reads what was shown."""

    @card(type="blank", id="training", refresh_interval=0)
    @step
    def start(self):
        """Progress comes in until a viewer sees it, then the outcome."""
        overrides = ["t2i.training.steps=400", "t2i.training.unmasked_steps=0"]
        board = TrainingCard(current.card["training"], load(recipe_path("tiny"), overrides).stages[0])
        board.update([])
        lines = [line(at) for at in range(10, 401, 10)]
        self.live, self.pathspec, deadline = None, current.pathspec, time.monotonic() + 120
        while not seen(self.live) and time.monotonic() < deadline:
            board.update(lines[:30])
            time.sleep(0.3)
            self.live = live_data(self.pathspec)
        board.finish(outcome(lines))
        self.next(self.end)

    @step
    def end(self):
        """Leave the final card and the live data for the test."""
        cards = get_cards(self.pathspec, id="training")
        Path("found.json").write_text(json.dumps({"cards": len(cards), "html": cards[0].get(), "live": self.live}))


def line(at):
    """A run whose start took 25 s, with 20 ms of each step's 250 spent waiting for data."""
    spent = {"init": 25.0, "step": 0.23 * at, "data_wait": 0.02 * at, "idle": 0.0}
    figures = dict(data_wait_seconds=0.02, mfu=0.306, straggler_ratio=1.08, spent_seconds=spent)
    return ProgressLine(at, 400, 1.0 + 1.0 / at, 0.5, 2e-4, 0.25, 256.0, 0.25 * at, **figures)


def live_data(pathspec):
    """What a viewer is sent while the step runs; None before the card's first rendering."""
    try:
        return get_cards(pathspec)[0].get_data()
    except CardNotPresentException:
        return None


def seen(live):
    return live is not None and any(part.get("value") == 300 for part in live["data"].values())


def outcome(progress):
    """What `run_stage` hands over."""
    from infra.launch.stage import StageOutcome
    from infra.registry.gate import evaluate_gate
    from infra.registry.registry import Registry
    from infra.store.location import open_store
    from model.config import GateRule

    grid = Path("samples.png")
    metrics = {"heldout_loss": 0.4312, "t2i_color_accuracy": 0.979}
    manifest = Registry(open_store("store")).publish("checkpoint", {"samples.png": grid}, metrics=metrics)
    Path("digest").write_text(manifest.digest)
    gate = evaluate_gate([GateRule(metric="heldout_loss", op="<", bound=0.8)], metrics)
    return StageOutcome(manifest, gate, tuple(progress), grid, {"t2i": grid}, {"train": 1.0})


if __name__ == "__main__":
    CardFlow()
'''
Component = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the flow has run."""
    folder = tmp_path_factory.mktemp("card-flow")
    (folder / "card_flow.py").write_text(FLOW)
    Image.new("RGB", (64, 32), "red").save(folder / "samples.png")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_USER": "tests",
        "METAFLOW_HOME": str(folder / "home"),
    }
    command = [sys.executable, "card_flow.py", "--no-pylint", "run"]
    flow = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert flow.returncode == 0, flow.stdout + flow.stderr
    assert "@card" not in flow.stdout + flow.stderr, "Metaflow warns about the card: " + flow.stdout
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / "found.json").read_text()))


@pytest.fixture(scope="module")
def shown(found: dict[str, Any]) -> list[Component]:
    """Every component of the final card, out of its page."""
    assert found["cards"] == 1
    data = re.search(r'__MF_DATA__\[.*?\]\s*=\s*"([A-Za-z0-9+/=]+)"', found["html"])
    assert data is not None
    return flat(json.loads(base64.b64decode(data[1]))["components"])


def flat(components: list[Component]) -> list[Component]:
    return [part for component in components for part in [component, *flat(component.get("contents", []))]]


def of_type(components: list[Component], kind: str) -> list[Component]:
    return [component for component in components if component.get("type") == kind]


def test_a_viewer_of_the_running_step_sees_its_progress(found: dict[str, Any]) -> None:
    live = cast(dict[str, Component], found["live"]["data"])
    assert list(live) == ["title", "progress", "state", "loss", "time"]
    assert (live["progress"]["value"], live["progress"]["max"]) == (300, 400)
    assert live["progress"]["details"] == "about 25 s left"
    assert "256 samples/s" in json.dumps(live["state"]) and "loss **1.003**" in json.dumps(live["state"])
    assert len(live["loss"]["spec"]["data"]["values"]) == 30


def test_the_final_card_shows_the_whole_run(shown: list[Component]) -> None:
    (bar,), (chart, _) = of_type(shown, "progressBar"), of_type(shown, "vegaChart")
    assert (bar["value"], bar["max"], bar["details"]) == (400, 400, "trained")
    assert "t2i: text to image" in json.dumps(of_type(shown, "markdown"))
    values = chart["spec"]["data"]["values"]
    assert [value["step"] for value in values] == list(range(10, 401, 10))
    assert values[0]["loss"] == 1.1


def test_a_viewer_of_the_running_step_sees_where_its_time_goes(found: dict[str, Any]) -> None:
    live = cast(dict[str, Component], found["live"]["data"])
    bar = {part["spent on"]: (part["seconds"], part["percent"]) for part in live["time"]["spec"]["data"]["values"]}
    assert bar == {"optimizer steps": (69.0, 69.0), "waiting for data": (6.0, 6.0), "starting": (25.0, 25.0)}
    said = json.dumps(live["state"], ensure_ascii=False)
    assert "goodput **69\xa0%** · MFU **31\xa0%** · 8\xa0% of a step waits for data" in said
    assert "slowest rank 1.08 × the median" in said and "HFU" not in said


def test_the_final_card_shows_gate_checkpoint_and_figures(shown: list[Component], folder: Path) -> None:
    gate, evaluation = of_type(shown, "table")
    assert gate["data"] == [["heldout_loss", "0.4312", "< 0.8", "passed"]]
    assert ["t2i_color_accuracy", "98\xa0%"] in evaluation["data"]
    words = json.dumps(of_type(shown, "markdown"))
    assert "Gate: promoted" in words and (folder / "digest").read_text() in words


def test_the_final_card_carries_the_sample_grid_itself(shown: list[Component], folder: Path) -> None:
    (image,) = of_type(shown, "image")
    kind, _, data = image["src"].partition(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == (folder / "samples.png").read_bytes()

"""The journal tells where a run's time went: in progress lines, metrics and the ledger, over a death too."""

import json
import re
import time
from pathlib import Path

import pytest

from model.network.cost import Cost
from model.training.journal import Journal
from model.training.run import RunFolders, read_progress
from monitoring import metrics
from monitoring.goodput import Ledger, read
from tests.tiny_stage import stage

STEP_SECONDS = 'stiv_training_time_seconds_total{account="step"}'
COST = Cost(tokens=100, model_flops=3 * 10**9, hardware_flops=4 * 10**9)
FIGURES = {"loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-3, "seconds": 0.025}


@pytest.fixture
def folders(tmp_path: Path) -> RunFolders:
    """Of a run; the journal reads nothing else."""
    return RunFolders(data=tmp_path / "data", codec=tmp_path / "codec", run=tmp_path)


def training_metrics() -> dict[str, float]:
    """As a scrape finds them now."""
    page = metrics.render(metrics.TRAINING)[0].decode()
    return {name: float(value) for name, value in re.findall(r"^(stiv_training\S+) (\S+)$", page, re.MULTILINE)}


def test_the_journal_says_where_the_time_went(folders: RunFolders) -> None:
    """Three steps of 20 ms with a save after the second, a death, and two more from that save."""
    before = training_metrics()
    for first_step, last_step in ((0, 3), (2, 4)):
        ledger = Ledger(folders.goodput, "init")
        recipe = stage(log_every=1)
        journal = Journal(recipe, folders, ledger, first_step=first_step, metrics_port=0, peak_flops=1e12)
        for step in range(first_step + 1, last_step + 1):
            ledger.switch("data_wait")
            time.sleep(0.005)
            ledger.switch("step")
            time.sleep(0.02)
            journal.note(step, **FIGURES, cost=COST, rank_seconds=[0.01, 0.02, 0.01])
            if step == 2:
                journal.note_save(step)
        if last_step == 4:
            journal.close()
        else:
            journal._exporter.close()  # all that a death would close
    written = read_progress(folders.progress)
    assert [line.step for line in written] == [1, 2, 3, 4]
    assert (written[0].mfu, written[0].hfu) == (pytest.approx(0.12), pytest.approx(0.16))
    assert written[0].tokens_per_second == pytest.approx(4000) and written[0].straggler_ratio == pytest.approx(2.0)
    assert all(line.data_wait_seconds is not None and line.data_wait_seconds >= 0.005 for line in written)

    booked, after = read(folders.goodput), training_metrics()
    assert booked is not None and booked.restarts == 1
    stepped = after[STEP_SECONDS] - before.get(STEP_SECONDS, 0.0)
    assert stepped >= 0.1, "all five steps were done"
    assert stepped - booked.seconds["step"] >= 0.015, "one of them twice"
    assert booked.seconds["lost_to_restart"] >= 0.025
    assert written[3].goodput == pytest.approx(after["stiv_training_goodput_ratio"])
    assert (after["stiv_training_mfu_ratio"], after["stiv_training_hfu_ratio"]) == (written[3].mfu, written[3].hfu)
    assert after["stiv_training_straggler_ratio"] == pytest.approx(2.0)


def test_what_a_cpu_cannot_know_is_absent(folders: RunFolders) -> None:
    ledger = Ledger(folders.goodput, "step")
    journal = Journal(stage(log_every=1), folders, ledger, first_step=0, metrics_port=0)
    journal.note(1, **FIGURES, cost=COST, rank_seconds=[0.02])
    journal.close()
    (written,) = read_progress(folders.progress)
    assert (written.mfu, written.hfu, written.straggler_ratio) == (None, None, None)
    assert written.tokens_per_second == 4000


def test_a_checkpoint_counts_once_and_when_it_is_durable(folders: RunFolders) -> None:
    journal = Journal(stage(), folders, Ledger(None, "init"), first_step=0, metrics_port=0)
    name = "stiv_training_checkpoint_seconds_count"
    before = metrics.TRAINING.get_sample_value(name) or 0.0
    journal.note_save(2)
    folder = folders.run / "step-00000002"
    for durable in (None, None, folder, folder):
        if durable:
            folder.mkdir(exist_ok=True)
        journal.note_durable(durable)
    journal.close()
    assert metrics.TRAINING.get_sample_value(name) == before + 1
    last = metrics.TRAINING.get_sample_value("stiv_training_last_checkpoint_timestamp_seconds")
    assert last == folder.stat().st_mtime


def test_progress_without_a_ledger_is_read_too(folders: RunFolders) -> None:
    old = {"step": 2, "total_steps": 4, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-3}
    old |= {"step_seconds": 0.1, "samples_per_second": 80.0, "elapsed_seconds": 0.2}
    folders.progress.write_text(json.dumps(old) + "\n")
    (found,) = read_progress(folders.progress)
    assert found.goodput is None and found.data_wait_seconds is None

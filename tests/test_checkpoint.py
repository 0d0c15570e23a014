"""Checkpoints: written whole or not at all, and never used where a byte differs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint.folder import (
    CheckpointCorrupt,
    TrainState,
    digest_of,
    latest,
    load,
    load_weights,
    random_state,
    restore_random,
    save,
    verify,
)
from tests.tiny_stage import stage

FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors"]
FILES += ["state.json", "recipe.json", "manifest.json"]


def state(step: int = 5, size: int = 6) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    stacked = torch.randn(3, size, generator=generator)
    return TrainState(
        step=step,
        model={"a.weight": torch.randn(size, 4, generator=generator), "a.bias": torch.zeros(0)},
        ema={"a.weight": torch.randn(4, size, generator=generator).T},
        optimizer={f"row:{place}": row for place, row in enumerate(stacked.unbind())},
        random=random_state(),
        loader={"position": 40},
        inputs={"data": "d1"},
        recipe=stage(),
    )


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = state()
    folder = save(tmp_path, saved, keep=2)
    loaded = load(folder)
    assert folder == latest(tmp_path) == tmp_path / "step-00000005"
    assert (loaded.step, loaded.loader, loaded.inputs) == (5, {"position": 40}, {"data": "d1"})
    assert loaded.recipe == saved.recipe
    for part in ("model", "ema", "optimizer", "random"):
        assert same(getattr(loaded, part), getattr(saved, part)), part
    assert same(load_weights(folder, "ema"), saved.ema)
    assert not any(path.suffix in {".pt", ".pkl", ".bin"} for path in folder.iterdir())


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    first, again = save(tmp_path / "a", state(), keep=1), save(tmp_path / "b", state(), keep=1)
    other = save(tmp_path / "c", state(step=6), keep=1)
    assert digest_of(first) == verify(first) == verify(again) != verify(other)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_flipped_byte_is_found_and_named(tmp_path: Path, name: str, share: float) -> None:
    save(tmp_path, state(step=5), keep=3)
    folder = save(tmp_path, state(step=9), keep=3)
    path = folder / name
    flip(path, round(share * (path.stat().st_size - 1)))
    for use in (verify, load):
        with pytest.raises(CheckpointCorrupt) as caught:
            use(folder)
        message = str(caught.value)
        assert name in message
        assert f"write step-00000005 into {tmp_path / 'latest'}" in message


def test_the_error_states_both_digests(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)
    expected = json.loads((folder / "manifest.json").read_text())["files"]["ema.safetensors"]["sha256"]
    flip(folder / "ema.safetensors", -1)
    found = subprocess.run(["sha256sum", folder / "ema.safetensors"], capture_output=True, text=True).stdout.split()[0]
    with pytest.raises(CheckpointCorrupt, match=f"(?s)ema.safetensors has sha256 {found}.*says {expected}"):
        load_weights(folder, "ema")
    with pytest.raises(CheckpointCorrupt, match="no other checkpoint there is intact"):
        load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, state(), keep=1)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt, match=name):
        verify(folder)
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match=f"{name} is missing"):
        verify(folder)


def test_a_manifest_that_leaves_a_file_out_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)
    (folder / "manifest.json").write_text('{"files": {}, "sha256": ""}')
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
        verify(folder)


def test_intact_ones_are_named_even_if_several_are_not(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step=step), keep=3)
    flip(tmp_path / "step-00000002" / "manifest.json", 20)
    flip(tmp_path / "step-00000003" / "manifest.json", 20)
    with pytest.raises(CheckpointCorrupt, match=r"write step-00000001 .*\(intact: step-00000001\)"):
        load(tmp_path / "step-00000003")


@pytest.mark.parametrize("text", ["", "step-00000099\n", "../elsewhere\n", "\xff"])
def test_a_pointer_to_nothing_is_an_error_with_a_way_out(tmp_path: Path, text: str) -> None:
    assert latest(tmp_path) is None
    save(tmp_path, state(), keep=1)
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointCorrupt, match="write step-00000005 into"):
        latest(tmp_path)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, state(step=step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_a_run_sent_back_to_an_earlier_step_goes_on_from_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step=step), keep=3)
    flip(tmp_path / "step-00000003" / "model.safetensors", -1)
    (tmp_path / "latest").write_text("step-00000001")
    save(tmp_path, state(step=2), keep=3)
    assert latest(tmp_path) == tmp_path / "step-00000002"
    assert load(save(tmp_path, state(step=3), keep=3)).step == 3


def test_a_torn_write_is_invisible_and_swept_away(tmp_path: Path) -> None:
    """Killed at many moments: `latest` always names a whole checkpoint, at most one step behind the last word."""
    writer = (
        "import sys; from pathlib import Path; from tests.test_checkpoint import save, state\n"
        "for step in range(1, 10_000):\n"
        "    save(Path(sys.argv[1]), state(step, size=20_000), keep=2); print(step, flush=True)"
    )
    command = [sys.executable, "-c", writer, str(tmp_path)]
    delays = random.Random(3)
    torn = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        for _ in range(25):
            process.send_signal(signal.SIGSTOP)
            torn += any(tmp_path.glob(".*.tmp"))
            seen = latest(tmp_path)
            assert seen is not None
            verify(seen)
            process.send_signal(signal.SIGCONT)
            time.sleep(delays.uniform(0.001, 0.05))
        process.kill()
    before = latest(tmp_path)
    assert before is not None
    verify(before)
    assert torn, "no stop fell into a write; the test shows nothing"
    save(tmp_path, state(step=20_000), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00020000"]


def test_process_wide_generators_come_back(tmp_path: Path) -> None:
    folder = save(tmp_path, state(), keep=1)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    expected = drawn()
    os.urandom(1)
    drawn()
    restore_random(load(folder).random)
    assert drawn() == expected

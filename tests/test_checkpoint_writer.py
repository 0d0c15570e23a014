"""Writing checkpoints: beside training, by many ranks, and whatever is killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint.folder import latest, verify
from model.checkpoint.reader import Reader
from model.checkpoint.state import Piece, RankState
from model.checkpoint.writer import CheckpointWriter
from tests.checkpoint_kills import killer
from tests.checkpoints import cut, flip, gang, same, save, save_cut, state, tensors


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".attempt")


def test_what_is_saved_is_what_stood_there_however_training_goes_on(tmp_path: Path) -> None:
    """Several saves through the same memory, each while the tensors already move on."""
    weight = torch.zeros(300_000)
    writer = CheckpointWriter(tmp_path, keep=10)
    template = state()
    for step in range(1, 6):
        weight.add_(1)
        writer.save(replace(template, step=step, tensors={"model": {"w": Piece.whole(weight)}}))
        weight.mul_(-1).mul_(-1).add_(100).sub_(100)
    writer.close()
    for step in range(1, 6):
        assert Reader(tmp_path / f"step-{step:08d}").read("model", "w").unique().tolist() == [step]


def test_the_copy_may_run_beside_training_until_it_is_settled(tmp_path: Path) -> None:
    weight = torch.ones(1000)
    writer = CheckpointWriter(tmp_path, keep=3)
    assert writer.settle() == 0
    writer.begin(replace(state(step=1), tensors={"model": {"w": Piece.whole(weight)}}))
    writer.settle()
    weight.zero_()
    writer.wait()
    assert Reader(tmp_path / "step-00000001").read("model", "w").sum() == 1000


def test_a_state_that_changes_before_it_is_settled_is_an_error_and_no_checkpoint(tmp_path: Path) -> None:
    weights = {f"w{place}": torch.ones(4_000_000) for place in range(10)}
    writer = CheckpointWriter(tmp_path, keep=3)
    pieces = {name: Piece.whole(weight) for name, weight in weights.items()}
    writer.begin(replace(state(step=1), tensors={"model": pieces}))
    weights["w9"].zero_()
    with pytest.raises(RuntimeError, match="changed while it was copied"):
        writer.wait()
    assert latest(tmp_path) is None and names(tmp_path) == []


def test_a_save_waits_for_the_one_before_and_says_how_long(tmp_path: Path) -> None:
    writers = gang(tmp_path, 2)
    whole = tensors(1)
    assert writers[0].save(cut(whole, 1, 0, 2)) < 0.5
    late = threading.Timer(0.6, lambda: writers[1].save(cut(whole, 1, 1, 2)))
    late.start()
    assert writers[0].save(cut(whole, 2, 0, 2)) > 0.4, "rank 1 had not written step 1 yet"
    late.join()
    writers[1].save(cut(whole, 2, 1, 2))
    assert [writer.wait() for writer in writers] == [tmp_path / "step-00000002"] * 2
    assert verify(tmp_path / "step-00000001") != verify(tmp_path / "step-00000002")


def test_a_new_writer_has_saved_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.check()
    assert writer.wait() is None
    writer.close()


def test_what_fails_in_the_background_is_raised_in_training(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "run", keep=1)
    shutil.rmtree(tmp_path / "run")
    writer.begin(state())
    for call in (writer.wait, writer.check, writer.close, lambda: writer.save(state())):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert f"while writing checkpoint step-00000005 in {tmp_path / 'run'}" in caught.value.__notes__


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    save_cut(tmp_path, tensors(1), 1, 3)
    writers = gang(tmp_path, 3, patience=0.3)
    for rank in (0, 2):
        writers[rank].save(cut(tensors(2), 2, rank, 3))
    with pytest.raises(TimeoutError, match=r"rank 1 of 3 left nothing in .* within 0\.3 s"):
        writers[0].wait()
    with pytest.raises(TimeoutError, match="rank 0 did not commit"):
        writers[2].wait()
    assert latest(tmp_path) == tmp_path / "step-00000001"


def changed(part: str, name: str, piece: Piece | None) -> Callable[[RankState], RankState]:
    def change(state: RankState) -> RankState:
        tensors = {key: dict(value) for key, value in state.tensors.items()}
        if piece is None:
            del tensors[part][name]
        else:
            tensors[part][name] = piece
        return replace(state, tensors=tensors)

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (changed("model", "w", None), r"model 'w' cannot be put together again: no rank has values 5 to 9 of 9"),
        (
            changed("model", "w", Piece(torch.Size((9,)), 4, torch.zeros(5))),
            "values 4 to 5 of 9 are there twice, once from rank 1",
        ),
        (changed("model", "w", Piece(torch.Size((9,)), 6, torch.zeros(3))), "no rank has values 5 to 6 of 9"),
        (changed("model", "w", Piece(torch.Size((9,)), 5, torch.zeros(5))), "rank 1 has values 5 to 10 of 9"),
        (
            changed("model", "w", Piece(torch.Size((3, 3)), 5, torch.zeros(4))),
            r"shape \[3, 3\] on rank 1, elsewhere \[9\]",
        ),
        (changed("ema", "v", Piece.whole(torch.zeros(2))), "values 0 to 2 of 2 are there twice"),
        (lambda state: replace(state, inputs={"data": "d2"}), "rank 1 saves inputs .*d2.*, rank 0 .*d1"),
    ],
    ids=["missing", "overlap", "gap", "beyond", "shape", "both", "inputs"],
)
def test_what_could_not_be_read_back_is_not_committed(
    tmp_path: Path, change: Callable[[RankState], RankState], error: str
) -> None:
    size = torch.Size((9,))
    base = cut(tensors(1), 1, 0, 1)
    first = {"model": {"w": Piece(size, 0, torch.zeros(5))}, "ema": {"v": Piece.whole(torch.zeros(2))}}
    second = {"model": {"w": Piece(size, 5, torch.zeros(4))}, "ema": {}}
    writers = gang(tmp_path, 2, patience=1.0)
    writers[0].save(replace(base, world_size=2, tensors=first))
    writers[1].save(change(replace(base, rank=1, world_size=2, tensors=second)))
    with pytest.raises(ValueError, match=error):
        writers[0].wait()
    assert latest(tmp_path) is None


def test_a_state_of_another_rank_or_a_step_twice_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    with pytest.raises(ValueError, match="the state is of rank 1 of 2, the writer of rank 0 of 1"):
        writer.save(cut(tensors(1), 1, 1, 2))
    writer.save(state(step=3))
    writer.wait()
    with pytest.raises(ValueError, match=r"step-00000003 is the latest checkpoint already"):
        writer.save(state(step=3))
    with pytest.raises(ValueError, match=r"'w' has torch.complex64; a checkpoint holds F64"):
        writer.save(
            replace(state(step=4), tensors={"model": {"w": Piece.whole(torch.zeros(2, dtype=torch.complex64))}})
        )
        writer.wait()


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        writer.save(state(step=step))
    writer.close()
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]


def test_a_run_sent_back_to_an_earlier_step_goes_on_from_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step=step), keep=3)
    flip(tmp_path / "step-00000003" / "model-00000-of-00001.safetensors", -1)
    (tmp_path / "latest").write_text("step-00000001")
    save(tmp_path, state(step=2), keep=3)
    assert latest(tmp_path) == tmp_path / "step-00000002"
    assert Reader(save(tmp_path, state(step=3), keep=3)).step == 3


def test_what_an_earlier_attempt_still_writes_leads_nowhere(tmp_path: Path) -> None:
    """A rank that outlived its gang, with files of the same names at the same step."""
    old = gang(tmp_path, 2, patience=1)
    old[1].save(cut(tensors(7), 1, 1, 2))
    time.sleep(0.3)
    new = gang(tmp_path, 2)
    new[0].save(cut(tensors(8), 1, 0, 2))
    old[0].save(cut(tensors(7), 1, 0, 2))
    new[1].save(cut(tensors(8), 1, 1, 2))
    for writer in new:
        writer.wait()
    with pytest.raises(TimeoutError, match="rank 1 of 2 left nothing"):
        old[0].wait()
    for part, whole in tensors(8).items():
        assert same(Reader(tmp_path / "step-00000001").whole(part), whole)


def test_only_the_newest_attempt_commits(tmp_path: Path) -> None:
    old = CheckpointWriter(tmp_path, keep=2)
    save(tmp_path, state(step=2), keep=2)
    old.save(state(step=1))
    with pytest.raises(RuntimeError, match="another attempt writes in"):
        old.wait()
    assert latest(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.timeout(600)
def test_killed_before_any_touch_of_the_file_system_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Two ranks replace the checkpoint of one rank; then a run of three ranks goes on."""
    base = tmp_path / "base"
    for step in (1, 2):
        save(base, state(step=step), keep=2)
    left: list[int] = []
    with killer() as save_and_die:
        for number in range(1, 1000):
            root = tmp_path / f"at-{number}"
            shutil.copytree(base, root)
            if not save_and_die(root, number, step=3, ranks=2):
                break
            seen = latest(root)
            assert seen is not None
            verify(seen)
            step = Reader(seen).step
            assert same(Reader(seen).whole("model"), tensors(step)["model"])
            left.append(step)
            gone_on = save_cut(root, tensors(step + 1), step + 1, 3)
            assert same(Reader(gone_on).whole("optimizer"), tensors(step + 1)["optimizer"])
            found = names(root)
            assert found[0] == "latest" and len(found) == 3, f"killed at touch {number}: {found}"
            shutil.rmtree(root)
    assert left.count(2) > 20 and left.count(3) >= 3, left
    # Ranks interleave, but once the pointer has moved it stays.
    assert left[0] == 2 and left[-1] == 3


def test_killed_at_any_moment_a_run_has_a_whole_checkpoint(tmp_path: Path) -> None:
    """Stopped at many moments: `latest` always names a whole checkpoint."""
    writer = (
        "import sys; from pathlib import Path; from tests.checkpoints import gang, cut, tensors\n"
        "writers = gang(Path(sys.argv[1]), 2)\n"
        "for step in range(1, 10_000):\n"
        "    for rank, writer in enumerate(writers): writer.save(cut(tensors(step, 20_000), step, rank, 2))\n"
        "    print(step, flush=True)"
    )
    delays = random.Random(3)
    torn = 0
    command = [sys.executable, "-c", writer, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        for _ in range(25):
            process.send_signal(signal.SIGSTOP)
            torn += any(tmp_path.glob(".step-*.tmp"))
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
    assert names(tmp_path) == ["latest", "step-00020000"]


@pytest.mark.gpu
def test_a_gpus_tensors_are_copied_while_it_works(tmp_path: Path) -> None:
    weight = torch.ones(1 << 24, device="cuda")
    writer = CheckpointWriter(tmp_path, keep=9)
    for step in (1, 2, 3):
        writer.begin(replace(state(step=step), tensors={"model": {"w": Piece.whole(weight)}}))
        for _ in range(20):
            weight.mul(2).sum()
        writer.settle()
        weight.add_(1)
    writer.close()
    for step in (1, 2, 3):
        assert Reader(tmp_path / f"step-{step:08d}").read("model", "w").unique().tolist() == [step]


def test_the_process_may_end_while_a_save_waits_for_others(tmp_path: Path) -> None:
    """Its error must not hang the exit for as long as ranks have patience."""
    script = (
        "import sys; from pathlib import Path; from tests.checkpoints import gang, cut, tensors\n"
        "gang(Path(sys.argv[1]), 2, patience=600)[0].save(cut(tensors(1), 1, 0, 2)); raise SystemExit(3)"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120).returncode == 3
    assert time.monotonic() - began < 60
    assert latest(tmp_path) is None and os.listdir(tmp_path)

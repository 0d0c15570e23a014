"""What a pod does around its ranks: where they meet, what their logs mean, what is told of them."""

import os
from pathlib import Path

import pytest

from infra.cluster.jobset import meeting_point
from infra.cluster.journal import GangJournal, Outcome, Progress
from infra.cluster.node import LogPatterns, LogSaysHung, ProgressTeller
from infra.launch.host import Host
from infra.launch.local import StageLaunch, command, environment
from infra.store.folder import FolderStore
from model.training.run import ProgressLine, RunFolders, append_progress
from tests.tiny_stage import stage


def folders(tmp_path: Path) -> RunFolders:
    made = RunFolders(tmp_path / "data", tmp_path / "codec", tmp_path / "run")
    made.checkpoints.mkdir(parents=True)
    return made


def test_every_host_meets_the_others_at_the_first_pods_name(tmp_path: Path) -> None:
    host = Host(index=1, hosts=2, ranks=2, meeting_point=meeting_point("t2v-0123456789"))
    launch = StageLaunch(stage(world_size=4, micro_batch_size=2), folders(tmp_path), host=host)
    line = " ".join(command(launch))
    assert "--nnodes 2 --node-rank 1 --nproc-per-node 2" in line and "--standalone" not in line
    assert "--master-addr t2v-0123456789-node-0-0.t2v-0123456789 --master-port 29400" in line
    alone = environment(os.environ, launch.local_ranks)["OMP_NUM_THREADS"]
    assert alone == environment(os.environ, 2)["OMP_NUM_THREADS"]  # the cores are shared by this host's ranks alone
    assert launch.torchrun_log.name == "torchrun-1.log"


def test_a_line_that_a_pattern_names_ends_the_attempt_once_it_is_whole_and_new(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("NCCL WARN old: timed out\n")
    patterns = LogPatterns([log, tmp_path / "rank-1.log"], (r"NCCL WARN .*timed out",))
    patterns.check()
    with log.open("a") as file:
        file.write("step 7\nNCCL WARN ring 0 ")
    patterns.check()
    with log.open("a") as file:
        file.write("timed out\n")
    with pytest.raises(LogSaysHung, match=r"rank-0\.log has a line .* NCCL WARN ring 0 timed out"):
        patterns.check()


def test_the_first_node_tells_how_far_the_run_is_and_how_long_a_save_took(tmp_path: Path) -> None:
    made, journal = folders(tmp_path), GangJournal(FolderStore(tmp_path / "store"), "t2v-0")
    teller = ProgressTeller(journal, made, total_steps=100)
    teller.look()
    told = journal.progress()
    assert told is not None and (told.step, told.checkpoint_step, told.loss) == (0, 0, None)
    append_progress(made.progress, ProgressLine(40, 100, 0.5, 1.0, 1e-3, 2.0, 16.0, 80.0))
    saving = made.checkpoints / ".step.attempt.tmp"
    saving.mkdir()
    teller.look()
    saving.rmdir()
    teller.look()
    teller.tell()
    told = journal.progress()
    assert told is not None and (told.step, told.loss, told.seconds_left) == (40, 0.5, 120.0)
    assert told.save_seconds is not None and told.save_seconds > 0 and told.number == 1


def test_what_was_published_first_stands(tmp_path: Path) -> None:
    journal = GangJournal(FolderStore(tmp_path), "t2v-0")
    assert journal.outcome() is None
    first = Outcome(checkpoint="a" * 64)
    assert journal.close(first) == journal.close(Outcome(checkpoint="b" * 64)) == journal.outcome() == first


def test_two_nodes_that_tell_at_once_do_not_fail(tmp_path: Path) -> None:
    journal = GangJournal(FolderStore(tmp_path), "t2v-0")
    for step in (1, 2, 2):
        journal.tell(Progress(number=0, step=step, total_steps=9, checkpoint_step=0))
    told = journal.progress()
    assert told is not None and (told.step, told.number) == (2, 2)

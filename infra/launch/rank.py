"""A rank's entry point: `python -m infra.launch.rank`, started by torchrun once a rank.

It owns the rank's log, its signals, its last words and its exit code; what is done between them is
`model.training.loop`'s.
"""

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from model.training.heartbeat import Heartbeat
from model.training.run import RunFolders

EXIT_STOPPED = 75
"""Stopped by SIGTERM after writing a checkpoint: start again to go on (EX_TEMPFAIL)."""
STACK_SIGNAL = signal.SIGUSR1
"""Asks a rank to print what each of its threads is doing to its log."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Turns true at the first SIGTERM; the loop finishes its step, saves and returns.

    Until it is first asked no step is done and nothing is to be saved: SIGTERM ends the process at once, also where it
    waits for ranks that will never come.
    """

    def __init__(self) -> None:
        self.received = False
        self._listens = False

    def __call__(self) -> bool:
        if not self._listens:
            signal.signal(signal.SIGTERM, self._receive)
            self._listens = True
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    folders = RunFolders(
        data=options.data,
        codec=options.codec,
        run=options.run_folder,
        initial=options.initial,
        initial_temporal=options.initial_temporal,
    )
    rank = int(os.environ.get("RANK", "0"))
    should_stop = StopRequest()
    _stop_with_parent()
    _redirect(folders.rank_log(rank))
    _print_stacks()
    beat = Heartbeat(folders, rank)
    try:
        finished = _train(options, folders, should_stop, beat)
    except BaseException as error:
        beat.end("failed", f"{type(error).__name__}: {error}")
        raise
    beat.end("succeeded" if finished else "stopped")
    return 0 if finished else EXIT_STOPPED


def _train(options: argparse.Namespace, folders: RunFolders, should_stop: StopRequest, beat: Heartbeat) -> bool:
    # Only now: these take seconds, and whatever goes wrong in them is in the rank's log.
    from infra.checkpoints import StoreSink
    from model.recipe import loads_stage
    from model.training.loop import train
    from monitoring.logs import configure

    recipe = loads_stage(options.recipe.read_bytes())
    configure(stage=recipe.name, rank=beat.rank)
    sink = None if options.checkpoint_store is None else StoreSink.open(options.checkpoint_store, recipe.name)
    return train(recipe, folders, metrics_port=options.metrics_port, should_stop=should_stop, beat=beat, sink=sink)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.launch.rank", description="Train one stage as one rank.")
    parser.add_argument("--recipe", type=Path, required=True, help="the stage's resolved recipe, JSON")
    parser.add_argument("--data", type=Path, required=True, help="folder with the shards train/")
    parser.add_argument("--codec", type=Path, required=True, help="folder with the frozen codec")
    parser.add_argument(
        "--run-folder", type=Path, required=True, help="folder to write; resumed if it holds checkpoints"
    )
    parser.add_argument("--initial", type=Path, help="the parent stage's checkpoint folder")
    parser.add_argument("--initial-temporal", type=Path, help="the temporal parent's, for its temporal attention")
    parser.add_argument("--checkpoint-store", help="folder or s3:// where checkpoints are kept as well")
    parser.add_argument("--metrics-port", type=int, default=0, help="Prometheus port of rank 0; 0 takes a free one")
    return parser.parse_args(arguments)


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM when torchrun dies, so that no orphan trains on and holds the run folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _redirect(log: Path) -> None:
    """Send this process's output, libraries' included, to the rank's own file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def _print_stacks() -> None:
    """On request, and when the interpreter itself dies; also while the main thread waits in a library."""
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)


if __name__ == "__main__":
    sys.exit(main())

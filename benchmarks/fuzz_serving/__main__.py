"""What a server process answers to thousands of requests made from its OpenAPI document: never a 5xx.

It owns the number of cases and the figures; the cases and the verdict are the test's (`tests.fuzz`).
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.result import report
from tests.fuzz import SETTINGS, fuzz
from tests.s3_server import free_ports
from tests.server_process import server_process

CASES, QUICK_CASES = 6000, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, writes nothing")
    quick = bool(parser.parse_args().quick)
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder, server_process(Path(folder), port, **SETTINGS) as server:
        outcome = fuzz(f"http://127.0.0.1:{port}", cases=QUICK_CASES if quick else CASES)
        assert server.poll() is None, "the server died of it"
    print("\n".join([*outcome.server_errors, *outcome.unlike_document][:20]))
    figures = {
        "cases": float(outcome.cases),
        "server_errors": float(len(outcome.server_errors)),
        "answers_unlike_document": float(len(outcome.unlike_document)),
        "slowest_s": outcome.slowest_s,
        **{f"status_{status}": float(count) for status, count in sorted(outcome.statuses.items())},
    }
    report("fuzz_serving", figures, quick=quick, peers=("schemathesis", "hypothesis", "fastapi"))


if __name__ == "__main__":
    main()

"""A Prometheus of this machine: its process, its scrape settings, and the list of servers that it reads.

It owns these files and the process; it knows nothing of what is asked. Each target bears its track as a label, so that
no server has to know whom it is compared with; in a cluster a ServiceMonitor does the same.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

TARGETS = "targets.json"
_CONFIG = """\
global:
  scrape_interval: {interval}
  scrape_timeout: {interval}
  evaluation_interval: {interval}
rule_files: [{rules}]
{alerting}scrape_configs:
  - job_name: stiv
    file_sd_configs:
      - files: [{targets}]
        refresh_interval: 5s
"""
_ALERTING = "alerting:\n  alertmanagers:\n    - static_configs:\n        - targets: ['{address}']\n"


class NoPrometheus(RuntimeError):
    """There is no `prometheus` on this machine."""


def write_targets(folder: Path, targets: Mapping[str, Mapping[str, str]]) -> None:
    """Whom to read from now on: host:port -> labels."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"targets": [address], "labels": dict(labels)} for address, labels in sorted(targets.items())]
    draft = folder / f".{TARGETS}.{os.getpid()}"
    draft.write_text(json.dumps(listed, indent=2))
    os.replace(draft, folder / TARGETS)


def start_prometheus(
    folder: Path, *, interval_s: float = 5.0, rules: Path | None = None, alertmanager: str | None = None
) -> tuple[str, "subprocess.Popen[bytes]"]:
    """Start one on a free port of loopback and wait until it is ready; its address and process.

    Raises:
        NoPrometheus: it is not installed. RuntimeError: it does not start; the message says why.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NoPrometheus(
            "there is no `prometheus` on this machine: install it (Debian: apt-get install prometheus), or name one"
            " that reads your servers with --prometheus"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TARGETS).exists():
        write_targets(folder, {})
    config = folder / "prometheus.yml"
    config.write_text(
        _CONFIG.format(
            interval=f"{round(1000 * interval_s)}ms",
            rules="" if rules is None else rules.absolute(),
            targets=(folder / TARGETS).absolute(),
            alerting=_ALERTING.format(address=alertmanager) if alertmanager else "",
        )
    )
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address={address}", "--storage.tsdb.retention.time=30d", "--log.level=warn"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    wait_until_answers(f"http://{address}/-/ready", process, folder / "log")
    return f"http://{address}", process


def wait_until_answers(url: str, process: "subprocess.Popen[bytes]", log: Path, *, patience_s: float = 120.0) -> None:
    """Until `url` answers 200; a process that ends before is an error with the end of its log."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer after {patience_s:g} s; its log is {log}")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

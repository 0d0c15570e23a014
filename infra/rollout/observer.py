"""A Prometheus of this machine: its process, its scrape settings, and the list of servers that it reads.

It owns these files and the process; it knows nothing of what is asked. Each target bears its track as a label, so that
no server has to know whom it is compared with; in a cluster a ServiceMonitor does the same.
"""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from infra.rollout.process import Process, wait_until_answers

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
) -> tuple[str, Process]:
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
    process = Process.spawn(command, folder / "log", os.environ)
    wait_until_answers(f"http://{address}/-/ready", process, folder / "log")
    return f"http://{address}", process


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

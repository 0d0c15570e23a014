"""What befell a gang: killed, stopped from outside, hung or crashed, and what its ranks were doing then.

It owns the files `incidents/NNN.json` and `.txt` of a run folder; how an incident is found, and what is done about it,
is not known here.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from model.training.heartbeat import Phase
from model.training.run import RunFolders

IncidentKind = Literal["killed", "stopped", "hung", "crashed"]


@dataclass(slots=True, frozen=True)
class RankReport:
    """A rank as it was found."""

    rank: int
    pid: int
    phase: Phase
    step: int
    """Steps done."""
    silent_seconds: float
    """Since its last sign of life, as the watcher counts."""
    state: str
    """As the kernel says: running, sleeping, stopped, disk-sleep, …"""
    waits_in: str
    """The kernel function it sleeps in, where the kernel tells."""
    busy: float
    """Share of one core it used while it was questioned."""
    stack: str
    """What it printed when asked; empty where it did not answer."""


@dataclass(slots=True, frozen=True)
class Incident:
    """One end of a gang that nobody asked for."""

    kind: IncidentKind
    why: str
    ranks: tuple[int, ...]
    """The cause; empty where torchrun itself was it, or no rank differs from the others."""
    exit_code: int
    """Of the first of these, as Python counts it: negative is a signal's number."""
    step: int
    """The furthest step any rank had done."""
    log: str
    """The end of the log that tells most."""
    reports: tuple[RankReport, ...] = ()
    """All ranks, where they could be questioned."""


def keep(folders: RunFolders, incident: Incident) -> Path:
    """Write an incident down as the run's next; for people beside it as text."""
    folders.incidents.mkdir(parents=True, exist_ok=True)
    number = len(list(folders.incidents.glob("*.json"))) + 1
    path = folders.incidents / f"{number:03d}.json"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    path.with_suffix(".txt").write_text(_text(incident, time))
    # By one rename, so that who counts or reads these never meets a torn one.
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"time": time, **asdict(incident)}, indent=2) + "\n")
    return temporary.replace(path)


def _text(incident: Incident, time: str) -> str:
    parts = [f"{time}  {incident.kind}: {incident.why}\n"]
    for report in incident.reports:
        waits = f" in {report.waits_in}" if report.waits_in else ""
        parts.append(
            f"rank {report.rank} (process {report.pid}): {report.phase} after step {report.step}, silent for"
            f" {report.silent_seconds:.1f} s; {report.state}{waits}, {report.busy:.0%} of a core\n"
            f"{report.stack or 'it did not answer when asked for its stack'}\n"
        )
    if incident.log:
        parts.append(f"the end of its log:\n{incident.log}")
    return "\n".join(parts)

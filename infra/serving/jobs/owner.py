"""Who holds a lease: a name for this process that another process can tell dead from alive.

It owns the name and what can be read from it; it knows nothing of jobs.
"""

import socket
import uuid
from pathlib import Path

import psutil


def new_owner() -> str:
    """host/kernel and process namespace/pid/start of the process/token of the holder."""
    me = psutil.Process()
    return f"{socket.gethostname()}/{_namespace()}/{me.pid}/{_started(me)}/{uuid.uuid4().hex[:8]}"


def is_dead(owner: str) -> bool:
    """Whether the process was one that we could see, and is gone. Of processes elsewhere only their lease tells."""
    host, namespace, pid, started, _ = owner.split("/")
    if host != socket.gethostname() or namespace != _namespace():
        return False
    try:
        process = psutil.Process(int(pid))
        return str(_started(process)) != started or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _started(process: psutil.Process) -> int:
    """Tells a process from an earlier one with its pid, which is 1 in every container."""
    return round(process.create_time() * 1000)


def _namespace() -> str:
    """A pid means nothing in another container or after a reboot, even under the same host name."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return "whole-host"
    return f"{boot.read_text().strip()[:8]}-{namespace.stat().st_ino}"

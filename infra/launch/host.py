"""One host of a gang that spans several: which it is, where all meet, and how its end is told to who restarts it.

It owns torchrun's options for it and the exit codes; it does not know what restarts it.
"""

from dataclasses import dataclass

EXIT_LOST = 76
"""Ranks were killed or hung, here or on another host: starting again may help, and costs nothing but time."""
EXIT_HOPELESS = 78
"""No restart can help: the order cannot be carried out (EX_CONFIG)."""


@dataclass(slots=True, frozen=True)
class Host:
    """This host's part of a gang."""

    index: int
    hosts: int
    ranks: int
    """On each host."""
    meeting_point: str
    """HOST:PORT of the first one."""

    def options(self) -> list[str]:
        """torchrun's; it restarts nothing by itself, so a fixed meeting point does."""
        address, _, port = self.meeting_point.rpartition(":")
        place = ["--nnodes", str(self.hosts), "--node-rank", str(self.index), "--nproc-per-node", str(self.ranks)]
        return [*place, "--master-addr", address, "--master-port", port]

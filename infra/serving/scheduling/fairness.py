"""Fair shares: how much of the engine each client had, and who is ahead of the others.

It owns the account in engine seconds; it knows nothing of jobs, keys or deadlines. A client's account is a virtual
time, as in start-time fair queueing: one that comes (back) starts no lower than the least of those present, so nobody
saves up a claim by staying away, and nobody pays later for an engine that stood idle.
"""

from collections.abc import Iterable


class FairShare:
    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._floor = 0.0

    def charge(self, client: str, seconds: float) -> None:
        """`client` had the engine for so long."""
        self._used[client] = self._used.get(client, self._floor) + seconds

    def lead(self, present: Iterable[str]) -> dict[str, float]:
        """Engine seconds that each client with work has had more than the one of them that had least."""
        clients = set(present)
        least = min((self._used.get(client, self._floor) for client in clients), default=self._floor)
        self._floor = max(self._floor, least)
        kept = {client: used for client, used in self._used.items() if used > self._floor}
        self._used = kept | {client: max(self._used.get(client, 0.0), self._floor) for client in clients}
        return {client: self._used[client] - self._floor for client in clients}

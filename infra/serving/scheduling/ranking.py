"""In which order videos are served: fair shares first, then what can still be in time, by its target, then the rest.

It owns the order, and keeps the queue in it while jobs come and go, so that the most urgent of a thousand are found at
once. It knows nothing of calls, memory or who is resident. A worker, a server that only answers, and the simulator use
the same order.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.serving.scheduling.order import Candidate, Rank, Video

Ranked = tuple[Rank, Candidate]


@dataclass(slots=True)
class Ranking:
    """Videos of one client by urgency: those that can reach their target by target, the late ones as they arrived."""

    timely: list[Ranked] = field(default_factory=list[Ranked])
    late: list[Ranked] = field(default_factory=list[Ranked])


Rankings = dict[str, Ranking]
"""By client."""


def rankings(candidates: Iterable[Candidate], now: float) -> Rankings:
    found: Rankings = {}
    for one in candidates:
        ranking = found.get(one.client)
        if ranking is None:
            ranking = found[one.client] = Ranking()
        if one.is_late(now):
            ranking.late.append((one.late_rank, one))
        else:
            ranking.timely.append((one.timely_rank, one))
    for ranking in found.values():
        ranking.timely.sort()
        ranking.late.sort()
    return found


def in_order(groups: Sequence[Rankings], lead: Mapping[str, float], quantum_s: float) -> Iterator[Candidate]:
    """All of them, most urgent first, found as they are asked for.

    With several clients the videos of each fall into rounds, `quantum_s` engine seconds long and begun by its `lead`;
    an earlier round goes first.
    """
    streams = {client: _by_urgency([group[client] for group in groups if client in group]) for client in lead}
    if len(streams) == 1:
        yield from (one for _, _, one in next(iter(streams.values())))
        return
    had, firsts = dict(lead), list[tuple[float, bool, Rank, Candidate]]()
    for client, stream in streams.items():
        for late, rank, one in stream:
            heapq.heappush(firsts, (had[client] // quantum_s, late, rank, one))
            break
    while firsts:
        *_, one = firsts[0]
        yield one
        had[one.client] += one.alone_s
        following = next(streams[one.client], None)
        if following is None:
            heapq.heappop(firsts)
        else:
            heapq.heapreplace(firsts, (had[one.client] // quantum_s, *following))


def _by_urgency(of_one_client: Sequence[Ranking]) -> Iterator[tuple[bool, Rank, Candidate]]:
    for rank, one in heapq.merge(*(ranking.timely for ranking in of_one_client)):
        yield False, rank, one
    for rank, one in heapq.merge(*(ranking.late for ranking in of_one_client)):
        yield True, rank, one


class Line:
    """The queue: what comes is priced once and put in its place, and is late from the moment that it is."""

    def __init__(self) -> None:
        self.rankings: Rankings = {}
        self._known: dict[str, Candidate] = {}
        self._turning: list[tuple[float, str]] = []
        """When those that can be in time no longer can."""

    def find(self, job_id: str) -> Candidate | None:
        return self._known.get(job_id)

    def update(self, waiting: Sequence[Video], price: Callable[[Video], Candidate], now: float) -> None:
        """The queue is `waiting` now."""
        jobs = {job.job_id: job for job in waiting}
        for job_id in self._known.keys() - jobs.keys():
            self.take(job_id)
        for job_id in jobs.keys() - self._known.keys():
            self._add(price(jobs[job_id]))
        while self._turning and self._turning[0][0] < now:
            one = self._known[self._turning.pop(0)[1]]
            ranking = self.rankings[one.client]
            _remove(ranking.timely, (one.timely_rank,))
            insort(ranking.late, (one.late_rank, one))

    def take(self, job_id: str) -> None:
        """Out of the queue, if it is there."""
        one = self._known.pop(job_id, None)
        if one is None:
            return
        ranking = self.rankings[one.client]
        if _remove(ranking.timely, (one.timely_rank,)):
            _remove(self._turning, _turn(one))
        else:
            _remove(ranking.late, (one.late_rank,))
        if not ranking.timely and not ranking.late:
            del self.rankings[one.client]

    def first_late(self, lead: Mapping[str, float], quantum_s: float) -> Candidate | None:
        """The oldest late job of the clients that had least."""
        firsts = [ranking.late[0][1] for ranking in self.rankings.values() if ranking.late]
        return min(firsts, key=lambda one: (lead[one.client] // quantum_s, one.late_rank), default=None)

    def _add(self, one: Candidate) -> None:
        self._known[one.job_id] = one
        insort(self.rankings.setdefault(one.client, Ranking()).timely, (one.timely_rank, one))
        insort(self._turning, _turn(one))


def _turn(one: Candidate) -> tuple[float, str]:
    return one.target_at - one.alone_s, one.job_id


def _remove(ordered: list[Any], first: tuple[Any, ...]) -> bool:
    """Drop the one tuple that begins with `first`; False if there is none."""
    place = bisect_left(ordered, first)
    if place == len(ordered) or ordered[place][: len(first)] != first:
        return False
    del ordered[place]
    return True

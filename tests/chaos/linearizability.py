"""Whether a recorded history of rival operations could have happened one at a time.

It owns the search (Wing and Gong's, with Lowe's memory of what was tried) and the register that is swapped by
comparison; it knows nothing of stores, networks or clocks. An operation whose outcome nobody knows, since its answer
was lost, may have taken place at any moment after it was called, or never.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NEVER = object()
"""What a step leads to that cannot be taken from a state."""
Step = Callable[[Any, "Operation"], Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a client asked, when, and what it was told; `returned` is None where it was told nothing it can rely on."""

    client: int
    kind: str
    key: str
    argument: Any
    result: Any
    called: int
    returned: int | None


def stuck_at(history: Sequence[Operation], initial: Hashable, step: Step) -> Operation | None:
    """None if some order of the operations explains all results and keeps the order of those that did not overlap.

    Else the operation at which the longest such order ends. `step` gives the state an operation leads to, or `NEVER`.
    """
    known = sorted((op for op in history if op.returned is not None), key=lambda op: op.called)
    unknown = sorted((op for op in history if op.returned is None), key=lambda op: op.called)
    start = _Order(0, frozenset(), frozenset(), initial)
    tried = {start}
    ways = [_ways_on(start, known, unknown, step)]
    furthest = 0
    while ways:
        order = next(ways[-1], None)
        if order is None:
            ways.pop()
        elif order.first == len(known):
            return None
        elif order not in tried:
            tried.add(order)
            furthest = max(furthest, order.first)
            ways.append(_ways_on(order, known, unknown, step))
    return known[furthest] if known else None


@dataclass(frozen=True, slots=True)
class _Order:
    """Where an order stands: all known operations before `first` are in it, some after it, and some unknown ones."""

    first: int
    beyond: frozenset[int]
    unknown: frozenset[int]
    state: Hashable


def _ways_on(order: _Order, known: Sequence[Operation], unknown: Sequence[Operation], step: Step) -> Iterator[_Order]:
    """The orders that are longer by one operation: one that was called before every other one left over returned.

    One that leaves the state as it is and may come now is the only way: whatever order has it later, has it now too.
    """
    horizon: float = float("inf")
    ways: list[_Order] = []
    for place in range(order.first, len(known)):
        if known[place].called > horizon:
            break
        if place in order.beyond:
            continue
        returned = known[place].returned
        assert returned is not None
        horizon = min(horizon, returned)
        state = step(order.state, known[place])
        if state == order.state:
            yield _with_known(order, place, state)
            return
        if state is not NEVER:
            ways.append(_with_known(order, place, state))
    yield from ways
    for place, operation in enumerate(unknown):
        if operation.called > horizon:
            break
        if place not in order.unknown:
            state = step(order.state, operation)
            if state is not NEVER:
                yield _Order(order.first, order.beyond, order.unknown | {place}, state)


def _with_known(order: _Order, place: int, state: Hashable) -> _Order:
    first, beyond = order.first, order.beyond | {place}
    while first in beyond:
        beyond -= {first}
        first += 1
    return _Order(first, beyond, order.unknown, state)


def register(state: Hashable, operation: Operation) -> Any:
    """A value that is created once and swapped by comparison; None before. Arguments are (expected, new)."""
    if operation.kind == "read":
        return state if state == operation.result else NEVER
    expected, new = operation.argument
    if operation.result == "refused":
        return NEVER if state == expected else state
    return new if state == expected else NEVER


def lost_writes(history: Sequence[Operation], last: Hashable) -> list[Operation]:
    """Acknowledged writes that are not among the ancestors of what a register holds in the end."""
    came_from = {op.argument[1]: op.argument[0] for op in history if op.kind == "write" and op.result != "refused"}
    ancestors: set[Hashable] = set()
    while last is not None and last not in ancestors:
        ancestors.add(last)
        last = came_from.get(last)
    return [op for op in history if op.kind == "write" and op.result == "done" and op.argument[1] not in ancestors]

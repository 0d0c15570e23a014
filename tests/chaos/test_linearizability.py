"""The checker tells histories that could have happened one at a time from those that could not."""

import itertools
import random

import pytest

from tests.chaos.linearizability import NEVER, Operation, lost_writes, register, stuck_at


def read(called: int, returned: int, value: object) -> Operation:
    return Operation(0, "read", "k", None, value, called, returned)


def write(called: int, returned: int | None, expected: object, new: object, result: str = "done") -> Operation:
    return Operation(0, "write", "k", (expected, new), result if returned else None, called, returned)


GOOD = {
    "nothing": [],
    "in a row": [write(1, 2, None, "a"), read(3, 4, "a"), write(5, 6, "a", "b"), read(7, 8, "b")],
    "read during a write, old and new": [write(1, 9, None, "a"), read(2, 3, None), read(4, 5, "a")],
    "of rivals one is refused": [write(1, 9, None, "a"), write(2, 8, None, "b", "refused"), read(10, 11, "a")],
    "refused by one that returns later": [write(1, 9, None, "a"), write(2, 3, None, "b", "refused")],
    "lost, and it took place": [write(1, None, None, "a"), read(2, 3, "a")],
    "lost, and it did not": [write(1, None, None, "a"), write(2, 3, None, "b"), read(4, 5, "b")],
    "lost, and it took place much later": [write(1, None, None, "a"), read(2, 3, None), read(4, 5, "a")],
    "lost, seen by who was refused alone": [write(1, None, None, "a"), write(2, 3, None, "b", "refused")],
    "a chain of lost ones": [write(1, None, None, "a"), write(2, None, "a", "b"), read(3, 4, "b")],
}
BAD = {
    "a read from nowhere": [write(1, 2, None, "a"), read(3, 4, "z")],
    "a stale read": [write(1, 2, None, "a"), write(3, 4, "a", "b"), read(5, 6, "a")],
    "a read before its write": [read(1, 2, "a"), write(3, 4, None, "a")],
    "new, then old": [write(1, 9, None, "a"), read(2, 3, "a"), read(4, 5, None)],
    "two rivals win": [write(1, 9, None, "a"), write(2, 8, None, "b")],
    "refused without a rival": [write(1, 2, None, "a", "refused"), read(3, 4, None)],
    "refused, and yet it took place": [write(1, 2, None, "a"), write(3, 4, "a", "b", "refused"), read(5, 6, "b")],
    "an acknowledged write is gone": [write(1, 2, None, "a"), write(3, 4, "a", "b"), read(5, 6, "a")],
    "lost, took place, and is gone": [write(1, None, None, "a"), read(2, 3, "a"), read(4, 5, None)],
    "lost before it was called": [read(1, 2, "a"), write(3, None, None, "a")],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_could_have_happened_is_accepted(name: str) -> None:
    for history in itertools.islice(itertools.permutations(GOOD[name]), 6):
        assert stuck_at(history, None, register) is None


@pytest.mark.parametrize("name", BAD)
def test_what_could_not_have_happened_is_found(name: str) -> None:
    for history in itertools.islice(itertools.permutations(BAD[name]), 6):
        assert stuck_at(history, None, register) in BAD[name]


def by_brute_force(history: list[Operation]) -> bool:
    """Every order of every choice of unknown operations."""
    known = [op for op in history if op.returned is not None]
    unknown = [op for op in history if op.returned is None]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            for order in itertools.permutations([*known, *chosen]):
                if keeps_time(order) and explains(order):
                    return True
    return False


def keeps_time(order: tuple[Operation, ...]) -> bool:
    return all(
        later.returned is None or later.returned > earlier.called
        for place, earlier in enumerate(order)
        for later in order[place:]
    )


def explains(order: tuple[Operation, ...]) -> bool:
    state: object = None
    for operation in order:
        state = register(state, operation)
        if state is NEVER:
            return False
    return True


def test_it_agrees_with_brute_force_on_small_random_histories() -> None:
    chance = random.Random(1)
    verdicts: list[bool] = []
    for _ in range(300):
        moments = chance.sample(range(1, 100), 10)
        history: list[Operation] = []
        for number in range(5):
            called, returned = sorted(moments[2 * number : 2 * number + 2])
            values = [None, "a", "b"]
            if chance.random() < 0.4:
                history.append(read(called, returned, chance.choice(values)))
            else:
                lost = chance.random() < 0.3
                result = chance.choice(["done", "done", "refused"])
                pair = chance.choice([(None, "a"), ("a", "b"), (None, "b")])
                history.append(write(called, None if lost else returned, *pair, result))
        verdicts.append(by_brute_force(history))
        assert (stuck_at(history, None, register) is None) == verdicts[-1], history
    assert 30 < sum(verdicts) < 270


def test_ten_thousand_operations_of_sixteen_clients_take_a_moment() -> None:
    """Drawn from a register as it is, with overlaps and lost answers; then spoilt at its end."""
    chance = random.Random(2)
    history: list[Operation] = []
    state: object = None
    for number in range(10_000):
        called, returned = 10 * number - chance.randrange(80), 10 * number + chance.randrange(1, 80)
        if chance.random() < 0.5:
            history.append(read(called, returned, state))
        else:
            history.append(write(called, None if chance.random() < 0.05 else returned, state, number))
            state = number
    assert stuck_at(history, None, register) is None
    assert stuck_at([*history, read(200_000, 200_001, "z")], None, register) is not None


def test_an_acknowledged_write_that_is_no_ancestor_of_the_last_value_is_lost() -> None:
    first, second, rival = write(1, 2, None, "a"), write(3, 4, "a", "b"), write(3, 5, "a", "c")
    assert lost_writes([first, second, write(5, 6, "a", "x", "refused")], "b") == []
    assert lost_writes([first, second, rival], "b") == [rival]
    assert lost_writes([first, write(3, None, "a", "b"), write(5, 6, "b", "c")], "c") == []

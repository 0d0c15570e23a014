"""A work folder: the list of units, and what each step leaves there for the next.

It owns the files of a curation on their way and who may go on with them; it knows nothing of how a step does its work.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.curate.captions.endpoint import Bill
from infra.curate.items import Item, Unit, units_of
from infra.curate.ledger import Ledger, append_line, read_lines
from infra.curate.recipe import CurationRecipe
from infra.curate.staging import Row, Staged
from model.config import Config

_DUPLICATES = "duplicates.json"


class Units(Config):
    """`units.json`."""

    recipe: str
    """Digest."""
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A curation's work folder; every machine that works on it must see it."""

    root: Path

    @classmethod
    def begun(cls, root: Path, recipe: CurationRecipe, items: Sequence[Item]) -> "Work":
        """Write the list of units, or make sure that the one that stands there is of this recipe.

        Items that are new since the last time make units of their own; those that are gone stay settled.
        """
        work = cls(root)
        known: list[Unit] = []
        if work._list.is_file():
            standing = Units.model_validate_json(work._list.read_bytes())
            if standing.recipe != recipe.digest():
                raise ValueError(f"{root} holds the work of another recipe; give another --work, or delete this folder")
            known = list(standing.units)
        listed = {item.place: item for item in items}
        # A known place keeps its unit, with the version it has now.
        units = [
            unit.model_copy(update={"items": tuple(listed.pop(item.place, item) for item in unit.items)})
            for unit in known
        ]
        for unit in units_of(list(listed.values()), recipe.items_per_unit):
            units.append(unit.model_copy(update={"number": len(units)}))
        root.mkdir(parents=True, exist_ok=True)
        write_whole(root / "recipe.json", recipe.model_dump_json(indent=1))
        write_whole(work._list, Units(recipe=recipe.digest(), units=tuple(units)).model_dump_json())
        return work

    @property
    def _list(self) -> Path:
        return self.root / "units.json"

    def recipe(self) -> CurationRecipe:
        return CurationRecipe.model_validate_json((self.root / "recipe.json").read_bytes())

    def units(self) -> tuple[Unit, ...]:
        return Units.model_validate_json(self._list.read_bytes()).units

    def unit(self, number: int) -> Unit:
        return self.units()[number]

    def folder(self, unit: Unit) -> Path:
        return self.root / unit.folder

    def staged(self, units: Iterable[Unit]) -> Iterator[Row]:
        """The segments of every item that is done, in order of items."""
        for unit in units:
            ledger = Ledger(self.folder(unit) / "ledger.jsonl", 1)
            for item in unit.items:
                entry = ledger.entries.get(item.key)
                if entry is not None and entry.state == "done":
                    path = self.item_folder(unit, item.key) / "segments.json"
                    yield from Staged.model_validate_json(path.read_bytes()).rows

    def item_folder(self, unit: Unit, key: str) -> Path:
        return self.folder(unit) / "items" / key

    def looks(self, unit: Unit, row: Row) -> list[bytes]:
        """JPEGs of a segment, in order."""
        folder = self.item_folder(unit, row.item) / "frames"
        return [path.read_bytes() for path in sorted(folder.glob(f"{row.key}-*.jpg"))]

    def item_counts(self) -> dict[str, Counter[str]]:
        """Items by state and reason; what was never begun is `waiting`."""
        total: dict[str, Counter[str]] = {}
        for unit in self.units():
            counts = Ledger(self.folder(unit) / "ledger.jsonl", 1).counts()
            seen = sum(sum(each.values()) for each in counts.values())
            if seen < len(unit.items):
                total.setdefault("waiting", Counter())[""] += len(unit.items) - seen
            for state, reasons in counts.items():
                total.setdefault(state, Counter()).update(reasons)
        return total

    def keep_bills(self, unit: Unit, bills: Mapping[str, Bill]) -> None:
        for role, bill in bills.items():
            append_line(self.folder(unit) / "bills.jsonl", {"role": role, **asdict(bill)})

    def bills(self) -> dict[str, Bill]:
        """What all units asked for and what it cost, by role."""
        total: dict[str, Bill] = {}
        for unit in self.units():
            for line in read_lines(self.folder(unit) / "bills.jsonl"):
                bill = total.setdefault(str(line.pop("role")), Bill())
                for name, value in line.items():
                    setattr(bill, name, getattr(bill, name) + value)
        return total

    def spent(self) -> dict[str, float]:
        return {role: bill.cost for role, bill in self.bills().items()}

    def keep_duplicates(self, found: dict[str, str]) -> None:
        write_whole(self.root / _DUPLICATES, json.dumps(found, indent=0))

    def duplicates(self) -> dict[str, str]:
        return json.loads((self.root / _DUPLICATES).read_text())


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

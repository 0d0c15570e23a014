"""One page of metrics read back from a process: names, labels and values. It does not know what they mean."""

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Page:
    """What a process showed at one moment."""

    values: Mapping[Key, float]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over every series of that name with these labels; None where there is none."""
        wanted = set(labels.items())
        found = [value for (each, own), value in self.values.items() if each == name and wanted <= set(own)]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a metric by one of its labels."""
        found: dict[str, float] = {}
        for (each, own), value in self.values.items():
            if each == name and label in dict(own):
                found[dict(own)[label]] = found.get(dict(own)[label], 0.0) + value
        return found

    def labels(self, name: str) -> dict[str, str]:
        """Of the first series of an `_info` metric; empty where there is none."""
        for each, own in self.values:
            if each == name:
                return dict(own)
        return {}


def read_page(url: str) -> Page:
    """The page at `url`; an OSError where nothing answers."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        return parse(answer.read().decode())


def parse(text: str) -> Page:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return Page({(each.name, tuple(sorted(each.labels.items()))): float(each.value) for each in samples})

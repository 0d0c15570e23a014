"""Tables as Parquet files, and the only door to pyarrow.

It owns the file's form; it does not know what a row is of.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

Cell = str | int | float | None


def write_table(path: Path, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Write rows with the same names, zstd-compressed; the file is there whole or not at all."""
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    part = path.with_name(f".{path.name}.part")
    parquet.write_table(arrow.table(columns), part, compression="zstd")
    part.replace(path)


def read_table(path: Path) -> list[dict[str, Cell]]:
    """Its rows."""
    parquet: Any = import_module("pyarrow.parquet")
    return parquet.read_table(path).to_pylist()

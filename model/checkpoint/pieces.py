"""A rank's pieces as a safetensors file, by way of host memory; and whether all ranks' pieces make whole tensors.

It owns the file's bytes and the tiling; it knows nothing of folders, ranks' meetings or manifests. The file is laid out
in host memory first, so that training waits for one copy alone, and is hashed as it is written. (The safetensors
library copies every tensor once more to write it, and does so holding the interpreter's lock.)
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.manifest import Entry
from model.checkpoint.state import Piece

CHUNK = 16 << 20
"""Bytes hashed and written at a time."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names."""

Run = tuple[int, int, int]
"""Rank that keeps it, first value, one past the last."""


class HostCopy:
    """Room in host memory for these pieces, laid out as their file; `take` fills it again and again."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        self.layout = _layout_of(pieces)
        # Wide values first, so that every tensor is aligned.
        ordered = sorted(pieces, key=lambda name: (-pieces[name].values.element_size(), name))
        ends = {name: pieces[name].values.nbytes for name in ordered}
        on_gpu = any(piece.values.is_cuda for piece in pieces.values())
        self._bytes = torch.empty(sum(ends.values()), dtype=torch.uint8, pin_memory=on_gpu)
        self._views: dict[str, Tensor] = {}
        table: dict[str, object] = {
            "__metadata__": {name: str(pieces[name].start) for name in ordered if not pieces[name].is_whole}
        }
        start = 0
        for name in ordered:
            piece, stop = pieces[name], start + ends[name]
            shape = list(piece.shape) if piece.is_whole else [piece.values.numel()]
            table[name] = {"dtype": DTYPES[piece.values.dtype], "shape": shape, "data_offsets": [start, stop]}
            self._views[name] = self._bytes[start:stop].view(piece.values.dtype)
            start = stop
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header

    def fits(self, pieces: Mapping[str, Piece]) -> bool:
        return self.layout == _layout_of(pieces)

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Copy the values here; from a GPU it is only begun, and done when the device is."""
        for name, view in self._views.items():
            view.copy_(pieces[name].values.detach().reshape(-1), non_blocking=True)

    def write(self, path: Path) -> Entry:
        """Write a new file and have it on disk; the digest is of what was in memory."""
        sha256 = hashlib.sha256()
        with path.open("xb", buffering=0) as file:
            for data in (memoryview(self._header), self._bytes.numpy().data):
                for first in range(0, len(data), CHUNK):
                    chunk = data[first : first + CHUNK]
                    sha256.update(chunk)
                    while chunk:  # an unbuffered file may take less than it is given
                        chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
        return {"sha256": sha256.hexdigest(), "size": len(self._header) + len(self._bytes)}


def gap_in(shape: Iterable[int], runs: Iterable[Run]) -> str | None:
    """What keeps these runs from making one whole tensor; None if they do."""
    size, reached, found = math.prod(shape), 0, False
    for rank, start, stop in sorted(runs, key=lambda run: (run[1], run[2])):
        if not 0 <= start <= stop <= size:
            return f"rank {rank} has values {start} to {stop} of {size}"
        if start > reached:
            return f"no rank has values {reached} to {start} of {size}"
        if start < reached:
            return f"values {start} to {min(stop, reached)} of {size} are there twice, once from rank {rank}"
        reached, found = stop, True
    if not found or reached < size:
        return f"no rank has values {reached} to {size} of {size}"
    return None


def _layout_of(pieces: Mapping[str, Piece]) -> dict[str, tuple[object, ...]]:
    layout: dict[str, tuple[object, ...]] = {}
    for name, piece in pieces.items():
        if piece.values.dtype not in DTYPES:
            raise ValueError(f"'{name}' has {piece.values.dtype}; a checkpoint holds {', '.join(DTYPES.values())}")
        layout[name] = (piece.shape, piece.start, piece.values.numel(), piece.values.dtype, piece.values.is_cuda)
    return layout

"""A rank's state as it stood at one moment, in host memory that is used again for the next.

It owns the copy, which runs beside training until training is about to change the state; it knows nothing of files'
names or ranks.
"""

import threading

import torch

from model.checkpoint.pieces import HostCopy
from model.checkpoint.state import PARTS, Piece, RankState

RANDOM = "random"


class Snapshot:
    """What is to be copied. Made in the training thread, `take`n in another, `settle`d in the training thread."""

    def __init__(self, state: RankState) -> None:
        self.index: dict[str, dict[str, tuple[list[int], int, int]]] = {}
        """Shape, start and stop of each tensor by part and name, once it is taken."""
        self._parts: dict[str, dict[str, Piece]] = {
            part: {name: piece for name, piece in state.tensors.get(part, {}).items() if _says_something(piece)}
            for part in PARTS
        }
        self._parts[RANDOM] = {name: Piece.whole(tensor) for name, tensor in state.random.items()}
        pieces = [piece for part in self._parts.values() for piece in part.values()]
        device = next((piece.values.device for piece in pieces if piece.values.is_cuda), None)
        self._stream = None if device is None else torch.cuda.Stream(device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._seen = [(piece.values, _version(piece)) for piece in pieces]
        self._settled = threading.Event()

    def take(self, memory: dict[str, HostCopy]) -> None:
        """Copy everything into `memory`, whose rooms are made, or made anew, where they do not fit."""
        try:
            for part, pieces in self._parts.items():
                if part not in memory or not memory[part].fits(pieces):
                    memory.pop(part, None)  # before its successor takes as much again
                    memory[part] = HostCopy(pieces)
            with torch.cuda.stream(self._stream):
                for part, pieces in self._parts.items():
                    memory[part].take(pieces)
            if self._stream is not None:
                self._stream.synchronize()
            if any(values._version != version for values, version in self._seen):  # pyright: ignore[reportPrivateUsage]
                raise RuntimeError("the state changed while it was copied; call settle() before the step that does")
            self.index = {part: {name: _place(x) for name, x in self._parts[part].items()} for part in PARTS}
        finally:
            self._parts.clear()
            self._seen.clear()
            self._settled.set()

    def settle(self) -> None:
        """Wait until the copy is done, or has failed."""
        self._settled.wait()


def _place(piece: Piece) -> tuple[list[int], int, int]:
    return list(piece.shape), piece.start, piece.stop


def _version(piece: Piece) -> int:
    """Counts changes in place."""
    return piece.values._version  # pyright: ignore[reportPrivateUsage]


def _says_something(piece: Piece) -> bool:
    """Not an empty run of a tensor that has values elsewhere."""
    return piece.values.numel() > 0 or piece.is_whole

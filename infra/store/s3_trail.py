"""The trail of an object in S3: who wrote it, and which version each write replaced, in the object's own metadata.

It owns the trail's form and what can be concluded from it; it knows nothing of requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_urlsafe
from typing import Any, Self

_ROOM = 1900
"""Bytes of a trail. S3 allows 2 KB of metadata, and a step on a 16-byte ETag takes 44, so the last forty writes fit."""
_NOTHING = "nothing"
_NAME = "trail"


@dataclass(frozen=True, slots=True)
class Step:
    """One write: the version it replaced, without its quotes, or `nothing`, and the writer's name."""

    replaced: str
    writer: str


@dataclass(frozen=True, slots=True)
class Trail:
    """The writes that led to an object, oldest first; empty of one that no store of ours wrote."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any] | None) -> Self:
        """That of the object a HEAD found, or the empty one of nothing."""
        text: str = answer["Metadata"].get(_NAME, "") if answer else ""
        pairs = (each.partition(":") for each in text.split())
        return cls(tuple(Step(replaced, writer) for replaced, _, writer in pairs))

    def then(self, replaced: str | None, writer: str) -> Self:
        """The trail of an object that replaces this one."""
        first, *later = (*self.steps, Step(_told(replaced), writer))
        # The first says who created the object, and is kept; of the others the oldest make room.
        while len(_text((first, *later))) > _ROOM and len(later) > 1:
            del later[0]
        return type(self)((first, *later))

    @property
    def metadata(self) -> dict[str, str]:
        return {_NAME: _text(self.steps)}

    def version_by(self, writer: str, standing: str) -> str | None:
        """The version that writer wrote, where `standing` is the last one; None if it is not among these writes."""
        # Behind the first step others may be left out; its version is then told as a later one, which is gone as well.
        versions = [*(f'"{step.replaced}"' for step in self.steps[1:]), standing]
        return {step.writer: each for step, each in zip(self.steps, versions, strict=False)}.get(writer)

    def replaces(self, version: str | None) -> bool:
        """Whether one of these writes replaced that version; nobody else can then."""
        return any(step.replaced == _told(version) for step in self.steps)


def new_writer() -> str:
    """A name that no other write has."""
    return token_urlsafe(8)


def _text(steps: tuple[Step, ...]) -> str:
    return " ".join(f"{step.replaced}:{step.writer}" for step in steps)


def _told(version: str | None) -> str:
    return _NOTHING if version is None else version.strip('"')

"""DSG-Video: which objects of a caption no frame shows (paper App. I).

It owns the questions, the answers and the two rates; it does not know which captions are kept. A language model lists
the caption's objects with a question each; a vision model answers it on each of N uniformly sampled frames. An object
that every frame lacks is hallucinated.

    DSG-Video_i = hallucinated objects / all objects mentioned
    DSG-Video_s = sentences with a hallucinated object / all sentences
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from infra.curate.captions.captioner import prompt_text, spread
from infra.curate.captions.endpoint import Endpoint, Unanswerable
from model.config import Config

_TRIES = 2
"""Of a question whose answer is not of the form that was asked for."""


Form = TypeVar("Form", bound=Config)


class _Object(Config):
    object: Annotated[str, Field(pattern=r"\S")]
    question: Annotated[str, Field(pattern=r"\S")]
    sentence: Annotated[int, Field(ge=1)]


class _Objects(Config):
    objects: tuple[_Object, ...]


class _Answers(Config):
    answers: tuple[str, ...]


class Audit(Config):
    """What became of one caption."""

    sentences: int
    objects: tuple[str, ...]
    hallucinated: tuple[str, ...]
    wrong_sentences: int
    """Sentences that mention a hallucinated object."""

    @property
    def share(self) -> float:
        """Of the caption's objects, those hallucinated."""
        return len(self.hallucinated) / len(self.objects) if self.objects else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """The figures of many captions, a row of the paper's Table 8."""

    captions: int
    objects: int
    dsg_video_i: float
    dsg_video_s: float

    @classmethod
    def of(cls, audits: Iterable[Audit]) -> "Rates":
        """Sums over sums, so that a long caption counts for more than a short one."""
        found = list(audits)
        objects = sum(len(audit.objects) for audit in found)
        sentences = sum(audit.sentences for audit in found)
        return cls(
            captions=len(found),
            objects=objects,
            dsg_video_i=sum(len(audit.hallucinated) for audit in found) / objects if objects else 0.0,
            dsg_video_s=sum(audit.wrong_sentences for audit in found) / sentences if sentences else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Auditor:
    """Audits captions with a language model's questions and a vision model's answers."""

    language: Endpoint
    vision: Endpoint
    frames: int

    def audit(self, caption: str, looks: Sequence[bytes]) -> Audit:
        """Raises `Unanswerable` where a model does not answer in the form that was asked for."""
        sentences = sentences_of(caption)
        objects = self._objects(sentences)
        absent = set(range(len(objects)))
        for look in spread(looks, self.frames) if objects else ():
            # An object is settled as soon as one frame shows it; only the others are asked for again.
            asked = sorted(absent)
            absent -= self._present([objects[place] for place in asked], asked, look)
            if not absent:
                break
        gone = [objects[place] for place in sorted(absent)]
        wrong = {each.sentence for each in gone}
        return Audit(
            sentences=len(sentences),
            objects=tuple(each.object for each in objects),
            hallucinated=tuple(each.object for each in gone),
            wrong_sentences=len(wrong),
        )

    def _objects(self, sentences: Sequence[str]) -> list[_Object]:
        numbered = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
        told = _in_form(self.language, prompt_text("objects").format(sentences=numbered), (), _Objects)
        objects = {each.object.casefold(): each for each in reversed(told.objects)}
        strays = [each.sentence for each in objects.values() if each.sentence > len(sentences)]
        if strays:
            raise Unanswerable(f"the caption has {len(sentences)} sentences, an object was said to be in {strays[0]}")
        return sorted(objects.values(), key=lambda each: each.sentence)

    def _present(self, objects: Sequence[_Object], places: Sequence[int], look: bytes) -> set[int]:
        questions = "\n".join(f"{number}. {each.question}" for number, each in enumerate(objects, 1))
        told = _in_form(self.vision, prompt_text("presence").format(questions=questions), (look,), _Answers)
        if len(told.answers) != len(objects):
            raise Unanswerable(f"{len(objects)} questions were asked, {len(told.answers)} were answered")
        return {
            place
            for place, answer in zip(places, told.answers, strict=True)
            if answer.strip().casefold().startswith("yes")
        }


def sentences_of(caption: str) -> list[str]:
    """A caption's sentences: what ends in `.`, `!` or `?` before a space."""
    return [part for part in re.split(r"(?<=[.!?])\s+", caption.strip()) if part]


def _in_form(endpoint: Endpoint, text: str, pictures: Sequence[bytes], form: type[Form]) -> Form:
    problem = ""
    for _ in range(_TRIES):
        told = endpoint.ask(text, pictures)
        found = re.search(r"\{.*\}", told, re.DOTALL)
        try:
            return form.model_validate(json.loads(found[0] if found else told))
        except (ValueError, ValidationError) as error:
            problem = f"{str(error).splitlines()[0]} in {told[:200]!r}"
    raise Unanswerable(f"{endpoint.config.model} did not answer in JSON as asked: {problem}")

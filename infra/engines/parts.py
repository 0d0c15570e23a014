"""The frozen parts that a recipe asks for beside its engine: exported, proven like it, and files of its bundle.

It owns which parts there are, what each is proven on and the names of the files; how a part is written and compared is
`export`'s. A server decodes and reads prompts with PyTorch; the files are for runtimes that have none.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from export.engines.onnx_runtime import run_part
from export.onnx import recipe_digest
from export.parity.inputs import ParityInputs
from export.parity.parts import check_part
from export.parts import Part, Tower, decoder, encoder, export_part, text_encoder
from export.profiles import Shape
from model.config import PartName
from model.data.moving_shapes import generate
from model.generation import to_frames

logger = logging.getLogger(__name__)

PARITY = "parts.json"
SEED = 0
Cases = list[Mapping[str, Tensor]]


class Tokenizing(Protocol):
    """A text encoder with its tokenizer."""

    def tokenize(self, texts: list[str]) -> Iterable[Tensor]: ...


def export_parts(inputs: ParityInputs, work: Path) -> dict[str, Path]:
    """Files by the names they get in a bundle; none where the recipe asks for none.

    Raises:
        ParityFailed: a part's file does not compute what the part does.
    """
    recipe, files, reports = inputs.recipe, dict[str, Path](), dict[str, object]()
    for name in recipe.export.parts:
        part, cases = _part(name, inputs)
        exported = export_part(part, work / "parts" / f"{name}.onnx", recipe=recipe)
        reports[name] = check_part(part, run_part(exported.path), cases).model_dump(mode="json")
        beside = exported.path.with_name(exported.path.name + ".data")
        files |= {path.name: path for path in (exported.path, beside) if path.exists()}
    if reports:
        files[PARITY] = work / "parts" / PARITY
        files[PARITY].write_text(json.dumps({"recipe_sha256": recipe_digest(recipe), "parts": reports}, indent=2))
        logger.info("exported and proved the parts %s", sorted(reports))
    return files


def _part(name: PartName, inputs: ParityInputs) -> tuple[Part, Cases]:
    """The part, and real contents at the usual size and with sizes of 1."""
    codec, text, profile = inputs.codec, inputs.text, inputs.profile
    assert codec is not None and text is not None
    if name == "text_encoder":
        part, tokenizer = text_encoder(cast(Tower, text)), cast(Tokenizing, text)
        batches = [["a red circle moves right", "a square", ""], [""]]
        return part, [dict(zip(part.inputs, tokenizer.tokenize(texts), strict=True)) for texts in batches]
    shape, factor = profile.opt, profile.spatial_factor
    frames = _frames(shape, factor)
    given = frames if name == "encoder" else codec.encode(frames)
    corner = factor if name == "encoder" else 1
    part = encoder(codec) if name == "encoder" else decoder(codec)
    (source,) = part.inputs
    return part, [{source: given}, {source: given[:1, :1, :, : 2 * corner, : 3 * corner]}]


def _frames(shape: Shape, factor: int) -> Tensor:
    """Moving shapes [2, T, 3, H, W]."""
    height, width = shape.height * factor, shape.width * factor
    clips = generate(2, num_frames=shape.frames, size=max(16, height, width), seed=SEED)
    return to_frames([clip.frames for clip in clips])[..., :height, :width]

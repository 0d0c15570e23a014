"""The captions of a data set, encoded once in a run's life.

It owns the table from caption to embedding, and the file that keeps it; it knows nothing of the network. The whole
table is kept in memory, so a data set of millions of captions needs another way.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.checkpoint import durable
from model.config import TextConfig
from model.data.shards import ShardSet
from model.text import TextEmbedding, load_text_encoder
from model.training.parallel import Place, meet

ENCODED_AT_ONCE = 64

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class CaptionTable:
    """Embeddings of N texts, padded to the longest; the empty string, the null text, is row 0."""

    places: dict[str, int]
    embeddings: TextEmbedding

    @classmethod
    def build(cls, captions: Iterable[str], encode: Callable[[Sequence[str]], TextEmbedding]) -> Self:
        """In sorted order, so that every start of a run encodes the same batches to the same bits."""
        texts = _in_order(captions)
        parts = [encode(texts[at : at + ENCODED_AT_ONCE]) for at in range(0, len(texts), ENCODED_AT_ONCE)]
        length = max(part.mask.shape[1] for part in parts)
        embeddings = TextEmbedding(
            tokens=torch.cat([_padded(part.tokens, length) for part in parts]),
            mask=torch.cat([_padded(part.mask, length) for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )
        return cls({text: place for place, text in enumerate(texts)}, embeddings)

    @classmethod
    def kept(cls, file: Path, captions: Iterable[str], text: TextConfig, place: Place) -> Self:
        """The table of a run, on the rank's device: encoded at its first start, read from `file` at every other.

        A text encoder may be larger than the network: only the first rank loads it, and once. A run that is started
        again goes on with the embeddings it began with, whatever became of the encoder. Every rank calls it.
        """
        texts = _in_order(captions)
        key = hashlib.sha256(json.dumps([text.model_dump(mode="json"), texts]).encode()).hexdigest()
        if place.is_first and _read(file, key) is None:
            encoder = load_text_encoder(text).to(place.device)
            made = cls.build(texts, encoder.encode).embeddings
            tensors = {"tokens": made.tokens, "mask": made.mask, "pooled": made.pooled}
            file.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(file, save({name: x.cpu().contiguous() for name, x in tensors.items()}, {"key": key}))
        meet()
        found = _read(file, key)
        if found is None:
            raise ValueError(f"{file} does not hold this run's captions; all ranks must see its run folder")
        on_device = (x.to(place.device) for x in (found.tokens, found.mask, found.pooled))
        return cls({caption: row for row, caption in enumerate(texts)}, TextEmbedding(*on_device))

    def rows(self, captions: Sequence[str], dropped: Tensor) -> TextEmbedding:
        """Embeddings [B, L, D] of `captions`, the null text's where `dropped` bool [B]; L fits the longest of them."""
        places = torch.tensor([self.places[caption] for caption in captions])
        places = places.masked_fill(dropped, 0).to(self.embeddings.mask.device)
        mask = self.embeddings.mask[places]
        length = int(mask.sum(1).max())
        tokens = self.embeddings.tokens[places, :length]
        return TextEmbedding(tokens, mask[:, :length], self.embeddings.pooled[places])


def captions_of(shards: ShardSet, *, stills: bool) -> set[str]:
    """Every caption that training clips may carry, and single frames where there are `stills`."""
    captions = {entry.caption for entry in shards.entries}
    if stills:
        found = (shards.still_caption(place) for place in range(len(shards)))
        captions |= {still for still in found if still is not None}
    return captions


def _in_order(captions: Iterable[str]) -> list[str]:
    return ["", *sorted(set(captions) - {""})]


def _read(file: Path, key: str) -> TextEmbedding | None:
    """What `file` keeps under this key, on the CPU."""
    try:
        with cast(Any, safe_open)(file, framework="pt") as opened:
            if cast(dict[str, str], opened.metadata() or {}).get("key") != key:
                return None
            return TextEmbedding(*(opened.get_tensor(name) for name in ("tokens", "mask", "pooled")))
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        logger.warning("%s cannot be read (%s): its captions are encoded again", file, error)
        return None


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)

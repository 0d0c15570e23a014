"""The captions of a data set, encoded once before training.

It owns the table from caption to embedding; it knows nothing of the encoder behind it or of the network. The whole
table is kept in memory, so a data set of millions of captions needs another way.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.data.shards import ShardSet
from model.text import TextEmbedding

ENCODED_AT_ONCE = 64


@dataclass(slots=True, frozen=True)
class CaptionTable:
    """Embeddings of N texts, padded to the longest; the empty string, the null text, is row 0."""

    places: dict[str, int]
    embeddings: TextEmbedding

    @classmethod
    def build(cls, captions: Iterable[str], encode: Callable[[Sequence[str]], TextEmbedding]) -> Self:
        """In sorted order, so that every start of a run encodes the same batches to the same bits."""
        texts = ["", *sorted(set(captions) - {""})]
        parts = [encode(texts[at : at + ENCODED_AT_ONCE]) for at in range(0, len(texts), ENCODED_AT_ONCE)]
        length = max(part.mask.shape[1] for part in parts)
        embeddings = TextEmbedding(
            tokens=torch.cat([_padded(part.tokens, length) for part in parts]),
            mask=torch.cat([_padded(part.mask, length) for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )
        return cls({text: place for place, text in enumerate(texts)}, embeddings)

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


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)

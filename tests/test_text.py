"""Text encoders: padding and batch mates change nothing, the empty text is a text, pickles and halves are refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn

from model import text
from model.config import TextConfig
from model.text import TextEncoder, load_text_encoder

WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right"]
CHARACTERS = sorted(set("".join(WORDS)))
TEXTS = ["a red circle moves right", "", "a blue square", "a red circle moves left a red circle moves left"]


def save_clip(folder: Path, positions: int = 77) -> None:
    """A random CLIP text tower with a tokenizer of one token a letter."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), *marks]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    """A random T5 encoder with a tokenizer of one token a word."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*marks, *(("▁" + word, -1.0) for word in WORDS), ("▁", -3.0), *((c, -4.0) for c in CHARACTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(pieces) + 2, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder)
    return folder


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder(TextConfig(type="minilm"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> TextEncoder:
    return load_text_encoder(clip_config(clip_folder))


@pytest.fixture(scope="module")
def t5_clip(clip_folder: Path, t5_folder: Path) -> TextEncoder:
    return load_text_encoder(TextConfig(type="t5_clip", path=str(clip_folder), t5_path=str(t5_folder)))


@pytest.fixture(params=["minilm", "clip", "t5_clip"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return request.getfixturevalue(request.param)


def clip_config(path: Path | str, max_tokens: int = 77) -> TextConfig:
    return TextConfig(type="clip", path=str(path), max_tokens=max_tokens)


# Every encoder


def test_shapes_follow_the_encoder_and_the_longest_text(encoder: TextEncoder) -> None:
    embedding = encoder.encode(TEXTS)
    longest = int(embedding.mask.sum(dim=1).max())
    assert embedding.tokens.shape == (4, longest, encoder.hidden_size)
    assert embedding.mask.shape == (4, longest)
    assert embedding.pooled.shape == (4, encoder.pooled_size)
    assert embedding.tokens.dtype == embedding.pooled.dtype == torch.float32
    assert embedding.mask.dtype == torch.bool
    assert not embedding.tokens.requires_grad


def test_batch_mates_change_nothing(encoder: TextEncoder) -> None:
    together = encoder.encode(TEXTS)
    for row, alone in enumerate(encoder.encode([caption]) for caption in TEXTS):
        length = alone.tokens.shape[1]
        assert torch.equal(together.mask[row, :length], alone.mask[0])
        assert not together.mask[row, length:].any()
        assert torch.allclose(together.tokens[row, :length], alone.tokens[0], rtol=0, atol=1e-5)
        assert torch.allclose(together.pooled[row], alone.pooled[0], rtol=0, atol=1e-5)


def test_padding_is_on_the_right_and_zero(encoder: TextEncoder) -> None:
    embedding = encoder.encode(TEXTS)
    assert (embedding.mask.int().diff(dim=1) <= 0).all()
    assert (embedding.tokens[~embedding.mask] == 0).all()


def test_the_same_text_gives_the_same_bits(encoder: TextEncoder) -> None:
    first, second = encoder.encode(TEXTS), encoder.encode(TEXTS)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, second.pooled)


def test_the_empty_text_keeps_its_special_tokens(encoder: TextEncoder) -> None:
    embedding = encoder.encode([""])
    assert embedding.mask.all()
    assert embedding.mask.shape[1] >= 1
    assert embedding.tokens.abs().sum() > 0
    assert embedding.pooled.abs().sum() > 0


def test_other_words_give_other_embeddings(encoder: TextEncoder) -> None:
    right, left = encoder.encode(["a red circle moves right"]), encoder.encode(["a red circle moves left"])
    assert not torch.allclose(right.pooled, left.pooled, atol=1e-3)


def test_count_tokens_is_the_mask_of_a_text_that_fits(minilm: TextEncoder, clip: TextEncoder) -> None:
    for encoder in (minilm, clip):
        counts = [encoder.count_tokens(caption) for caption in TEXTS]
        assert counts == encoder.encode(TEXTS).mask.sum(dim=1).tolist()


def test_count_tokens_sees_what_encode_cuts_off(encoder: TextEncoder) -> None:
    long = "red " * 200
    assert encoder.count_tokens(long) > 200
    assert encoder.encode([long]).mask.shape == (1, 77)


def test_threads_may_count_while_others_encode(encoder: TextEncoder) -> None:
    def both(length: int) -> int:
        encoder.encode(["a red circle"])
        return encoder.count_tokens("red " * length)

    expected = [encoder.count_tokens("red " * length) for length in range(1, 100, 3)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(1, 100, 3))) == expected


def test_an_encoder_is_frozen_and_moves(encoder: TextEncoder) -> None:
    assert encoder.to("cpu") is encoder
    networks = [value for value in vars(encoder).values() if isinstance(value, nn.Module)]
    assert networks
    for network in networks:
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, model.text, model.vae; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# MiniLM


def test_minilm_tokens_and_pooled_have_unit_rms(minilm: TextEncoder) -> None:
    embedding = minilm.encode(TEXTS)
    assert minilm.hidden_size == minilm.pooled_size == 384
    rms = embedding.tokens[embedding.mask].square().mean(dim=-1).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), atol=1e-4)
    assert torch.allclose(embedding.pooled.square().mean(dim=-1).sqrt(), torch.ones(4), atol=1e-4)


def test_minilm_pooled_is_the_last_text_token(minilm: TextEncoder) -> None:
    embedding = minilm.encode(["a red circle moves right", "a red circle"])
    assert torch.equal(embedding.pooled[0], embedding.tokens[0, 5])  # [CLS] a red circle moves right [SEP]
    assert torch.equal(embedding.pooled[1], embedding.tokens[1, 3])


def test_minilm_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MINILM_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ValueError, match=r"pip install 'stiv-platform\[demo\]'"):
        load_text_encoder(TextConfig(type="minilm"))


def test_more_tokens_than_positions_are_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"max_tokens 600 exceeds the 512 positions"):
        load_text_encoder(TextConfig(type="minilm", max_tokens=600))
    with pytest.raises(ValueError, match=r"max_tokens 78 exceeds the 77 positions"):
        load_text_encoder(clip_config(clip_folder, max_tokens=78))


def test_a_limit_without_room_for_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives the empty text 2 tokens: text.max_tokens 2 must be above that"):
        load_text_encoder(TextConfig(type="minilm", max_tokens=2))


# CLIP and T5


def test_clip_states_are_the_towers_own_and_pooled_is_its_eos(clip: TextEncoder, clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tower = CLIPTextModel.from_pretrained(clip_folder).eval()
    embedding = clip.encode(TEXTS)
    for row, caption in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(caption)["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            output = tower(input_ids=ids)
        assert torch.allclose(embedding.tokens[row, : ids.shape[1]], output.last_hidden_state[0], atol=1e-5)
        assert torch.allclose(embedding.pooled[row], output.last_hidden_state[0, -1], atol=1e-5)
        assert torch.allclose(embedding.pooled[row], output.pooler_output[0], atol=1e-5)


def test_a_cut_text_still_ends_with_eos(clip_folder: Path) -> None:
    short = load_text_encoder(clip_config(clip_folder, max_tokens=5))
    # Start, three letters, end: what is beyond them leaves no trace.
    cut, fitting = short.encode(["red circle"]), short.encode(["red"])
    assert cut.mask.shape == (1, 5)
    assert torch.allclose(cut.tokens, fitting.tokens, atol=1e-6)
    assert torch.allclose(cut.pooled, fitting.pooled, atol=1e-6)


def test_t5_clip_takes_tokens_from_t5_and_pooled_from_clip(
    t5_clip: TextEncoder, clip: TextEncoder, t5_folder: Path
) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    embedding = t5_clip.encode(TEXTS)
    assert (t5_clip.hidden_size, t5_clip.pooled_size) == (24, 32)
    assert torch.equal(embedding.pooled, clip.encode(TEXTS).pooled)
    ids = torch.tensor([AutoTokenizer.from_pretrained(t5_folder)(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        states = T5EncoderModel.from_pretrained(t5_folder).eval()(input_ids=ids).last_hidden_state
    assert torch.allclose(embedding.tokens[0, : ids.shape[1]], states[0], atol=1e-5)


def test_t5_clip_counts_the_longer_of_its_two_tokenizings(t5_clip: TextEncoder, clip: TextEncoder) -> None:
    assert t5_clip.count_tokens("a red circle") == clip.count_tokens("a red circle") == 12
    assert t5_clip.encode(["a red circle"]).mask.shape[1] == 4


def test_the_text_tower_of_a_whole_clip_loads(clip: TextEncoder, clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionConfig

    tower = CLIPTextModel.from_pretrained(clip_folder)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    whole = CLIPModel(CLIPConfig(text_config=tower.config.to_dict(), vision_config=vision.to_dict()))
    whole.text_model.load_state_dict(tower.state_dict())
    whole.half().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip_folder / name, tmp_path)
    embedding = load_text_encoder(clip_config(tmp_path)).encode(TEXTS)
    assert embedding.tokens.dtype == torch.float32
    assert torch.allclose(embedding.pooled, clip.encode(TEXTS).pooled, atol=2e-2)


def test_a_hub_name_is_read_from_the_cache(
    clip: TextEncoder, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tiny-clip"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(clip_folder, repository / "snapshots" / commit)
    loaded = load_text_encoder(clip_config("somebody/tiny-clip"))
    assert torch.equal(loaded.encode(TEXTS).pooled, clip.encode(TEXTS).pooled)
    with pytest.raises(ValueError, match=r"text.path somebody/unknown is neither a folder here nor"):
        load_text_encoder(clip_config("somebody/unknown"))


# Bad folders


def test_a_missing_folder_is_named(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"text.path .*nowhere is not a folder"):
        load_text_encoder(clip_config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"text.t5_path .*nowhere is not a folder"):
        load_text_encoder(TextConfig(type="t5_clip", path=str(clip_folder), t5_path=str(tmp_path / "nowhere")))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def other_size(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))


def other_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text._minilm_folder() / name, folder)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_only, r"no model\.safetensors.*pickled \.bin weights are refused"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"cannot be read as a CLIPTextModel"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"the tokenizer in .* cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), r"does not end a text with its EOS token"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), r"cannot be read as a CLIPTextModel"),
        (other_size, r"tensors of the CLIPTextModel .* are missing or have another shape"),
        (other_tokenizer, r"30522 tokens, its encoder 38: they do not belong together"),
    ],
)
def test_a_damaged_folder_is_refused(
    clip_folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(clip_config(folder))
    assert str(folder) in str(caught.value)


def test_a_t5_folder_is_no_clip(t5_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors of the CLIPTextModel .* are missing or have another shape"):
        load_text_encoder(clip_config(t5_folder))

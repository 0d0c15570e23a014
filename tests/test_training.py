"""What a training step is made of: draws, captions, DeepSpeed's settings, progress. Whole runs are in test_launch."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.data.moving_shapes import generate
from model.data.shards import ShardSet
from model.recipe import StageRecipe
from model.text import TextEmbedding
from model.training import parallel
from model.training.captions import CaptionTable, captions_of
from model.training.draws import draw
from model.training.journal import Journal
from model.training.prepare import begin, digests_of, latest_of
from model.training.run import ProgressLine, RunBusy, append_progress, exclusive, read_progress, rewind_progress
from monitoring import metrics
from monitoring.goodput import Ledger
from tests.checkpoints import save, state
from tests.tiny_stage import Inputs, stage, write_inputs

SHAPE = torch.Size((4, 3, 4, 4))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def encode(texts: Sequence[str]) -> TextEmbedding:
    """A token a letter, between a start and an end token, as long as the longest of the batch."""
    tokens = torch.zeros(len(texts), max(map(len, texts)) + 2, 2)
    for row, text in enumerate(texts):
        tokens[row, : len(text) + 2, 0] = torch.tensor([1.0, *map(float, map(ord, text)), 2.0])
    return TextEmbedding(tokens, tokens[..., 0] > 0, torch.tensor([[float(len(text))] for text in texts]))


def line(step: int, **values: float) -> ProgressLine:
    figures: dict[str, Any] = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "step_seconds": 0.5,
        "samples_per_second": 16.0,
    }
    return ProgressLine(step=step, total_steps=10, elapsed_seconds=float(step), **{**figures, **values})


def cut_short(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"step": 8, "total_st')


def test_a_clip_draws_the_same_whatever_batch_it_is_in() -> None:
    recipe = stage("ti2v")
    together = draw(recipe, range(100, 112), SHAPE, mask_ratio=0.5)
    halves = [draw(recipe, range(first, first + 6), SHAPE, mask_ratio=0.5) for first in (100, 106)]
    for part in ("timestep", "noise", "frame_mask", "text_dropped", "keep"):
        assert torch.equal(getattr(together, part), torch.cat([getattr(half, part) for half in halves])), part


def test_draws_differ_between_clips_and_seeds() -> None:
    first, other = (
        draw(stage(), range(64), SHAPE, mask_ratio=0.5),
        draw(stage(seed=1), range(64), SHAPE, mask_ratio=0.5),
    )
    assert first.timestep.unique().numel() == 64
    assert not torch.equal(first.noise, other.noise)
    assert abs(first.noise.mean().item()) < 0.05 and abs(first.noise.std().item() - 1) < 0.05
    assert (
        first.keep is not None and first.keep.shape == (64, 2) and len({tuple(row.tolist()) for row in first.keep}) > 3
    )


def test_draws_follow_the_recipes_odds() -> None:
    recipe = stage("ti2v")
    drawn = draw(recipe, range(3000), torch.Size((4, 1, 2, 2)), mask_ratio=0.0)
    assert drawn.keep is None
    assert drawn.text_dropped.float().mean().item() == pytest.approx(recipe.conditioning.text_dropout, abs=0.02)
    kept = drawn.frame_mask[:, 0].float().mean().item()
    assert kept == pytest.approx(1 - recipe.conditioning.image_dropout, abs=0.02)
    assert not drawn.frame_mask[:, 1:].any()
    both = (drawn.text_dropped & ~drawn.frame_mask[:, 0]).float().mean().item()
    assert both == pytest.approx(0.008, abs=0.006), "text and image are dropped independently"
    assert not draw(stage("t2v"), range(9), SHAPE, mask_ratio=0.0).frame_mask.any()


def test_the_caption_table_gives_each_caption_its_own_embedding() -> None:
    table = CaptionTable.build(["bb", "a long caption", "bb", ""], encode)
    rows = table.rows(["bb", "a long caption"], torch.tensor([False, False]))
    direct = encode(["bb", "a long caption"])
    assert torch.equal(rows.tokens, direct.tokens) and torch.equal(rows.mask, direct.mask)
    assert torch.equal(rows.pooled, direct.pooled)


def test_a_dropped_caption_is_the_empty_string() -> None:
    table = CaptionTable.build(["bb", "a long caption"], encode)
    rows = table.rows(["bb", "a long caption"], torch.tensor([False, True]))
    assert rows.mask.sum(1).tolist() == [4, 2]
    assert rows.mask.shape[1] == 4, "padding goes with the caption that needed it"
    assert rows.pooled.flatten().tolist() == [2.0, 0.0]


def test_images_may_carry_the_caption_of_a_still(inputs: Inputs) -> None:
    shards = ShardSet(inputs.data / "train")
    shapes = {clip.spec.image_caption for clip in generate(24, num_frames=4, size=32, seed=1)}
    stills = captions_of(shards, stills=True) - captions_of(shards, stills=False)
    assert stills == shapes


def test_deepspeed_is_told_what_the_recipe_says() -> None:
    training = stage(global_batch_size=24, micro_batch_size=2, world_size=3).training
    config: dict[str, Any] = parallel.deepspeed_config(training, parameters=1000)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["zero_optimization"]["stage"] == 0
    assert config["gradient_clipping"] == 0.0, "its default is not off, and clipping is ours where nothing is shared"
    json.dumps(config)
    shared = stage(global_batch_size=24, micro_batch_size=2, world_size=3, zero_stage=2, precision="bf16").training
    config = parallel.deepspeed_config(shared, parameters=1000)
    assert config["zero_optimization"]["stage"] == 2 and config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 1.0
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}, "micro-batches must not add up in bf16"


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        ({"zero_stage": 1, "precision": "bf16"}, ["'bf16' at zero_stage 1", "2 micro-batches", "zero_stage 2"]),
        ({"world_size": 3, "sequence_parallel": 2}, ["world_size 3", "sequence_parallel 2"]),
        ({"world_size": 4, "sequence_parallel": 4}, ["sequence_parallel 4", "2 token frames"]),
        ({"world_size": 2, "sequence_parallel": 2, "temporal_mask_ratio": 0.5}, ["temporal_mask_ratio"]),
        ({"zero_stage": 3}, ["zero_stage 3", "adamw"]),
    ],
)
def test_a_layout_that_would_not_be_exact_is_refused(training: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        stage(**training)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_rank_outside_torchrun_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"MASTER_ADDR.* not set: start ranks with torchrun"):
        parallel.read_place()


def test_a_wrong_number_of_ranks_is_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 ranks were started, the recipe says training\.world_size 2; start 2"):
        parallel.join(stage(world_size=2).training)


def test_progress_is_read_while_a_line_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert read_progress(path) == []
    append_progress(path, line(2))
    append_progress(path, line(4, loss=0.5))
    cut_short(path)
    assert read_progress(path) == [line(2), line(4, loss=0.5)]


def test_a_resumed_run_writes_its_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    for step in (2, 4, 6):
        append_progress(path, line(step))
    cut_short(path)
    assert rewind_progress(path, 5) == 4.0
    append_progress(path, line(6, loss=0.3))
    assert [entry.step for entry in read_progress(path)] == [2, 4, 6]
    assert read_progress(path)[-1].loss == 0.3


def test_the_journal_writes_means_metrics_and_its_port(inputs: Inputs, tmp_path: Path) -> None:
    folders = inputs.folders(tmp_path)
    journal = Journal(stage(log_every=2), folders, Ledger(None, "init"), first_step=0, metrics_port=0)
    try:
        assert 0 < int(folders.metrics_port.read_text()) < 65536
        for step, loss in enumerate([3.0, 1.0, 7.0], start=1):
            journal.note(step, loss=loss, grad_norm=0.5, learning_rate=1e-3, seconds=0.25)
        page = metrics.render(metrics.TRAINING)[0].decode()
    finally:
        journal.close()
    (written,) = read_progress(folders.progress)
    assert (written.step, written.total_steps, written.loss) == (2, 10, 2.0)
    assert (written.step_seconds, written.samples_per_second) == (0.25, 32.0)
    assert "stiv_training_loss 7.0" in page
    assert 'stiv_training_stage_info{stage="t2v",task="t2v",world_size="1"} 1.0' in page
    assert not folders.metrics_port.exists()


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    busy = pytest.raises(RunBusy, match=rf"process {os.getpid()} trains in .* did not end within 0\.2 s")
    with exclusive(tmp_path), busy, exclusive(tmp_path, patience=0.2):
        pass
    with exclusive(tmp_path):
        pass


def test_a_stage_wants_its_parent_and_only_then(tmp_path: Path) -> None:
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has parent 't2v', but its initial checkpoint is None"):
        begin(network, stage("ti2v"), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="none to one that has not"):
        begin(network, stage("t2v"), tmp_path)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("recipe", "data", "error"),
    [
        (stage(), "d1", None),
        (stage(log_every=7, checkpoint_every=1, keep_checkpoints=9, micro_batch_size=2), "d1", None),
        (stage().model_copy(update={"gate": ()}), "d1", None),
        (stage(seed=4), "d1", r"training\.seed was 0 and is 4"),
        (stage("ti2v"), "d1", r"name was t2v and is ti2v \(3 differences\)"),
        (stage(), "d2", "data was d1 and is d2"),
    ],
    ids=["same", "bookkeeping", "gate", "seed", "stage", "data"],
)
def test_a_run_goes_on_with_its_own_recipe_and_data_only(
    inputs: Inputs, tmp_path: Path, recipe: StageRecipe, data: str, error: str | None
) -> None:
    folders = inputs.folders(tmp_path)
    assert latest_of(recipe, folders, {"data": data}) is None
    save(folders.checkpoints, state(), keep=1)
    if error is None:
        found = latest_of(recipe, folders, {"data": data})
        assert found is not None and found.step == 5
    else:
        with pytest.raises(ValueError, match=error):
            latest_of(recipe, folders, {"data": data})


def test_inputs_are_told_apart_by_content(inputs: Inputs, tmp_path: Path) -> None:
    parent = save(tmp_path / "parent", state(), keep=1)
    first = digests_of(inputs.folders(tmp_path, initial=parent))
    assert first.keys() == {"data", "codec", "initial"}
    moved = Inputs(*(shutil.copytree(folder, tmp_path / folder.name) for folder in (inputs.data, inputs.codec)))
    assert digests_of(moved.folders(tmp_path)) == {key: first[key] for key in ("data", "codec")}
    (moved.codec / "codec.json").write_text("{}")
    assert digests_of(moved.folders(tmp_path))["codec"] != first["codec"]

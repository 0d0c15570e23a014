"""Tasks: which frames are given, what of them the loss counts, and how plans chain clips into films."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model import tasks
from model.conditioning import Conditions
from model.config import Task
from model.data.moving_shapes import generate
from model.flow_matching import loss_weight, masked_loss
from model.generation import ClipGenerator, denoise_steps, to_clips, to_frames
from model.recipe import StageRecipe
from model.text import load_text_encoder
from model.training.draws import draw
from model.vae import PatchPca
from tests.tiny_stage import stage

FRAMES = 8
GIVEN: dict[Task, list[int]] = {
    "t2v": [],
    "ti2v": [0],
    "keyframes": [0],
    "prediction": [0, 1, 2, 3],
    "interpolation": [0, 7],
    "upsampling": [0, 2, 4, 6],
    "multiview": [0, 1],
}
SHAPE = torch.Size((FRAMES, 4, 4, 4))


def recipe_of(task: str = "t2v", *, frames: int = FRAMES, **sections: object) -> StageRecipe:
    """A stage of `task`; `sections` are merged key by key."""
    tree = stage().model_dump(mode="json")
    tree |= {"task": task}
    for name, values in {"video": {"num_frames": frames, "keyframe_stride": 5}, **sections}.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    return StageRecipe.model_validate(tree)


@pytest.mark.parametrize("task", GIVEN)
def test_a_task_gives_its_frames_and_the_loss_counts_all_others(task: Task) -> None:
    recipe = recipe_of(task, conditioning={"image_dropout": 0.0})
    drawn = draw(recipe, range(6), SHAPE, mask_ratio=0.0)
    wanted = torch.tensor([frame in GIVEN[task] for frame in range(FRAMES)])
    assert torch.equal(drawn.frame_mask, wanted.expand(6, FRAMES))
    assert torch.equal(tasks.frame_mask(recipe, task), wanted)

    weight = loss_weight(drawn.frame_mask, drawn.noise, keep=None, patch_size=2)
    assert weight.sum() == 6 * (FRAMES - len(GIVEN[task])) * 4 * 4
    target = torch.zeros(6, *SHAPE)
    for frame in range(FRAMES):
        wrong = target.clone()
        wrong[:, frame] = 1.0
        counted = masked_loss(wrong, target, weight).item()
        assert counted == pytest.approx(0.0 if frame in GIVEN[task] else 1 / (FRAMES - len(GIVEN[task])))


@pytest.mark.parametrize("task", [task for task in GIVEN if GIVEN[task]])
def test_image_dropout_takes_all_given_frames_of_a_clip_or_none(task: Task) -> None:
    recipe = recipe_of(task, conditioning={"image_dropout": 0.3})
    counts = draw(recipe, range(1000), torch.Size((FRAMES, 1, 2, 2)), mask_ratio=0.0).frame_mask.sum(1)
    assert set(counts.tolist()) == {0, len(GIVEN[task])}
    assert (counts == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_multiview_is_always_trained_without_text() -> None:
    assert draw(recipe_of("multiview"), range(50), SHAPE, mask_ratio=0.0).text_dropped.all()
    assert not draw(recipe_of("ti2v"), range(50), SHAPE, mask_ratio=0.0).text_dropped.all()


def test_the_papers_seven_views_are_seven_frames_or_eight_by_the_temporal_patch() -> None:
    """App. J.3: the input view and 6 novel ones; a token of two frames wants the input view twice."""
    for patch, frames, given in ((1, 7, [0]), (2, 8, [0, 1])):
        recipe = recipe_of("multiview", frames=frames, network={"temporal_patch_size": patch})
        assert tasks.frame_mask(recipe, "multiview").nonzero().flatten().tolist() == given
        assert tasks.source_frames(recipe.video, "multiview", patch) == (*[0] * (patch - 1), *range(7))
        assert len(tasks.plan(recipe, "multiview", 1).returned) == 7


def test_a_mix_draws_its_tasks_by_weight_and_nothing_else_changes() -> None:
    mix: dict[Task, float] = {"t2v": 1.0, "prediction": 2.0, "interpolation": 1.0}
    mixed, single = recipe_of(conditioning={"mix": mix, "image_dropout": 0.0}), recipe_of()
    chosen: list[Task] = [tasks.task_of(mixed, number) for number in range(4000)]
    for task, weight in mix.items():
        assert chosen.count(task) / 4000 == pytest.approx(weight / 4, abs=0.03)
    drawn, alone = (draw(recipe, range(200), SHAPE, mask_ratio=0.5) for recipe in (mixed, single))
    assert torch.equal(drawn.noise, alone.noise) and torch.equal(drawn.timestep, alone.timestep)
    for row, task in enumerate(chosen[:200]):
        assert drawn.frame_mask[row].nonzero().flatten().tolist() == GIVEN[task]
    assert [tasks.task_of(single, number) for number in range(9)] == ["t2v"] * 9


def test_the_task_of_a_clip_depends_on_seed_and_number_not_on_the_order_of_the_mix() -> None:
    one = {"ti2v": 1.0, "t2v": 3.0}
    other = {"t2v": 3.0, "ti2v": 1.0}
    first, again, seeded = (
        [tasks.draw_task(mix, seed, number) for number in range(300)]  # pyright: ignore[reportArgumentType]
        for mix, seed in ((one, 0), (other, 0), (one, 1))
    )
    assert first == again and first != seeded


def test_temporal_masking_draws_token_frames_last() -> None:
    recipe = recipe_of("ti2v")
    plain = draw(recipe, range(20), SHAPE, mask_ratio=0.5)
    masked = draw(recipe, range(20), SHAPE, mask_ratio=0.5, temporal_mask_ratio=0.5)
    assert plain.keep_frames is None
    assert masked.keep_frames is not None and masked.keep_frames.shape == (20, FRAMES // 2 // 2)
    assert plain.keep is not None and masked.keep is not None and torch.equal(plain.keep, masked.keep)
    assert torch.equal(plain.noise, masked.noise) and torch.equal(plain.frame_mask, masked.frame_mask)


@pytest.mark.parametrize(
    ("task", "frames"), [("prediction", 5), ("interpolation", 2), ("multiview", 2), ("ti2v", 1), ("upsampling", 1)]
)
def test_a_task_that_leaves_nothing_to_draw_is_refused(task: Task, frames: int) -> None:
    recipe = recipe_of(frames=max(frames, 2), network={"temporal_patch_size": 1})
    recipe = recipe.model_copy(
        update={
            "video": recipe.video.model_copy(update={"num_frames": frames}),
            "network": recipe.network.model_copy(update={"temporal_patch_size": 2}),
            "conditioning": recipe.conditioning.model_copy(update={"prediction_frames": 5}),
        }
    )
    with pytest.raises(ValueError, match=f"task '{task}' gives .* leaves none to draw of video.num_frames {frames}"):
        tasks.given_frames(recipe, task)


def test_a_stage_is_measured_on_what_it_was_trained_for() -> None:
    assert tasks.evaluated(stage("t2i")) == ("t2i",)
    assert tasks.evaluated(stage("t2v")) == ("t2v",)
    assert tasks.evaluated(stage("ti2v")) == ("t2v", "ti2v")
    assert tasks.evaluated(recipe_of("prediction")) == ("prediction",)
    mixed = recipe_of(conditioning={"mix": {"interpolation": 1, "ti2v": 1, "keyframes": 2}})
    assert tasks.evaluated(mixed) == ("t2v", "ti2v", "interpolation", "keyframes")


INPUTS = {
    "t2v": (0,),
    "ti2v": (1,),
    "prediction": (4,),
    "interpolation": (2,),
    "upsampling": (4, 5, 9, 16),
    "multiview": (1,),
    "keyframes": (0, 1),
    "long_video": (0, 1),
}
PLANS = [(task, count) for task, counts in INPUTS.items() for count in counts]


@pytest.mark.parametrize(("task", "count"), PLANS)
def test_a_plan_reads_only_what_is_there_and_returns_every_frame_once(task: str, count: int) -> None:
    recipe = recipe_of()
    planned = tasks.plan(recipe, task, count)
    known = set(range(count))
    for passes in planned.rounds:
        for one in passes:
            assert {place for _, place in one.given} <= known
            given = [frame for frame, _ in one.given]
            wanted = GIVEN["interpolation" if task == "long_video" else task]  # pyright: ignore[reportArgumentType]
            assert given == wanted or (task in ("keyframes", "long_video") and given in ([], [0]))
        written = [place for one in passes for _, place in one.kept]
        assert len(written) == len(set(written)) and not set(written) & known
        known |= set(written)
    assert len(set(planned.returned)) == len(planned.returned) and set(planned.returned) <= known


def test_long_video_is_the_papers_380_frames() -> None:
    recipe = recipe_of(frames=20, video={"num_frames": 20, "keyframe_stride": 20})
    planned = tasks.plan(recipe, "long_video", 0)
    keyframes, segments = planned.rounds
    assert len(planned.returned) == 380 and len(keyframes) == 1 and len(segments) == 19
    assert (keyframes[0].frame_stride, {one.frame_stride for one in segments}) == (20, {1})
    assert keyframes[0].given == () and tasks.plan(recipe, "long_video", 1).rounds[0][0].given == ((0, 0),)
    places = [place for _, place in keyframes[0].kept]
    assert [one.given for one in segments] == [((0, a), (19, b)) for a, b in pairwise(places)]


@pytest.mark.parametrize(("count", "frames"), [(4, 8), (5, 8), (9, 8), (4, 7), (12, 7), (3, 2)])
def test_upsampling_puts_a_frame_after_each_given_one_and_stands_drawn_ones_between_two(
    count: int, frames: int
) -> None:
    recipe = recipe_of(frames=frames, network={"temporal_patch_size": 1})
    planned = tasks.plan(recipe, "upsampling", count)
    film = 2 * count - frames % 2
    assert len(planned.returned) == film
    source = {place: (one, frame) for one in planned.rounds[0] for frame, place in one.kept}
    for at, place in enumerate(planned.returned):
        one, frame = source[place]
        given = dict(one.given)
        if at % 2 == 0:
            assert given[frame] == at // 2
        else:
            neighbours = [given.get(frame - 1), given.get(frame + 1)]
            complete = [at // 2, at // 2 + 1]
            assert neighbours == complete or (neighbours[0] == complete[0] and (at == film - 1 or frames == 2))


def test_multiview_is_drawn_without_text_at_its_own_guidance_against_zero_latents() -> None:
    planned = tasks.plan(recipe_of(), "multiview", 1)
    assert not planned.takes_text
    assert (planned.sampling.guidance_scale, planned.sampling.null_frames) == (3.5, "zeros")
    plain = tasks.plan(recipe_of(), "ti2v", 1)
    assert plain.takes_text and plain.sampling == recipe_of().sampling


@pytest.mark.parametrize(
    ("task", "count", "said"),
    [
        ("v2v", 0, "unknown task 'v2v'; use one of t2i, t2v"),
        ("t2i", 0, "draws 8 frames, so any task but t2i"),
        ("t2v", 1, "takes 0 given frames, not 1"),
        ("ti2v", 0, "takes 1 given frames, not 0"),
        ("prediction", 5, "takes 4 given frames, not 5; its clips have 8 frames"),
        ("interpolation", 1, "takes 2 given frames, not 1"),
        ("upsampling", 3, "takes at least 4 given frames, not 3"),
        ("multiview", 2, "takes 1 given frames, not 2"),
        ("long_video", 2, "takes 0 or 1 given frames, not 2"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_numbers(task: str, count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tasks.plan(recipe_of(), task, count)


def test_an_image_stage_draws_images_only() -> None:
    assert tasks.plan(stage("t2i"), "t2i", 0).returned == (0,)
    with pytest.raises(ValueError, match="draws 1 frames, so only task t2i"):
        tasks.plan(stage("t2i"), "t2v", 0)


def test_what_a_network_cannot_carry_is_refused() -> None:
    attending = recipe_of(network={"image_cross_attention": "linear"}, conditioning={"frame_replacement": False})
    assert tasks.plan(attending, "ti2v", 1).rounds[0][0].given == ((0, 0),)
    with pytest.raises(ValueError, match="frame_replacement = false"):
        tasks.plan(attending, "long_video", 0)
    with pytest.raises(ValueError, match="objective 'diffusion'"):
        tasks.plan(recipe_of(flow={"objective": "diffusion"}), "ti2v", 1)


CLIPS = to_frames([clip.frames for clip in generate(4, num_frames=20, size=32, seed=3)])
"""[4, 20, 3, 32, 32]."""
CODEC = PatchPca.fit(CLIPS, 4, 8)


class Seen:
    """A velocity of zero, so that drawn latents are noise, which notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Conditions]] = []

    def __call__(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        self.calls.append((latents, t, conditions))
        return torch.zeros_like(latents)


def generator_of(recipe: StageRecipe) -> tuple[ClipGenerator, Seen]:
    seen = Seen()
    return ClipGenerator(seen, CODEC, load_text_encoder(recipe.text), recipe), seen


QUICK: dict[str, object] = {"num_steps": 2, "solver": "euler", "stochastic": False, "guidance_scale": 2.0}


def pixels(frames: Tensor) -> np.ndarray:
    """Frames [N, 3, H, W] as the codec gives them back."""
    return to_clips(CODEC.decode(CODEC.encode(frames[None])))[0]


@pytest.mark.parametrize(("task", "count"), PLANS)
def test_a_film_has_the_frames_that_were_given_where_they_belong(task: str, count: int) -> None:
    recipe = recipe_of(sampling=QUICK)
    generator, seen = generator_of(recipe)
    planned = tasks.plan(recipe, task, count)
    given = CLIPS[0, :count]
    steps = list[None]()
    film = generator.film(planned, "a red ball", given, seed=5, on_step=lambda: steps.append(None))
    kept = pixels(given) if count else np.zeros((0, 32, 32, 3), np.uint8)
    assert film.shape == (len(planned.returned), 32, 32, 3) and film.dtype == np.uint8
    assert len(steps) == denoise_steps(planned) == len(seen.calls)
    where = {
        "prediction": [0, 1, 2, 3],
        "interpolation": [0, 7],
        "upsampling": list(range(0, 2 * count, 2)),
    }.get(task, [0] * count)
    for frame, place in enumerate(where):
        assert np.array_equal(film[place], kept[frame]), f"frame {frame} of the user's is not frame {place}"
    drawn = [at for at in range(len(film)) if at not in where]
    assert all((film[at] != one).any() for at in drawn for one in kept)
    again = generator.film(planned, "a red ball", given, seed=5)
    assert np.array_equal(film, again)
    assert not np.array_equal(film, generator.film(planned, "a red ball", given, seed=6))


def test_a_long_video_hands_each_keyframe_to_both_its_segments_and_tells_the_strides() -> None:
    recipe = recipe_of(sampling=QUICK)
    generator, seen = generator_of(recipe)
    film = generator.film(tasks.plan(recipe, "long_video", 1), "a red ball", CLIPS[0, :1])
    assert len(film) == 7 * 8
    for border in range(8, 56, 8):
        assert np.array_equal(film[border - 1], film[border])
    strides = [conditions.micro[:, 4].unique().tolist() for _, _, conditions in seen.calls]
    assert strides == [[5.0]] * 2 + [[1.0]] * 4  # two steps of keyframes, then 4 and 3 segments in two batches
    assert [len(latents) for latents, _, _ in seen.calls] == [2, 2, 8, 8, 6, 6]


def test_multiview_sees_no_text_and_zeros_where_the_view_is_withheld() -> None:
    recipe = recipe_of(sampling=QUICK)
    generator, seen = generator_of(recipe)
    generator.film(tasks.plan(recipe, "multiview", 1), "ignored", CLIPS[0, :1])
    empty = generator.text.encode([""])
    for latents, _, conditions in seen.calls:
        view = CODEC.encode(CLIPS[:1, :1])[0, 0]
        assert torch.equal(latents[0, 0], view) and torch.equal(latents[0, 1], view)
        assert not latents[1, :2].any() and latents[1, 2:].any()
        assert torch.equal(conditions.pooled, empty.pooled.expand(2, -1))


def test_one_clip_drawn_as_a_plan_is_the_clip_drawn_directly() -> None:
    recipe = recipe_of("ti2v", parent="t2v", sampling={**QUICK, "stochastic": True, "solver": "heun"})
    generator, _ = generator_of(recipe)
    image = CLIPS[1, :1]
    direct = generator(["a red ball"], images=image, seed=3)[0]
    assert np.array_equal(generator.film(tasks.plan(recipe, "ti2v", 1), "a red ball", image, seed=3), direct)
    completed = generator.complete(["a red ball"], CLIPS[1:2, :8], "ti2v", seed=3)[0]
    assert np.array_equal(completed, direct)
    blank = generator.film(tasks.plan(recipe, "t2v", 0), "a red ball", seed=3)
    assert np.array_equal(blank, generator(["a red ball"], seed=3)[0])


def test_completing_clips_gives_every_frame_of_the_task() -> None:
    recipe = recipe_of("prediction", sampling=QUICK)
    generator, _ = generator_of(recipe)
    for clip, original in zip(generator.complete(["a", "b"], CLIPS[:2, :8], "prediction"), CLIPS[:2, :8], strict=True):
        assert np.array_equal(clip[:4], pixels(original)[:4]) and (clip[4:] != pixels(original)[4:]).any()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_network_that_attends_to_the_image_gets_it_as_a_condition(replaced: bool) -> None:
    recipe = recipe_of(
        network={"image_cross_attention": "linear"}, conditioning={"frame_replacement": replaced}, sampling=QUICK
    )
    generator, seen = generator_of(recipe)
    generator(["a red ball", "a blue box"], images=CLIPS[:2, 0])
    latents, _, conditions = seen.calls[0]
    image = CODEC.encode(CLIPS[:2, :1])[:, 0]
    assert conditions.image is not None and conditions.image_given is not None
    assert torch.equal(conditions.image[:2], image) and not conditions.image[2:].any()
    assert conditions.image_given.tolist() == [True, True, False, False]
    assert torch.equal(latents[:2, 0], image) is replaced
    generator(["a red ball"])
    given = seen.calls[-1][2].image_given
    assert given is not None and not given.any()


def test_frames_of_another_number_or_size_are_refused() -> None:
    recipe = recipe_of(sampling=QUICK)
    generator, _ = generator_of(recipe)
    planned = tasks.plan(recipe, "interpolation", 2)
    for frames in (None, CLIPS[0, :1], CLIPS[0, :2, :, :16]):
        with pytest.raises(ValueError, match=r"task 'interpolation' takes frames of shape \(2, 3, 32, 32\)"):
            generator.film(planned, "a red ball", frames)


def test_conditions_carry_the_image_through_stacking_rows_and_devices() -> None:
    text = load_text_encoder(stage().text).encode(["a", "b"])
    plain = Conditions.of(text, torch.zeros(2, 6))
    image = torch.randn(2, 4, 2, 2)
    carried = plain.with_image(image, torch.tensor([True, False])).to("cpu")
    assert carried.image is not None and torch.equal(carried.image[0], image[0]) and not carried.image[1].any()
    assert plain.image is None
    dropped = carried.with_image(image, torch.tensor([False, False]))
    assert dropped.image is not None and not dropped.image.any()
    both = Conditions.stack([carried, dropped])
    assert both.image_given is not None and both.image_given.tolist() == [True, False, False, False]
    row = both.rows(slice(0, 1))
    assert row.image is not None and torch.equal(row.image, image[:1])
    with pytest.raises(ValueError, match="1 of 2 conditions carry an image"):
        Conditions.stack([carried, plain])

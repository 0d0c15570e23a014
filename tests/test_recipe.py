"""A recipe that cannot be used says which key, which value and which limit; a good one resolves the same every time."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.catalog import recipe_path
from model.recipe import Curriculum, RecipeError, dumps, load, loads_stage

IMAGES = """
name = "images"
task = "t2i"
network = { hidden_size = 64, depth = 4, num_heads = 4, temporal_patch_size = 1, temporal_attention = false }
video = { num_frames = 1, height = 32, width = 32 }
training = { steps = 10, global_batch_size = 8, micro_batch_size = 4 }
gate = [{ metric = "heldout_loss", op = "<=", bound = 0.9 }]
"""
VIDEOS = """
name = "videos"
task = "t2v"
parent = "images"
network = { hidden_size = 64, depth = 4, num_heads = 4 }
video = { num_frames = 8, height = 32, width = 48 }
training = { steps = 10, global_batch_size = 8, micro_batch_size = 4 }
gate = [{ metric = "heldout_loss", op = "<=", bound = 0.9 }]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A curriculum of two stages that loads."""
    (tmp_path / "images.toml").write_text(IMAGES)
    (tmp_path / "videos.toml").write_text(VIDEOS)
    path = tmp_path / "curriculum.toml"
    path.write_text('name = "small"\nstages = ["images", "videos"]\n')
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_a_good_recipe_loads_with_the_paper_defaults(recipe: Path) -> None:
    stage = load(recipe).stage("videos")
    assert (stage.parent, stage.network.patch_size, stage.optimizer.beta2) == ("images", 2, 0.999)
    assert (stage.training.total_steps, stage.training.gradient_accumulation_steps) == (10, 2)


def test_an_override_reaches_its_stage_only_and_a_star_reaches_all(recipe: Path) -> None:
    curriculum = load(recipe, ["videos.training.steps=25", "*.optimizer.lr=1e-3", "videos.sampling.solver='euler'"])
    assert [stage.training.steps for stage in curriculum.stages] == [10, 25]
    assert [stage.optimizer.lr for stage in curriculum.stages] == [1e-3, 1e-3]
    assert [stage.sampling.solver for stage in curriculum.stages] == ["heun", "euler"]


def test_a_later_override_wins(recipe: Path) -> None:
    assert load(recipe, ["videos.training.steps=25", "*.training.steps=3"]).stage("videos").training.steps == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("videos.training.stpes=100", ["videos.training.stpes", "not permitted"]),
        ("videos.trianing.steps=100", ["videos.trianing", "not permitted"]),
        ("videos.network.num_heads=5", ["videos.network", "hidden_size 64", "num_heads 5"]),
        ("videos.network.num_heads=32", ["hidden_size 64 / num_heads 32 = 2", "multiple of 4"]),
        ("videos.network.unmasked_depth=4", ["unmasked_depth 4", "depth 4"]),
        ("videos.video.height=40", ["video.height 40", "vae.spatial_factor 8", "network.patch_size 2", "16"]),
        ("videos.video.width=30", ["video.width 30", "16"]),
        ("videos.video.num_frames=7", ["video.num_frames 7", "network.temporal_patch_size 2"]),
        ("images.video.num_frames=2", ["t2i", "must be 1, not 2"]),
        ("videos.network.temporal_attention=false", ["t2v", "network.temporal_attention = true"]),
        ("images.temporal_parent='videos'", ["temporal_parent 'videos'", "network.temporal_attention = true"]),
        ("videos.temporal_parent='videos'", ["'videos' takes temporal attention from 'videos'", "['images']"]),
        ("videos.temporal_parent='images'", ["temporal attention from 'images', which has none"]),
        ("videos.training.micro_batch_size=3", ["global_batch_size 8", "micro_batch_size 3", "world_size 1"]),
        ("videos.training.zero_stage=3", ["zero_stage 3", "use zero_stage 2", "optimizer.type 'adamw'"]),
        ("videos.training.zero_stage=7", ["videos.training.zero_stage", "0, 1, 2 or 3"]),
        ("videos.training.steps=0", ["videos.training.steps", "greater than or equal to 1"]),
        ("videos.training.steps='many'", ["videos.training.steps", "valid integer"]),
        ("videos.conditioning.text_dropout=1.5", ["videos.conditioning.text_dropout", "less than or equal to 1"]),
        ("videos.sampling.solver='rk4'", ["videos.sampling.solver", "'euler' or 'heun'"]),
        ("videos.task='v2v'", ["videos.task", "'t2v', 'ti2v', 'prediction'"]),
        ("videos.vae.latent_channels=200", ["vae.latent_channels 200", "192"]),
        ("videos.vae.type='autoencoder_kl'", ["vae.type 'autoencoder_kl' needs vae.path"]),
        ("videos.text.type='clip'", ["text.type 'clip' needs text.path"]),
        ("videos.text={type='t5_clip', path='x'}", ["text.type 't5_clip' needs text.t5_path"]),
        ("videos.gate=[]", ["gate is empty", "[[gate]]"]),
        ("videos.gate=[{metric='loss', op='==', bound=1}]", ["videos.gate.0.op", "'<', '<=', '>' or '>='"]),
        ("videos.parent='imgaes'", ["'videos' grows from 'imgaes'", "['images']"]),
        ("videos.name='images'", ["'images' is named twice"]),
        ("videos.name='Videos 2'", ["name", "^[a-z0-9_]+$"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_key_value_and_limit(
    recipe: Path, override: str, parts: list[str]
) -> None:
    message = refusal(recipe, override)
    assert str(recipe) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("videos.training.steps", ["is not stage.section.key=value"]),
        ("steps=3", ["is not stage.section.key=value"]),
        ("vidoes.training.steps=3", ["no stage 'vidoes'", "['images', 'videos']"]),
        ("videos.sampling.solver=euler", ["'euler' is not a TOML value (quote strings)"]),
        ("videos.training.steps=", ["'' is not a TOML value"]),
        ("videos.task.steps=3", ["'task' is a value, not a section"]),
    ],
)
def test_an_override_that_cannot_be_read_is_refused_with_the_way_out(
    recipe: Path, override: str, parts: list[str]
) -> None:
    message = refusal(recipe, override)
    assert f"override '{override}'" in message
    for part in parts:
        assert part in message


def test_defaults_stand_below_every_stage_and_overrides_above(recipe: Path) -> None:
    defaults = "[defaults.optimizer]\nlr = 1e-3\nbeta1 = 0.5\n[defaults.training]\nsteps = 77\nunmasked_steps = 7\n"
    recipe.write_text(recipe.read_text() + defaults)
    curriculum = load(recipe, ["videos.optimizer.beta1=0.7"])
    assert [stage.optimizer.lr for stage in curriculum.stages] == [1e-3, 1e-3]
    assert [stage.optimizer.beta1 for stage in curriculum.stages] == [0.5, 0.7]
    assert [stage.training.steps for stage in curriculum.stages] == [10, 10]  # the stage's own
    assert [stage.training.unmasked_steps for stage in curriculum.stages] == [7, 7]


def test_a_list_or_table_a_stage_gives_replaces_the_default_whole(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text()
        + "[defaults.data.weights]\nfilmed = 1\ndrawn = 2\n[[defaults.gate]]\nmetric = 'other'\nop = '<'\nbound = 1\n"
    )
    (recipe.parent / "videos.toml").write_text(VIDEOS + "[data.weights]\nchosen = 1\n")
    images, videos = load(recipe).stages
    assert images.data.weights == {"filmed": 1, "drawn": 2}
    assert videos.data.weights == {"chosen": 1}
    assert [rule.metric for rule in images.gate] == ["heldout_loss"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("defaults = 3", "defaults must be a table of sections and keys, not 3"),
        ("[defaults.training]\nstpes = 3", "images.training.stpes: Extra inputs are not permitted"),
        ("[defaults]\nsampling = 3", "videos.sampling: Input should be a valid dictionary"),
    ],
)
def test_a_default_that_cannot_be_is_refused_at_the_stages_that_take_it(recipe: Path, text: str, part: str) -> None:
    recipe.write_text(recipe.read_text() + text)
    assert part in refusal(recipe)


def test_stage_files_may_lie_elsewhere_and_serve_two_sizes(recipe: Path) -> None:
    large = recipe.parent / "large" / "curriculum.toml"
    large.parent.mkdir()
    large.write_text("name = 'large'\nstages = ['../images', '../videos']\n[defaults.optimizer]\nlr = 0.5\n")
    assert [stage.name for stage in load(large).stages] == ["images", "videos"]
    assert (load(large).stages[1].optimizer.lr, load(recipe).stages[1].optimizer.lr) == (0.5, 2e-4)
    assert "videos.training.steps" in refusal(large, "videos.training.steps=0")
    large.write_text("name = 'large'\nstages = ['../vidoes']\n")
    assert "../vidoes.toml: no such recipe file" in refusal(large)


def test_a_parent_is_taken_away_by_an_empty_name(recipe: Path) -> None:
    assert load(recipe, ["videos.parent=''"]).stage("videos").parent is None


def test_every_mistake_of_a_recipe_is_told_at_once(recipe: Path) -> None:
    message = refusal(recipe, "videos.training.stpes=1", "images.optimizer.lr=0")
    assert "videos.training.stpes" in message
    assert "images.optimizer.lr" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "stages must list at least one stage file"),
        ("name = 'small'\nstages = []", "stages must list at least one stage file"),
        ("stages = ['images']", "name: Field required"),
        ("name = 'small'\nstages = ['images', 'vidoes']", "vidoes.toml: no such recipe file"),
        ("name = 'small'\nstages = ['images', 'images']", "'images' is named twice"),
        ("name = 'small'\nstages = ['videos', 'images']", "which is not an earlier stage []"),
        ("name = 'small'\nstages = ['images']\ncolour = 1", "colour: Extra inputs are not permitted"),
        ("name = small", "not valid TOML"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(recipe: Path, text: str, part: str) -> None:
    recipe.write_text(text)
    assert part in refusal(recipe)


def test_a_stage_file_that_is_not_toml_is_named(recipe: Path) -> None:
    broken = recipe.with_name("videos.toml")
    broken.write_text("name = ")
    assert f"{broken}: not valid TOML" in refusal(recipe)


def test_a_recipe_that_is_nowhere_is_refused_with_the_built_in_names() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'tinny' is neither a file nor a built-in curriculum; built in: \["):
        recipe_path("tinny")


def test_a_path_names_itself(recipe: Path) -> None:
    assert recipe_path(str(recipe)) == recipe


def test_an_unknown_stage_is_refused_with_the_known_ones(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"no stage 'video'; it has \['images', 'videos'\]"):
        load(recipe).stage("video")


def test_the_resolved_tree_reads_back_equal(recipe: Path) -> None:
    curriculum = load(recipe)
    assert Curriculum.model_validate_json(dumps(curriculum)) == curriculum
    for stage in curriculum.stages:
        assert loads_stage(dumps(stage)) == stage
        assert dumps(loads_stage(dumps(stage))) == dumps(stage)


def test_a_recipe_cannot_be_changed_after_it_is_read(recipe: Path) -> None:
    stage = load(recipe).stages[0]
    with pytest.raises(ValidationError, match="frozen"):
        stage.training.steps = 5  # pyright: ignore[reportAttributeAccessIssue]

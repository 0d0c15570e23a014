"""The resolved tree of every built-in recipe is committed, so that a changed default shows in the diff; so is the
document of the videos API, so that a change of what clients see does."""

import json

import pytest

from flows.catalog import RECIPES
from infra.serving.http.app import openapi_document
from model.recipe import dumps, load
from tests.conftest import GOLDEN, Golden

CURRICULA = sorted(path.parent.name for path in RECIPES.glob("*/curriculum.toml"))


def resolved() -> dict[str, str]:
    """Name of the golden file -> its text, for every stage of every built-in curriculum."""
    return {
        f"{name}_{stage.name}.json": dumps(stage) + "\n"
        for name in CURRICULA
        for stage in load(RECIPES / name / "curriculum.toml").stages
    }


def test_the_tiny_curriculum_is_built_in() -> None:
    assert "tiny" in CURRICULA


@pytest.mark.parametrize("file_name", sorted(resolved()))
def test_a_built_in_recipe_resolves_to_its_golden_tree(file_name: str, golden: Golden) -> None:
    golden(file_name, resolved()[file_name])


def test_no_golden_tree_is_left_of_a_stage_that_is_gone() -> None:
    prefixes = tuple(f"{name}_" for name in CURRICULA)
    kept = {path.name for path in GOLDEN.glob("*.json") if path.name.startswith(prefixes)}
    assert kept <= resolved().keys()


def test_the_videos_api_is_its_golden_document(golden: Golden) -> None:
    golden("openapi.json", json.dumps(openapi_document(), indent=2, sort_keys=True) + "\n")

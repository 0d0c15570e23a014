"""The built-in recipes and targets by name; it knows where they lie, not what they say."""

from pathlib import Path

from model.recipe import RecipeError

RECIPES = Path(__file__).parent / "recipes"


def recipe_path(name: str) -> Path:
    """A path as given, or the built-in curriculum of that name (`tiny`)."""
    if Path(name).is_file():
        return Path(name)
    built_in = RECIPES / name / "curriculum.toml"
    if built_in.is_file():
        return built_in
    known = sorted(path.parent.name for path in RECIPES.glob("*/curriculum.toml"))
    raise RecipeError(f"recipe '{name}' is neither a file nor a built-in curriculum; built in: {known}")


def target_path(name: str) -> Path:
    """A path as given, or the built-in target of that name (`cpu`)."""
    if Path(name).is_file():
        return Path(name)
    built_in = RECIPES / "targets" / f"{name}.toml"
    if built_in.is_file():
        return built_in
    known = sorted(path.stem for path in (RECIPES / "targets").glob("*.toml"))
    raise ValueError(f"target '{name}' is neither a file nor a built-in target; built in: {known}")


def curation_path(name: str) -> Path:
    """A path as given, or the built-in curation of that name (`film`)."""
    if Path(name).is_file():
        return Path(name)
    built_in = RECIPES / "curate" / f"{name}.toml"
    if built_in.is_file():
        return built_in
    known = sorted(path.stem for path in (RECIPES / "curate").glob("*.toml"))
    raise ValueError(f"curation '{name}' is neither a file nor a built-in one; built in: {known}")

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
    return _file(name, "target", RECIPES / "targets")


def curation_path(name: str) -> Path:
    """A path as given, or the built-in curation of that name (`film`)."""
    return _file(name, "curation", RECIPES / "curate")


def _file(name: str, what: str, folder: Path) -> Path:
    if Path(name).is_file():
        return Path(name)
    built_in = folder / f"{name}.toml"
    if built_in.is_file():
        return built_in
    known = sorted(path.stem for path in folder.glob("*.toml"))
    raise ValueError(f"{what} '{name}' is neither a file nor a built-in {what}; built in: {known}")

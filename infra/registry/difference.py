"""What two artifacts differ in: recipe, figures, data, files, code. It does not say which is better."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, JsonValue

from infra.registry.records import Manifest


class Change(BaseModel):
    """One name and its value on either side; None where that side has none."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    before: JsonValue
    after: JsonValue


class Difference(BaseModel):
    """Everything two artifacts differ in, by subject; an empty subject is the same in both."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    before: str
    after: str
    recipe: tuple[Change, ...]
    metrics: tuple[Change, ...]
    parents: tuple[Change, ...]
    """Data set, codec and the checkpoints it grew from, by digest."""
    files: tuple[Change, ...]
    """By sha256."""
    code: tuple[Change, ...]

    @property
    def subjects(self) -> dict[str, tuple[Change, ...]]:
        return {name: getattr(self, name) for name in ("recipe", "metrics", "parents", "files", "code")}


def difference(before: Manifest, after: Manifest) -> Difference:
    """What `after` has other than `before`."""
    return Difference(
        before=before.digest,
        after=after.digest,
        recipe=_changes(_flat(before.recipe or {}), _flat(after.recipe or {})),
        metrics=_changes(dict(before.metrics), dict(after.metrics)),
        parents=_changes(dict(before.parents), dict(after.parents)),
        files=_changes(
            {name: blob.digest for name, blob in before.files.items()},
            {name: blob.digest for name, blob in after.files.items()},
        ),
        code=_changes(before.code.model_dump(), after.code.model_dump()),
    )


def _changes(before: Mapping[str, JsonValue], after: Mapping[str, JsonValue]) -> tuple[Change, ...]:
    names = sorted(before.keys() | after.keys())
    # repr: NaN is the same figure on both sides, though it equals nothing.
    return tuple(
        Change(name=name, before=before.get(name), after=after.get(name))
        for name in names
        if repr(before.get(name)) != repr(after.get(name))
    )


def _flat(tree: Mapping[str, JsonValue], above: str = "") -> dict[str, JsonValue]:
    """Dotted names to leaves; a list is a leaf."""
    flat: dict[str, JsonValue] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat

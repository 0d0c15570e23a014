"""The registry's commands as a user runs them: compare, draw, audit, clean up, sign, go back."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from infra.registry.records import Manifest
from infra.registry.registry import Registry
from infra.store.artifacts import blob_key
from infra.store.location import open_store
from model.config import GateRule

Stiv = Callable[..., tuple[int, str, str]]
RULES = (GateRule(metric="heldout_loss", op="<", bound=0.5),)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    return Registry(open_store("store"))


@pytest.fixture
def made(registry: Registry, tmp_path: Path) -> list[Manifest]:
    """Data set, codec, and three stages each grown from the one before; the last failed its gate."""

    def publish(kind: str, name: str, parents: dict[str, Manifest], loss: float = 0.4) -> Manifest:
        (tmp_path / name).write_text(f"weights {name}")
        return registry.publish(
            kind,  # pyright: ignore[reportArgumentType]
            {"weights": tmp_path / name},
            rules=RULES,
            recipe={"name": name, "training": {"steps": len(name) * 10}},
            metrics={"heldout_loss": loss},
            parents={role: parent.digest for role, parent in parents.items()},
        )

    data = publish("dataset", "shapes", {})
    codec = publish("codec", "pca", {"dataset": data})
    t2i = publish("checkpoint", "t2i", {"dataset": data, "codec": codec})
    t2v = publish("checkpoint", "t2v", {"dataset": data, "codec": codec, "checkpoint": t2i})
    bad = publish("checkpoint", "bad", {"dataset": data, "codec": codec, "checkpoint": t2v}, loss=0.6)
    return [data, codec, t2i, t2v, bad]


@pytest.fixture
def stiv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: list[Manifest]) -> Stiv:
    for name in ("STIV_TRUST", "STIV_WEBHOOK_URL", "STIV_KEY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("flows.commands.tables.console._width", 200)
    monkeypatch.setattr("flows.commands.registry.getpass.getuser", lambda: "ann")

    def run(*arguments: str) -> tuple[int, str, str]:
        stored = () if arguments[0] == "keygen" else ("--store", "store")
        monkeypatch.setattr("sys.argv", ["stiv", *arguments, *stored])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_an_override_is_seen_in_history_and_in_every_form_of_the_lineage(
    stiv: Stiv, made: list[Manifest], tmp_path: Path
) -> None:
    data, codec, t2i, t2v, bad = made
    assert stiv("promote", t2v.digest, "t2v/promoted", "--why", "good")[0] == 0
    code, _, err = stiv("promote", bad.digest, "t2v/promoted", "--why", "hope")
    assert code == 1 and "heldout_loss = 0.6, must be < 0.5" in err
    assert stiv("promote", bad.digest, "t2v/promoted", "--why", "hope", "--override", "demo <today>")[0] == 0
    code, out, _ = stiv("rollback", "t2v/promoted", "--why", "it draws squares")
    assert code == 0 and t2v.digest in out and "generation 3, back to 1" in out
    code, out, _ = stiv("history", "t2v/promoted")
    assert "demo <today>" in out and "it draws squares (back to 1)" in out
    moves = json.loads(stiv("history", "t2v/promoted", "--json")[1])
    assert [move["override"] for move in moves] == [None, "demo <today>", None]

    text = stiv("lineage", bad.digest)[1]
    for each in made:
        assert each.digest[:16] in text
    assert "GATE OVERRIDDEN t2v/promoted: demo <today> (ann)" in text and "checkpoint: checkpoint t2i" in text
    dot = stiv("lineage", bad.digest, "--form", "dot")[1]
    assert f'"{t2i.digest}" -> "{t2v.digest}" [label="checkpoint"];' in dot
    assert f'"{data.digest}" -> "{codec.digest}" [label="dataset"];' in dot and "GATE OVERRIDDEN" in dot
    assert stiv("lineage", bad.digest, "--form", "html", "--out", "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    picture = re.search(r"<svg.*?</svg>", page, re.S)
    assert picture and "demo &lt;today&gt;" in page and "<today>" not in page
    boxes = ElementTree.fromstring(picture[0]).findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(boxes) == 5 and len({(box.get("x"), box.get("y")) for box in boxes}) == 5
    assert not re.search(r'(src|href)="', page), "it needs nothing from elsewhere"


def test_diff_tells_recipe_figures_data_and_files_apart(stiv: Stiv, made: list[Manifest]) -> None:
    _, _, t2i, t2v, bad = made
    found = json.loads(stiv("diff", t2v.digest, bad.digest, "--json")[1])
    assert found["metrics"] == [{"name": "heldout_loss", "before": 0.4, "after": 0.6}]
    assert {change["name"] for change in found["recipe"]} == {"name"}
    assert [change["name"] for change in found["parents"]] == ["checkpoint"]
    assert [change["name"] for change in found["files"]] == ["weights"] and found["code"] == []
    out = stiv("diff", t2i.digest, bad.digest)[1]
    assert "heldout_loss" in out and "+0.2" in out
    assert "they differ in nothing" in stiv("diff", t2i.digest, t2i.digest)[1]


def test_verify_names_what_is_corrupt_or_missing_and_whom_it_concerns(
    stiv: Stiv, made: list[Manifest], registry: Registry
) -> None:
    _, codec, t2i, t2v, _ = made
    stiv("promote", t2v.digest, "t2v/promoted", "--why", "good")
    code, out, _ = stiv("verify")
    assert code == 0 and "5 artifacts, 5 files" in out and "0 problems" in out
    hurt, lost = (blob_key(each.files["weights"].digest) for each in (codec, t2i))
    registry.store.swap(hurt, b"weights pcb", registry.store.read(hurt).version)
    registry.store.delete(lost)
    code, out, _ = stiv("verify", "t2v/promoted")
    assert code == 1 and f"{hurt}: corrupt" in out and f"{lost}: missing" in out and "2 problems" in out
    assert f"(checkpoint {t2i.digest[:16]}: weights)" in out
    registry.store.delete(f"manifests/{t2i.digest}.json")
    code, out, _ = stiv("verify", "t2v/promoted", "--json")
    keys = [problem["key"] for problem in json.loads(out)["problems"]]
    assert code == 1 and keys == [hurt, f"manifests/{t2i.digest}.json"]
    assert f"missing {t2i.digest[:16]}" in stiv("lineage", "t2v/promoted")[1]


def test_gc_only_says_until_it_is_told_to(stiv: Stiv, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "orphan").write_text("of a publication that broke off")
    registry.store.put_file(tmp_path / "orphan")
    for command, said in (("survey", "`stiv gc mark` writes them down"), ("mark", "in 7 days: `stiv gc sweep`")):
        code, out, _ = stiv("gc", command)
        assert code == 0 and said in out and "nothing was deleted" in out and "31 B" in out
    assert "deleted 0 objects" in stiv("gc", "sweep")[1], "marked this moment"
    assert len(registry.store.list("cas/")) == 6


def test_a_release_is_signed_with_a_new_key_and_promoted_under_its_policy(
    stiv: Stiv, made: list[Manifest], tmp_path: Path
) -> None:
    t2v = made[3]
    code, out, _ = stiv("keygen", "team")
    assert code == 0
    (tmp_path / "trust.toml").write_text(out[out.index("[[signer]]") :])
    promotion = ("promote", t2v.digest, "release/stable", "--why", "shipped")
    assert "no key is trusted here" in stiv(*promotion)[2]
    assert "'team' has not signed it" in stiv(*promotion, "--trust", "trust.toml")[2]
    assert stiv("sign", t2v.digest, "--key", "team.key")[0] == 0
    assert stiv(*promotion, "--trust", "trust.toml")[0] == 0
    code, out, _ = stiv("verify", "release/stable", "--trust", "trust.toml")
    assert code == 0 and "1 signatures" in out
    code, _, err = stiv("export", "release/stable")
    assert code == 1 and "no key is trusted here" in err, "nothing of it is fetched"


def test_what_was_never_evaluated_is_not_promoted_and_told_the_way_out(
    stiv: Stiv, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("weights")
    artifact = registry.publish("checkpoint", {"weights": tmp_path / "weights"}, rules=RULES)
    code, _, err = stiv("promote", artifact.digest, "t2v/promoted", "--why", "new")
    assert code == 1 and "heldout_loss is missing, must be < 0.5; evaluate and publish it anew" in err
    assert registry.refs() == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("history", "t2v/promotd"), "did you mean 't2v/promoted'"),
        (("lineage", "0" * 64), "0" * 64),
        (("promote", "0" * 64, "t2v/promoted", "--why", "x"), "0" * 64),
        (("rollback", "t2v/promoted", "--why", "x"), "nothing before generation 1"),
        (("rollback", "t2v/promoted", "--why", "x", "--to", "9"), "no generation 9; it has [1]"),
        (("events", "deliver"), "set STIV_WEBHOOK_URL and STIV_WEBHOOK_SECRET"),
        (("verify", "nothing/here"), "no ref 'nothing/here'"),
    ],
)
def test_bad_input_is_one_line(stiv: Stiv, made: list[Manifest], arguments: tuple[str, ...], said: str) -> None:
    stiv("promote", made[3].digest, "t2v/promoted", "--why", "good")
    code, _, err = stiv(*arguments)
    assert code == 1 and said in err and err.count("\n") == 1 and "Traceback" not in err

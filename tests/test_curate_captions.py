"""Captions, categories and audits by a server that speaks OpenAI's chat completions, over real HTTP."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.curate.answers import Answer, Desk, answer_all
from infra.curate.captions.captioner import keeps_original
from infra.curate.captions.endpoint import BudgetSpent, Endpoint, Unanswerable
from infra.curate.curation import curate
from infra.curate.dsg import Audit, Auditor, Rates, sentences_of
from infra.curate.items import About
from infra.curate.recipe import CurationRecipe, EndpointConfig
from infra.curate.staging import Row
from model.data.shards import ShardSet
from tests.raw_videos import texture, write_sidecar, write_video
from tests.vision_server import VisionServer, serving

CAPTION = "A red ball rolls. A dog runs after it.\nA cat watches."
OBJECTS = [("red ball", 1), ("dog", 2), ("cat", 3)]


def rule(text: str, pictures: list[np.ndarray]) -> str:
    """A model that sees a ball in red frames, a dog in green ones, and never a cat."""
    if "Answer each question" in text:
        red, green, _ = pictures[0].reshape(-1, 3).mean(axis=0)
        seen = {"red ball": red > 128, "dog": green > 128}
        asked = [name for name, _ in OBJECTS if f"Is there a {name}?" in text]
        return json.dumps({"answers": ["Yes" if seen.get(name) else "no" for name in asked]})
    if "List every concrete object" in text:
        told = [{"object": name, "question": f"Is there a {name}?", "sentence": at} for name, at in OBJECTS]
        return f"```json\n{json.dumps({'objects': told})}\n```"
    if "Which one of these categories" in text:
        return "Animals."
    return CAPTION


@pytest.fixture
def server() -> Iterator[VisionServer]:
    with serving(rule) as running:
        yield running
        for client in running.clients:
            client.close()


def look(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), color, np.uint8)).save(file, "JPEG")
    return file.getvalue()


RED, GREEN, BLUE = look((250, 0, 0)), look((0, 250, 0)), look((0, 0, 250))


def endpoint(server: VisionServer, **changes: object) -> Endpoint:
    made = Endpoint(EndpointConfig.model_validate({"url": server.url, "model": "eye"} | changes), "secret")
    server.clients.append(made)
    return made


def answered(recipe: CurationRecipe, rows: list[Row], path: Path) -> dict[str, Answer]:
    with Desk.of(recipe) as desk:
        return answer_all(desk, rows, lambda _: [RED], path)


def row(number: int, **about: object) -> Row:
    return Row(
        key=f"film-{number:05d}",
        item="film",
        place="/film.mp4",
        digest="0" * 64,
        start_seconds=0,
        end_seconds=1,
        num_frames=10,
        facts={"brightness": 100.0, "motion": 3.0, "orientation": "landscape"},
        about=About.model_validate(about),
        colour="2828c8",
    )


def test_an_object_that_no_frame_shows_is_hallucinated_and_rates_are_the_papers(server: VisionServer) -> None:
    asked = endpoint(server)
    auditor = Auditor(asked, asked, frames=8)
    audit = auditor.audit(CAPTION, [BLUE] * 6 + [RED, GREEN])
    assert (audit.objects, audit.hallucinated) == (("red ball", "dog", "cat"), ("cat",))
    worse = auditor.audit(CAPTION, [RED] * 8)
    assert worse.hallucinated == ("dog", "cat")
    rates = Rates.of([audit, worse])
    assert rates.dsg_video_i == 3 / 6, "hallucinated objects by all objects"
    assert rates.dsg_video_s == 3 / 6, "sentences with a hallucinated object by all sentences"
    assert (rates.captions, rates.objects) == (2, 6)


def test_sentences_with_several_hallucinated_objects_count_once() -> None:
    audit = Audit(sentences=4, objects=("a", "b", "c"), hallucinated=("a", "b"), wrong_sentences=1)
    assert Rates.of([audit]).dsg_video_s == 0.25 and Rates.of([audit]).dsg_video_i == pytest.approx(2 / 3)
    assert Rates.of([]).dsg_video_i == 0.0
    assert sentences_of("A dog, 3.5 years old, sits. It barks!") == ["A dog, 3.5 years old, sits.", "It barks!"]


def test_a_busy_server_is_asked_again_when_it_says_and_every_token_is_counted(server: VisionServer) -> None:
    server.first = [(429, "slow down", {"retry-after": "0.3"}), (503, "restarting", {})]
    asked = endpoint(server, price_in=2.0, price_out=10.0)
    began = time.monotonic()
    assert asked.ask("What is it?", [RED]).startswith("A red ball")
    assert time.monotonic() - began >= 0.3
    assert (asked.bill.requests, asked.bill.retries, asked.bill.tokens_in) == (1, 2, 1000)
    assert asked.bill.cost == pytest.approx((1000 * 2 + 100 * 10) / 1e6)
    assert server.keys == {"Bearer secret"} and len(server.asked) == 3


def test_what_is_wrong_with_the_question_and_with_the_server_are_told_apart(server: VisionServer) -> None:
    asked = endpoint(server, attempts=2)
    server.first = [(400, "too many images", {})]
    with pytest.raises(Unanswerable, match="too many images"):
        asked.ask("?")
    server.first = [(401, "no such key", {})]
    with pytest.raises(ValueError, match="check url, model and key") as wrong:
        asked.ask("?")
    assert "secret" not in str(wrong.value)
    server.first = [(200, "<html>", {})]
    with pytest.raises(Unanswerable, match="not JSON"):
        asked.ask("?")
    server.first = [(500, "", {})] * 2
    with pytest.raises(ConnectionError, match="after 2 attempts"):
        asked.ask("?")


def test_a_rate_limit_spreads_requests(server: VisionServer) -> None:
    asked = endpoint(server, requests_per_minute=600)
    began = time.monotonic()
    for _ in range(4):
        asked.ask("?")
    assert time.monotonic() - began >= 0.3


def captioned(server: VisionServer, **changes: object) -> CurationRecipe:
    told = {"vision": {"url": server.url, "model": "eye", "concurrency": 4, "attempts": 1, "price_in": 1000.0}}
    return CurationRecipe.model_validate({"captions": told | changes})


def test_answers_are_kept_as_they_come_so_that_nothing_is_paid_for_twice(server: VisionServer, tmp_path: Path) -> None:
    recipe, rows = captioned(server), [row(number) for number in range(12)]
    path = tmp_path / "answers.jsonl"
    ball = {"choices": [{"message": {"content": "A ball."}}]}
    server.first = [*([(200, ball, {})] * 3), (500, "", {})]
    with pytest.raises(ConnectionError):
        answered(recipe, rows, path)
    paid = len(path.read_text().splitlines())
    assert 1 <= paid < 12
    before = len(server.asked)
    answers = answered(recipe, rows, path)
    assert len(answers) == 12 and len(server.asked) - before == 12 - paid
    assert server.most_at_once <= 4
    answered(recipe, rows, path)
    assert len(server.asked) - before == 12 - paid


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(server: VisionServer, tmp_path: Path) -> None:
    vision = {"url": server.url, "model": "eye", "concurrency": 1, "price_in": 1000.0, "max_cost": 2.0}
    rows = [row(number) for number in range(5)]
    with pytest.raises(BudgetSpent, match="max_cost 2"):
        answered(captioned(server, vision=vision), rows, tmp_path / "a.jsonl")
    assert len(server.asked) == 2
    answered(captioned(server, vision=vision | {"max_cost": 9.0}), rows, tmp_path / "a.jsonl")
    assert len(server.asked) == 5


def test_original_captions_are_mixed_in_by_share_and_both_are_kept(server: VisionServer, tmp_path: Path) -> None:
    rows = [row(number, caption=f"thing {number}") for number in range(30)]
    answers = answered(captioned(server, original_share=0.5), rows, tmp_path / "a.jsonl")
    originals = {key for key, answer in answers.items() if answer.captioner == "original"}
    assert originals == {each.key for each in rows if keeps_original(each.key, 0.5)}
    assert 5 < len(originals) < 25
    synthetic = next(answer for key, answer in answers.items() if key not in originals)
    assert synthetic.caption.startswith("A red ball") and synthetic.original.startswith("thing")
    offline = Desk.of(CurationRecipe()).answer(row(1), [])
    assert offline.caption == "an evenly lit landscape picture in mostly red tones with slow motion"


def test_a_curation_asks_a_vision_model_and_drops_what_it_makes_up(server: VisionServer, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "one.mp4", texture(12))
    write_video(tmp_path / "videos" / "two.mp4", texture(12, seed=2))
    write_sidecar(tmp_path / "videos" / "one.mp4", caption="a thing")
    asked = {"url": server.url, "model": "eye"}
    told = {
        "origin": {"licence": "CC0", "credit": "nobody"},
        "cut": {"short_side": 32, "min_scene_len": 5},
        "captions": {"vision": asked, "language": asked, "categories": ["animals", "cities"], "frames": 3},
        "audit": {"enabled": True, "max_hallucinated": 1.0},
    }
    lenient = CurationRecipe.model_validate(told)
    results = curate(lenient, str(tmp_path / "videos"), tmp_path / "w1", tmp_path / "out", key="secret")
    facts, _ = ShardSet(tmp_path / "out").stored(0)
    assert facts["caption"] == " ".join(CAPTION.split()) and facts["category"] == "animals"
    assert results.rates()[next(iter(results.rates()))].objects == 6
    assert "DSG-Video" in (tmp_path / "out" / "report.html").read_text()
    captions = [body for body in server.asked if "frames of one short video" in str(body)]
    assert [len(body["messages"][0]["content"]) for body in captions] == [4, 4], "three pictures and the prompt"
    strict = CurationRecipe.model_validate(told | {"audit": {"enabled": True}})
    with pytest.raises(ValueError, match="nothing was kept"):
        curate(strict, str(tmp_path / "videos"), tmp_path / "w2", tmp_path / "out2")
    counts = json.loads((tmp_path / "out2" / "statistics.json").read_text())
    assert counts["segments"] == {"hallucinated": 2}

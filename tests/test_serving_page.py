"""The web page in headless Chromium: a video is made by keyboard alone, watched, and deleted."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.tiny_server import KEY, Running, serving, tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WAIT_MS = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt-get install chromium` brings it")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), tiny_pipeline()) as server:
        yield server


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1200, "height": 860}
        )
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        yield page
        context.close()


def test_the_page_makes_a_video_by_keyboard_alone(running: Running, page: Page, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.goto(running.url)
    expect(page.get_by_role("dialog")).to_be_visible()  # this server asks for a key
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("stiv-tiny · ready")

    page.keyboard.press("Tab")  # the page is its own tab order: skip link, key, prompt
    for _ in range(6):
        if page.evaluate("document.activeElement.id") == "prompt":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("a red circle moves right")
    page.keyboard.press("Control+Enter")
    card = page.locator("#gallery .card").first
    expect(card.locator(".prompt")).to_have_text("a red circle moves right")
    expect(card.locator("video")).to_be_visible()
    card.locator("video").evaluate("video => { video.muted = true; return video.play(); }")
    assert card.locator("video").evaluate("video => video.videoWidth") == 32
    page.get_by_text("The same from your own code").click()
    expect(page.locator("#snippet")).to_contain_text('prompt="a red circle moves right"')
    page.get_by_role("tab", name="Python").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#snippet")).to_contain_text("curl http")
    page.screenshot(path=tmp_path / "page.png")

    card.get_by_role("button", name="Delete").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#gallery .card")).to_have_count(0)
    assert not errors


def test_the_page_says_what_is_wrong_beside_the_field(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_text("Size, length and sampling").click()
    page.get_by_label("Size", exact=True).fill("33x32")
    page.get_by_role("button", name="Create video").click()
    expect(page.locator("#problem")).to_contain_text("nearest is '32x32'")
    expect(page.get_by_label("Size", exact=True)).to_be_focused()


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, a")].filter(it =>
            !it.labels?.length && !it.textContent.trim() && !it.getAttribute("aria-label")).map(it => it.id)"""
    )
    assert unnamed == []

"""The page in a real browser, before `lcm-jax serve` with the bundled model: what a visitor sees."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lcm_jax.bench.serving import serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'lcm-jax[test]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: none of {', '.join(NAMES)} is on the PATH"),
]
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SECONDS = 120.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server, which has to end in peace when it is told to."""
    with serving(JAX_PLATFORMS="cpu") as server:
        yield server.address
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert server.process.stdout.read().endswith("stopped\n")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS, *CAMERA])
        yield chromium
        chromium.close()


class Visitor:
    """One page, what its console said and whom it asked."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | options))
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.on("websocket", lambda socket: self.asked.add(socket.url))
        self.page.goto(address)
        self.until(lambda: self.text("status-text") == "Streaming" and self.text("fps") not in ("–", "0.0"))

    def text(self, name: str) -> str:
        return str(self.page.text_content(f"#{name}"))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.text("status-text"), self.said)
            self.page.wait_for_timeout(100)

    def picture(self, name: str = "output") -> str:
        """Of what a canvas shows."""
        data = self.page.evaluate(f"document.getElementById('{name}').toDataURL()")
        return hashlib.sha256(data.encode()).hexdigest()

    def settled(self, *others: str) -> str:
        """The picture when it is none of these and has not changed for a while."""
        self.until(lambda: self.picture() not in others)
        last, since = self.picture(), time.monotonic()
        while time.monotonic() - since < 3.0:
            self.page.wait_for_timeout(200)
            if (now := self.picture()) != last:
                last, since = now, time.monotonic()
        assert last not in others
        return last

    def back_at(self, picture: str) -> None:
        """Wait for a picture that has been seen before."""
        self.until(lambda: self.picture() == picture)
        assert self.settled() == picture

    def stroke(self) -> None:
        box = self.page.locator("#source").bounding_box()
        self.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
        self.page.mouse.up()


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Open a page. In the end its console has been silent, and it has asked nobody but the server."""
    visitors: list[Visitor] = []
    with ExitStack() as stack:

        def visit(**options: Any) -> Visitor:
            visitors.append(Visitor(browser, address, **options))
            stack.callback(visitors[-1].context.close)
            return visitors[-1]

        yield visit
        for i, visitor in enumerate(visitors):
            visitor.page.screenshot(path=tmp_path / f"{request.node.name}-{i}.png", full_page=True)
            assert visitor.said == []
            hosts = {urlsplit(url).netloc for url in visitor.asked if not url.startswith(("blob:", "data:"))}
            assert hosts == {urlsplit(address).netloc}


def test_it_streams_at_once(visit: Any) -> None:
    visitor = visit()
    assert visitor.text("model") == "openmoji"
    assert float(visitor.text("fps")) > 0
    visitor.until(lambda: "ms" in visitor.text("latency"))
    blank = "(c => { c.width = 512; c.height = 512; return c.toDataURL() })(document.createElement('canvas'))"
    assert visitor.picture() != hashlib.sha256(visitor.page.evaluate(blank).encode()).hexdigest()


def test_drawing_changes_the_picture_and_undo_brings_it_back(visit: Any) -> None:
    visitor = visit()
    drawn, before = visitor.picture("source"), visitor.settled()
    visitor.stroke()
    assert visitor.picture("source") != drawn
    after = visitor.settled(before)
    visitor.page.click("#undo")
    visitor.back_at(before)
    visitor.page.click("#clear")
    visitor.settled(before, after)


def test_prompts_change_the_picture_live(visit: Any) -> None:
    visitor = visit()
    before = visitor.settled()
    visitor.page.fill(".prompt .text", "red heart")
    changed = visitor.settled(before)
    visitor.page.click("#add-prompt")
    visitor.page.keyboard.type("cat face")
    visitor.settled(before, changed)
    visitor.page.locator(".prompt [type=range]").first.fill("0")  # the second alone
    visitor.back_at(before)
    visitor.page.locator(".remove").last.click()
    visitor.back_at(changed)


def test_the_camera_streams(visit: Any) -> None:
    visitor = visit()
    visitor.page.get_by_label("Camera").check(force=True)
    pictures = set()
    visitor.until(lambda: pictures.add(visitor.picture()) or len(pictures) > 6)
    assert visitor.text("status-text") == "Streaming"
    visitor.page.get_by_label("Draw", exact=True).check(force=True)
    visitor.settled()


def test_a_picture_file_streams(visit: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    (tmp_path / "no.png").write_text("no picture")
    visitor = visit()
    before = visitor.settled()
    visitor.page.set_input_files("#file", tmp_path / "red.png")
    visitor.settled(before)
    assert visitor.page.is_checked("[value=picture]")
    visitor.page.set_input_files("#file", tmp_path / "no.png")
    visitor.until(lambda: "no.png is no picture" in visitor.text("status-text"))


def test_controls_work_from_the_keyboard(visit: Any) -> None:
    visitor = visit()
    before = visitor.settled()
    visitor.page.get_by_label("Strength").focus()
    for _ in range(25):
        visitor.page.keyboard.press("ArrowRight")
    assert visitor.page.get_by_label("Strength").input_value() == "0.85"
    after = visitor.settled(before)
    visitor.page.get_by_label("Seed").fill("7")
    visitor.settled(before, after)
    visitor.page.keyboard.press("Tab")
    assert visitor.page.evaluate("document.activeElement.id") == "dice"
    nameless = "e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()"
    names = f"[...document.querySelectorAll('input, select, button')].filter({nameless}).map(e => e.outerHTML)"
    assert visitor.page.evaluate(names) == []  # everything has a name to be read out


def test_two_pages_do_not_mix(visit: Any) -> None:
    first, second = visit(), visit()
    before = first.settled()
    second.back_at(before)  # the same drawing, prompt and seed
    second.page.fill(".prompt .text", "red heart")
    second.stroke()
    second.page.get_by_label("Camera").check(force=True)
    second.until(lambda: second.picture() != before)
    first.stroke()
    first.until(lambda: first.picture() != before)
    first.page.click("#undo")  # so that its picture is made anew, beside the other's
    first.back_at(before)


def test_what_is_shown_can_be_kept(visit: Any, tmp_path: Path) -> None:
    from PIL import Image

    visitor = visit()
    with visitor.page.expect_download() as saving:
        visitor.page.click("#save")
    saving.value.save_as(tmp_path / "own.png")
    assert Image.open(tmp_path / "own.png").size == (512, 512)
    visitor.page.click("#record")
    visitor.until(lambda: visitor.text("record-text") == "Stop at 0:02")
    with visitor.page.expect_download() as recording:
        visitor.page.click("#record")
    recording.value.save_as(tmp_path / "own.video")
    assert (tmp_path / "own.video").stat().st_size > 1000
    assert recording.value.suggested_filename.endswith((".mp4", ".webm"))


@pytest.mark.parametrize("width", [360, 390, 768, 1024, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(visit: Any, width: int, scheme: str) -> None:
    visitor = visit(viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    overflowing = (
        "[...document.querySelectorAll('figcaption, .row, .numbers')].filter(e => e.scrollWidth > e.clientWidth)"
    )
    assert visitor.page.evaluate(f"{overflowing}.map(e => e.outerHTML)") == []
    ground = visitor.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")
    boxes = [visitor.page.locator(f"#{name}").bounding_box() for name in ("source", "output")]
    assert boxes[0]["width"] == boxes[1]["width"] > 0.3 * min(width, 1000)
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 680)  # side by side, or under each other

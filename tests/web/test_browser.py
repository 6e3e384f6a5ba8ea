"""The dashboard of a live swarm in a real Chromium: rounds rise and the loss falls before one's eyes.

The pictures stay in pytest's temporary folder, for people to look at.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peer.swarm import Swarm, free_port, make_run

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SIZES = {1280: 900, 390: 844}
# Keeps what the page says of the newest round whenever something on it changes.
WATCH = """() => {
  const text = (place) => document.querySelector(place).textContent;
  window.seen = [];
  const note = () => window.seen.push([text("#round"), text("#loss")]);
  const what = { subtree: true, childList: true, characterData: true };
  new MutationObserver(note).observe(document.querySelector("main"), what);
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.net,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Reader:
    """One open page, and what went wrong in it."""

    def __init__(self, browser: Browser, url: str, width: int, scheme: str) -> None:
        self.name, self.wrong = f"{width}-{scheme}", list[str]()
        context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme)  # type: ignore[arg-type]  # it is light or dark
        self.page: Page = context.new_page()
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(request.url))
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        # It is gone when somebody loads the page anew.
        self.page.evaluate(WATCH)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def seen(self) -> list[tuple[float, float]]:
        """Each round and loss that stood on the page together, in this order; a busy reader misses some of them."""
        return [(float(round), float(loss)) for round, loss in self.page.evaluate("window.seen") if loss[:1].isdigit()]

    def wait_complete(self) -> None:
        """Wait until the page says that the run is."""
        self._wait_until(lambda: self.page.inner_text("#link") == "complete")

    def _wait_until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Look again and again: the page's own policy lets nobody evaluate a condition in it."""
        end_s = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end_s, f"{self.name}: waited in vain; it shows\n{self.page.inner_text('main')}"
            self.page.wait_for_timeout(100)


def test_a_live_swarm(browser: Browser, tmp_path: Path) -> None:
    run, port = make_run(tmp_path, rounds=14, steps=8), free_port()
    with Swarm(tmp_path, run) as swarm:
        url = f"http://127.0.0.1:{port}"
        aggregator = swarm.start("aggregator", "aggregate", str(run), "--dashboard", url.removeprefix("http://"))
        assert aggregator.wait_event("dashboard ready")["url"] == url
        readers = [Reader(browser, url, width, scheme) for width in SIZES for scheme in ("light", "dark")]
        peers = [swarm.peer(name) for name in ("one", "two")]
        aggregator.wait_event("run complete", 90)
        for reader in readers:
            reader.wait_complete()
            check(reader, url, rounds=14)
            rounds, losses = zip(*reader.seen(), strict=True)
            assert len(set(rounds)) >= 3 and list(rounds) == sorted(rounds), rounds
            assert losses[-1] < losses[0] - 0.3, losses
            reader.page.screenshot(path=tmp_path / f"{reader.name}.png", full_page=True)
        for peer in peers:
            peer.wait_end(60)


def check(reader: Reader, url: str, rounds: int) -> None:
    """What is true of the page of a run of two peers that is complete."""
    page = reader.page
    assert reader.wrong == []
    assert all(asked.startswith(url + "/") for asked in reader.asked), reader.asked
    assert page.inner_text("#round") == str(rounds) and page.inner_text("#peers") == "2"
    assert page.locator("#map tr").count() == 3 and page.locator("#peer-table tbody tr").count() == 2
    assert page.locator("#rounds tbody tr").count() == rounds
    assert page.locator("canvas").count() == 4, "each chart is drawn"
    assert page.is_hidden("#alarms") and page.is_hidden("#amendments")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(part) for part in background[4:-1].split(",")) < 3 * 128
    assert dark == reader.name.endswith("dark")
    assert page.evaluate(INK) > 4.5, "the quietest text can be read"


# The contrast of quiet text on a card, by WCAG 2.
INK = """() => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const ink = light(getComputedStyle(document.querySelector("#round-note")).color);
  const card = light(getComputedStyle(document.querySelector(".tiles > div")).backgroundColor);
  return (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05);
}"""

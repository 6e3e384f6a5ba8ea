"""The dashboard over real HTTP, beside a ledger that grows."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peer.errors import UserCode, UserError
from peer.journal import RecordRow
from peer.web import server
from peer.web.board import Live, Loss
from peer.web.server import Address, dashboard, show
from protocol.errors import Code
from protocol.ledger import CloseReason, Verdict
from tests.peer.swarm import free_port, run_cli
from tests.peer.test_audit import Maker
from tests.web.ledger import close_round, entry

pytestmark = pytest.mark.net

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
STATIC = Path(server.__file__).parent / "static"
LIVE = Live(True, 3, 3, 20.0, Loss(2, 2.0), 1.0)


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path / "run")
    close_round(maker, 1, entries=(entry(1, 1), entry(2, 1)), reason=CloseReason.COMPLETE)
    close_round(maker, 2, entries=(entry(1, 2), entry(2, 2, Verdict.LATE, Code.LATE)), loss=2.5)
    yield maker
    maker.store.close()


@asynccontextmanager
async def served(maker: Maker, live: Live = LIVE) -> AsyncGenerator[aiohttp.ClientSession, None]:
    async with (
        asyncio.timeout(60),
        dashboard(Address(port=0), maker.store.path, lambda: live) as url,
        aiohttp.ClientSession(url) as session,
    ):
        await until(session, "/status.json", 200)
        yield session


async def status(session: aiohttp.ClientSession, path: str, method: str = "GET") -> int:
    async with session.request(method, path) as answer:
        return answer.status


async def until(session: aiohttp.ClientSession, path: str, wanted: int) -> None:
    while await status(session, path) != wanted:  # noqa: ASYNC110 - HTTP knows no other way
        await asyncio.sleep(0.05)


async def told(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The messages of an event stream."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


async def figures(session: aiohttp.ClientSession) -> dict[str, dict[tuple[str, ...], float]]:
    text = await (await session.get("/metrics")).text()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


async def test_pages_and_their_headers(maker: Maker) -> None:
    async with served(maker) as session:
        page = await session.get("/")
        assert page.status == 200 and page.content_type == "text/html"
        for path in re.findall(r'(?:src|href)="([^"]+)"', await page.text()):
            assert not path.startswith(("http", "/", "#")), "the page works below any path and asks no other server"
            assert await status(session, "/" + path) == 200, path
        for path in ("/", "/events", "/metrics", "/status.json", "/healthz", "/static/page.js", "/nothing"):
            async with session.get(path) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert await (await session.get("/healthz")).text() == "ok\n"


@pytest.mark.parametrize(
    "path", ["/static/", "/static/%2e%2e/server.py", "/static/../board.py", "/static/vendor/uPlot.LICENSE", "/run.bin"]
)
async def test_nothing_else_is_served(maker: Maker, path: str) -> None:
    async with served(maker) as session:
        assert await status(session, path) == 404
        assert await status(session, "/status.json", "POST") == 405


async def test_news_come_without_asking(maker: Maker) -> None:
    async with served(maker) as session, session.get("/events") as response:
        messages = told(response)
        first = await anext(messages)
        assert first["fresh"] and [round["round"] for round in first["rounds"]] == [1, 2]
        assert first["losses"] == [[1, 2.5]] and first["now"]["newest"]["loss"] == 2.0
        close_round(maker, 3, entries=(entry(2, 3),), reason=CloseReason.GRACE, loss=1.5)
        second = await anext(messages)
        assert not second["fresh"] and [round["reason"] for round in second["rounds"]] == ["grace"]
        assert second["losses"] == [[2, 1.5]] and second["now"]["head"] == 3


async def test_too_many_readers(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STREAMS_MAX", 2)
    async with served(maker) as session:
        async with session.get("/events") as first:
            assert first.status == 200
            async with session.get("/events") as second:
                assert second.status == 200
                assert await status(session, "/events") == 503
        await until(session, "/events", 200)


async def test_the_metrics_are_those_of_the_document(maker: Maker) -> None:
    documented = set(re.findall(r"^\| `(sparseloco_\w+)`", DOCS.read_text("utf-8"), re.MULTILINE))
    async with served(maker) as session:
        found = await figures(session)
    ours = {name for name in found if name.startswith("sparseloco_")}
    # The packets of this ledger were never made, so nobody knows how many bytes they had.
    assert documented - ours == {"sparseloco_packet_bytes", "sparseloco_download_bytes"}
    assert ours <= documented
    assert found["sparseloco_round"] == {(): 2.0}
    assert found["sparseloco_packets_total"] == {("accepted",): 3.0, ("late",): 1.0, ("refused",): 0.0}
    assert found["sparseloco_refused_total"] == {("SL319",): 1.0}
    assert found["sparseloco_rounds_total"] == {("applied", "complete"): 1.0, ("applied", "deadline"): 1.0}
    assert found["sparseloco_run_info"].keys() == {("small", maker.run.run_id.hex(), "0.1.0")}
    assert found["sparseloco_alarm"] == {("divergence",): 0.0, ("unguarded",): 0.0, ("stale_head",): 0.0}
    assert found["sparseloco_validation_bits_per_byte"][()] == pytest.approx(2.0 / 0.6931472)
    assert found["sparseloco_validation_perplexity"][()] == pytest.approx(7.389056)
    assert found["process_cpu_seconds_total"][()] > 0


async def test_a_copy_has_fewer_metrics(maker: Maker) -> None:
    async with served(maker, Live()) as session:
        found = await figures(session)
    assert found["sparseloco_leading"] == {(): 0.0}
    missing = {"sparseloco_open_round", "sparseloco_peers_connected", "sparseloco_validation_bits_per_byte"}
    assert not missing & found.keys()


async def test_a_damaged_ledger_is_not_healthy(maker: Maker) -> None:
    async with served(maker) as session:
        maker.store.journal.close_round(RecordRow(3, bytes(32), bytes(32), bytes(32), b"garbage"), {})
        await until(session, "/healthz", 503)
        assert await status(session, "/status.json") == 200, "what was read is still shown"


async def test_the_port_that_was_asked_for_is_taken(maker: Maker) -> None:
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        with pytest.raises(UserError) as failed:
            async with dashboard(Address.parse(f"127.0.0.1:{port}", "--dashboard"), maker.store.path, Live):
                pass
        assert failed.value.code == UserCode.PORT_IN_USE
        async with dashboard(Address(port=port), maker.store.path, Live) as url:
            assert url.startswith("http://127.0.0.1:") and not url.endswith(f":{port}")
    finally:
        listener.close()
        await listener.wait_closed()


async def test_a_folder_is_shown_until_it_is_enough(maker: Maker, tmp_path: Path) -> None:
    stop, port = asyncio.Event(), free_port()
    address = Address.parse(f"127.0.0.1:{port}", "--listen")
    showing = asyncio.create_task(show(tmp_path, address, stop))
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{port}/status.json") as answer:
                    if answer.status == 200:
                        assert (await answer.json())["run"]["name"] == "small"
                        break
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)
        stop.set()
        await showing


@pytest.mark.parametrize("argument", ["nonsense", "127.0.0.1:99999", "host:0"])
def test_an_address_that_cannot_be_meant(argument: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an address"):
        Address.parse(argument, "--dashboard")


def test_bad_input_on_the_command_line(tmp_path: Path) -> None:
    shown = run_cli("dashboard", str(tmp_path))
    assert shown.returncode == 1 and "no ledger" in shown.stderr and "try:" in shown.stderr


def test_foreign_words_are_never_html() -> None:
    for name in ("page.js", "charts.js"):
        text = (STATIC / name).read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|style=|https?://", page)

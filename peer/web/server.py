"""The dashboard over HTTP, in the event loop of the program whose run it shows.

It only reads, and only from this machine unless it is told to listen elsewhere. Whoever looks costs the aggregator
little: files are read by one thread, pages lie in memory, and a reader who is slow or absent holds up nobody.
"""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from peer.errors import UserCode, UserError
from peer.net.errors import LinkError
from peer.net.tls import split_address
from peer.web.board import Board, Live, View, known_bytes_per_token, newest_store
from peer.web.messages import message
from peer.web.metrics import Figures, Reading
from protocol.errors import ProtocolError

log = structlog.get_logger()

HOST, PORT = "127.0.0.1", 7780
LOOK_S = 1.0
HEARTBEAT_S = 15.0  # below the patience of proxies
STREAMS_MAX = 256
LEAVE_S = 1.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Address:
    """Where to listen. The default port gives way to any free one; a port that was asked for does not."""

    host: str = HOST
    port: int = PORT
    asked: bool = False

    @classmethod
    def parse(cls, text: str, option: str) -> "Address":
        """Read "host:port", as this option of the command line has it. Raises UserError BAD_ARGUMENT."""
        try:
            return cls(*split_address(text), asked=True)
        except LinkError as error:
            raise UserError(UserCode.BAD_ARGUMENT, error.reason, f"write {option} HOST:PORT") from error


class _Reader:
    """The board in the one thread that may use it, opened at the first use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._board: Board | None = None
        self._executor = ThreadPoolExecutor(1, "dashboard")

    async def read(self) -> View | None:
        """Read on. Raises UserError or ProtocolError."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._read)

    def _read(self) -> View | None:
        self._board = self._board or Board(self._path)
        return self._board.read()

    def close(self) -> None:
        """Let the thread end."""
        self._executor.submit(self._close)
        self._executor.shutdown(wait=False)

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()


class Dashboard:
    """The handlers, and the newest view that they answer from."""

    def __init__(self, path: Path, live: Callable[[], Live]) -> None:
        """`path` is the folder of the ledger; `live` is asked in the event loop for what memory alone knows."""
        self._path, self._live = path, live
        self._view: View | None = None
        self._healthy = True
        self._changed = asyncio.Event()
        self._closing = False
        self._streams = 0
        self._figures = Figures(self._reading)

    def application(self) -> web.Application:
        """The pages by their paths."""
        application = web.Application()
        application.on_response_prepare.append(_add_headers)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/healthz", self._health)
        application.router.add_get("/status.json", self._status)
        application.router.add_get("/events", self._events)
        static = files("peer.web") / "static"
        # What is not in this list does not exist, whatever a path looks like.
        for name in (
            "index.html",
            "style.css",
            "page.js",
            "charts.js",
            "icon.svg",
            "vendor/uPlot.iife.min.js",
            "vendor/uPlot.min.css",
        ):
            place = "/" if name == "index.html" else f"/static/{name}"
            body, suffix = static.joinpath(name).read_bytes(), Path(name).suffix
            application.router.add_get(place, _page(body, TYPES[suffix]))
        return application

    # The newest view

    async def follow(self) -> None:
        """Read the ledger whenever it has grown, until cancelled."""
        reader, told = _Reader(self._path), None
        try:
            while True:
                try:
                    self._view = await reader.read()
                    news = self._news()
                    self._healthy = True
                except (UserError, ProtocolError, OSError) as error:
                    if self._healthy:
                        log.warning("the dashboard cannot read the ledger", why=str(error))
                    self._healthy, news = False, told
                if news != told:
                    told = news
                    self._tell()
                behind = self._healthy and self._view is not None and self._view.behind
                await asyncio.sleep(0 if behind else LOOK_S)
        finally:
            reader.close()

    def _news(self) -> dict[str, Any] | None:
        """What has to differ for readers to be told; clocks go on by themselves."""
        reading = self._reading()
        if reading is None:
            return None
        told: dict[str, Any] = message(*reading[:3], since=reading[0])["now"]
        alarms = [alarm["name"] for alarm in told["alarms"]]
        return {**told, "branch": reading[0].branch, "time_ms": 0, "closes_in_s": 0, "alarms": alarms}

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _reading(self) -> Reading | None:
        if self._view is None:
            return None
        return self._view, self._live(), time.time_ns() // 1_000_000, shutil.disk_usage(self._path).free

    # What browsers and Prometheus ask for

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._figures.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(
            text="ok\n" if self._healthy else "cannot read the ledger\n", status=200 if self._healthy else 503
        )

    async def _status(self, _request: web.Request) -> web.Response:
        reading = self._reading()
        if reading is None:
            return web.json_response({}, status=503)
        response = web.json_response(message(*reading[:3], since=None))
        response.enable_compression()
        return response

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Everything at once, and then what changes, until one side leaves."""
        if self._streams >= STREAMS_MAX:
            return web.Response(text="too many readers\n", status=503)
        headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        self._streams += 1
        try:
            await response.prepare(request)
            await self._stream(response)
        except ConnectionError:
            pass  # the reader has gone
        finally:
            self._streams -= 1
        return response

    async def _stream(self, response: web.StreamResponse) -> None:
        since: View | None = None
        while not self._closing:
            changed, reading = self._changed, self._reading()
            if reading is not None:
                text = json.dumps(message(*reading[:3], since=since), separators=(",", ":"))
                await response.write(f"data: {text}\n\n".encode())
                since = reading[0]
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
                except TimeoutError:
                    await response.write(b": still here\n\n")

    async def close(self, _application: web.Application) -> None:
        """End the streams, so that nobody is waited for."""
        self._closing = True
        self._tell()


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _page(body: bytes, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def page(_request: web.Request) -> web.Response:
        response = web.Response(body=body, content_type=kind, charset="utf-8")
        response.enable_compression()
        return response

    return page


@asynccontextmanager
async def dashboard(address: Address, path: Path, live: Callable[[], Live]) -> AsyncGenerator[str, None]:
    """Serve the dashboard of a ledger while the block runs; gives its URL. Raises UserError PORT_IN_USE."""
    program = Dashboard(path, live)
    application = program.application()
    application.on_shutdown.append(program.close)
    # A stream whose reader has gone ends at once, not at the next heartbeat.
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=LEAVE_S, handler_cancellation=True)
    await runner.setup()
    following = asyncio.create_task(program.follow())
    try:
        await _listen(runner, address)
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("dashboard ready", url=url)
        yield url
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await runner.cleanup()


async def _listen(runner: web.AppRunner, address: Address) -> None:
    try:
        await web.TCPSite(runner, address.host, address.port).start()
    except (OSError, socket.gaierror) as error:
        if not address.asked:
            await web.TCPSite(runner, address.host, 0).start()
            return
        raise UserError(
            UserCode.PORT_IN_USE,
            f"the dashboard cannot listen on {address.host}:{address.port} ({error})",
            "name another address, or leave it away: then any free port of this machine is taken",
        ) from error


async def show(folder: Path, address: Address, stop: asyncio.Event) -> None:
    """Serve the dashboard of the furthest ledger in a folder until `stop`. Raises UserError."""
    path = newest_store(folder)
    board = Board(path)  # a folder that cannot be shown says so at once
    run = board.run
    board.close()
    live = Live(bytes_per_token=known_bytes_per_token(run))
    async with dashboard(address, path, lambda: live):
        await stop.wait()

"""What the tests of this room share: an aggregator's handler that remembers what happened, and ways to hurt a link."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer.net.link import Link
from peer.net.messages import Amended, ReceiptMsg, RoundOpened, WatchEvent
from peer.net.service import Server, ServiceLimits, serve
from peer.net.throttle import Traffic
from peer.net.tls import TlsIdentity, make_tls_identity
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

RUN = bytes(range(32))
ROOT = bytes(reversed(range(32)))
TLS = make_tls_identity()
AGGREGATOR = PrivateKey.from_bytes(b"a" * 32)
HEAD = b"the head record"


@dataclass
class House:
    """A handler that keeps everything in memory, and a log of who came and went."""

    submit_bytes_max: int = 16 << 20
    log: list[tuple[str, bytes]] = field(default_factory=list)
    packets: dict[bytes, bytes] = field(default_factory=dict)
    forms: list[type] = field(default_factory=list)
    blobs: dict[tuple[str, bytes], bytes | Path] = field(default_factory=dict)
    events: asyncio.Queue[WatchEvent] = field(default_factory=asyncio.Queue)
    gate: asyncio.Event | None = None
    standby: bool = False
    shown_to_us: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    amendments: list[bytes] = field(default_factory=list)

    async def welcome(self, peer: bytes) -> bytes:
        return HEAD

    async def joined(self, peer: bytes) -> None:
        self.log.append(("joined", peer))

    async def left(self, peer: bytes) -> None:
        self.log.append(("left", peer))

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        self.shown_to_us.append((peer, record, ad))

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        yield RoundOpened(7, ROOT, 15, 2.5)
        while True:
            yield await self.events.get()

    def observe(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        return self.watch(peer)

    async def receipt(self, peer: bytes, digest: bytes) -> ReceiptMsg | None:
        return ReceiptMsg(digest, True, 0) if digest in self.packets else None

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        if self.gate is not None:
            await self.gate.wait()
        self.forms.append(type(data))
        self.packets[digest] = data if isinstance(data, bytes) else await asyncio.to_thread(data.read_bytes)
        return ReceiptMsg(digest, True, 0)

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        return self.blobs.get((kind, digest))

    async def amend(self, peer: bytes, data: bytes) -> Amended:
        if data == b"bad":
            raise ProtocolError(Code.BAD_AMENDMENT, "it is not signed by the operator")
        self.amendments += [data] if data else []
        return Amended(ROOT if self.amendments else bytes(32), 7)


@asynccontextmanager
async def serving(
    house: House,
    spool: Path,
    limits: ServiceLimits | None = None,
    tls: TlsIdentity | None = TLS,
    traffic: Traffic | None = None,
) -> AsyncIterator[Server]:
    server = await serve(
        house,
        host="127.0.0.1",
        port=0,
        key=AGGREGATOR,
        run_id=RUN,
        tls=tls,
        spool=spool,
        limits=limits or ServiceLimits(),
        traffic=traffic,
    )
    try:
        yield server
    finally:
        await server.close(0.5)


async def join(
    port: int,
    key: PrivateKey | None = None,
    *,
    run_id: bytes = RUN,
    certificate_sha256: bytes | None = TLS.fingerprint,
    plaintext: bool = False,
    silence_s: float = 15.0,
    timeout_s: float = 10.0,
) -> Link:
    return await Link.open(
        f"127.0.0.1:{port}",
        run_id=run_id,
        key=key or PrivateKey.generate(),
        expect_aggregators={AGGREGATOR.public},
        certificate_sha256=certificate_sha256,
        plaintext=plaintext,
        silence_s=silence_s,
        timeout_s=timeout_s,
    )


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition; fail when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 -- a test looks from outside, there is no event to wait for
            await asyncio.sleep(0.02)


@asynccontextmanager
async def listening(accept: Accept, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Let `accept` serve every connection to a port of its own, and leave none open afterwards."""
    tasks: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        tasks.add(asyncio.get_running_loop().create_task(accept(reader, writer)))

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # an aborted transport closes its socket in the loop's next turn


class Wire:
    """A TCP proxy that can cut its connections, at once or after every so many bytes down, or swallow what passes."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._down_bytes = 0
        self.frozen = False
        self.cut_every_bytes: int | None = None
        self.cuts = 0
        self.port = 0

    @asynccontextmanager
    async def laid(self) -> AsyncIterator["Wire"]:
        async with listening(self._accept) as self.port:
            yield self

    def cut(self) -> None:
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer, False), self._pump(far_reader, writer, True))
        finally:
            far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, down: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.frozen:
                    continue
                self._down_bytes += len(data) if down else 0
                if self.cut_every_bytes is not None and self._down_bytes > self.cut_every_bytes:
                    self._down_bytes = 0
                    self.cut()
                    return
                writer.write(data)
                await writer.drain()
            writer.close()

"""A TCP proxy that spoils a link on purpose: it cuts, throttles, stalls and flips bits, and counts what it carries.

It forwards bytes and knows nothing of what they mean. Faults may change at any time and hold for live connections too.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

READ_BYTES = 1 << 16
TURN_S = 0.02  # how often a stalled or throttled connection looks whether it may go on


@dataclass(frozen=True)
class Faults:
    """What is wrong with the link. None is no fault; all counts are of one connection, in both directions together."""

    cut_after_bytes: int | None = None
    """The connection is reset after exactly so many bytes."""
    stall_after_bytes: int | None = None
    """Nothing moves any more after so many bytes, but the connection stays open."""
    bytes_per_s: float | None = None
    """How fast each direction is."""
    flip_bit: int | None = None
    """This bit of what is sent to the client is wrong, counted from 0. Seen through TLS it is a cut."""
    refuse: bool = False
    """New connections are reset at once."""


HEALTHY = Faults()


class Proxy:
    """Listens on a free port of the loopback interface and forwards to `target_port` there."""

    def __init__(self, target_port: int, faults: Faults = HEALTHY) -> None:
        self.target_port = target_port
        self.faults = faults
        self.port = 0
        self.connections = 0
        self.cuts = 0
        self.up_bytes = 0
        self.down_bytes = 0
        self._server: asyncio.Server | None = None
        self._live: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> Self:
        """Listen; 0 takes a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=READ_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """Reset every connection and stop listening."""
        assert self._server is not None, "a proxy is started before it is closed"
        self._server.close()
        self.cut_all()
        # One that is stalled or throttled would sleep on.
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def cut_all(self) -> None:
        """Reset every connection that there is now."""
        for connection in list(self._live):
            connection.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a server runs this in a task"
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self.connections += 1
        if self.faults.refuse:
            writer.transport.abort()
            return
        try:
            out_reader, out_writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=READ_BYTES)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, (reader, out_writer), (out_reader, writer))
        self._live.add(connection)
        try:
            await connection.run()
        finally:
            self._live.discard(connection)


_Way = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    def __init__(self, proxy: Proxy, up: _Way, down: _Way) -> None:
        self._proxy, self._up, self._down = proxy, up, down
        self._carried = 0
        self._down_carried = 0

    async def run(self) -> None:
        # A connection that was reset raises in one way and ends the other.
        with suppress(OSError):
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._forward(*self._up, to_client=False))
                ways.create_task(self._forward(*self._down, to_client=True))

    def cut(self) -> None:
        self._proxy.cuts += 1
        for _, writer in (self._up, self._down):
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_client: bool) -> None:
        # So that `drain` waits until everything is out: what counts as carried is not lost by a reset.
        writer.transport.set_write_buffer_limits(high=0)
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                while data:
                    part = data[: await self._turn(len(data))]
                    data = data[len(part) :]
                    writer.write(self._spoilt(part) if to_client else part)
                    await writer.drain()
                    self._count(len(part), to_client=to_client)
                    if self._at(self._proxy.faults.cut_after_bytes):
                        self.cut()
                        return
        if not writer.transport.is_closing():
            writer.close()

    async def _turn(self, size: int) -> int:
        """Wait until some bytes may go; how many of `size`."""
        while self._at(self._proxy.faults.stall_after_bytes):  # noqa: ASYNC110  the faults change under it
            await asyncio.sleep(TURN_S)
        faults = self._proxy.faults
        for limit in (faults.cut_after_bytes, faults.stall_after_bytes):
            if limit is not None and limit > self._carried:
                size = min(size, limit - self._carried)
        if faults.bytes_per_s is not None:
            size = min(size, max(1, round(faults.bytes_per_s * TURN_S)))
            await asyncio.sleep(size / faults.bytes_per_s)
        return size

    def _at(self, limit: int | None) -> bool:
        return limit is not None and self._carried >= limit

    def _spoilt(self, part: bytes) -> bytes:
        bit = self._proxy.faults.flip_bit
        place = -1 if bit is None else bit // 8 - self._down_carried
        if bit is None or not 0 <= place < len(part):
            return part
        return part[:place] + bytes([part[place] ^ 1 << bit % 8]) + part[place + 1 :]

    def _count(self, size: int, *, to_client: bool) -> None:
        self._carried += size
        if to_client:
            self._down_carried += size
            self._proxy.down_bytes += size
        else:
            self._proxy.up_bytes += size


@contextmanager
def proxy_thread(target_port: int, faults: Faults = HEALTHY, port: int = 0) -> Iterator[Proxy]:
    """A proxy with a loop of its own, for tests that are not asynchronous. Setting `faults` is safe from there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    proxy = asyncio.run_coroutine_threadsafe(Proxy(target_port, faults).start(port), loop).result(10)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()

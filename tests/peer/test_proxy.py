"""The proxy does to a connection what a test asks for, and nothing else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.peer.proxy import HEALTHY, Faults, Proxy, proxy_thread

pytestmark = pytest.mark.net

DATA = bytes(range(256)) * 1024


@asynccontextmanager
async def talker() -> AsyncIterator[int]:
    """A server that sends DATA to whoever comes, and ends."""

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(DATA)
            await writer.drain()
            writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def received(port: int) -> bytes:
    """All bytes that come until the connection ends or is reset."""
    got = bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(OSError):
        while data := await reader.read(1000):
            got += data
    writer.close()
    return bytes(got)


async def test_a_healthy_link_carries_everything() -> None:
    async with talker() as port, Proxy(port) as proxy:
        assert await received(proxy.port) == DATA
        assert (proxy.down_bytes, proxy.up_bytes, proxy.connections, proxy.cuts) == (len(DATA), 0, 1, 0)


async def test_each_connection_is_cut_after_exactly_so_many_bytes() -> None:
    async with talker() as port, Proxy(port, Faults(cut_after_bytes=100_001)) as proxy:
        assert await received(proxy.port) == DATA[:100_001]
        assert await received(proxy.port) == DATA[:100_001]
        assert proxy.cuts == 2


async def test_one_bit_is_flipped() -> None:
    async with talker() as port, Proxy(port, Faults(flip_bit=8 * 70_000 + 3)) as proxy:
        got = await received(proxy.port)
    assert [i for i, (a, b) in enumerate(zip(got, DATA, strict=True)) if a != b] == [70_000]
    assert got[70_000] ^ DATA[70_000] == 8


async def test_a_stalled_link_goes_on_when_it_is_healed() -> None:
    async with talker() as port, Proxy(port, Faults(stall_after_bytes=5000)) as proxy:
        reading = asyncio.create_task(received(proxy.port))
        while proxy.down_bytes < 5000:  # noqa: ASYNC110  the proxy counts, it does not call
            await asyncio.sleep(0.01)
        assert not reading.done() and proxy.down_bytes == 5000
        proxy.faults = HEALTHY
        assert await reading == DATA


async def test_a_stalled_link_ends_with_its_proxy() -> None:
    before = asyncio.all_tasks()
    async with talker() as port:
        async with Proxy(port, Faults(stall_after_bytes=5000)) as proxy:
            reading = asyncio.create_task(received(proxy.port))
            while proxy.down_bytes < 5000:  # noqa: ASYNC110  the proxy counts, it does not call
                await asyncio.sleep(0.01)
        assert len(await reading) <= 5000
    assert asyncio.all_tasks() == before


async def test_a_throttled_link_takes_its_time() -> None:
    async with talker() as port, Proxy(port, Faults(bytes_per_s=1e6)) as proxy:
        began_s = asyncio.get_running_loop().time()
        assert await received(proxy.port) == DATA
        assert asyncio.get_running_loop().time() - began_s >= len(DATA) / 1e6


async def test_a_refusing_link_and_one_without_a_target() -> None:
    async with talker() as port, Proxy(port, Faults(refuse=True)) as proxy:
        assert await received(proxy.port) == b""
    async with Proxy(port) as proxy:
        assert await received(proxy.port) == b""


def test_it_runs_beside_a_test_that_is_not_asynchronous() -> None:
    async def talk_through() -> bytes:
        async with talker() as port:
            with proxy_thread(port, Faults(cut_after_bytes=10)) as proxy:
                return await received(proxy.port)

    assert asyncio.run(talk_through()) == DATA[:10]

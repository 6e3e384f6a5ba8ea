"""The probe over real sockets: it measures, it is bounded, and strangers cannot make much of it."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from peer.net.link import PROBE_BYTES, Link
from peer.net.messages import SERVICE
from peer.net.pb import swarm_pb2 as pb
from peer.net.service import ServiceLimits
from protocol.errors import Code, ProtocolError
from protocol.limits import FRAME_BYTES
from tests.net.room import House, join, serving
from tests.peer.proxy import Faults, Proxy

pytestmark = pytest.mark.net


async def test_a_line_is_measured_within_its_bounds(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, Proxy(server.port) as proxy, await join(proxy.port) as link:
        before = proxy.up_bytes, proxy.down_bytes
        line = await link.probe(0.5)
        up, down = proxy.up_bytes - before[0], proxy.down_bytes - before[1]
    assert 0 < up < 1.1 * PROBE_BYTES
    assert 0 < down < 1.1 * PROBE_BYTES
    assert line.up_bytes_per_s > 0 and line.down_bytes_per_s > 0
    assert line.round_trip_s > 0
    # One clock is read on both sides; scheduling alone moves the two readings apart.
    assert abs(line.clock_ahead_s) < 5


async def test_what_is_measured_is_the_shape_of_the_line(tmp_path: Path) -> None:
    slow = Faults(bytes_per_s=200_000.0)
    async with serving(House(), tmp_path) as server, Proxy(server.port, slow) as proxy, await join(proxy.port) as link:
        line = await link.probe(1.5)
    for speed in (line.up_bytes_per_s, line.down_bytes_per_s):
        # The line carries TLS and headers too, and this machine adds its own pauses; no burst can be faster.
        assert 100_000 < speed < 210_000


class RawProbe:
    """A probe by hand, for peers that do not keep to the rules."""

    def __init__(self, link: Link) -> None:
        self.session = link._session
        self._call: Any = link._bulk.stream_stream(
            f"/{SERVICE}/Probe", pb.ProbeRequest.SerializeToString, pb.ProbeReply.FromString
        )()

    async def ask(self, *, session: bytes = b"", padding: bytes = b"", down_bytes: int = 0) -> pb.ProbeReply:
        await self._call.write(pb.ProbeRequest(session=session, padding=padding, down_bytes=down_bytes))
        reply: pb.ProbeReply = await self._call.read()
        return reply

    async def code(self) -> Code:
        return Code(int(dict(await self._call.trailing_metadata())["sl-code"]))


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(
    ("sizes", "code"), [([FRAME_BYTES + 1], Code.BAD_MESSAGE), ([FRAME_BYTES] * 3, Code.TOO_LARGE)]
)
async def test_a_probe_that_wants_too_much_is_ended(tmp_path: Path, way: str, sizes: list[int], code: Code) -> None:
    limits = ServiceLimits(probe_bytes_max=2 * FRAME_BYTES)
    async with serving(House(), tmp_path, limits) as server, await join(server.port) as link:
        raw = RawProbe(link)
        await raw.ask(session=raw.session)
        with pytest.raises(grpc.aio.AioRpcError):
            for size in sizes:
                await (raw.ask(padding=bytes(size)) if way == "up" else raw.ask(down_bytes=size))
        assert await raw.code() is code


async def test_a_probe_needs_a_session(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, await join(server.port) as link:
        raw = RawProbe(link)
        with pytest.raises(grpc.aio.AioRpcError):
            await raw.ask(session=bytes(16))
        assert await raw.code() is Code.BAD_SESSION


async def test_a_probe_ends_after_its_time(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, ServiceLimits(probe_s_max=0.3)) as server, await join(server.port) as link:
        raw = RawProbe(link)
        await raw.ask(session=raw.session)
        began_s = time.monotonic()
        assert await raw.code() is Code.BUSY
        assert time.monotonic() - began_s < ServiceLimits().probe_s_max


async def test_probes_are_few_at_once_and_few_in_a_minute(tmp_path: Path) -> None:
    limits = ServiceLimits(probes_max=1, probes_per_session_minute_max=2, probes_per_minute_max=3)
    async with (
        serving(House(), tmp_path, limits) as server,
        await join(server.port) as one,
        await join(server.port) as two,
    ):
        held = RawProbe(one)
        await held.ask(session=held.session)
        with pytest.raises(ProtocolError, match="others are measuring") as caught:
            await two.probe(0.05)
        assert caught.value.code is Code.BUSY
        held._call.cancel()
        await _free(one)
        with pytest.raises(ProtocolError, match="at most 2 probes of a peer a minute"):
            await one.probe(0.05)
        await two.probe(0.05)
        async with await join(server.port) as three:
            with pytest.raises(ProtocolError, match="at most 3 probes a minute"):
                await three.probe(0.05)


async def _free(link: Link) -> None:
    """Probe as soon as the place of a probe that was given up is free again."""
    async with asyncio.timeout(10):
        while True:
            with suppress(ProtocolError):
                await link.probe(0.05)
                return
            await asyncio.sleep(0.02)

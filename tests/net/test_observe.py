"""Observers, standbys and what aggregators tell of each other, over real sockets."""

import hashlib
from pathlib import Path

import pytest

from peer.net.messages import AD_BYTES_MAX, Aggregators, Heartbeat, PacketStored, ReceiptMsg, RoundClosed, RoundOpened
from peer.net.service import ServiceLimits
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import RECORD_BYTES_MAX
from tests.net.room import ROOT, House, join, serving, until

pytestmark = pytest.mark.net

PACKET = b"packet" * 1000
DIGEST = hashlib.sha256(PACKET).digest()


async def test_an_observer_sees_everything_and_is_not_there(tmp_path: Path) -> None:
    house, key = House(), PrivateKey.generate()
    async with (
        serving(house, tmp_path, ServiceLimits(heartbeat_s=0.1)) as server,
        await join(server.port, key) as link,
    ):
        events = link.observe(b"a record", b"an ad")
        assert await anext(events) == RoundOpened(7, ROOT, 15, 2.5)
        assert house.shown_to_us == [(key.public, b"a record", b"an ad")]
        assert await anext(events) == Heartbeat()
        house.events.put_nowait(PacketStored(DIGEST))
        house.events.put_nowait(RoundClosed(b"record 8"))
        seen: list[object] = []
        while len(seen) < 2:
            event = await anext(events)
            seen += [] if event == Heartbeat() else [event]
        assert seen == [PacketStored(DIGEST), RoundClosed(b"record 8")]
        assert link.head_record == b"record 8"
        await events.aclose()
    assert house.log == []


async def test_a_member_is_not_told_of_packets_and_learns_where_other_aggregators_are(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        watch = link.watch()
        await anext(watch)
        ads = (b"a" * AD_BYTES_MAX, b"")
        for event in (PacketStored(DIGEST), Aggregators(ads), RoundClosed(b"record 8")):
            house.events.put_nowait(event)
        assert await anext(watch) == RoundClosed(b"record 8")
        assert link.ads == ads
        await watch.aclose()


async def test_a_welcome_says_whether_the_aggregator_stands_by(tmp_path: Path) -> None:
    for standby in (False, True):
        async with serving(House(standby=standby), tmp_path) as server, await join(server.port) as link:
            assert link.standby is standby


async def test_a_record_can_be_shown_without_watching_on(tmp_path: Path) -> None:
    house, key = House(), PrivateKey.generate()
    async with serving(house, tmp_path) as server, await join(server.port, key) as link:
        await link.show(b"a newer record", 5.0)
        await until(lambda: house.shown_to_us == [(key.public, b"a newer record", b"")])
        watch = link.watch()
        assert await anext(watch) == RoundOpened(7, ROOT, 15, 2.5)
        await watch.aclose()


async def test_what_is_shown_is_bounded(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        for record, ad in ((bytes(RECORD_BYTES_MAX + 1), b""), (b"", bytes(AD_BYTES_MAX + 1))):
            with pytest.raises(ProtocolError) as caught:
                await anext(link.observe(record, ad))
            assert caught.value.code is Code.BAD_MESSAGE
    assert house.shown_to_us == []


async def test_a_packet_that_is_known_is_not_sent_again(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        assert await link.submit(DIGEST, PACKET) == ReceiptMsg(DIGEST, True, 0)
        assert await link.submit(DIGEST, PACKET) == ReceiptMsg(DIGEST, True, 0)
    assert len(house.forms) == 1, "the second receipt came before the bytes"

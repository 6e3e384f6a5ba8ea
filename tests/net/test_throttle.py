"""The caps on what a program sends and receives. A cap is a least time, so that alone is measured here."""

import asyncio
import hashlib
import random
import time
from pathlib import Path

import pytest

from peer.net.throttle import BYTES_PER_MBIT, Bucket, Traffic
from protocol.limits import FRAME_BYTES
from tests.net.room import House, join, serving

pytestmark = pytest.mark.net

BLOB = random.Random(3).randbytes(300_000)
DIGEST = hashlib.sha256(BLOB).digest()


async def test_all_who_share_a_bucket_share_its_speed() -> None:
    bucket = Bucket()
    bucket.bytes_per_s = 100_000.0
    began_s = time.monotonic()
    await asyncio.gather(*(bucket.take(10_000) for _ in range(3)))
    assert time.monotonic() - began_s >= 0.299
    assert bucket.total == 30_000


async def test_what_others_fetch_counts_and_is_capped_too(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.cap(16.0, 0.0)
    house = House(blobs={("update", DIGEST): BLOB})
    async with serving(house, tmp_path, traffic=traffic) as server, await join(server.port) as link:
        began_s = time.monotonic()
        assert await link.fetch("update", DIGEST, size_max=len(BLOB)) == BLOB
        assert time.monotonic() - began_s >= len(BLOB) / (16 * BYTES_PER_MBIT)
    assert (traffic.up.total, link.traffic.down.total) == (len(BLOB), len(BLOB))


async def test_without_a_cap_nothing_waits() -> None:
    bucket = Bucket()
    with pytest.raises(StopIteration):
        bucket.take(1 << 40).send(None)
    assert bucket.frame_bytes(FRAME_BYTES) == FRAME_BYTES
    bucket.bytes_per_s = 1.0
    assert bucket.frame_bytes(FRAME_BYTES) == 1 << 12, "frames never become tiny"


async def test_both_ways_of_a_link_keep_to_their_caps(tmp_path: Path) -> None:
    house, traffic = House(blobs={("update", DIGEST): BLOB}), Traffic()
    traffic.cap(8.0, 16.0)
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        link.traffic = traffic
        began_s = time.monotonic()
        assert (await link.submit(DIGEST, BLOB)).accepted
        up_s = time.monotonic() - began_s
        assert await link.fetch("update", DIGEST, size_max=len(BLOB)) == BLOB
        down_s = time.monotonic() - began_s - up_s
    assert house.packets[DIGEST] == BLOB
    assert up_s >= len(BLOB) / (8 * BYTES_PER_MBIT) and down_s >= len(BLOB) / (16 * BYTES_PER_MBIT)
    assert (traffic.up.total, traffic.down.total) == (len(BLOB), len(BLOB))

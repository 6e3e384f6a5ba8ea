"""Watching, submitting and fetching over real sockets, and what cut, frozen and lying ends do to them."""

import asyncio
import hashlib
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.net.messages import SERVICE, Amended, ReceiptMsg, RoundClosed, RoundOpened
from peer.net.pb import swarm_pb2 as pb
from peer.net.service import ServiceLimits
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import AMENDMENT_BYTES_MAX, FRAME_BYTES
from tests.net.room import AGGREGATOR, ROOT, RUN, TLS, House, Wire, join, serving, until

pytestmark = pytest.mark.net

EIGHT_MIB = random.Random(8).randbytes(8 << 20)
DIGEST = hashlib.sha256(EIGHT_MIB).digest()


async def test_a_watch_tells_rounds_in_order_and_presence_alternates(tmp_path: Path) -> None:
    house, key = House(), PrivateKey.generate()
    async with serving(house, tmp_path) as server, await join(server.port, key) as link:
        watch = link.watch()
        assert await anext(watch) == RoundOpened(7, ROOT, 15, 2.5)
        for closed in (RoundClosed(b"record 7"), RoundClosed(b"record 8", (1 << 64) - 1, 17)):
            house.events.put_nowait(closed)
            assert await anext(watch) == closed
        assert house.log == [("joined", key.public)]
        await watch.aclose()
        await until(lambda: house.log == [("joined", key.public), ("left", key.public)])
        again = link.watch()
        await anext(again)
        newer = link.watch()
        await anext(newer)
        with pytest.raises(ProtocolError, match="newer watch"):
            await anext(again)
        assert [what for what, _ in house.log] == ["joined", "left", "joined"], "a newer watch is not an absence"
        await newer.aclose()
    await until(lambda: len(house.log) == 4)


async def test_heartbeats_keep_a_quiet_watch_alive_and_their_absence_ends_it(tmp_path: Path) -> None:
    async with (
        serving(House(), tmp_path, ServiceLimits(heartbeat_s=0.1)) as server,
        Wire(server.port).laid() as wire,
        await join(wire.port, silence_s=0.5) as link,
    ):
        watch = link.watch()
        await anext(watch)
        pending = asyncio.create_task(_next(watch))
        await asyncio.sleep(1.0)
        assert not pending.done(), "heartbeats must keep the watch alive beyond its limit of silence"
        wire.frozen = True
        with pytest.raises(LinkError, match="silent for") as caught:
            await pending
        assert caught.value.retryable


async def test_a_packet_of_8_mib_goes_up_through_a_file_and_a_small_one_through_memory(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        assert await link.submit(DIGEST, EIGHT_MIB) == ReceiptMsg(DIGEST, True, 0)
        assert house.packets[DIGEST] == EIGHT_MIB
        small = hashlib.sha256(b"small").digest()
        await link.submit(small, EIGHT_MIB[:FRAME_BYTES])
        assert house.packets[small] == EIGHT_MIB[:FRAME_BYTES]
        assert issubclass(house.forms[0], Path) and house.forms[1] is bytes
        assert list(tmp_path.iterdir()) == [], "the spool is empty when nothing arrives"


async def test_an_oversize_packet_is_refused_before_a_byte_is_stored(tmp_path: Path) -> None:
    house = House(submit_bytes_max=(8 << 20) - 1)
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        with pytest.raises(ProtocolError) as caught:
            await link.submit(DIGEST, EIGHT_MIB)
        assert caught.value.code is Code.TOO_LARGE
        assert not house.packets
        assert list(tmp_path.iterdir()) == []
        assert (await link.submit(DIGEST, EIGHT_MIB[:-1])).accepted


async def test_a_submit_that_lies_about_its_size_or_its_frames_is_refused(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        start = pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=DIGEST, size=2 * FRAME_BYTES))
        full = pb.SubmitRequest(frame=bytes(FRAME_BYTES))
        cases = [
            ([start, full, full, full], Code.BAD_MESSAGE),
            ([start, full], Code.BAD_MESSAGE),
            ([start, full, pb.SubmitRequest(frame=b"")], Code.BAD_MESSAGE),
            ([start, pb.SubmitRequest(frame=bytes(FRAME_BYTES + 1))], Code.BAD_MESSAGE),
            ([start, start], Code.BAD_MESSAGE),
            ([full], Code.BAD_MESSAGE),
            ([], Code.BAD_MESSAGE),
            ([pb.SubmitRequest(start=pb.SubmitStart(session=b"x" * 16, digest=DIGEST, size=9))], Code.BAD_SESSION),
            ([pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=b"", size=9))], Code.BAD_MESSAGE),
            ([pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=DIGEST))], Code.BAD_MESSAGE),
        ]
        async with asyncio.timeout(10):
            for messages, code in cases:
                assert await _raw_submit(link, messages) is code
        assert not house.packets
        assert list(tmp_path.iterdir()) == []


async def test_a_message_beyond_the_limit_hurts_only_its_own_call(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, await join(server.port) as link:
        start = pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=DIGEST, size=8 << 20))
        options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "sparseloco-peer")]
        channel = grpc.aio.secure_channel(
            f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(TLS.certificate_pem), options
        )
        call: Any = channel.stream_stream(
            f"/{SERVICE}/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitReply.FromString
        )()
        await call.write(start)
        assert (await call.read()).WhichOneof("step") == "go"
        with pytest.raises(grpc.aio.AioRpcError):
            await call.write(pb.SubmitRequest(frame=EIGHT_MIB))
            await call.read()
        await channel.close()
        await until(lambda: not list(tmp_path.iterdir()))
        assert (await link.submit(DIGEST, EIGHT_MIB)).accepted


async def test_a_slow_sender_is_given_up(tmp_path: Path) -> None:
    limits = ServiceLimits(frame_gap_s=0.3)
    async with serving(House(), tmp_path, limits) as server, await join(server.port) as link:
        start = pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=DIGEST, size=2 * FRAME_BYTES))

        call = _submit_call(link)
        await call.write(start)
        await call.read()
        async with asyncio.timeout(5):
            assert int(dict(await call.trailing_metadata())["sl-code"]) == Code.BAD_MESSAGE
        await until(lambda: not list(tmp_path.iterdir()))
    limits = ServiceLimits(frame_gap_s=0.3, bytes_per_s_min=1 << 30)
    async with serving(House(), tmp_path, limits) as server, await join(server.port) as link:
        crawling = _submit_call(link)
        await crawling.write(pb.SubmitRequest(start=pb.SubmitStart(session=link._session, digest=DIGEST, size=1000)))
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(5):
                while True:
                    await crawling.write(pb.SubmitRequest(frame=b"x"))
                    await asyncio.sleep(0.05)
        assert crawling.done()


async def test_a_peer_has_one_submit_at_a_time_and_a_turn_among_others(tmp_path: Path) -> None:
    house = House(gate=asyncio.Event())
    limits = ServiceLimits(submits_max=1, submit_turn_s=0.2)
    async with (
        serving(house, tmp_path, limits) as server,
        await join(server.port) as one,
        await join(server.port) as two,
    ):
        first = asyncio.create_task(one.submit(DIGEST, b"first"))
        await asyncio.sleep(0.1)
        for link in (one, two):
            with pytest.raises(ProtocolError) as caught:
                await link.submit(DIGEST, b"second")
            assert caught.value.code is Code.BUSY
        assert house.gate is not None
        house.gate.set()
        assert (await first).accepted
        assert (await two.submit(DIGEST, b"second")).accepted


async def test_a_blob_comes_down_from_memory_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(EIGHT_MIB)
    house = House(blobs={("update", DIGEST): EIGHT_MIB, ("piece", DIGEST): path, ("run", DIGEST): b""})
    async with serving(house, tmp_path / "spool") as server, await join(server.port) as link:
        assert await link.fetch("update", DIGEST, size_max=8 << 20) == EIGHT_MIB
        assert await link.fetch("piece", DIGEST, size_max=8 << 20) == EIGHT_MIB
        assert await link.fetch("piece", DIGEST, size_max=8 << 20, resume=EIGHT_MIB[:5_000_001]) == EIGHT_MIB
        assert await link.fetch("piece", DIGEST, size_max=8 << 20, resume=EIGHT_MIB) == EIGHT_MIB
        assert await link.fetch("run", DIGEST, size_max=0) == b""
        for kind, size_max, resume, code in [
            ("nothing", 9, b"", Code.NOT_FOUND),
            ("k" * 17, 9, b"", Code.BAD_MESSAGE),
            ("update", (8 << 20) - 1, b"", Code.TOO_LARGE),
            ("run", 9, b"x", Code.BAD_MESSAGE),
        ]:
            with pytest.raises(ProtocolError) as caught:
                await link.fetch(kind, DIGEST, size_max=size_max, resume=resume)
            assert caught.value.code is code


async def test_a_fetch_goes_on_where_a_cut_connection_left_it(tmp_path: Path) -> None:
    house = House(blobs={("update", DIGEST): EIGHT_MIB})
    async with serving(house, tmp_path) as server, Wire(server.port).laid() as wire, await join(wire.port) as link:
        wire.cut_every_bytes = 3 << 20
        data, errors = b"", []
        while len(data) < len(EIGHT_MIB):
            try:
                data = await link.fetch("update", DIGEST, size_max=8 << 20, resume=data)
            except LinkError as error:
                errors.append(error)
                data = error.partial
                await asyncio.sleep(0.1)
        assert data == EIGHT_MIB
        assert all(error.retryable for error in errors)
        assert wire.cuts >= 2, "the wire must have been cut in the middle for this test to mean anything"


async def test_fetches_of_a_session_are_bounded(tmp_path: Path) -> None:
    house = House(blobs={("update", DIGEST): EIGHT_MIB})
    limits = ServiceLimits(fetches_per_session_max=1)
    async with serving(house, tmp_path, limits) as server, await join(server.port) as link:
        stuck: Any = link._bulk.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, None)(
            pb.FetchRequest(session=link._session, kind="update", digest=DIGEST)
        )
        await stuck.read()
        with pytest.raises(ProtocolError) as caught:
            await link.fetch("update", DIGEST, size_max=8 << 20)
        assert caught.value.code is Code.BUSY
        stuck.cancel()


async def test_a_submit_through_a_cut_connection_leaves_nothing_behind(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, Wire(server.port).laid() as wire, await join(wire.port) as link:
        wire.frozen = True
        task = asyncio.create_task(link.submit(DIGEST, EIGHT_MIB))
        await asyncio.sleep(0.2)
        wire.cut()
        with pytest.raises(LinkError) as caught:
            await task
        assert caught.value.failure is LinkFailure.CUT
        await until(lambda: not list(tmp_path.iterdir()))
        wire.frozen = False
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await link.submit(DIGEST, EIGHT_MIB)).accepted
                    break
                except LinkError:
                    await asyncio.sleep(0.2)
        assert house.packets[DIGEST] == EIGHT_MIB


async def test_what_fails_inside_the_aggregator_says_nothing_of_the_inside(tmp_path: Path, caplog: Any) -> None:
    house = House(blobs={("update", DIGEST): tmp_path / "secret-place"})
    async with serving(house, tmp_path / "spool") as server, await join(server.port) as link:
        with pytest.raises(LinkError) as caught:
            await link.fetch("update", DIGEST, size_max=9)
        assert caught.value.failure is LinkFailure.SERVER
        assert "secret-place" not in str(caught.value)
        assert "secret-place" in caplog.text, "the operator must see it"


async def test_closing_the_service_tells_the_watchers(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        watch = link.watch()
        await anext(watch)
        pending = asyncio.create_task(_next(watch))
        await asyncio.sleep(0.05)
        await server.close(1.0)
        with pytest.raises(LinkError, match="shutting down") as caught:
            await pending
        assert caught.value.retryable
        assert [what for what, _ in house.log] == ["joined", "left"]


async def test_closing_the_link_ends_its_calls_with_a_reason(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, await join(server.port) as link:
        watch = link.watch()
        await anext(watch)
        pending = asyncio.create_task(_next(watch))
        await asyncio.sleep(0.05)
        await link.close()
        with pytest.raises(LinkError, match="closed on this side"):
            await pending


_WATCHER = """
import asyncio, sys
from peer.net.link import Link
from protocol.identity import PrivateKey
async def main():
    link = await Link.open("127.0.0.1:%d", run_id=bytes.fromhex("%s"), key=PrivateKey.generate(),
        expect_aggregators={bytes.fromhex("%s")}, certificate_sha256=bytes.fromhex("%s"))
    async for event in link.watch():
        print("watching", flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_killed_and_a_frozen_peer_are_noticed(tmp_path: Path, how: signal.Signals) -> None:
    house = House()
    limits = ServiceLimits(keepalive_s=1.0, keepalive_timeout_s=1.0)
    async with serving(house, tmp_path, limits) as server:
        script = _WATCHER % (server.port, RUN.hex(), AGGREGATOR.public.hex(), TLS.fingerprint.hex())
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"watching\n"
        assert [what for what, _ in house.log] == ["joined"]
        process.send_signal(how)
        await until(lambda: len(house.log) == 2, timeout_s=8)
        assert house.log[1][0] == "left"
        if how is signal.SIGSTOP:
            process.kill()
        await process.wait()


async def _next(watch: Any) -> Any:
    return await anext(watch)


async def _raw_submit(link: Link, messages: list[pb.SubmitRequest]) -> Code:
    """Send these messages, waiting for the go-ahead after the first, and return the code of the refusal."""
    call = _submit_call(link)
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for at, message in enumerate(messages):
            await call.write(message)
            if at == 0:
                await call.read()
        if sum(len(m.frame) for m in messages) < 2 * FRAME_BYTES:
            await call.done_writing()
        await call.read()
    code = Code(int(dict(await call.trailing_metadata())["sl-code"]))
    call.cancel()
    return code


def _submit_call(link: Link) -> Any:
    return link._bulk.stream_stream(
        f"/{SERVICE}/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitReply.FromString
    )()


async def test_amendments_go_up_whole_are_refused_with_a_code_and_are_bounded_in_size_and_number(
    tmp_path: Path,
) -> None:
    house, largest = House(), EIGHT_MIB[:AMENDMENT_BYTES_MAX]
    async with (
        serving(house, tmp_path, ServiceLimits(amends_per_minute_max=4)) as server,
        await join(server.port) as link,
    ):
        assert await link.amend() == Amended(bytes(32), 7)
        assert await link.amend(largest) == Amended(ROOT, 7)
        with pytest.raises(ProtocolError, match="not signed by the operator") as refused:
            await link.amend(b"bad")
        assert refused.value.code == Code.BAD_AMENDMENT
        with pytest.raises(ProtocolError, match="at most 65536 bytes"):
            await link.amend(largest + b"1")
        assert await link.amend() == Amended(ROOT, 7)
        with pytest.raises(ProtocolError, match="at most 4 amendments a minute") as busy:
            await link.amend(b"one more")
        assert busy.value.code == Code.BUSY and house.amendments == [largest]

"""What a peer makes of an aggregator that lies or breaks the rules."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from peer.net.errors import LinkError, LinkFailure, clean, from_rpc
from peer.net.link import Link
from peer.net.messages import NO_CERTIFICATE, SERVICE, RoundClosed, transcript
from peer.net.pb import swarm_pb2 as pb
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import RECORD_BYTES_MAX
from tests.net.room import AGGREGATOR, HEAD, RUN, join

pytestmark = pytest.mark.net
DIGEST = bytes(range(32))


class Liar:
    """A server whose answers are whatever a test wants."""

    def __init__(self) -> None:
        self.signer = AGGREGATOR
        self.nonce = bytes(32)
        self.session = bytes(16)
        self.head = HEAD
        self.frames: list[pb.BlobFrame] = []
        self.events: list[pb.RoundEvent] = []
        self.replies: list[pb.SubmitReply] = []

    async def join(self, _requests: Any, context: Any) -> None:
        hello = (await context.read()).hello
        text = transcript(RUN, hello.peer, hello.nonce, self.nonce, NO_CERTIFICATE)
        signature = self.signer.sign("join-aggregator", text)
        challenge = pb.Challenge(nonce=self.nonce, aggregator=AGGREGATOR.public, signature=signature)
        await context.write(pb.JoinReply(challenge=challenge))
        await context.read()
        await context.write(pb.JoinReply(welcome=pb.Welcome(session=self.session, head_record=self.head)))

    async def fetch(self, _request: Any, context: Any) -> None:
        for frame in self.frames:
            await context.write(frame)

    async def watch(self, _request: Any, context: Any) -> None:
        for event in self.events:
            await context.write(event)

    async def submit(self, _requests: Any, context: Any) -> None:
        await context.read()
        for reply in self.replies:
            await context.write(reply)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[int]:
        server = grpc.aio.server()
        write = type(pb.Hello()).SerializeToString
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Join": grpc.stream_stream_rpc_method_handler(self.join, pb.JoinRequest.FromString, write),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch, pb.FetchRequest.FromString, write),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, pb.WatchRequest.FromString, write),
            "Submit": grpc.stream_stream_rpc_method_handler(self.submit, pb.SubmitRequest.FromString, write),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(0)


async def joined(port: int) -> Link:
    return await join(port, plaintext=True, certificate_sha256=None)


async def test_a_join_without_the_aggregators_signature_is_refused() -> None:
    for field, value, code in [
        ("signer", PrivateKey.generate(), Code.BAD_SIGNATURE),
        ("nonce", bytes(31), Code.BAD_MESSAGE),
        ("session", bytes(15), Code.BAD_MESSAGE),
        ("head", bytes(RECORD_BYTES_MAX + 1), Code.BAD_MESSAGE),
    ]:
        liar = Liar()
        setattr(liar, field, value)
        async with liar.at_work() as port:
            with pytest.raises(ProtocolError) as caught:
                await joined(port)
            assert caught.value.code is code, field


async def test_a_blob_that_is_not_as_announced_is_refused() -> None:
    liar = Liar()
    frame = pb.BlobFrame
    cases: list[tuple[list[pb.BlobFrame], Code]] = [
        ([frame(size=1 << 60, data=b"x")], Code.TOO_LARGE),
        ([frame(size=11, data=b"x")], Code.TOO_LARGE),
        ([frame(size=3, data=b"xxxx")], Code.BAD_MESSAGE),
        ([frame(size=3, data=b"xx"), frame(data=b"xx")], Code.BAD_MESSAGE),
        ([frame(size=3, data=b"x"), frame(), frame(data=b"xx")], Code.BAD_MESSAGE),
    ]
    async with liar.at_work() as port, await joined(port) as link:
        for liar.frames, code in cases:
            with pytest.raises(ProtocolError) as caught:
                await link.fetch("update", DIGEST, size_max=10)
            assert caught.value.code is code
        for liar.frames in ([], [frame(size=3, data=b"xx")]):
            with pytest.raises(LinkError, match="ended the update after") as cut:
                await link.fetch("update", DIGEST, size_max=10)
            assert cut.value.partial == b"".join(f.data for f in liar.frames)
            assert cut.value.retryable


async def test_receipts_and_replies_out_of_place_are_refused() -> None:
    liar = Liar()
    go = pb.SubmitReply(go=pb.SubmitGo())
    other = pb.SubmitReply(receipt=pb.Receipt(digest=bytes(32), accepted=True))
    cases = [([go, other], Code.WRONG_DIGEST), ([other], Code.WRONG_DIGEST), ([go, go], Code.BAD_MESSAGE)]
    async with liar.at_work() as port, await joined(port) as link:
        for liar.replies, code in cases:
            with pytest.raises(ProtocolError) as caught:
                await link.submit(DIGEST, b"packet")
            assert caught.value.code is code


async def test_malformed_events_are_refused_and_unknown_ones_passed_over() -> None:
    liar = Liar()
    cases = [
        pb.RoundEvent(opened=pb.RoundOpened(round=1, base_root=b"short")),
        pb.RoundEvent(opened=pb.RoundOpened(round=1, base_root=bytes(32), closes_in_ms=1 << 63)),
        pb.RoundEvent(closed=pb.RoundClosed(record=bytes(RECORD_BYTES_MAX + 1))),
    ]
    async with liar.at_work() as port, await joined(port) as link:
        for event in cases:
            liar.events = [event]
            with pytest.raises(ProtocolError) as caught:
                await anext(link.watch())
            assert caught.value.code is Code.BAD_MESSAGE
        liar.events = [pb.RoundEvent(), pb.RoundEvent(closed=pb.RoundClosed(record=b"r"))]
        assert [event async for event in link.watch()] == [RoundClosed(b"r")]


async def test_a_message_beyond_the_limit_of_a_link_is_not_taken_in() -> None:
    liar = Liar()
    async with liar.at_work() as port, await joined(port) as link:
        liar.frames = [pb.BlobFrame(size=3 << 20, data=bytes(3 << 20))]
        with pytest.raises(LinkError) as caught:
            await link.fetch("update", DIGEST, size_max=4 << 20)
        assert caught.value.failure is LinkFailure.SERVER


def test_foreign_text_cannot_reach_the_terminal_raw_or_long() -> None:
    assert clean("a\x1b[31mb\nc\u202ed") == "a?[31mb?c?d"
    assert len(clean("x" * 10_000)) < 500
    metadata = grpc.aio.Metadata(("sl-code", "703"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, metadata, metadata, details="\x1b]0;title\x07")
    found = from_rpc(error, "host:1")
    assert isinstance(found, ProtocolError)
    assert (found.code, found.detail) == (Code.NOT_FOUND, "?]0;title?")
    for text in ("9999", "x", ""):
        unknown = grpc.aio.Metadata(("sl-code", text))
        error = grpc.aio.AioRpcError(grpc.StatusCode.INVALID_ARGUMENT, unknown, unknown, details="d")
        assert isinstance(from_rpc(error, "host:1"), LinkError)


async def test_a_grpc_server_that_is_no_aggregator_is_named() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(LinkError, match="no sparseloco-peer aggregator") as caught:
        await joined(port)
    assert caught.value.failure is LinkFailure.NOT_OURS
    await server.stop(0)
    await asyncio.sleep(0)

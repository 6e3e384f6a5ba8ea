"""Two versions of the protocol meet over real sockets: whoever is told reads which side is too old, and what to do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from peer.errors import render
from peer.net.errors import status_of
from peer.net.link import Link
from peer.net.messages import SERVICE, other_version
from peer.net.pb import swarm_pb2 as pb
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.limits import VERSION
from tests.net.room import AGGREGATOR, RUN, House, serving
from tests.peer.swarm import run_cli

pytestmark = pytest.mark.net


@asynccontextmanager
async def aggregator_of(version: int) -> AsyncIterator[int]:
    """What an aggregator of another version does with our Hello; nothing else of it matters. Plaintext."""

    async def join(_requests: Any, context: Any) -> None:
        hello = (await context.read()).hello
        assert hello.version == VERSION
        await context.abort(*status_of(ProtocolError(Code.VERSION, other_version(version, hello.version))))

    method = grpc.stream_stream_rpc_method_handler(
        join, pb.JoinRequest.FromString, type(pb.JoinReply()).SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Join": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("version", "told"), [(VERSION + 1, "your sparseloco-peer is too old"), (0, "the aggregator is too old")]
)
async def test_a_peer_that_meets_an_aggregator_of_another_version_is_told_who_is_too_old(
    version: int, told: str
) -> None:
    async with aggregator_of(version) as port:
        with pytest.raises(ProtocolError) as caught:
            await Link.open(
                f"127.0.0.1:{port}",
                run_id=RUN,
                key=PrivateKey.generate(),
                expect_aggregators={AGGREGATOR.public},
                certificate_sha256=None,
                plaintext=True,
            )
    assert caught.value.code is Code.VERSION
    said, remedy = render(caught.value).splitlines()
    assert said.endswith(f"(this aggregator speaks version {version}, you speak {VERSION}: {told})")
    assert "install the newest sparseloco-peer on the side that is too old" in remedy


@pytest.mark.parametrize(
    ("version", "told"),
    [(VERSION + 1, "the aggregator is too old"), (0, "your sparseloco-peer is too old"), (2**32 - 1, "the aggregator")],
)
async def test_an_aggregator_tells_a_peer_of_another_version_who_is_too_old(
    tmp_path: Path, version: int, told: str
) -> None:
    async with serving(House(), tmp_path, tls=None) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call: Any = channel.stream_stream(
                f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinReply.FromString
            )()
            # Whatever else a later Hello says, its version is looked at first.
            hello = pb.Hello(version=version, run_id=b"of another form", peer=b"", nonce=b"")
            await call.write(pb.JoinRequest(hello=hello))
            assert dict(await call.trailing_metadata())["sl-code"] == str(Code.VERSION.value)
            assert told in await call.details()
        assert server.sessions == 0


async def test_the_command_line_says_it_in_two_lines() -> None:
    async with aggregator_of(VERSION + 1) as port:
        invite = Invite(RUN, AGGREGATOR.public, bytes(32), (f"127.0.0.1:{port}",), ())
        done = await asyncio.to_thread(run_cli, "status", invite.to_text(), "--plaintext-local")
    assert done.returncode == 1
    said, remedy = done.stderr.splitlines()[-2:]
    assert said.startswith("error SL204 version:") and said.endswith("your sparseloco-peer is too old)")
    assert remedy.startswith("  try: install the newest sparseloco-peer")

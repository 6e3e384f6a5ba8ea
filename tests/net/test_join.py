"""Joining over real sockets: who gets in, and who is told what."""

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from peer.net.errors import LinkError, LinkFailure
from peer.net.link import Link
from peer.net.messages import NO_CERTIFICATE, SERVICE, transcript
from peer.net.pb import swarm_pb2 as pb
from peer.net.service import ServiceLimits, serve
from peer.net.tls import make_tls_identity
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import VERSION
from tests.net.room import AGGREGATOR, HEAD, RUN, TLS, House, Wire, join, listening, serving

pytestmark = pytest.mark.net


class RawJoin:
    """A join by hand, for clients that do not keep to the rules. Plaintext."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.call: Any = self.channel.stream_stream(
            f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinReply.FromString
        )()

    async def hello(self, peer: bytes, *, version: int = VERSION, run_id: bytes = RUN, nonce: bytes = bytes(32)) -> Any:
        message = pb.Hello(version=version, run_id=run_id, peer=peer, nonce=nonce)
        await self.call.write(pb.JoinRequest(hello=message))
        return await self._read()

    async def proof(self, signature: bytes) -> Any:
        await self.call.write(pb.JoinRequest(proof=pb.Proof(signature=signature)))
        return await self._read()

    async def _read(self) -> Any:
        try:
            return await self.call.read()
        except grpc.aio.AioRpcError:
            return None

    async def code(self) -> Code:
        trailers = dict(await self.call.trailing_metadata())
        await self.channel.close()
        return Code(int(trailers["sl-code"]))


async def test_a_peer_joins_over_tls_and_gets_the_head_record(tmp_path: Path) -> None:
    house = House()
    async with serving(house, tmp_path) as server, await join(server.port) as link:
        assert link.head_record == HEAD
        assert link.aggregator == AGGREGATOR.public
        assert link.certificate_sha256 == TLS.fingerprint
        assert server.sessions == 1


async def test_a_peer_joins_without_a_pin_because_the_signature_covers_the_certificate(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, await join(server.port, certificate_sha256=None) as link:
        assert link.certificate_sha256 == TLS.fingerprint


async def test_plaintext_works_on_loopback_only(tmp_path: Path) -> None:
    async with (
        serving(House(), tmp_path, tls=None) as server,
        await join(server.port, plaintext=True, certificate_sha256=None) as link,
    ):
        assert link.certificate_sha256 == NO_CERTIFICATE
    with pytest.raises(LinkError, match="plaintext is for this machine only") as caught:
        await Link.open(
            "192.0.2.1:7000",
            run_id=RUN,
            key=PrivateKey.generate(),
            expect_aggregators=[],
            certificate_sha256=None,
            plaintext=True,
        )
    assert not caught.value.retryable
    with pytest.raises(ValueError, match="use TLS"):
        await serve(House(), host="0.0.0.0", port=0, key=AGGREGATOR, run_id=RUN, tls=None, spool=tmp_path)


async def test_another_run_is_refused_by_its_code(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server:
        with pytest.raises(ProtocolError) as caught:
            await join(server.port, run_id=bytes(32))
        assert caught.value.code is Code.OTHER_RUN
        assert server.sessions == 0


async def test_another_version_is_refused_by_its_code(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, tls=None) as server:
        raw = RawJoin(server.port)
        await raw.hello(PrivateKey.generate().public, version=VERSION + 1)
        assert await raw.code() is Code.VERSION


async def test_a_peer_that_cannot_sign_with_its_key_is_refused(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, tls=None) as server:
        raw = RawJoin(server.port)
        victim, thief = PrivateKey.generate(), PrivateKey.generate()
        challenge = (await raw.hello(victim.public)).challenge
        text = transcript(RUN, victim.public, bytes(32), challenge.nonce, NO_CERTIFICATE)
        await raw.proof(thief.sign("join-peer", text + AGGREGATOR.public))
        assert await raw.code() is Code.BAD_SIGNATURE
        assert server.sessions == 0


async def test_a_key_of_small_order_is_refused(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, tls=None) as server:
        raw = RawJoin(server.port)
        await raw.hello(bytes([1]) + bytes(31))
        await raw.proof(bytes([1]) + bytes(63))
        assert await raw.code() is Code.BAD_KEY


async def test_a_proof_cannot_be_replayed(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, tls=None) as server:
        key = PrivateKey.generate()
        first = RawJoin(server.port)
        challenge = (await first.hello(key.public)).challenge
        text = transcript(RUN, key.public, bytes(32), challenge.nonce, NO_CERTIFICATE)
        proof = key.sign("join-peer", text + AGGREGATOR.public)
        assert len((await first.proof(proof)).welcome.session) == 16
        await first.channel.close()
        again = RawJoin(server.port)
        await again.hello(key.public)
        await again.proof(proof)
        assert await again.code() is Code.BAD_SIGNATURE


async def test_a_wrong_certificate_is_named_and_not_retried(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server:
        with pytest.raises(LinkError, match="somebody is in between") as caught:
            await join(server.port, certificate_sha256=make_tls_identity().fingerprint)
        assert caught.value.failure is LinkFailure.CERTIFICATE
        assert not caught.value.retryable


async def test_an_aggregator_that_the_run_does_not_name_is_refused(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server:
        with pytest.raises(ProtocolError) as caught:
            await Link.open(
                f"127.0.0.1:{server.port}",
                run_id=RUN,
                key=PrivateKey.generate(),
                expect_aggregators={PrivateKey.generate().public},
                certificate_sha256=None,
            )
        assert caught.value.code is Code.NOT_AN_AGGREGATOR
        assert server.sessions == 0


async def test_a_proxy_with_its_own_certificate_cannot_pass_the_join_on(tmp_path: Path) -> None:
    """It ends the TLS of the peer and opens its own to the aggregator, and relays what it reads in between."""
    async with serving(House(), tmp_path) as server:
        mine = make_tls_identity()
        pem = tmp_path / "proxy.pem"
        pem.write_bytes(mine.to_bytes())
        inward = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        inward.load_cert_chain(pem)
        inward.set_alpn_protocols(["h2"])
        outward = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        outward.check_hostname, outward.verify_mode = False, ssl.CERT_NONE
        outward.set_alpn_protocols(["h2"])
        relayed: list[int] = []

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(1 << 16):
                    relayed.append(len(data))
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.transport.abort()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=outward)
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        async with listening(accept, inward) as port:
            with pytest.raises(ProtocolError) as caught:
                await join(port, certificate_sha256=None)
            assert caught.value.code is Code.BAD_SIGNATURE
            assert sum(relayed) > 200, "the proxy must have relayed a challenge for this test to mean anything"
            with pytest.raises(LinkError) as pinned:
                await join(port)
            assert pinned.value.failure is LinkFailure.CERTIFICATE
            assert server.sessions == 0


async def test_joining_again_ends_the_older_session(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server:
        key = PrivateKey.generate()
        async with await join(server.port, key) as old, await join(server.port, key) as new:
            with pytest.raises(ProtocolError) as caught:
                await old.submit(os.urandom(32), b"x")
            assert caught.value.code is Code.BAD_SESSION
            assert (await new.submit(os.urandom(32), b"x")).accepted
            assert server.sessions == 1


async def test_sessions_are_bounded_in_all_and_per_source(tmp_path: Path) -> None:
    for limits in (ServiceLimits(sessions_max=2), ServiceLimits(sessions_per_source_max=2)):
        async with serving(House(), tmp_path, limits) as server:
            links = [await join(server.port) for _ in range(2)]
            with pytest.raises(ProtocolError) as caught:
                await join(server.port)
            assert caught.value.code is Code.BUSY
            for link in links:
                await link.close()


async def test_idle_sessions_make_room(tmp_path: Path) -> None:
    async with serving(House(), tmp_path, ServiceLimits(sessions_max=1, session_idle_s=0.05)) as server:
        idle = await join(server.port)
        await asyncio.sleep(0.1)
        async with await join(server.port):
            assert server.sessions == 1
        await idle.close()


async def test_half_open_joins_are_bounded_and_time_out(tmp_path: Path) -> None:
    limits = ServiceLimits(joins_per_source_max=2, join_step_s=0.5)
    async with serving(House(), tmp_path, limits, tls=None) as server:
        silent = [RawJoin(server.port) for _ in range(2)]
        for raw in silent:
            await raw.hello(PrivateKey.generate().public)
        with pytest.raises(ProtocolError) as caught:
            await join(server.port, plaintext=True, certificate_sha256=None)
        assert caught.value.code is Code.BUSY
        for raw in silent:
            assert await raw.code() is Code.BAD_MESSAGE
        async with await join(server.port, plaintext=True, certificate_sha256=None):
            assert server.sessions == 1


async def test_what_cannot_be_reached_is_explained(tmp_path: Path) -> None:
    async def failure(address: str, *, timeout_s: float = 5.0, plaintext: bool = False) -> LinkError:
        with pytest.raises(LinkError) as caught:
            await Link.open(
                address,
                run_id=RUN,
                key=PrivateKey.generate(),
                expect_aggregators=[],
                certificate_sha256=None,
                plaintext=plaintext,
                timeout_s=timeout_s,
            )
        return caught.value

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read()

    async def slams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with listening(mute) as silent, listening(chatty) as mail, listening(slams) as slam:
        cases = [
            (await failure("nonsense"), LinkFailure.ADDRESS, False),
            (await failure("::1:7000"), LinkFailure.ADDRESS, False),
            (await failure("host:99999"), LinkFailure.ADDRESS, False),
            (await failure("127.0.0.1:1"), LinkFailure.HERE, True),
            (await failure("0.0.0.0:1"), LinkFailure.REFUSED, True),
            (await failure("no-such-host.invalid:7000"), LinkFailure.DNS, True),
            (await failure(f"127.0.0.1:{silent}", timeout_s=0.3), LinkFailure.TIMEOUT, True),
            (await failure(f"127.0.0.1:{mail}"), LinkFailure.NOT_OURS, True),
            (await failure(f"127.0.0.1:{slam}"), LinkFailure.CUT, True),
        ]
        for error, kind, retryable in cases:
            assert (error.failure, error.retryable) == (kind, retryable), error.reason
            assert len(error.reason) > 15
        mute_plain = await failure(f"127.0.0.1:{silent}", plaintext=True, timeout_s=0.3)
        assert mute_plain.failure in {LinkFailure.TIMEOUT, LinkFailure.CUT}
    async with serving(House(), tmp_path, tls=None) as plain:
        assert (await failure(f"127.0.0.1:{plain.port}")).failure in {LinkFailure.NOT_OURS, LinkFailure.CUT}


async def test_two_aggregators_cannot_share_a_port(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server:
        with pytest.raises(OSError, match="cannot listen"):
            await serve(
                House(), host="127.0.0.1", port=server.port, key=AGGREGATOR, run_id=RUN, tls=TLS, spool=tmp_path
            )


async def test_a_join_that_stalls_in_the_middle_is_given_up(tmp_path: Path) -> None:
    async with serving(House(), tmp_path) as server, Wire(server.port).laid() as wire:
        wire.frozen = True
        with pytest.raises(LinkError) as caught:
            await join(wire.port, timeout_s=0.5)
        assert caught.value.failure is LinkFailure.TIMEOUT

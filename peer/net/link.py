"""A peer's side of the link to one aggregator (SPEC 9). The peer dials out; nothing ever connects to it. Bytes only."""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from peer.net.errors import LinkError, LinkFailure, from_rpc
from peer.net.messages import (
    AD_BYTES_MAX,
    ADS_MAX,
    DIGEST_BYTES,
    MESSAGE_BYTES_MAX,
    NO_CERTIFICATE,
    NONCE_BYTES,
    SERVICE,
    SESSION_BYTES,
    Aggregators,
    Amended,
    Heartbeat,
    Line,
    PacketStored,
    ReceiptMsg,
    RoundClosed,
    RoundEvent,
    RoundOpened,
    WatchEvent,
    transcript,
)
from peer.net.pb import swarm_pb2 as pb
from peer.net.throttle import Traffic
from peer.net.tls import NAME, Endpoint, fingerprint_of, probe
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, verify
from protocol.limits import FRAME_BYTES, RECORD_BYTES_MAX, VERSION

PROBE_S = 4.0
PROBE_PINGS = 3
PROBE_BURST_BYTES = 1 << 14
PROBE_BYTES = 4 << 20  # in each direction
_STALL_S = 120.0  # a submit or fetch that moves nothing for so long is given up, though the connection seems alive
_KEEPALIVE_S = 5.0
_KEEPALIVE_TIMEOUT_S = 10.0
_CLOSES_IN_MS_MAX = 7 * 24 * 3600 * 1000


class Link:
    """One joined session with one aggregator. Made by `Link.open`; every call raises LinkError or ProtocolError."""

    def __init__(self, address: str, certificate_sha256: bytes, control: grpc.aio.Channel, bulk: grpc.aio.Channel):
        self.address = address
        self.certificate_sha256 = certificate_sha256
        self.aggregator = b""
        self.head_record = b""  # the newest that it sent, not checked
        self.standby = False
        self.ads: tuple[bytes, ...] = ()  # of other aggregators, not checked
        self.traffic = Traffic()  # shared by all links of a program that caps or counts its bytes
        self._session = b""
        self._silence_s = 0.0
        self._closed = False
        self._control = control
        self._bulk = bulk

    @classmethod
    async def open(
        cls,
        address: str,
        *,
        run_id: bytes,
        key: PrivateKey,
        expect_aggregators: Collection[bytes],
        certificate_sha256: bytes | None,
        plaintext: bool = False,
        timeout_s: float = 15.0,
        silence_s: float = 15.0,
    ) -> Self:
        """Connect to "host:port", check who answers, and join the run with `key`.

        `certificate_sha256` is the fingerprint that an invite or a signed record promised; without one the join's
        signatures still tie the connection to one of `expect_aggregators`. A watch that hears nothing for `silence_s`
        counts as cut. Raises LinkError (unreachable, wrong certificate) or ProtocolError (other run, other version,
        refused, not one of the aggregators).
        """
        try:
            async with asyncio.timeout(timeout_s):
                endpoint = await probe(address, plaintext=plaintext, timeout_s=0.7 * timeout_s)
                found = fingerprint_of(endpoint.certificate_der) if endpoint.certificate_der else NO_CERTIFICATE
                if certificate_sha256 is not None and not plaintext and found != certificate_sha256:
                    reason = (
                        f"{address} shows certificate {found.hex()[:16]}, promised was {certificate_sha256.hex()[:16]}:"
                        " it was set up anew (ask for a new invite) or somebody is in between"
                    )
                    raise LinkError(LinkFailure.CERTIFICATE, reason, retryable=False)
                link = cls(address, found, _channel(endpoint, keepalive=True), _channel(endpoint, keepalive=False))
                link._silence_s = silence_s
                try:
                    await link._join(run_id, key, expect_aggregators)
                except BaseException:
                    await link.close()
                    raise
                return link
        except TimeoutError:
            reason = f"{address} did not complete the join within {timeout_s:g} s"
            raise LinkError(LinkFailure.TIMEOUT, reason, retryable=True) from None

    async def _join(self, run_id: bytes, key: PrivateKey, expect_aggregators: Collection[bytes]) -> None:
        call: Any = self._control.stream_stream(
            f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinReply.FromString
        )()
        try:
            nonce = os.urandom(NONCE_BYTES)
            hello = pb.Hello(version=VERSION, run_id=run_id, peer=key.public, nonce=nonce)
            await call.write(pb.JoinRequest(hello=hello))
            challenge = _step(await call.read(), "challenge").challenge
            if challenge.aggregator not in expect_aggregators:
                raise ProtocolError(
                    Code.NOT_AN_AGGREGATOR, f"{self.address} is run by a key that the run does not name"
                )
            if len(challenge.nonce) != NONCE_BYTES:
                raise ProtocolError(Code.BAD_MESSAGE, f"a nonce has {NONCE_BYTES} bytes")
            text = transcript(run_id, key.public, nonce, challenge.nonce, self.certificate_sha256)
            verify(challenge.aggregator, "join-aggregator", text, challenge.signature)
            signature = key.sign("join-peer", text + challenge.aggregator)
            await call.write(pb.JoinRequest(proof=pb.Proof(signature=signature)))
            welcome = _step(await call.read(), "welcome").welcome
            await call.done_writing()
        except asyncio.InvalidStateError:
            # A write after the server has ended the call; its status says why.
            raise await self._status_error(call) from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None
        finally:
            call.cancel()
        if len(welcome.session) != SESSION_BYTES or len(welcome.head_record) > RECORD_BYTES_MAX:
            raise ProtocolError(Code.BAD_MESSAGE, "the welcome is malformed")
        self.aggregator, self._session, self.head_record = challenge.aggregator, welcome.session, welcome.head_record
        self.standby = welcome.standby

    async def _status_error(self, call: Any) -> LinkError | ProtocolError:
        error = grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )
        return from_rpc(error, self.address)

    async def watch(self) -> AsyncGenerator[RoundEvent, None]:
        """Take part: rounds as they open and close. Ends when the aggregator has nothing more to say."""
        async with aclosing(self._watch(pb.WatchRequest(session=self._session))) as events:
            async for event in events:
                if isinstance(event, RoundOpened | RoundClosed):
                    yield event

    async def observe(
        self, head_record: bytes = b"", ad: bytes = b""
    ) -> AsyncGenerator[RoundEvent | PacketStored | Heartbeat, None]:
        """Look on: rounds, packets and signs of life. Shows the newest record that we know, and where we serve."""
        request = pb.WatchRequest(session=self._session, observer=True, head_record=head_record, ad=ad)
        async with aclosing(self._watch(request)) as events:
            async for event in events:
                if not isinstance(event, Aggregators):
                    yield event

    async def show(self, head_record: bytes, timeout_s: float) -> None:
        """Show the aggregator a record that it may not know; what it makes of it is its own affair."""
        with suppress(LinkError, ProtocolError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                async with aclosing(self.observe(head_record)) as events:
                    await anext(events)

    async def _watch(self, request: pb.WatchRequest) -> AsyncGenerator[WatchEvent | Heartbeat, None]:
        call: Any = self._control.unary_stream(
            f"/{SERVICE}/Watch", pb.WatchRequest.SerializeToString, pb.RoundEvent.FromString
        )(request)
        try:
            while True:
                async with asyncio.timeout(self._silence_s):
                    message = await call.read()
                if not isinstance(message, pb.RoundEvent):
                    return
                event = _event(message)
                if isinstance(event, RoundClosed):
                    self.head_record = event.record
                elif isinstance(event, Aggregators):
                    self.ads = event.ads
                if event is not None:
                    yield event
        except TimeoutError:
            reason = f"{self.address} has been silent for {self._silence_s:g} s"
            raise LinkError(LinkFailure.TIMEOUT, reason, retryable=True) from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None
        except asyncio.CancelledError as cancelled:
            raise self._closed_under() or cancelled from None
        finally:
            call.cancel()

    async def submit(self, digest: bytes, data: bytes) -> ReceiptMsg:
        """Send a packet's wire bytes and wait for the receipt. Sending the same bytes again is harmless."""
        call: Any = self._bulk.stream_stream(
            f"/{SERVICE}/Submit", pb.SubmitRequest.SerializeToString, pb.SubmitReply.FromString
        )()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(_STALL_S) as limit:
                start = pb.SubmitStart(session=self._session, digest=digest, size=len(data))
                await call.write(pb.SubmitRequest(start=start))
                reply = await call.read()
                if not isinstance(reply, pb.SubmitReply) or reply.WhichOneof("step") != "receipt":
                    _reply(reply, "go")
                    writer = asyncio.create_task(_send(call, data, limit, self.traffic))
                    reply = await call.read()
                receipt = _reply(reply, "receipt").receipt
        except TimeoutError:
            reason = f"{self.address} took no data for {_STALL_S:g} s"
            raise LinkError(LinkFailure.TIMEOUT, reason, retryable=True) from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None
        except asyncio.CancelledError as cancelled:
            raise self._closed_under() or cancelled from None
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            call.cancel()
        if receipt.digest != digest:
            raise ProtocolError(Code.WRONG_DIGEST, "the receipt is for another packet")
        return ReceiptMsg(receipt.digest, receipt.accepted, receipt.code)

    async def fetch(
        self,
        kind: str,
        digest: bytes,
        *,
        size_max: int,
        resume: bytes = b"",
        sink: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """Fetch a whole blob of at most `size_max` bytes, going on after the bytes `resume` that are here already.

        The caller checks the hash. When the connection breaks, the LinkError's `partial` is what to resume with; `sink`
        has then had every new byte of it.
        """
        request = pb.FetchRequest(session=self._session, kind=kind, digest=digest, offset=len(resume))
        call: Any = self._bulk.unary_stream(
            f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, pb.BlobFrame.FromString
        )(request)
        data = bytearray(resume)
        size: int | None = None
        try:
            while True:
                async with asyncio.timeout(_STALL_S):
                    frame = await call.read()
                if not isinstance(frame, pb.BlobFrame):
                    break
                if size is None:
                    size = frame.size
                    if size > size_max:
                        raise ProtocolError(Code.TOO_LARGE, f"{kind} of {size} bytes; at most {size_max} are expected")
                elif not frame.data:
                    raise ProtocolError(Code.BAD_MESSAGE, "an empty frame in the middle of a blob")
                data += frame.data
                if len(data) > size:
                    raise ProtocolError(Code.BAD_MESSAGE, f"more bytes than the {size} that were announced")
                if sink is not None:
                    sink(frame.data)
                await self.traffic.down.take(len(frame.data))
        except TimeoutError:
            reason = f"{self.address} sent nothing for {_STALL_S:g} s"
            raise LinkError(LinkFailure.TIMEOUT, reason, retryable=True, partial=bytes(data)) from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address, bytes(data)) from None
        except asyncio.CancelledError as cancelled:
            raise self._closed_under(bytes(data)) or cancelled from None
        finally:
            call.cancel()
        if size is None or len(data) != size:
            reason = f"{self.address} ended the {kind} after {len(data)} of {size} bytes"
            raise LinkError(LinkFailure.CUT, reason, retryable=True, partial=bytes(data))
        return bytes(data)

    async def amend(self, data: bytes = b"", timeout_s: float = 30.0) -> Amended:
        """Bring an amendment, durable when this returns, or none to ask what is there."""
        call: Any = self._control.unary_unary(
            f"/{SERVICE}/Amend", pb.AmendRequest.SerializeToString, pb.AmendReply.FromString
        )(pb.AmendRequest(session=self._session, amendment=data), timeout=timeout_s)
        try:
            reply: pb.AmendReply = await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None
        except asyncio.CancelledError as cancelled:
            raise self._closed_under() or cancelled from None
        if len(reply.newest) != DIGEST_BYTES:
            raise ProtocolError(Code.BAD_MESSAGE, "the answer to an amendment is malformed")
        return Amended(reply.newest, reply.round)

    async def probe(self, seconds: float = PROBE_S) -> Line:
        """Measure the line, in about `seconds` for each direction: what a packet will meet, over the same connection.

        Bursts double from one to the next, so that the last one is long enough to be measured and a slow line is not
        held up by the first.
        """
        call: Any = self._bulk.stream_stream(
            f"/{SERVICE}/Probe", pb.ProbeRequest.SerializeToString, pb.ProbeReply.FromString
        )()
        try:
            trips, ahead = [], []
            for turn in range(PROBE_PINGS):
                session = self._session if not turn else b""
                sent_s, began_s = time.time(), time.perf_counter()
                (reply,) = await _exchange(call, [pb.ProbeRequest(session=session)])
                trips.append(time.perf_counter() - began_s)
                ahead.append(sent_s + trips[-1] / 2 - reply.now_ms / 1000)
            trip_s = min(trips)
            up = await _burst_speed(call, lambda size: pb.ProbeRequest(padding=os.urandom(size)), trip_s, seconds)
            down = await _burst_speed(call, lambda size: pb.ProbeRequest(down_bytes=size), trip_s, seconds)
            await call.done_writing()
            return Line(up, down, trip_s, ahead[trips.index(trip_s)])
        except asyncio.InvalidStateError:
            raise await self._status_error(call) from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None
        except TimeoutError:
            reason = f"{self.address} did not answer a probe for {_STALL_S:g} s"
            raise LinkError(LinkFailure.TIMEOUT, reason, retryable=True) from None
        except asyncio.CancelledError as cancelled:
            raise self._closed_under() or cancelled from None
        finally:
            call.cancel()

    def _closed_under(self, partial: bytes = b"") -> LinkError | None:
        """What a cancelled call means when it was not its task that was cancelled: the link was closed meanwhile."""
        task = asyncio.current_task()
        if not self._closed or (task is not None and task.cancelling()):
            return None
        reason = f"the link to {self.address} was closed on this side"
        return LinkError(LinkFailure.CUT, reason, retryable=True, partial=partial)

    async def close(self) -> None:
        """End the session's calls and both connections. Harmless when they are gone already."""
        self._closed = True
        await self._control.close()
        await self._bulk.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _channel(endpoint: Endpoint, *, keepalive: bool) -> grpc.aio.Channel:
    """A connection of its own to the endpoint. Control and bulk have one each, so that heartbeats never queue behind
    a packet, and only control is watched by pings: on a slow line a ping would wait behind the packet too."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if keepalive:
        options += [
            ("grpc.keepalive_time_ms", round(_KEEPALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(_KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.http2.ping_timeout_ms", round(_KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    if endpoint.certificate_der is None:
        return grpc.aio.insecure_channel(endpoint.target, options)
    root = ssl.DER_cert_to_PEM_cert(endpoint.certificate_der).encode("ascii")
    options.append(("grpc.ssl_target_name_override", NAME))
    return grpc.aio.secure_channel(endpoint.target, grpc.ssl_channel_credentials(root), options)


async def _send(call: Any, data: bytes, limit: asyncio.Timeout, traffic: Traffic) -> None:
    """Write the frames, and push the limit on with each, so that only a standstill runs into it."""
    rest = memoryview(data)
    while rest:
        size = traffic.up.frame_bytes(FRAME_BYTES)
        frame, rest = bytes(rest[:size]), rest[size:]
        await traffic.up.take(len(frame))
        await call.write(pb.SubmitRequest(frame=frame))
        limit.reschedule(asyncio.get_running_loop().time() + _STALL_S)
    await call.done_writing()


def _reply(message: Any, wanted: str) -> pb.SubmitReply:
    if not isinstance(message, pb.SubmitReply) or message.WhichOneof("step") != wanted:
        raise ProtocolError(Code.BAD_MESSAGE, f"the aggregator's next message in a submit is {wanted}")
    return message


def _step(message: Any, wanted: str) -> pb.JoinReply:
    if not isinstance(message, pb.JoinReply) or message.WhichOneof("step") != wanted:
        raise ProtocolError(Code.BAD_MESSAGE, f"the aggregator's next message in a join is {wanted}")
    return message


def _event(message: pb.RoundEvent) -> WatchEvent | Heartbeat | None:
    """The event of a message, None for kinds that a later version may add."""
    kind = message.WhichOneof("event")
    if kind == "heartbeat":
        return Heartbeat()
    if kind == "stored":
        if len(message.stored.digest) != DIGEST_BYTES:
            raise ProtocolError(Code.BAD_MESSAGE, "the announcement of a packet is malformed")
        return PacketStored(message.stored.digest)
    if kind == "aggregators":
        ads = tuple(message.aggregators.ads)
        if len(ads) > ADS_MAX or any(len(ad) > AD_BYTES_MAX for ad in ads):
            raise ProtocolError(Code.BAD_MESSAGE, "the list of aggregators is malformed")
        return Aggregators(ads)
    if kind == "opened":
        opened = message.opened
        if len(opened.base_root) != DIGEST_BYTES or opened.closes_in_ms > _CLOSES_IN_MS_MAX:
            raise ProtocolError(Code.BAD_MESSAGE, "the opening of a round is malformed")
        return RoundOpened(opened.round, opened.base_root, opened.inner_steps, opened.closes_in_ms / 1000)
    if kind == "closed":
        if len(message.closed.record) > RECORD_BYTES_MAX:
            raise ProtocolError(Code.BAD_MESSAGE, "a round record is too large")
        return RoundClosed(message.closed.record, message.closed.update_bytes, message.closed.bundle_bytes)
    return None


async def _burst_speed(call: Any, question: Callable[[int], pb.ProbeRequest], trip_s: float, seconds: float) -> float:
    """Bytes a second of the last of some bursts, each twice as long as the one before."""
    size, moved, began_s = PROBE_BURST_BYTES, 0, time.perf_counter()
    while True:
        sizes = [FRAME_BYTES] * (size // FRAME_BYTES) + [size % FRAME_BYTES] * (size % FRAME_BYTES > 0)
        questions = [question(each) for each in sizes]
        burst_s = time.perf_counter()
        await _exchange(call, questions)
        took_s = time.perf_counter() - burst_s
        moved += size
        if moved + 2 * size > PROBE_BYTES or time.perf_counter() - began_s + 2 * took_s > seconds:
            return size / max(took_s - trip_s, 1e-6)
        size *= 2


async def _exchange(call: Any, questions: Sequence[pb.ProbeRequest]) -> list[pb.ProbeReply]:
    """Send all of these, and wait for the answers to all of them."""

    async def write() -> None:
        for question in questions:
            await call.write(question)

    writer, replies = asyncio.create_task(write()), []
    try:
        async with asyncio.timeout(_STALL_S):
            for question in questions:
                reply = await call.read()
                if not isinstance(reply, pb.ProbeReply) or len(reply.padding) != question.down_bytes:
                    raise ProtocolError(Code.BAD_MESSAGE, "the answer to a probe is not what it asked for")
                replies.append(reply)
            await writer
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
    return replies

"""The aggregator's side of the link: joins, watches, submits and fetches over grpc.aio (SPEC 9). Bytes only."""

import asyncio
import io
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import grpc
import grpc.aio

from peer.net.errors import status_of
from peer.net.messages import (
    AD_BYTES_MAX,
    DIGEST_BYTES,
    MESSAGE_BYTES_MAX,
    NO_CERTIFICATE,
    NONCE_BYTES,
    SERVICE,
    Aggregators,
    Amended,
    PacketStored,
    ReceiptMsg,
    RoundOpened,
    WatchEvent,
    other_version,
    transcript,
)
from peer.net.pb import swarm_pb2 as pb
from peer.net.sessions import PerMinute, ServiceLimits, Session, SessionEndedError, Sessions, first_of, source_of
from peer.net.throttle import Traffic
from peer.net.tls import TlsIdentity, is_loopback
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, verify
from protocol.limits import AMENDMENT_BYTES_MAX, FRAME_BYTES, RECORD_BYTES_MAX, VERSION

__all__ = ["Handler", "Server", "ServiceLimits", "serve"]

T = TypeVar("T")
P = ParamSpec("P")
_log = logging.getLogger(__name__)
_KIND_CHARS_MAX = 16
# gRPC hands a message over whole or not at all, so a cut connection costs half a frame on average.
_FETCH_FRAME_BYTES = 1 << 16
_SPOOL_PREFIX = "incoming-"
_SPOOL_SUFFIX = ".part"
_DEFAULT_LIMITS = ServiceLimits()
_STOPPING = "the aggregator is shutting down"

Context = grpc.aio.ServicerContext[Any, Any]


class Handler(Protocol):
    """What the aggregator program supplies. A ProtocolError from any of these reaches the peer with its code."""

    submit_bytes_max: int
    standby: bool
    """Whether another aggregator opens the rounds."""

    async def welcome(self, peer: bytes) -> bytes:
        """Admit a peer that has proved its key: the bytes of the newest round record."""

    async def joined(self, peer: bytes) -> None:
        """The peer's first watch began. `joined` and `left` of one peer alternate."""

    async def left(self, peer: bytes) -> None:
        """The peer's last watch ended, for whatever reason."""

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        """What a peer showed when it began to watch: the newest record it knows and its own ad, each empty if not."""

    def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """What this peer is told, starting with the state of things now. Closed when the watch ends."""

    def observe(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """The same for a peer that does not take part, with every packet besides."""

    async def receipt(self, peer: bytes, digest: bytes) -> ReceiptMsg | None:
        """The answer to a packet if it is known without its bytes."""

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        """Take a packet's wire bytes. A path is a file that the handler may move away; it is deleted afterwards."""

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        """A content-addressed blob, or None when there is none."""

    async def amend(self, peer: bytes, data: bytes) -> Amended:
        """Keep the operator's next amendment, unless `data` is empty, and say what is here then."""


Method = Callable[["_Service", Any, Context], Awaitable[Any]]


def _guarded(method: Method) -> Method:
    """Turn what a call raises into a gRPC status. Only the detail of a ProtocolError is for strangers' eyes."""

    async def call(self: "_Service", request: Any, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except ProtocolError as error:
            await context.abort(*status_of(error))
        except SessionEndedError as ended:
            if self.stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _STOPPING)
            await context.abort(*status_of(ProtocolError(Code.BAD_SESSION, str(ended))))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:
            _log.debug("%s went away in the middle of a call", context.peer())
        except Exception:  # noqa: BLE001 -- whatever fails inside must not leave the peer without a status
            _log.exception("a call of %s failed", context.peer())
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return call


class _Service:
    def __init__(
        self,
        handler: Handler,
        key: PrivateKey,
        run_id: bytes,
        certificate_sha256: bytes,
        spool: Path,
        limits: ServiceLimits,
        traffic: Traffic,
    ) -> None:
        self._handler = handler
        self._traffic = traffic
        self._key = key
        self._run_id = run_id
        self._certificate_sha256 = certificate_sha256
        self._spool = spool
        self._limits = limits
        self._watches: dict[bytes, int] = {}
        self._presence = asyncio.Lock()
        self._submitting: set[bytes] = set()
        self._submit_turns = asyncio.Semaphore(limits.submits_max)
        self._farewells: set[asyncio.Task[None]] = set()
        self._probing = 0
        self._probes = PerMinute(limits.probes_per_minute_max, "probes a minute are served")
        self.sessions = Sessions(limits)
        self.stopping = False

    # Join

    @_guarded
    async def join(self, _request: Any, context: Context) -> None:
        source = source_of(context.peer())
        with self.sessions.half_open(source):
            hello = (await self._step(context, "hello")).hello
            self._check_hello(hello)
            nonce = os.urandom(NONCE_BYTES)
            text = transcript(self._run_id, hello.peer, hello.nonce, nonce, self._certificate_sha256)
            signature = self._key.sign("join-aggregator", text)
            challenge = pb.Challenge(nonce=nonce, aggregator=self._key.public, signature=signature)
            await self._write(context, pb.JoinReply(challenge=challenge))
            proof = (await self._step(context, "proof")).proof
            verify(hello.peer, "join-peer", text + self._key.public, proof.signature)
        head = await self._handler.welcome(hello.peer)
        assert len(head) <= RECORD_BYTES_MAX
        session = self.sessions.admit(hello.peer, source)
        welcome = pb.Welcome(session=session.token, head_record=head, standby=self._handler.standby)
        await self._write(context, pb.JoinReply(welcome=welcome))

    async def _step(self, context: Context, wanted: str) -> pb.JoinRequest:
        try:
            async with asyncio.timeout(self._limits.join_step_s):
                message = await context.read()
        except TimeoutError:
            raise ProtocolError(Code.BAD_MESSAGE, f"no {wanted} within {self._limits.join_step_s:g} s") from None
        if not isinstance(message, pb.JoinRequest) or message.WhichOneof("step") != wanted:
            raise ProtocolError(Code.BAD_MESSAGE, f"the next message of a join is {wanted}")
        return message

    def _check_hello(self, hello: pb.Hello) -> None:
        if self.stopping:
            raise SessionEndedError(_STOPPING)
        if hello.version != VERSION:
            raise ProtocolError(Code.VERSION, other_version(VERSION, hello.version))
        if hello.run_id != self._run_id:
            raise ProtocolError(Code.OTHER_RUN, "this aggregator serves another run")
        if len(hello.nonce) != NONCE_BYTES:
            raise ProtocolError(Code.BAD_MESSAGE, f"a nonce has {NONCE_BYTES} bytes")

    # Watch

    @_guarded
    async def watch(self, request: pb.WatchRequest, context: Context) -> None:
        session = self.sessions.find(request.session)
        if len(request.head_record) > RECORD_BYTES_MAX or len(request.ad) > AD_BYTES_MAX:
            raise ProtocolError(Code.BAD_MESSAGE, "a watch shows one record and one ad")
        if request.head_record or request.ad:
            await self._handler.shown(session.peer, request.head_record, request.ad)
        await session.run(self._watch(session, request.observer, context))

    async def _watch(self, session: Session, observer: bool, context: Context) -> None:
        replaced = session.take_watch()
        if not observer:
            await self._arrive(session.peer)
        events = self._handler.observe(session.peer) if observer else self._handler.watch(session.peer)
        upcoming: asyncio.Task[WatchEvent] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.create_task(_next(events))
                await first_of(upcoming, replaced, timeout_s=self._limits.heartbeat_s)
                if replaced.done():
                    raise SessionEndedError("a newer watch of the same session took over")
                message = pb.RoundEvent(heartbeat=pb.Heartbeat())
                if upcoming.done():
                    try:
                        message = _event_message(upcoming.result())
                    except StopAsyncIteration:
                        return
                    upcoming = None
                await self._write(context, message)
        finally:
            # The farewell is a task of its own, because gRPC cancels this one when the peer is gone.
            farewell = asyncio.create_task(self._leave(session.peer, observer, events, upcoming))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)
            await asyncio.shield(farewell)

    async def _arrive(self, peer: bytes) -> None:
        async with self._presence:
            self._watches[peer] = self._watches.get(peer, 0) + 1
            if self._watches[peer] == 1:
                await self._handler.joined(peer)

    async def _leave(
        self,
        peer: bytes,
        observer: bool,
        events: AsyncGenerator[WatchEvent, None],
        upcoming: asyncio.Task[WatchEvent] | None,
    ) -> None:
        if upcoming is not None:
            upcoming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await upcoming
        await events.aclose()
        if observer:
            return
        async with self._presence:
            self._watches[peer] -= 1
            if not self._watches[peer]:
                del self._watches[peer]
                await self._handler.left(peer)

    # Submit

    @_guarded
    async def submit(self, _request: Any, context: Context) -> None:
        first = await self._frame(context)
        if not isinstance(first, pb.SubmitRequest) or first.WhichOneof("part") != "start":
            raise ProtocolError(Code.BAD_MESSAGE, "a submit starts with SubmitStart")
        session = self.sessions.find(first.start.session)
        await session.run(self._submit(session, first.start, context))

    async def _submit(self, session: Session, start: pb.SubmitStart, context: Context) -> None:
        if len(start.digest) != DIGEST_BYTES or not start.size:
            raise ProtocolError(Code.BAD_MESSAGE, f"a submit names a digest of {DIGEST_BYTES} bytes and a size above 0")
        if start.size > self._handler.submit_bytes_max:
            limit = self._handler.submit_bytes_max
            raise ProtocolError(Code.TOO_LARGE, f"{start.size} bytes; a packet of this run has at most {limit}")
        if session.peer in self._submitting:
            raise ProtocolError(Code.BUSY, "your previous submit is still running")
        self._submitting.add(session.peer)
        try:
            receipt = await self._handler.receipt(session.peer, start.digest)
            if receipt is None:
                await self._turn()
                try:
                    await self._write(context, pb.SubmitReply(go=pb.SubmitGo()))
                    receipt = await self._receive(session.peer, start, context)
                finally:
                    self._submit_turns.release()
        finally:
            self._submitting.discard(session.peer)
        message = pb.Receipt(digest=receipt.digest, accepted=receipt.accepted, code=receipt.code)
        await self._write(context, pb.SubmitReply(receipt=message))

    async def _turn(self) -> None:
        try:
            async with asyncio.timeout(self._limits.submit_turn_s):
                await self._submit_turns.acquire()
        except TimeoutError:
            raise ProtocolError(Code.BUSY, "too many packets arrive at this moment") from None

    async def _receive(self, peer: bytes, start: pb.SubmitStart, context: Context) -> ReceiptMsg:
        deadline_s = self._limits.frame_gap_s + start.size / self._limits.bytes_per_s_min
        if start.size <= self._limits.submit_memory_bytes_max:
            memory = bytearray()
            await self._frames(context, start.size, memory.extend, deadline_s)
            return await self._handler.submit(peer, start.digest, bytes(memory))
        path = self._spool / f"{_SPOOL_PREFIX}{secrets.token_hex(16)}{_SPOOL_SUFFIX}"
        try:
            with await _in_thread(open, path, "xb", 0) as file:

                async def write(frame: bytes) -> None:
                    await _in_thread(_write_all, file, frame)

                await self._frames(context, start.size, write, deadline_s)
            return await self._handler.submit(peer, start.digest, path)
        except OSError as error:
            _log.error("cannot store a packet in %s: %s", self._spool, error)
            raise ProtocolError(Code.BUSY, "the aggregator cannot store packets at this moment") from None
        finally:
            await _in_thread(path.unlink, True)

    async def _frames(
        self, context: Context, size: int, sink: Callable[[bytes], Awaitable[None] | None], deadline_s: float
    ) -> None:
        received = 0
        try:
            async with asyncio.timeout(deadline_s):
                while (message := await self._frame(context)) is not None:
                    data = message.frame
                    if not 0 < len(data) <= FRAME_BYTES:
                        raise ProtocolError(Code.BAD_MESSAGE, f"a frame carries 1 to {FRAME_BYTES} bytes")
                    received += len(data)
                    if received > size:
                        raise ProtocolError(Code.BAD_MESSAGE, f"more bytes than the {size} that were announced")
                    waiting = sink(data)
                    if waiting is not None:
                        await waiting
        except TimeoutError:
            raise ProtocolError(Code.BAD_MESSAGE, f"{received} bytes in {deadline_s:.0f} s is too slow") from None
        if received != size:
            raise ProtocolError(Code.BAD_MESSAGE, f"{received} bytes of the {size} that were announced")

    async def _frame(self, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._limits.frame_gap_s):
                message = await context.read()
        except TimeoutError:
            raise ProtocolError(Code.BAD_MESSAGE, f"no frame for {self._limits.frame_gap_s:g} s") from None
        return message if isinstance(message, pb.SubmitRequest) else None

    # Fetch

    @_guarded
    async def fetch(self, request: pb.FetchRequest, context: Context) -> None:
        session = self.sessions.find(request.session)
        if session.fetches >= self._limits.fetches_per_session_max:
            raise ProtocolError(Code.BUSY, f"a session has {self._limits.fetches_per_session_max} fetches at once")
        session.fetches += 1
        try:
            await session.run(self._fetch(request, context))
        finally:
            session.fetches -= 1

    async def _fetch(self, request: pb.FetchRequest, context: Context) -> None:
        if len(request.digest) != DIGEST_BYTES or len(request.kind) > _KIND_CHARS_MAX:
            raise ProtocolError(Code.BAD_MESSAGE, f"a fetch names a kind and a digest of {DIGEST_BYTES} bytes")
        blob = await self._handler.blob(request.kind, request.digest)
        if blob is None:
            raise ProtocolError(Code.NOT_FOUND, f"no {request.kind} {request.digest.hex()[:16]} here")
        if isinstance(blob, bytes):
            await self._stream(context, request.offset, len(blob), lambda at: blob[at : at + _FETCH_FRAME_BYTES])
            return
        with await _in_thread(open, blob, "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size

            def read(at: int) -> Awaitable[bytes]:
                return _in_thread(os.pread, file.fileno(), _FETCH_FRAME_BYTES, at)

            await self._stream(context, request.offset, size, read)

    async def _stream(
        self, context: Context, offset: int, size: int, read: Callable[[int], bytes | Awaitable[bytes]]
    ) -> None:
        if offset > size:
            raise ProtocolError(Code.BAD_MESSAGE, f"offset {offset} is beyond the end of a blob of {size} bytes")
        first = True
        while first or offset < size:
            chunk = read(offset)
            data = chunk if isinstance(chunk, bytes) else await chunk
            if not data and offset < size:
                raise ProtocolError(Code.NOT_FOUND, "the blob was removed meanwhile")
            await self._traffic.up.take(len(data))
            await self._write(context, pb.BlobFrame(size=size if first else 0, data=data))
            offset += len(data)
            first = False

    async def _write(self, context: Context, message: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.frame_gap_s):
                await context.write(message)
        except TimeoutError:
            raise ProtocolError(Code.BUSY, f"you took no data for {self._limits.frame_gap_s:g} s") from None

    # Amend

    @_guarded
    async def amend(self, request: pb.AmendRequest, context: Context) -> pb.AmendReply:
        session = self.sessions.find(request.session)
        if len(request.amendment) > AMENDMENT_BYTES_MAX:
            raise ProtocolError(Code.TOO_LARGE, f"an amendment has at most {AMENDMENT_BYTES_MAX} bytes")
        session.amends.demand()
        amended = await session.run(self._handler.amend(session.peer, request.amendment))
        return pb.AmendReply(newest=amended.newest, round=amended.round)

    # Probe

    @_guarded
    async def probe(self, _request: Any, context: Context) -> None:
        first = await self._question(context)
        if first is None:
            raise ProtocolError(Code.BAD_MESSAGE, "a probe starts with a request")
        session = self.sessions.find(first.session)
        if self._probing >= self._limits.probes_max:
            raise ProtocolError(Code.BUSY, "others are measuring their line at this moment")
        session.probes.demand()
        self._probes.demand()
        self._probing += 1
        try:
            async with asyncio.timeout(self._limits.probe_s_max):
                await session.run(self._answer(first, context))
        except TimeoutError:
            raise ProtocolError(Code.BUSY, f"a probe takes at most {self._limits.probe_s_max:g} s") from None
        finally:
            self._probing -= 1

    async def _answer(self, first: pb.ProbeRequest, context: Context) -> None:
        up_bytes = down_bytes = 0
        question: pb.ProbeRequest | None = first
        while question is not None:
            if max(len(question.padding), question.down_bytes) > FRAME_BYTES:
                raise ProtocolError(Code.BAD_MESSAGE, f"a probe's messages have at most {FRAME_BYTES} bytes")
            up_bytes += len(question.padding)
            down_bytes += question.down_bytes
            if max(up_bytes, down_bytes) > self._limits.probe_bytes_max:
                limit = self._limits.probe_bytes_max
                raise ProtocolError(Code.TOO_LARGE, f"a probe moves at most {limit} bytes each way")
            padding = os.urandom(question.down_bytes)  # so that nothing on the way can compress it
            await self._write(context, pb.ProbeReply(now_ms=time.time_ns() // 1_000_000, padding=padding))
            question = await self._question(context)

    async def _question(self, context: Context) -> pb.ProbeRequest | None:
        try:
            async with asyncio.timeout(self._limits.frame_gap_s):
                message = await context.read()
        except TimeoutError:
            raise ProtocolError(Code.BAD_MESSAGE, f"no request for {self._limits.frame_gap_s:g} s") from None
        return message if isinstance(message, pb.ProbeRequest) else None

    # The end

    async def stop(self) -> None:
        self.stopping = True
        self.sessions.end_all(_STOPPING)
        while self._farewells:
            await asyncio.wait(set(self._farewells))

    def rpc_handlers(self) -> grpc.GenericRpcHandler:
        serialize = type(pb.Hello()).SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.stream_stream_rpc_method_handler(self.join, pb.JoinRequest.FromString, serialize),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch, pb.WatchRequest.FromString, serialize),
                "Submit": grpc.stream_stream_rpc_method_handler(self.submit, pb.SubmitRequest.FromString, serialize),
                "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch, pb.FetchRequest.FromString, serialize),
                "Amend": grpc.unary_unary_rpc_method_handler(self.amend, pb.AmendRequest.FromString, serialize),
                "Probe": grpc.stream_stream_rpc_method_handler(self.probe, pb.ProbeRequest.FromString, serialize),
            },
        )


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread. A cancelled caller waits for its end, lest a file be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def _next(events: AsyncGenerator[WatchEvent, None]) -> WatchEvent:
    return await anext(events)


def _event_message(event: WatchEvent) -> pb.RoundEvent:
    match event:
        case RoundOpened(round=number, base_root=base_root, inner_steps=steps, closes_in_s=closes_in_s):
            left_ms = max(0, round(closes_in_s * 1000))
            opened = pb.RoundOpened(round=number, base_root=base_root, inner_steps=steps, closes_in_ms=left_ms)
            return pb.RoundEvent(opened=opened)
        case PacketStored(digest=digest):
            return pb.RoundEvent(stored=pb.PacketStored(digest=digest))
        case Aggregators(ads=ads):
            return pb.RoundEvent(aggregators=pb.Aggregators(ads=ads))
        case _:
            sizes = {"update_bytes": event.update_bytes, "bundle_bytes": event.bundle_bytes}
            return pb.RoundEvent(closed=pb.RoundClosed(record=event.record, **sizes))


def _empty(spool: Path) -> None:
    spool.mkdir(parents=True, exist_ok=True)
    for stale in spool.glob(f"{_SPOOL_PREFIX}*{_SPOOL_SUFFIX}"):
        stale.unlink(missing_ok=True)


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


class Server:
    """A running service. `port` is the one it listens on."""

    def __init__(self, server: grpc.aio.Server, service: _Service, port: int) -> None:
        self._server = server
        self._service = service
        self.port = port

    @property
    def sessions(self) -> int:
        """How many peers have a session."""
        return len(self._service.sessions)

    async def close(self, grace_s: float = 2.0) -> None:
        """Tell every peer, let running calls end within the grace, then stop listening."""
        await self._service.stop()
        await self._server.stop(grace_s)


async def serve(
    handler: Handler,
    *,
    host: str,
    port: int,
    key: PrivateKey,
    run_id: bytes,
    tls: TlsIdentity | None,
    spool: Path,
    limits: ServiceLimits = _DEFAULT_LIMITS,
    traffic: Traffic | None = None,
) -> Server:
    """Listen and serve until the returned Server is closed. Port 0 takes a free one.

    `spool` is a folder for packets that are still arriving; `traffic` counts and caps what others fetch. Raises
    ValueError for plaintext on an address that other machines can reach, and OSError when the address cannot be had.
    """
    if tls is None and not is_loopback(host):
        raise ValueError(f"plaintext is for this machine only, and {host} is open to others: use TLS")
    await asyncio.to_thread(_empty, spool)
    service = _Service(
        handler, key, run_id, tls.fingerprint if tls else NO_CERTIFICATE, spool, limits, traffic or Traffic()
    )
    server = grpc.aio.server(
        options=_options(limits),
        # Beyond this calls are refused at once, so that a flood of them holds no memory.
        maximum_concurrent_rpcs=4 * limits.sessions_max + 2 * limits.joins_max,
    )
    server.add_generic_rpc_handlers((service.rpc_handlers(),))
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(target)
        else:
            pair = (tls.private_key_pem, tls.certificate_pem)
            bound = server.add_secure_port(target, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        bound = 0
    if not bound:
        raise OSError(f"cannot listen on {target}: the port is taken or the address is not of this machine")
    await server.start()
    return Server(server, service, bound)


def _options(limits: ServiceLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_concurrent_streams", 16),
        # Two aggregators must not share a port and split the peers between them.
        ("grpc.so_reuseport", 0),
        # Pings notice a peer that froze or vanished behind a NAT, even when nothing is under way.
        ("grpc.keepalive_time_ms", round(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.max_connection_idle_ms", round(limits.session_idle_s * 1000)),
        ("grpc.server_handshake_timeout_ms", round(limits.join_step_s * 1000)),
    ]

"""Which of a run's aggregators leads: the program behind `sparseloco-peer aggregate`.

A run names the keys of one or more aggregators. One leads: it opens the rounds and signs the records. The others stand
by: each follows the leader into a copy of its own, offers that copy to whoever asks, and takes over in a higher epoch
when the leader has been silent for too long (protocol.standby). A leader that learns of a higher epoch signs nothing
more and stands by itself. Two that both lead for a while do no harm: the higher epoch wins.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from peer.aggregator import Aggregator, demand_room, prepare_amendment, stored_blob
from peer.amendments import keep_waiting, stored_amendments, with_waiting
from peer.bootstrap import wait_for_stop
from peer.core import codec
from peer.errors import UserCode, UserError
from peer.evaluate import Evaluator
from peer.find import DHT_TTL_S, AdBook, Finder, sign_ad
from peer.follow import Follower, stored_head
from peer.net.directory import DirectoryError
from peer.net.errors import LinkError
from peer.net.messages import Aggregators, Amended, ReceiptMsg, RoundClosed, WatchEvent
from peer.net.service import Handler, Server, serve
from peer.net.tls import split_address
from peer.operator import OperatorFolder
from peer.store import Home, RunFolder, load_key
from peer.web.board import Live, known_bytes_per_token
from peer.web.live import live_of
from peer.web.server import Address, dashboard
from protocol.amendment import Amendment, Amendments
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.ledger import RoundRecord
from protocol.records import Ad
from protocol.round import Tick, WakeAt
from protocol.run import RunConfig, SignedRun
from protocol.standby import LEASE_S_MIN, Heard, Recorded, Standby, StandbyEvent, TakeOver
from protocol.wire import packet_wire_bytes_max

log = structlog.get_logger()

RETRY_S = 10.0
MEET_S = 15.0  # how often a leader compares its head with those of the other aggregators
EPOCH = "epoch"  # in the journal: the newest epoch in which this aggregator set out to lead


@dataclass(frozen=True)
class Options:
    """What the command line says. Without `lease_s` the lease follows the length of the rounds.

    The dashboard is served where `dashboard` says. A leader's states are evaluated every so many rounds; 0 is never.
    """

    listen: str | None = None
    plaintext: bool = False
    standby: bool = False
    take_over: bool = False
    lease_s: float | None = None
    dashboard: Address | None = None
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        """Raise UserError BAD_ARGUMENT for what cannot be meant."""
        if self.standby and self.take_over:
            raise UserError(UserCode.BAD_ARGUMENT, "--standby and --take-over exclude each other", "give one of them")
        if self.evaluate_every < 0:
            remedy = "give --evaluate-every a number of rounds, or 0 for never"
            raise UserError(UserCode.BAD_ARGUMENT, f"every {self.evaluate_every} rounds makes no sense", remedy)
        if self.lease_s is not None and not self.lease_s >= LEASE_S_MIN:
            remedy = f"give --lease {LEASE_S_MIN:g} or more, or leave it away"
            raise UserError(UserCode.BAD_ARGUMENT, f"a lease of {self.lease_s:g} s is too short", remedy)


_DEFAULT = Options()


class Copy:
    """What a standby offers: all that it has, and a place to wait for peers that lost the leader."""

    standby = True

    def __init__(self, signed: SignedRun, folder: RunFolder, key: PrivateKey, book: AdBook) -> None:
        self.submit_bytes_max = packet_wire_bytes_max(signed.config)
        self._signed, self._folder, self._key, self._book = signed, folder, key, book
        self._led = False
        self._changed = asyncio.Event()

    def tell(self, *, led: bool) -> None:
        """Wake those who wait: there is a new record, or another aggregator was found that leads, or it was lost."""
        self._led = led
        self._changed.set()
        self._changed = asyncio.Event()

    async def welcome(self, peer: bytes) -> bytes:
        """Whoever comes learns the newest record of the copy. Raises ProtocolError BUSY while there is none."""
        head = stored_head(self._folder)
        if head is None:
            raise ProtocolError(Code.BUSY, "this standby has no copy of the run yet")
        return head.to_bytes()

    async def joined(self, peer: bytes) -> None:
        """Nobody takes part here."""

    async def left(self, peer: bytes) -> None:
        """Nobody takes part here."""

    async def shown(self, peer: bytes, record: bytes, ad: bytes) -> None:
        """Note where another aggregator is; records are believed when the leader has them."""
        if ad:
            self._book.add_all([ad], self._signed.config.aggregators)

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """Let a peer wait for the takeover. Raises ProtocolError BUSY when another aggregator leads."""
        yield Aggregators(tuple(self._book.signed(but=self._key.public)))
        yield self._closed_event()
        while not self._led:
            await self._changed.wait()
        raise ProtocolError(Code.BUSY, "this is a standby, and it hears the aggregator that leads: join that one")

    async def observe(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        """Each record as soon as its round is complete here."""
        yield Aggregators(tuple(self._book.signed(but=self._key.public)))
        told = b""
        while True:
            event = self._closed_event()
            if event.record != told:
                told = event.record
                yield event
            else:
                await self._changed.wait()

    async def receipt(self, peer: bytes, digest: bytes) -> ReceiptMsg | None:
        """Packets go to the leader. Raises ProtocolError BUSY."""
        raise ProtocolError(Code.BUSY, "this is a standby: it takes packets only after it has taken over")

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        """Packets go to the leader. Raises ProtocolError BUSY."""
        raise ProtocolError(Code.BUSY, "this is a standby: it takes packets only after it has taken over")

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        """Whatever the copy has."""
        return stored_blob(self._signed, self._folder, kind, digest)

    async def amend(self, peer: bytes, data: bytes) -> Amended:
        """Keep an amendment in case that the leader is lost before its record. Raises ProtocolError."""
        head, run = stored_head(self._folder), self._signed.config
        assert head is not None, "nobody is welcome before"
        named = stored_amendments(self._folder.blobs, Amendments(run), head.amendment)
        known = with_waiting(self._folder, named, head.round + 1)
        if data:
            amendment = Amendment.from_bytes(data, run)
            if amendment not in known.chain:
                demand_room(known, head)
                known = known.bring_in(amendment, head.round + 1)
                await asyncio.to_thread(prepare_amendment, self._folder, run, amendment)
                keep_waiting(self._folder, amendment)
        return Amended(known.head, head.round + 1)

    def _closed_event(self) -> RoundClosed:
        head, blobs = stored_head(self._folder), self._folder.blobs
        assert head is not None, "nobody is welcome before"
        update_bytes = blobs.size("update", head.update_digest.hex())
        return RoundClosed(head.to_bytes(), update_bytes, blobs.size("bundle", head.digest.hex()))


class LeaseClock:
    """The standby's machine on the loop's clock. `expired` gets the epoch in which to take over."""

    def __init__(self, machine: Standby, copy: Copy) -> None:
        self._loop = asyncio.get_running_loop()
        self.expired: asyncio.Future[int] = self._loop.create_future()
        self._machine, self._copy = machine, copy
        self._timer: asyncio.TimerHandle | None = None
        self._led = False

    def heard(self, head: RoundRecord) -> None:
        """The leader lives."""
        if not self._led:
            self._led = True
            self._copy.tell(led=True)
        self._handle(Heard(head))

    def lost(self) -> None:
        """The link to the leader is gone; peers that come may wait here."""
        self._led = False
        self._copy.tell(led=False)

    def recorded(self, record: RoundRecord, run: RunConfig) -> None:
        """The copy is complete up to this record; `run` has the settings of the round after it."""
        self._copy.tell(led=self._led)
        self._machine.run = run
        self._handle(Recorded(record))

    def stop(self) -> None:
        """Expire no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, event: StandbyEvent) -> None:
        for effect in self._machine.handle(event, self._loop.time()):
            match effect:
                case WakeAt():
                    self.stop()
                    self._timer = self._loop.call_at(effect.at_s, self._handle, Tick())
                case TakeOver():
                    self.expired.set_result(effect.epoch)


class Station:
    """One aggregator of a run, which leads or stands by, and changes from one to the other."""

    def __init__(self, folder: OperatorFolder, home: Home, store: RunFolder, options: Options) -> None:
        self._signed, self._invite = folder.load()
        self._home, self._store, self._options = home, store, options
        self._key = load_key(home.key_path)
        self._program: Aggregator | None = None  # while this one leads
        self._evaluator: Evaluator | None = None
        self._tls = None if options.plaintext else folder.tls()
        self._finder = Finder(self._invite, home, self._signed.config)
        everywhere = "127.0.0.1" if options.plaintext else "0.0.0.0"  # noqa: S104 - volunteers come from anywhere
        try:
            place = options.listen or f"{everywhere}:{split_address(self._invite.addresses[0])[1]}"
            self._host, self._port = split_address(place)
        except LinkError as error:
            raise UserError(UserCode.BAD_ARGUMENT, error.reason, "write --listen HOST:PORT") from error
        if self._key.public not in self._signed.config.aggregators:
            raise UserError(
                UserCode.BAD_RUN_FILE,
                f"{home.key_path} is not the key of one of this run's aggregators",
                "use the folder that `sparseloco-peer run new` made for this aggregator, with the key in it",
            )

    def live(self) -> Live:
        """What the dashboard cannot read from the disk."""
        if self._program is None:
            return Live(bytes_per_token=known_bytes_per_token(self._signed.config))
        return live_of(self._program, self._evaluator)

    async def run(self, stop: asyncio.Event) -> None:
        """Lead or stand by until `stop`."""
        path, _, why = codec.kernels_in_use(torch.device("cpu")).partition(": ")
        log.info("kernels", path=path, why=why)
        advert = asyncio.create_task(self._advertise(stop))
        advert.add_done_callback(lambda _: stop.set())
        try:
            epoch = self._first_epoch()
            if self._options.standby and epoch is not None:
                log.info("no standby", why="by its own ledger this is the aggregator that leads")
            while not stop.is_set():
                if epoch is not None:
                    await self._lead(epoch, stop)
                epoch = await self._stand_by(stop)
        finally:
            stop.set()
            await asyncio.gather(advert, return_exceptions=True)
            await self._finder.close()
        advert.result()

    def _first_epoch(self) -> int | None:
        """Where to begin: whoever led last leads on, at least in the returned epoch; None is to stand by."""
        head = stored_head(self._store)
        begun = int.from_bytes(self._store.journal.meta(EPOCH) or b"", "little")
        leads = head is None or head.aggregator == self._key.public or begun > head.epoch
        return begun if leads or self._options.take_over else None

    # Leading

    async def _lead(self, epoch: int, stop: asyncio.Event) -> None:
        """Lead until `stop`, or until somebody else does."""
        program = Aggregator(self._signed, self._key, self._store, book=self._finder.book, epoch=epoch)
        self._program = program
        server = None
        try:
            await self._meet(program)
            if not program.superseded.done():
                if program.epoch > program.head.epoch:
                    self._store.journal.set_meta(EPOCH, program.epoch.to_bytes(8, "little"))
                server = await self._serve(program)
                ready = {"run": program.run.name, "port": server.port, "round": program.head.round}
                log.info("aggregator ready", epoch=program.epoch, **ready)
                beside = (self._keep_meeting(program), self._keep_evaluating(program))
                await _first(stop.wait(), *beside, program.superseded, program.failed)
            if program.superseded.done():
                record = program.superseded.result()
                log.warning("superseded", epoch=record.epoch, round=record.round, aggregator=record.aggregator)
        finally:
            self._program = self._evaluator = None
            if server is not None:
                await server.close()
            await program.close()
            log.info("aggregator left", round=program.head.round, state_root=program.head.state_root.hex())

    async def _keep_meeting(self, program: Aggregator) -> None:
        while True:
            await asyncio.sleep(MEET_S)
            await self._meet(program)

    async def _keep_evaluating(self, program: Aggregator) -> None:
        if self._options.evaluate_every:
            cache = self._home.path / "data"
            self._evaluator = Evaluator(program.run, cache, self._options.evaluate_every)
            await self._evaluator.follow(program)
        # Where there is nothing to evaluate on, the aggregator leads all the same.
        await asyncio.Event().wait()

    async def _meet(self, program: Aggregator) -> None:
        """See whether another aggregator has gone further; one that has not heard of our epoch hears of it."""
        if len(self._signed.config.aggregators) > 1:
            for record, leads in await self._finder.meet(self._key, program.head, plaintext=self._options.plaintext):
                program.consider(record, leads=leads)

    # Standing by

    async def _stand_by(self, stop: asyncio.Event) -> int | None:
        """Follow the leader; return the epoch in which to take over, or None at `stop`."""
        if stop.is_set():
            return None
        run, plaintext = self._signed.config, self._options.plaintext
        copy = Copy(self._signed, self._store, self._key, self._finder.book)
        lease = LeaseClock(Standby(run, self._key.public, lease_s=self._options.lease_s), copy)
        ad = self._ad(int(time.time()) + DHT_TTL_S)
        follower = Follower(run, self._store, self._finder, self._key, ad=ad, plaintext=plaintext, lease=lease)
        if follower.head is not None:
            lease.recorded(follower.head, follower.settings)
        server = await self._serve(copy)
        try:
            log.info("standing by", run=run.name, port=server.port, round=follower.head.round if follower.head else -1)
            await _first(stop.wait(), self._follow(follower, stop), lease.expired)
        finally:
            lease.stop()
            await server.close(0.5)
        if stop.is_set() or not lease.expired.done():
            return None
        log.warning("taking over", epoch=lease.expired.result(), why="the aggregator that led is silent")
        return lease.expired.result()

    async def _follow(self, follower: Follower, stop: asyncio.Event) -> None:
        await follower.follow()
        await stop.wait()

    # Where others find us

    async def _serve(self, handler: Handler) -> Server:
        run_id, spool = self._signed.config.run_id, self._home.path / "spool"
        host, port = self._host, self._port
        try:
            return await serve(handler, host=host, port=port, key=self._key, run_id=run_id, tls=self._tls, spool=spool)
        except OSError as error:
            raise UserError(
                UserCode.PORT_IN_USE,
                f"cannot listen on {host}:{port} ({error})",
                "stop the program that uses this port, or name another with --listen HOST:PORT",
            ) from error
        except ValueError as error:
            raise UserError(
                UserCode.BAD_ARGUMENT, str(error), "listen on 127.0.0.1, or leave --plaintext-local away"
            ) from error

    def _ad(self, expires_s: int) -> bytes:
        head, invite = stored_head(self._store), self._invite
        newest = (0, NO_DIGEST) if head is None else (head.round, head.digest)
        ad = Ad(invite.addresses, invite.certificate_sha256, *newest)
        return sign_ad(invite.run_id, self._key, ad, expires_s)

    async def _advertise(self, stop: asyncio.Event) -> None:
        """Keep our signed address in the directory; the run goes on without it."""
        await self._finder.go_online()
        while not stop.is_set():
            wait_s = DHT_TTL_S / 3
            expires_s = int(time.time()) + DHT_TTL_S
            try:
                await self._finder.advertise(self._ad(expires_s), expires_s)
                log.info("advertised", addresses=list(self._invite.addresses))
            except DirectoryError as error:
                log.warning("not advertised", why=str(error))
                wait_s = RETRY_S
            await wait_for_stop(stop, wait_s)


async def _first(*waiting: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
    """Wait for the first of these, end the coroutines among them, and raise what it raised."""
    tasks = [asyncio.ensure_future(item) for item in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        started = [task for task, item in zip(tasks, waiting, strict=True) if not isinstance(item, asyncio.Future)]
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)
    for task in done:
        task.result()


async def aggregate(folder: OperatorFolder, stop: asyncio.Event, options: Options = _DEFAULT) -> None:
    """Run the aggregator of a run folder until `stop`. Raises UserError."""
    signed, _ = folder.load()
    home = Home(folder.aggregator_home)
    with home.lock(), closing(home.run(signed.config.run_id)) as store:
        station = Station(folder, home, store, options)
        async with AsyncExitStack() as stack:
            if options.dashboard is not None:
                await stack.enter_async_context(dashboard(options.dashboard, store.path, station.live))
            await station.run(stop)

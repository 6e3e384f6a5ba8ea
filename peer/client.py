"""The peer: finds the run, takes its parameters, trains, sends packets and applies updates until the run is complete.

`ReplicaRound` decides what is done next; this program performs it: inner steps and merges in threads, bytes over the
link. It only ever dials out, unless it is told to serve others, and it goes on by itself through a restart of the
aggregator or a lost connection. Its replica is stored before each packet is sent, so a peer that is killed goes on from
there when it is started again. Its owner's wishes (peer.controls) decide whether it may train: while it may not, it
follows the rounds without being awaited. Told to finish, it sends what it has, waits for the receipt and leaves.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from peer import keep
from peer.amendments import AmendedRun
from peer.config import PeerConfig
from peer.connection import FIRST_PATIENCE_S, Connection
from peer.controls import Controls
from peer.core.replica import Replica, Trained
from peer.data.prepare import Dataset
from peer.download import StateLoader
from peer.equip import demand_room, equip
from peer.find import DHT_TTL_S, Finder
from peer.merge import accepted
from peer.net.errors import LinkError
from peer.net.link import Link
from peer.net.messages import RoundClosed, RoundEvent, RoundOpened
from peer.net.service import Server
from peer.net.throttle import Traffic
from peer.phases import DOWNLOAD, FIND, FIRST_ACCEPTED, FIRST_STEP, REPLAY, VERIFY, Phases
from peer.serving import Donor, serve_others
from peer.sources import state_loader
from peer.store import Home, RunFolder, load_or_make_key
from peer.telemetry import Telemetry
from peer.totals import Totals
from peer.training import Trainer
from peer.updates import Updates
from peer.view import View
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.invite import Invite
from protocol.ledger import Kind, RoundRecord, check_record
from protocol.limits import RECORD_BYTES_MAX, RUN_BYTES_MAX
from protocol.packet import make_packet
from protocol.round import (
    RESENDABLE,
    Alarm,
    Applied,
    ApplyUpdate,
    CatchUp,
    Connected,
    Failed,
    InnerDone,
    LoadState,
    Lost,
    MakePacket,
    Opened,
    PacketReady,
    Prefetch,
    Prefetched,
    Receipt,
    Recorded,
    ReplicaEffect,
    ReplicaEvent,
    ReplicaRound,
    Send,
    Settle,
    StopInner,
    Tick,
    TrainInner,
    WakeAt,
)
from protocol.run import RunConfig, SignedRun
from protocol.wire import packet_to_wire

log = structlog.get_logger()
T = TypeVar("T")

ANNOUNCE_S = DHT_TTL_S / 3
LEAVE_S = 4.0  # for whatever is under way when it is time to leave
INTERRUPT_S = 6.0  # Ctrl+C gives the packet so long to arrive
FINISH_S = 300.0  # `finish` is not in such a hurry
WAITING = "waiting for the others"
_ACTIVITIES = {
    TrainInner: "training",
    MakePacket: "making the packet",
    Send: "sending the packet",
    ApplyUpdate: "taking the update",
    LoadState: "fetching the parameters",
    CatchUp: "catching up",
}


@dataclass
class _Packet:
    digest: bytes
    wire: bytes
    values: int
    answered: bool = False


class Client:
    """One replica of one run, from the first connection to the last round."""

    def __init__(
        self,
        invite: Invite,
        home: Home,
        config: PeerConfig,
        telemetry: Telemetry,
        stop: asyncio.Event,
        *,
        plaintext: bool = False,
        patience_s: float = FIRST_PATIENCE_S,
        began_s: float | None = None,
    ) -> None:
        """`stop` ends it at once, `finish` when its packet is sent; `began_s` is when its user started it."""
        self._invite, self._home, self._config = invite, home, config
        self._telemetry, self._stop, self._plaintext = telemetry, stop, plaintext
        self._patience_s = patience_s
        self._key = load_or_make_key(home.key_path)
        self._inbox: asyncio.Queue[ReplicaEvent] = asyncio.Queue()
        self._jobs: dict[asyncio.Task[None], ReplicaEffect] = {}
        self._stop_inner = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._packet: _Packet | None = None
        self._traffic = Traffic()
        self._controls = Controls(home, config.limits, self._traffic, self._wishes_changed)
        self._phases = Phases(time.monotonic() if began_s is None else began_s, telemetry.say)
        self._view = View(telemetry.console, self._phases, self._traffic)
        self._nudge = asyncio.Event()  # wakes who waits for the owner's leave to train
        self._round_over = self._finishing = self._driving = False
        self._totals = Totals()
        self._crash: BaseException | None = None
        # Set by `join` once the run is known.
        self.run: RunConfig
        self._folder: RunFolder
        self._data: Dataset
        self._replica: Replica
        self._machine: ReplicaRound
        self._trainer: Trainer
        self._loader: StateLoader
        self._connection: Connection
        self._amended: AmendedRun
        self._updates: Updates
        self._donor: Donor | None = None
        self._server: Server | None = None
        self._certificate_sha256 = NO_DIGEST

    async def join(self) -> Totals:
        """Take part until the run is complete or `stop` is set. Raises UserError or ProtocolError."""
        self._telemetry.listener = self._view.heard
        watch = asyncio.create_task(self._controls.watch())
        watch.add_done_callback(self._job_done)
        try:
            with self._view:
                await self._unless_stopped(self._allowance())
                if not self._stop.is_set():
                    # Not given up half-way, lest the directory's daemon stays behind.
                    await self._join(await Finder.open(self._invite, self._home))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._telemetry.listener = None
        if self._crash is not None:
            raise self._crash
        return self._totals

    async def _join(self, finder: Finder) -> None:
        self._connection = Connection(
            finder, self._key, self._stop, self._traffic, plaintext=self._plaintext, patience_s=self._patience_s
        )
        try:
            link = await self._unless_stopped(self._connection.first())
            if link is None:
                return
            self._phases.over(FIND)
            try:
                await self._unless_stopped(self._prepare(link, finder))
            except BaseException:
                await link.close()
                raise
            if self._stop.is_set():
                await link.close()
                return
            self._phases.over(VERIFY)
            await self._take_part(link, finder)
        finally:
            await finder.close()

    async def _take_part(self, link: Link, finder: Finder) -> None:
        """Follow the rounds from here on, until the end or the time to leave."""
        self._driving = True
        self._wishes_changed()
        keeper = asyncio.create_task(self._connection.keep(link, self))
        herald = asyncio.create_task(self._announce(finder))
        sense = asyncio.create_task(self._view.sense(self._replica.device.type))
        try:
            await self._drive(keeper)
        finally:
            for task in (herald, sense):
                task.cancel()
            await asyncio.gather(herald, sense, return_exceptions=True)
            await self._leave(keeper)

    async def _unless_stopped(self, work: Coroutine[None, None, T]) -> T | None:
        """Do this, or give it up when it is time to leave."""
        task, stopped = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stopped):
                each.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    # The owner's wishes

    def finish(self, patience_s: float) -> None:
        """Stop training after the step under way, send what was done, wait for its receipt, and leave by then."""
        first, self._finishing = not self._finishing, True
        asyncio.get_running_loop().call_later(patience_s, self._stop.set)
        if not self._driving:
            self._stop.set()
        elif first:
            log.info("finishing", before_leaving=self._unfinished() or "nothing", at_most_s=patience_s)
            self._stop_training()
            self._post(Tick())

    def _unfinished(self) -> str:
        """What is still to be done before this peer may leave; "" when nothing is."""
        if any(isinstance(effect, TrainInner) for effect in self._jobs.values()):
            return "the inner step under way ends, and the packet is sent"
        unsent = self._packet is not None and not self._packet.answered and self._connection.stands
        busy = any(isinstance(effect, MakePacket | Send) for effect in self._jobs.values())
        return "the packet is sent" if busy or unsent else ""

    def _wishes_changed(self) -> None:
        """Act on what the owner or the machine itself lets this peer do now."""
        hold = self._controls.hold
        if self._driving:
            self._trainer.share = self._controls.limits.share
            offline = hold is not None and hold.offline
            self._connection.go_offline(offline)
            if self._donor is not None:
                self._donor.resting = offline
            if hold is None:
                self._connection.observe(False)
            else:
                self._stop_inner.set()
        self._nudge.set()
        if self._controls.finish:
            self.finish(FINISH_S)

    async def _allowance(self) -> None:
        """Wait while nothing may travel."""
        while self._controls.hold is not None and self._controls.hold.offline:
            self._nudge.clear()
            await self._nudge.wait()

    async def _may_train(self, ahead: bool) -> bool:
        """Wait for the owner's leave to train. False when the round is over first, or it is not worth the wait."""
        while self._controls.hold is not None and not self._ends() and not ahead:
            # The rounds need not wait for us.
            self._connection.observe(True)
            self._nudge.clear()
            await self._nudge.wait()
        return self._controls.hold is None and not self._ends()

    def _ends(self) -> bool:
        return self._round_over or self._finishing or self._stop.is_set()

    def _stop_training(self) -> None:
        self._stop_inner.set()
        self._nudge.set()

    # The link

    async def connected(self, link: Link) -> None:
        """A link stands. Raises LinkError and ProtocolError."""
        self._post(Connected(await self._learned(link.head_record, link)))

    async def heard(self, link: Link, event: RoundEvent) -> None:
        """A round opened or closed. Raises LinkError and ProtocolError."""
        match event:
            case RoundOpened():
                self._view.opened(event.closes_in_s)
                self._post(Opened(event.round, event.base_root, event.inner_steps, event.closes_in_s))
            case RoundClosed():
                record = await self._learned(event.record, link)
                self._updates.note(event, record)
                self._post(Recorded((record,)))

    def lost(self, reason: str) -> None:
        """The link is gone."""
        self._post(Lost(reason))

    async def _announce(self, finder: Finder) -> None:
        """Show this peer in the directory for as long as it takes part."""
        while True:
            record = self._machine.record
            if record is not None:
                addresses = (self._config.serve,) if self._server is not None else ()
                await finder.announce(self._key, record.round, record.digest, addresses, self._certificate_sha256)
            await asyncio.sleep(ANNOUNCE_S if record is not None else 1.0)

    def _checked(self, data: bytes) -> RoundRecord:
        record = RoundRecord.from_bytes(data)
        check_record(record, self.run)
        return record

    async def _learned(self, data: bytes, link: Link) -> RoundRecord:
        """A record that was checked, whose amendments are here before anything is done about it."""
        record = self._checked(data)
        await self._amended.learn(record, lambda kind, digest, most: link.fetch(kind, digest, size_max=most))
        return record

    async def _prepare(self, link: Link, finder: Finder) -> None:
        """Fetch and verify the run, then make its data and the replica."""
        log.info("connected", address=link.address, aggregator=link.aggregator)
        run_id = self._invite.run_id
        signed = SignedRun.from_bytes(await link.fetch("run", run_id, size_max=RUN_BYTES_MAX + 1024), run_id=run_id)
        self.run = signed.config
        self._folder = self._home.run(run_id)
        await asyncio.to_thread(demand_room, self.run, self._home, self._controls.limits)
        self._loader = state_loader(
            self.run,
            self._folder.path / "loading",
            self._connection,
            finder,
            self._key,
            self._traffic,
            self._plaintext,
        )
        self._amended = AmendedRun(self.run, self._folder.blobs)
        self._updates = Updates(self._amended, self._connection)
        if self._config.serve:
            await self._serve(signed)
        made = await asyncio.to_thread(equip, self.run, self._home, self._config, self._key.public)
        self._data, self._replica = made.data, made.replica
        self._controls.device = self._replica.device.type
        self._trainer = Trainer(self._replica)
        stored = await asyncio.to_thread(keep.stored_record, self._folder.replica_path, self.run)
        if stored is not None:
            await self._learned(stored.to_bytes(), link)
            self._replica.change(self._amended.settings(stored.round + 1))
        self._machine = await asyncio.to_thread(self._resume)
        run = self._machine.run  # as amended up to where we go on
        self._view.begin(run.name, run.outer.rounds, run.inner.steps)

    async def _serve(self, signed: SignedRun) -> None:
        """Offer others what they need to join, under the address of our settings."""
        self._donor = Donor(signed, self._folder.path / "offered")
        self._server, self._certificate_sha256 = await serve_others(
            self._donor,
            self._config.serve,
            self.run.run_id,
            self._key,
            self._home.path,
            plaintext=self._plaintext,
            traffic=self._traffic,
        )

    def _resume(self) -> ReplicaRound:
        """Go on from the replica that was stored last, if there is one."""
        kept = keep.load(self._folder.replica_path, self._replica)
        if kept is None:
            return ReplicaRound(self.run)
        record, packet, run = kept.record, kept.packet, self._replica.run
        log.info("resumed", round=record.round, packet=packet.header.digest if packet else None)
        if packet is not None:
            header = packet.header
            self._packet = _Packet(header.digest, packet.wire, self._replica.sent_values)
            # Parameters other than the record's show after the next update, and are then loaded anew.
            return ReplicaRound(run, record=record, packet=(header.round, header.digest))
        if kept.state_root != record.state_root:
            log.warning("the stored parameters are not those of their record, so they are loaded anew")
            return ReplicaRound(self.run)
        return ReplicaRound(run, record=record)

    def _store(self, wire: bytes | None) -> None:
        """Keep the replica on the disk, with the packet that is about to be sent."""
        record, began_s = self._machine.record, time.monotonic()
        assert record is not None, "work starts from a record"
        size = keep.save(self._folder.replica_path, self._replica, record, wire, self._leaving)
        self._loader.forget()  # what was fetched is stored here now
        log.info("stored", round=record.round + 1, bytes=size, seconds=round(time.monotonic() - began_s, 3))

    def _leaving(self) -> bool:
        return self._stop.is_set()

    # The machine

    def _post(self, event: ReplicaEvent) -> None:
        self._inbox.put_nowait(event)

    async def _drive(self, keeper: asyncio.Task[None]) -> None:
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while not self._machine.finished and not self._stop.is_set():
                if self._finishing and self._inbox.empty() and not self._unfinished():
                    break
                got = asyncio.create_task(self._inbox.get())
                await asyncio.wait({got, stopped, keeper}, return_when=asyncio.FIRST_COMPLETED)
                if not got.done():
                    got.cancel()
                    if keeper.done():
                        keeper.result()
                    break
                for effect in self._machine.handle(got.result(), time.monotonic()):
                    await self._perform(effect)
                self._note_replayed()
        finally:
            stopped.cancel()
        if self._machine.finished:
            self._finish()

    def _note_replayed(self) -> None:
        """The updates that led here are applied as soon as nothing of that kind is under way."""
        behind = any(isinstance(effect, ApplyUpdate | LoadState | CatchUp) for effect in self._jobs.values())
        if self._phases.current in (DOWNLOAD, REPLAY) and self._machine.record is not None and not behind:
            self._phases.over(REPLAY)

    async def _perform(self, effect: ReplicaEffect) -> None:
        match effect:
            case TrainInner():
                self._start(effect, self._train(effect))
            case MakePacket():
                self._start(effect, self._make_packet(effect))
            case Prefetch():
                self._start(effect, self._prefetch(effect.record))
            case ApplyUpdate():
                self._start(effect, self._apply_update(effect.record))
            case LoadState():
                self._start(effect, self._load_state(effect.record))
            case CatchUp():
                self._start(effect, self._catch_up(effect))
            case Send():
                self._start(effect, self._send(effect.digest))
            case StopInner():
                self._round_over = True
                self._stop_training()
            case Settle():
                await asyncio.to_thread(self._settle, effect)
            case Alarm():
                log.warning("alarm", why=effect.reason)
            case WakeAt():
                if self._timer is not None:
                    self._timer.cancel()
                delay_s = max(0.0, effect.at_s - time.monotonic())
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._post, Tick())

    def _start(self, effect: ReplicaEffect, job: Coroutine[None, None, ReplicaEvent]) -> None:
        """Run a job beside the machine; its answer, or the reason why there is none, comes back as an event."""

        async def answered() -> None:
            try:
                self._post(await job)
            except LinkError as error:
                self._fail(effect, error.reason, gone=False)
            except ProtocolError as error:
                self._fail(effect, str(error), gone=True)
            except keep.LeavingError as error:
                log.info("leaving", why=str(error))

        task = asyncio.create_task(answered())
        self._jobs[task] = effect
        self._say(_ACTIVITIES.get(type(effect), ""))
        task.add_done_callback(self._job_done)

    def _say(self, activity: str) -> None:
        if activity:
            self._view.say(activity)
            self._controls.say(activity)

    def _fail(self, effect: ReplicaEffect, reason: str, *, gone: bool) -> None:
        log.warning("will try again", job=type(effect).__name__, why=reason)
        if isinstance(effect, Send):
            self._post(Receipt(effect.digest, False, int(Code.BUSY)))
        else:
            self._post(Failed(reason, gone))

    def _job_done(self, task: asyncio.Task[None]) -> None:
        self._jobs.pop(task, None)
        if self._driving and not self._jobs:
            self._say(WAITING)
        if self._finishing:
            self._post(Tick())  # so that the driver sees whether this was the last of it
        if not task.cancelled() and task.exception() is not None:
            # Our own mistake or a user error such as a full disk: it ends the program, by way of the driver.
            self._crash = task.exception()
            self._stop.set()

    # The jobs

    async def _train(self, effect: TrainInner) -> ReplicaEvent:
        self._round_over = False
        if self._key.public in self._amended.amendments.banned_at(effect.round):
            log.warning("not training", round=effect.round, why="the operator has banned this peer from the run")
            return InnerDone(effect.round, 0, 0)
        run = self._amended.settings(effect.round)
        inner = run.inner
        step_tokens = inner.batch_size * self.run.data.sequence_length
        began_s = time.monotonic()
        if self._totals.began_s is None:
            self._totals.began_s = began_s

        def batches(first: int) -> Iterator[NDArray[np.int64]]:
            every = self._data.training_batches(effect.round, self._key.public, inner.steps, inner.batch_size)
            return islice(every, first, None)

        def on_step(steps: int, loss: float) -> None:
            self._phases.over(FIRST_STEP)
            self._view.report(round=effect.round, step=effect.done + steps, tokens=step_tokens, loss=loss)
            if steps >= effect.steps:
                self._stop_inner.set()

        def train() -> Trained:
            self._replica.change(run)
            if effect.ahead:
                self._replica.begin_ahead()
            elif not effect.done:
                self._replica.drop_ahead()
            return self._trainer.train(effect.round, batches, self._stop_inner, on_step, effect.done)

        trained = Trained(0, 0, float("nan"))
        try:
            # Paused before its first step it waits for the owner; later it sends the steps that it has.
            while not trained.steps and await self._may_train(effect.ahead):
                self._stop_inner.clear()
                trained = await asyncio.to_thread(train)
        except ValueError as error:
            return await self._start_again(error)
        self._totals.inner_s += time.monotonic() - began_s
        self._totals.tokens += trained.tokens
        self._totals.steps_ahead += trained.steps if effect.ahead else 0
        if trained.steps:
            self._totals.loss = trained.mean_loss
            self._totals.learning_rate = self._replica.inner.learning_rate
        return InnerDone(effect.round, trained.steps, trained.tokens)

    async def _make_packet(self, effect: MakePacket) -> ReplicaEvent:
        record = self._machine.record
        assert record is not None, "work starts from a record"
        run = self._amended.settings(effect.round)

        def build() -> _Packet:
            self._replica.change(run)
            sections = self._replica.make_contribution()
            packet = make_packet(run, self._key, effect.round, record.state_root, effect.tokens, effect.steps, sections)
            wire = packet_to_wire(packet, run)
            self._store(wire)
            return _Packet(packet.header.digest, wire, self._replica.sent_values)

        try:
            self._packet = await asyncio.to_thread(build)
        except ValueError as error:
            return await self._start_again(error)
        return PacketReady(self._packet.digest)

    async def _start_again(self, error: ValueError) -> ReplicaEvent:
        """After training diverged: go back to the outer parameters and sit this round out."""
        await asyncio.to_thread(self._replica.abandon)
        return Failed(str(error))

    async def _send(self, digest: bytes) -> ReplicaEvent:
        packet = self._packet
        assert packet is not None and packet.digest == digest, "the machine sends what was made last"
        answer = await self._connection.link.submit(digest, packet.wire)
        packet.answered = answer.accepted or answer.code not in RESENDABLE
        self._totals.bytes_up += len(packet.wire)
        self._totals.sent_values += packet.values
        log.info("receipt", accepted=answer.accepted, code=answer.code, bytes=len(packet.wire))
        record, peers = self._machine.record, self.run.rounds.start_peers
        if answer.accepted and record is not None and record.round == 0 and peers > 1:
            log.info("waiting", why=f"the first round closes when {peers} peers are there")
        return Receipt(digest, answer.accepted, answer.code)

    def _settle(self, effect: Settle) -> None:
        """Commit what counts; put everything else back into the residual."""
        if self._packet is None:
            self._absorb()
        elif effect.accepted:
            self._replica.commit()
            self._totals.accepted += 1
            if self._phases.current == FIRST_ACCEPTED:  # and not a packet of an earlier life
                self._phases.over(FIRST_ACCEPTED)
        else:
            self._replica.restore()
        self._packet = None

    def _absorb(self) -> None:
        """Keep what was learned in a round that closed before there was a packet."""
        try:
            self._replica.absorb()
        except ValueError as error:
            # Steps ahead that diverged must not be carried over to the next outer parameters.
            self._replica.abandon()
            log.warning("alarm", why=str(error))
            return
        try:
            self._store(None)
        except keep.LeavingError as error:
            log.info("leaving", why=str(error))

    async def _apply_update(self, record: RoundRecord) -> ReplicaEvent:
        update = await self._updates.take(record, self._base_root())
        root = await asyncio.to_thread(self._replica.apply, update.sections)
        await self._offer_others(record, root, update.sections)
        self._totals.rounds += 1
        log.info(
            "round",
            round=record.round,
            reason=record.reason.name.lower(),
            mine_counted=any(entry.peer == self._key.public and entry.weight for entry in record.entries),
            contributors=len(accepted(record.entries)),
            loss=self._totals.loss,
            learning_rate=self._totals.learning_rate,
            tokens=self._totals.tokens,
            form=update.form,
            bytes=update.size,
            state_root=root.hex(),
        )
        return self._applied(record, root)

    def _applied(self, record: RoundRecord, root: bytes) -> Applied:
        """The parameters are those after a record's round; the next one may go by other settings."""
        run, before = self._amended.settings(record.round + 1), self._machine.run
        if (run.outer.rounds, run.inner.steps) != (before.outer.rounds, before.inner.steps):
            self._view.begin(run.name, run.outer.rounds, run.inner.steps)
        return Applied(record.round, root, run)

    async def _prefetch(self, record: RoundRecord) -> ReplicaEvent:
        await self._updates.prefetch(record, self._base_root())
        return Prefetched(record.digest)

    def _base_root(self) -> bytes:
        """The state root that the next update starts from; nothing is applied to a state that is not known."""
        record = self._machine.record
        return NO_DIGEST if record is None else record.state_root

    async def _load_state(self, record: RoundRecord) -> ReplicaEvent:
        """Take the outer parameters from our own disk, or get them from others."""
        states, replica = self._folder.states, self._replica
        healing = self._machine.record is not None and record.kind != Kind.ROLLBACK
        if record.kind == Kind.ROLLBACK:
            log.info("the operator took the run back", round=record.round, state_root=record.state_root.hex())
        if healing:
            why = "its parameters are not those of the ledger, or updates do not lead there any more"
            log.warning(
                "this replica takes no part until it holds the parameters of the run", round=record.round, why=why
            )
        if states.has(record.state_root):
            flat = await asyncio.to_thread(states.load, record.state_root, self.run.layout)
            root = await asyncio.to_thread(replica.load_outer, flat)
            log.info("state loaded", round=record.round, state_root=root.hex())
        else:
            held = await asyncio.to_thread(replica.outer_state)
            root = await self._loader.load(record, held, self._adopt, replica.apply)
        if healing:
            log.info("this replica holds the parameters of the run again and takes part", round=record.round)
        await self._offer_others(record, root, None)
        return self._applied(record, root)

    def _adopt(self, flat: NDArray[np.float32]) -> bytes:  # f32[N]
        self._phases.over(DOWNLOAD)
        return self._replica.load_outer(flat)

    async def _offer_others(self, record: RoundRecord, root: bytes, sections: Sequence[bytes] | None) -> None:
        """Offer the parameters that we have now to others, if we serve them."""
        if self._donor is not None and root == record.state_root:
            flat = self._replica.outer_state()
            await asyncio.to_thread(self._donor.applied, record, self._base_root(), sections, flat)

    async def _catch_up(self, effect: CatchUp) -> ReplicaEvent:
        records = [effect.head]
        while records[-1].round > effect.have.round + 1:
            digest = records[-1].previous
            record = self._checked(await self._connection.link.fetch("record", digest, size_max=RECORD_BYTES_MAX))
            if record.digest != digest:
                raise ProtocolError(Code.WRONG_DIGEST, "the record is another than the one asked for")
            records.append(record)
        self._amended.check(effect.have, records[::-1])
        return Recorded(tuple(reversed(records)))

    # The end

    def _finish(self) -> None:
        record, totals, updates = self._machine.record, self._totals, self._updates
        assert record is not None, "a finished run has a last record"
        flat = self._replica.outer_state()
        root = self._folder.states.save(flat, self.run.layout, {"run": self.run.name, "round": str(record.round)})
        # A finished run needs nothing but its parameters.
        keep.forget(self._folder.replica_path)
        log.info("finished", rounds=record.round, **totals.facts(), **updates.facts(), state_root=root.hex())
        home = self._home.path
        self._telemetry.say(f"The run is complete. `sparseloco-peer export {home} --out model` writes its model.")

    async def _leave(self, keeper: asyncio.Task[None]) -> None:
        """Stop training after the current step, close the link and forget the timers."""
        self._driving, self._round_over = False, True
        self._say("leaving")
        self._stop_training()
        if self._timer is not None:
            self._timer.cancel()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=LEAVE_S)
        await self._connection.close()
        if self._server is not None:
            await self._server.close(LEAVE_S / 4)
        self._folder.close()
        if not self._machine.finished:
            self._telemetry.say(f"Left; {self._totals.accepted} contributions counted. The same command goes on.")

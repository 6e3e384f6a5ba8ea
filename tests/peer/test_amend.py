"""Operators change a run that goes on: an aggregator in this process, with packets made up for it, and real swarms."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from peer.aggregator import Aggregator
from peer.amend import Wish, amend, parse_setting, parse_settings
from peer.amendments import AmendedRun
from peer.audit import audit
from peer.audit_report import Report
from peer.cli import main
from peer.errors import UserError
from peer.find import AdBook, Finder
from peer.follow import Follower
from peer.net.service import serve
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.standby import Copy
from peer.status import status_of_folder
from peer.store import BlobStore, Home, RunFolder, load_key
from protocol.amendment import (
    Action,
    Amendment,
    Amendments,
    Ban,
    ChangeSettings,
    Pause,
    Resume,
    Rollback,
    Unban,
    sign_amendment,
)
from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.invite import Invite
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, sign_record
from protocol.limits import AMENDMENTS_PER_RECORD_MAX, CLIP_ONE
from protocol.packet import Packet, make_packet
from protocol.packing import encode_section
from protocol.run import RunConfig, sign_run
from protocol.run import parse_settings as parse_run
from protocol.wire import packet_to_wire
from tests.peer.swarm import SETTINGS, Program, Swarm, free_port, make_run, run_cli
from tests.peer.test_swarm import ledger

pytestmark = pytest.mark.net

SEED = 5
ROUNDS = 30
PEERS = [PrivateKey.from_bytes(bytes([number + 1]) * 32) for number in range(2)]


@dataclass
class House:
    """A run folder, and the aggregator in it as long as it is `open`."""

    path: Path

    @property
    def operator(self) -> OperatorFolder:
        return OperatorFolder(self.path)

    @property
    def run(self) -> RunConfig:
        return self.operator.load()[0].config

    @property
    def key(self) -> PrivateKey:
        return load_key(self.path / "operator.key")

    @contextmanager
    def store(self) -> Iterator[RunFolder]:
        with closing(Home(self.operator.aggregator_home).run(self.run.run_id)) as store:
            yield store

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Aggregator]:
        signed, _ = self.operator.load()
        with self.store() as store:
            program = Aggregator(signed, load_key(self.operator.aggregator_home / "key"), store)
            try:
                yield program
            finally:
                await program.close()
                assert not program.failed.done()

    @asynccontextmanager
    async def served(self, program: Aggregator) -> AsyncIterator[int]:
        tls, key = self.operator.tls(), load_key(self.operator.aggregator_home / "key")
        port = int(self.operator.load()[1].addresses[0].rpartition(":")[2])
        run_id, spool = self.run.run_id, self.path / "spool"
        server = await serve(program, host="127.0.0.1", port=port, key=key, run_id=run_id, tls=tls, spool=spool)
        try:
            yield port
        finally:
            await server.close(0.2)

    def audited(self) -> Report:
        (report,) = audit(self.path, None, None, lambda _done, _asked: None)
        return report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    settings = parse_run(SETTINGS.format(rounds=ROUNDS, steps=1, grace_s=0.5).replace("start_peers = 2", ""))
    new_run(settings, path, RunPlace("127.0.0.1", free_port(), free_port()))
    return path


@pytest.fixture
def house(made: Path, tmp_path: Path) -> House:
    return House(Path(shutil.copytree(made, tmp_path / "run")))


def packet(program: Aggregator, key: PrivateKey, run: RunConfig | None = None) -> Packet:
    """A packet of noise for the open round, by its settings."""
    round, run = program.round, run or program.round.run
    draw, k, bits = (
        np.random.default_rng([SEED, round.round, key.public[0]]),
        run.compression.k,
        run.compression.code_bits,
    )
    noise = [draw.normal(0, 0.01, tensor.size).astype(np.float32) for tensor in run.layout.tensors]
    sections = [encode_section(compress(acc, k, bits)[0], k, bits) for acc in noise]
    return make_packet(run, key, round.round, round.base_root, run.nominal_tokens, run.inner.steps, sections)


async def send(program: Aggregator, key: PrivateKey, run: RunConfig | None = None) -> int:
    """Submit a packet for the open round; its code, 0 when it counts."""
    made = packet(program, key, run)
    wire = packet_to_wire(made, run or program.round.run)
    return (await program.submit(key.public, made.header.digest, wire)).code


async def settled(program: Aggregator, round: int) -> RoundRecord:
    async with asyncio.timeout(20):
        while program.head.round < round:  # noqa: ASYNC110 - a test looks from outside, there is no event to wait for
            await asyncio.sleep(0.005)
    return program.head


async def close_rounds(program: Aggregator, count: int) -> RoundRecord:
    """Let so many rounds close with one packet each."""
    for _ in range(count):
        round = program.round.round
        assert await send(program, PEERS[0]) == 0
        await settled(program, round)
    return program.head


async def bring(program: Aggregator, house: House, action: Action, round: int) -> Amendment:
    """Sign the next amendment and bring it."""
    with_all = program._amendments
    amendment = sign_amendment(with_all.draft(action, round), house.key)
    assert (await program.amend(PEERS[0].public, amendment.to_bytes())).newest == amendment.digest
    return amendment


# ---------------------------------------------------------------- the aggregator


async def test_settings_hold_from_their_round_on_for_packets_merge_and_audit(house: House) -> None:
    async with house.open() as program:
        assert await program.amend(b"", b"") == await program.amend(PEERS[0].public, b"")
        await close_rounds(program, 2)
        amendment = await bring(program, house, ChangeSettings({"compression.k": 32, "outer.alpha": 0.5}), 5)
        announced = await close_rounds(program, 2)
        assert announced.round == 4 and announced.amendment == amendment.digest
        assert (await program.amend(b"", b"")).newest == amendment.digest
        # A packet by the old settings is not what the round asks for any more.
        assert program.round.run.compression.k == 32 and program.round.run.run_id == house.run.run_id
        assert await send(program, PEERS[1], house.run) != 0
        last = await close_rounds(program, 2)
    report = house.audited()
    assert report.passed and (report.recomputed, report.amendments) == (7, 1), report.lines()
    chain = status_of_folder(house.path, 3)
    assert chain.amendments == ("from round 5 on compression.k = 32, outer.alpha = 0.5",) and chain.head == last.round
    with house.store() as store:
        path = store.blobs.path("amendment", amendment.digest.hex())
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    damaged = house.audited()
    assert not damaged.passed and any(finding.file == str(path) for finding in damaged.findings)


async def test_what_is_not_the_operators_next_word_is_refused(house: House) -> None:
    run, key = house.run, house.key
    other = replace(run, name="other")
    async with house.open() as program:
        await close_rounds(program, 3)

        async def code(amendment: Amendment, by: PrivateKey = key) -> Code:
            with pytest.raises(ProtocolError) as refused:
                await program.amend(PEERS[0].public, sign_amendment(amendment, by).to_bytes())
            assert program._amendments.head == NO_DIGEST and refused.value.detail
            return refused.value.code

        none = Amendments(run)
        assert await code(none.draft(Pause(), 9), PEERS[0]) == Code.BAD_SIGNATURE
        assert await code(Amendments(other).draft(Pause(), 9)) == Code.OTHER_RUN
        assert await code(none.draft(Pause(), 4)) == Code.BAD_AMENDMENT, "round 4 is open"
        assert await code(replace(none.draft(Pause(), 9), number=2)) == Code.BAD_AMENDMENT
        assert await code(none.draft(Resume(), 5)) == Code.BAD_AMENDMENT
        assert await code(none.draft(Rollback(6), 9)) == Code.BAD_AMENDMENT, "round 6 has not closed"
        assert await code(none.draft(ChangeSettings({"rounds.deadline_s": 0.4}), 9)) == Code.BAD_AMENDMENT
        for data in (b"SLAM", b"x" * 99, sign_amendment(none.draft(Pause(), 9), key).to_bytes()[:-1]):
            with pytest.raises(ProtocolError):
                await program.amend(PEERS[0].public, data)
        first = await bring(program, house, Ban(PEERS[1].public), 9)
        again = await program.amend(PEERS[0].public, first.to_bytes())
        assert again.newest == first.digest, "the same once more is no harm"
        for number in range(1, AMENDMENTS_PER_RECORD_MAX):
            await bring(program, house, Ban(bytes([number]) * 32), 9)
        with pytest.raises(ProtocolError, match="wait for the next record"):
            await bring(program, house, Ban(bytes(32)), 9)
        record = await close_rounds(program, 1)
        assert record.amendment == program._amendments.head
    assert house.audited().passed


async def test_an_amendment_survives_a_crash_before_its_record(house: House) -> None:
    async with house.open() as program:
        await close_rounds(program, 1)
        amendment = await bring(program, house, ChangeSettings({"inner.learning_rate": 0.001}), 3)
        # What kill -9 leaves: the disk as it is now.
        crashed = House(Path(shutil.copytree(house.path, house.path.with_name("crashed"))))
    async with crashed.open() as program:
        assert program.head.amendment == NO_DIGEST and (await program.amend(b"", b"")).newest == amendment.digest
        assert (await close_rounds(program, 1)).amendment == amendment.digest
        assert program.round.run.inner.learning_rate == 0.001
    assert crashed.audited().passed


async def test_pause_rollback_and_resume_also_through_a_restart(house: House) -> None:
    async with house.open() as program:
        target = await close_rounds(program, 3)
        await close_rounds(program, 2)
        await bring(program, house, Pause(), 7)
        await close_rounds(program, 1)
        assert program.round.closed and not program.finished.is_set()
        assert await send(program, PEERS[1]) == Code.LATE
    async with house.open() as program:
        await program.joined(PEERS[0].public)
        assert program.round.closed and program.head.round == 6, "the pause lasts"
        await bring(program, house, Rollback(3), 7)
        assert program.head.round == 6, "and so long nothing happens"
        await bring(program, house, Resume(), 7)
        back = await settled(program, 7)
        assert (back.kind, back.state_root, back.entries) == (Kind.ROLLBACK, target.state_root, ())
        assert program.round.members == {PEERS[0].public}, "who was there before is awaited"
        after = await close_rounds(program, 2)
        # Another one, while nothing is paused, and over the first.
        await bring(program, house, Rollback(6), after.round + 2)
        await close_rounds(program, 1)
        twice = await settled(program, after.round + 2)
        assert twice.kind == Kind.ROLLBACK
        await close_rounds(program, 1)
    async with house.open() as program:
        await close_rounds(program, 1)
    report = house.audited()
    assert report.passed and report.amendments == 4, report.lines()
    # An audit of a part begins where a rollback lies between the state that is stored and the first round.
    for first in (8, 12, 13):
        (part,) = audit(house.path, first, None, lambda _done, _asked: None)
        assert part.passed, part.lines()


async def test_no_packet_of_a_banned_peer_counts_until_it_is_unbanned(house: House) -> None:
    async with house.open() as program:
        watch = program.watch(PEERS[1].public)
        await anext(watch)
        await program.joined(PEERS[1].public)
        await bring(program, house, Ban(PEERS[1].public), 2)
        assert await send(program, PEERS[1]) == 0, "round 1 was open"
        await settled(program, 1)
        assert program.round.members == frozenset(), "nobody waits for it"
        assert await send(program, PEERS[1]) == Code.BANNED
        await close_rounds(program, 1)
        await bring(program, house, Unban(PEERS[1].public), 4)
        await close_rounds(program, 1)
        assert program.round.members == {PEERS[1].public}
        assert await send(program, PEERS[1]) == 0
        await settled(program, 4)
        await watch.aclose()
    assert house.audited().passed
    shown = run_cli("run", "peers", str(house.path), "--json")
    peers = {line["peer"]: line for line in json.loads(shown.stdout)["peers"]}
    assert peers[PEERS[1].public.hex()]["accepted"] == 2 and not peers[PEERS[1].public.hex()]["banned"]


async def test_amended_rounds_end_the_run_where_they_say(house: House) -> None:
    async with house.open() as program:
        await bring(program, house, ChangeSettings({"outer.rounds": 3}), 2)
        await close_rounds(program, 3)
        assert program.finished.is_set()
        with pytest.raises(ProtocolError, match="the run is complete"):
            await bring(program, house, Pause(), 9)
    assert house.audited().passed and status_of_folder(house.path, 1).rounds == 3


async def test_a_mirror_follows_amendments_to_an_earlier_end(house: House, tmp_path: Path) -> None:
    run = house.run
    async with house.open() as program, house.served(program) as port:
        await close_rounds(program, 2)
        await bring(program, house, ChangeSettings({"compression.k": 16, "outer.rounds": 7}), 4)
        await close_rounds(program, 3)
        await bring(program, house, Rollback(1), 7)
        await close_rounds(program, 1)
        await settled(program, 7)
        assert program.finished.is_set()
        invite = replace(house.operator.load()[1], bootstraps=())
        assert invite.addresses == (f"127.0.0.1:{port}",)
        home = Home(tmp_path / "mirror")
        (home.path / "run.bin").write_bytes((house.path / "run.bin").read_bytes())
        with closing(home.run(run.run_id)) as copy:
            follower = Follower(run, copy, Finder(invite, home, run), PrivateKey.generate())
            async with asyncio.timeout(30):
                await follower.follow()
            assert follower.head == program.head and follower.settings.compression.k == 16
    (report,) = audit(tmp_path / "mirror", None, None, lambda _done, _asked: None)
    assert report.passed and (report.recomputed, report.amendments) == (8, 2), report.lines()


async def test_a_standby_keeps_an_amendment_that_no_record_names_yet(house: House) -> None:
    async with house.open() as program:
        await close_rounds(program, 1)
    signed, _ = house.operator.load()
    with house.store() as store:
        copy = Copy(signed, store, PEERS[1], AdBook(house.run.run_id))
        asked = await copy.amend(PEERS[0].public, b"")
        assert (asked.newest, asked.round) == (NO_DIGEST, 2)
        amendment = sign_amendment(Amendments(house.run).draft(Pause(), 3), house.key)
        assert (await copy.amend(PEERS[0].public, amendment.to_bytes())).newest == amendment.digest
        with pytest.raises(ProtocolError, match="too late"):
            late = Amendments(house.run).append(amendment).draft(Ban(PEERS[0].public), 2)
            await copy.amend(PEERS[0].public, sign_amendment(late, house.key).to_bytes())
    async with house.open() as program:
        assert (await close_rounds(program, 1)).amendment == amendment.digest
        assert program.round.closed, "it took over, and the pause holds"


async def test_a_peer_refuses_records_that_do_not_keep_to_their_amendments(house: House, tmp_path: Path) -> None:
    run, signer = house.run, load_key(house.operator.aggregator_home / "key")
    chain = [Amendments(run)]
    for action, round in ((Ban(PEERS[1].public), 3), (Pause(), 5), (Rollback(1), 5)):
        chain.append(chain[-1].append(sign_amendment(chain[-1].draft(action, round), house.key)))
    blobs = {item.digest: item.to_bytes() for item in chain[-1].chain}
    fetched: list[bytes] = []

    async def fetch(kind: str, digest: bytes, size_max: int) -> bytes:
        assert kind == "amendment" and len(blobs[digest]) <= size_max
        fetched.append(digest)
        return blobs[digest]

    def record(round: int, names: Amendments, previous: RoundRecord | None, *senders: PrivateKey) -> RoundRecord:
        entries = tuple(
            Entry(key.public, bytes(32), Verdict.ACCEPTED, 0, 256, 1, 1024, CLIP_ONE)
            for key in sorted(senders, key=lambda key: key.public)
        )
        before = NO_DIGEST if previous is None else previous.digest
        kind, reason, update = (Kind.NULL, CloseReason.DEADLINE, NO_DIGEST)
        if senders:
            kind, reason, update = (Kind.APPLIED, CloseReason.COMPLETE, bytes([1]) * 32)
        head = (run.run_id, round, 0, before, kind, reason, run.genesis_root, update, 0, 1)
        return sign_record(RoundRecord(*head, entries, names.head), signer)

    async def code(amended: AmendedRun, found: RoundRecord) -> Code:
        held = amended.amendments
        with pytest.raises(ProtocolError) as refused:
            await amended.learn(found, fetch)
        assert amended.amendments is held
        return refused.value.code

    amended = AmendedRun(run, BlobStore(tmp_path / "blobs"))
    first = record(2, chain[1], None, *PEERS)
    await amended.learn(first, fetch)
    assert await code(amended, record(3, chain[1], first, *PEERS)) == Code.BANNED
    assert await code(amended, record(3, chain[0], first, PEERS[0])) == Code.BAD_AMENDMENT, "it forgets one"
    third = record(3, chain[1], first, PEERS[0])
    await amended.learn(third, fetch)
    assert await code(amended, record(5, chain[2], None)) == Code.BAD_AMENDMENT, "the run is paused"
    assert await code(amended, record(5, chain[3], third)) == Code.BAD_AMENDMENT
    await amended.learn(record(4, chain[2], third), fetch)
    assert len(fetched) == len(set(fetched)), "each is fetched once and then lies on the disk"
    # A first look at the run in the middle of it.
    late = AmendedRun(run, BlobStore(tmp_path / "late"))
    assert await code(late, record(4, chain[2], None, PEERS[1])) == Code.BANNED
    await late.learn(record(4, chain[2], None), fetch)
    assert late.amendments == chain[2]
    blobs[chain[3].head] = blobs[chain[2].head]
    assert await code(late, record(4, chain[3], None)) == Code.WRONG_DIGEST


# ---------------------------------------------------------------- the operator's commands


async def test_the_operator_sees_what_would_change_and_then_changes_it(house: House) -> None:
    async with house.open() as program, house.served(program):
        await close_rounds(program, 2)
        wish = Wish(parse_settings(["inner.learning_rate=0.001", "inner.overlap=true"]), "+2")
        shown = "\n".join(await amend(house.operator, wish, dry_run=True))
        assert "from round 5 on" in shown and "0.003 -> 0.001" in shown and "False -> True" in shown
        assert "every peer trains by it" in shown and "1 peer had packets" in shown and "dry run" in shown
        assert program._amendments.head == NO_DIGEST
        done = "\n".join(await amend(house.operator, wish))
        assert "the record of round 3 will name it" in done and len(program._amendments.chain) == 1
        ban = Wish(Ban(b""), peer=PEERS[0].public.hex()[:12])
        assert "it had packets in 2 of the last 3 rounds" in "\n".join(await amend(house.operator, ban))
        bad = {
            "round 3 is the next to close": Wish(Pause(), "3"),
            "'soon' is no round": Wish(Pause(), "soon"),
            "not paused": Wish(Resume()),
            "banned already": ban,
            "not banned": Wish(Unban(b""), peer=PEERS[1].public.hex()),
            "no known peer": Wish(Ban(b""), peer="abcdef"),
            "has these settings already": Wish(parse_settings(["inner.learning_rate=0.001"]), "9"),
            "cannot go back to round 7": Wish(Rollback(7), "7"),
        }
        for words, what in bad.items():
            with pytest.raises(UserError, match=words) as refused:
                await amend(house.operator, what)
            assert refused.value.remedy
        assert "from round 4 on the run is paused" in "\n".join(await amend(house.operator, Wish(Pause())))
        await bring(program, house, Unban(PEERS[0].public), 4)
        await close_rounds(program, 1)
        assert "round 4 opens as soon as" in "\n".join(await amend(house.operator, Wish(Resume())))
        assert not program.round.closed and program.round.round == 4
        (house.path / "operator.key").unlink()
        with pytest.raises(UserError, match="holds no operator"):
            await amend(house.operator, Wish(Pause()))


def test_settings_are_read_by_kind_and_misspelled_ones_are_known() -> None:
    assert parse_setting("inner.steps = 30") == ("inner.steps", 30)
    assert parse_setting("rounds.deadline_s=60") == ("rounds.deadline_s", 60.0)
    assert parse_setting("outer.rule=mean") == ("outer.rule", "mean")
    bad = {
        "inner.learning_rat=1": 'did you mean "inner.learning_rate"',
        "learning_rate=1": 'did you mean "inner.learning_rate"',
        "x=1": "table.key",
        "model.hidden_size=64": "start a new run",
        "inner.steps=many": "a whole number",
        "inner.steps=1.5": "a whole number",
        "inner.overlap=yes": "true or false",
        "inner.steps": "write it as",
        "": "write it as",
    }
    for text, remedy in bad.items():
        with pytest.raises(UserError) as refused:
            parse_setting(text)
        assert remedy in f"{refused.value.message}; {refused.value.remedy}", text
    with pytest.raises(UserError, match="set twice"):
        parse_settings(["inner.steps=3", "inner.steps=4"])


def test_an_invite_for_a_new_address(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    before = house.operator.load()[1]
    assert main(["run", "invite", str(house.path)]) == 0
    assert Invite.from_text(capsys.readouterr().out) == before
    assert main(["run", "invite", str(house.path), "--host", "run.example.org", "--port", "7800"]) == 0
    shown = capsys.readouterr()
    moved = Invite.from_text(shown.out)
    assert moved == house.operator.load()[1] and "Start the servers again" in shown.err
    assert moved.addresses == ("run.example.org:7800",) and moved.run_id == before.run_id
    assert moved.bootstraps[0].startswith("/dns4/run.example.org/tcp/")
    assert moved.bootstraps[0].split("/")[4:] == before.bootstraps[0].split("/")[4:]
    for wrong in (["--port", "0"], ["--host", "no such host"], ["--bootstrap-port", "99999"]):
        assert main(["run", "invite", str(house.path), *wrong]) == 1
        assert "error SL820" in capsys.readouterr().err


def test_a_run_is_signed_by_itself_alone(house: House) -> None:
    amended = house.run.amended({"inner.steps": 7})
    assert amended.run_id == house.run.run_id
    with pytest.raises(AssertionError):
        sign_run(amended, house.key)


# ---------------------------------------------------------------- live runs


def rates(peer: Program) -> dict[int, float]:
    """The learning rate of each round that a peer trained for."""
    return {event["round"]: event["learning_rate"] for event in peer.all("round") if event["mine_counted"]}


def act(*arguments: str) -> str:
    done = run_cli("run", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_live_run_is_amended_paused_taken_back_and_rid_of_a_peer(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=100_000, steps=4)
    constant = ("--set", "inner.schedule=constant", "--set", "inner.warmup_steps=0")
    with Swarm(tmp_path, run) as swarm:
        # Nobody is there yet, so no record names it before the aggregator dies.
        aggregator = swarm.aggregator()
        act("amend", str(run), *constant, "--set", "inner.learning_rate=0.002", "--from", "2")
        aggregator.kill()
        aggregator = swarm.aggregator()
        one, two = swarm.peer("one"), swarm.peer("two")
        one.wait_for(lambda event: event["event"] == "round" and event["round"] >= 3, 60)
        act("amend", str(run), "--set", "inner.learning_rate=0.001", "--set", "inner.steps=5", "--from", "+3")
        second = aggregator.wait_event("amendment", number=2)
        first = int(second["says"].split()[2])
        one.wait_for(lambda event: event["event"] == "round" and event["round"] > first, 60)
        late = swarm.peer("late")
        late.wait_for(lambda event: event["event"] == "round" and event["mine_counted"], 60)
        act("pause", str(run))
        paused = aggregator.wait_event("paused")["round"]
        act("rollback", str(run), "--to", "1")
        assert aggregator.all("round closed")[-1]["round"] == paused - 1, "nothing closes while it is paused"
        act("resume", str(run))
        back = aggregator.wait_event("round closed", kind="rollback")
        for peer in (one, two, late):
            peer.wait_for(lambda event: event["event"] == "round" and event["round"] > paused + 1, 60)
        key = load_key(tmp_path / "two" / "key").public
        act("ban", str(run), key.hex()[:16])
        banned = two.wait_event("not training")["round"]
        one.wait_for(lambda event: event["event"] == "round" and event["round"] > banned, 60)
        assert "BANNED" in act("peers", str(run))
        late.kill()
        told = len(late.log.read_text())
        again = swarm.peer("late")
        again.wait_for(lambda event: event["event"] == "round" and event["tokens"] > 0, 60)
        steps = re.findall(r"progress .* step \d+/(\d+) ", again.log.read_text()[told:])
        assert set(steps) == {"5"}, "who comes back shows the amended steps"
    records = ledger(run)
    assert back["round"] == paused and records[paused].state_root == records[1].state_root
    for peer in (one, two, late):
        roots = {event["round"]: event["state_root"] for event in peer.all("round")}
        assert [round for round, root in roots.items() if records[round].state_root.hex() != root] == []
        for round, rate in rates(peer).items():
            # Round 1 has the first step of the warm-up to 0.003 over 20 steps, the fourth of them last.
            wanted = 0.003 * 4 / 20 if round == 1 else 0.002 if round < first else 0.001
            assert rate == pytest.approx(wanted), (peer.log.name, round)
    assert min(rates(one)) < first < max(rates(one)) and min(rates(late)) > first
    senders = {
        entry.peer for record in records[banned:] for entry in record.entries if entry.verdict == Verdict.ACCEPTED
    }
    assert senders and key not in senders
    (report,) = audit(run, None, None, lambda _done, _asked: None)
    assert report.passed and report.amendments >= 6, report.lines()

"""The frozen vectors: the reference gives every answer, every rule has one, and refusing takes little memory."""

import json
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from protocol import make_vectors
from protocol.amendment import Amendment, Amendments
from protocol.cases import packets
from protocol.cases.sections import gap_bytes
from protocol.cases.transport import Frame, block, zstd
from protocol.cases.vector import make_run, text_of
from protocol.conformance import FOLDER, LINE_BYTES_MAX, Case, load
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, digest, merkle_root
from protocol.ledger import Kind, RoundRecord, check_record
from protocol.packing import section_bytes_max
from protocol.reference_client import answer
from protocol.round import (
    Alarm,
    Applied,
    ApplyUpdate,
    CatchUp,
    Connected,
    Failed,
    InnerDone,
    LoadState,
    MakePacket,
    Opened,
    PacketReady,
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
)
from protocol.run import RunConfig
from protocol.update import update_section_bytes_max
from protocol.wire import packet_wire_bytes_max

CASES = list(load())
FILES = sorted({case.file for case in CASES})
SPEC = Path(make_vectors.__file__).with_name("SPEC.md")

# What a stranger's bytes cannot raise: these depend on who sends what when, and on what is there.
OF_THE_CONVERSATION = {
    Code.DUPLICATE,
    Code.LATE,
    Code.NOT_A_MEMBER,
    Code.NO_QUORUM,
    Code.WRONG_ROOT,
    Code.BAD_MESSAGE,
    Code.BAD_SESSION,
    Code.NOT_FOUND,
    Code.BUSY,
}
# Which kinds of requests put the rules of a table to the test: by the section of SPEC.md and the table's first cell.
TABLES = {
    ("2", "signed run"): {"run"},
    ("5", "header"): {"packet"},
    ("5", "then each section"): {"section"},
    ("6", "rule, in this order"): {"packet-wire", "update-wire"},
    ("7", "header"): {"update"},
    ("7", "then each section"): {"update-section"},
    ("8", "record"): {"record"},
    ("8", "amendment"): {"amendment"},
    ("8", "then, as the next one"): {"amendments"},
    ("8", "amendments that a record"): {"amendments"},
    ("10", "record"): {"dht"},
    ("11", "bundle"): {"bundle"},
}
SMALL_BYTES = 1 << 20  # what refusing may take beyond twice the bytes of a small request
SCRATCH_BYTES = 8 << 20  # and of any other


@pytest.mark.parametrize("file", FILES)
def test_the_reference_gives_every_answer(file: str) -> None:
    wrong = {case.name: (answer(case.request), case.expect) for case in CASES if case.file == file}
    assert {name: pair for name, pair in wrong.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("file", FILES)
def test_the_files_are_what_the_cases_make(file: str) -> None:
    assert (FOLDER / file).read_text("ascii") == make_vectors.contents(make_vectors.FILES[file]())


def test_check_tells_a_changed_a_missing_and_a_foreign_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("identity.json", "packets.json", "updates.json")
    monkeypatch.setattr(make_vectors, "FILES", {name: make_vectors.FILES[name] for name in names})
    for name in names:
        shutil.copy(FOLDER / name, tmp_path)
    assert make_vectors.main(["--check"], tmp_path) == 0
    changed = tmp_path / "identity.json"
    changed.write_text(changed.read_text("ascii").replace("101", "102", 1), "ascii")
    (tmp_path / "packets.json").unlink()
    (tmp_path / "other.json").write_text("{}", "ascii")
    assert make_vectors.main(["--check"], tmp_path) == 1
    told = capsys.readouterr().err
    assert "identity.json" in told and "packets.json" in told and "other.json" in told and "updates.json" not in told


def test_vectors_are_well_formed() -> None:
    assert set(FILES) == set(make_vectors.FILES)
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert re.fullmatch(r"[a-z0-9-]+/[A-Za-z0-9._-]+", case.name), case.name
        assert re.fullmatch(r"\S.{1,120}\.", case.why), case.name
        assert len(json.dumps(case.request)) < LINE_BYTES_MAX
        assert [*case.expect] in (["ok"], ["refused"])
        assert all(0 <= number < 2**53 for number in _whole_numbers(case.request)), case.name


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)
    elif type(value) is int:
        yield value


def test_invalid_vectors_dominate() -> None:
    refused = [case for case in CASES if "refused" in case.expect]
    assert len(refused) > len(CASES) / 2


def test_every_code_that_bytes_can_raise_has_a_vector() -> None:
    raised = {case.expect["refused"] for case in CASES if "refused" in case.expect}
    assert raised - {0} == set(map(int, set(Code) - OF_THE_CONVERSATION))


def refusal_tables(spec: str) -> dict[tuple[str, str], list[list[str]]]:
    """The tables of SPEC.md whose last column is `code`: by section and first cell, the codes of each row."""
    tables: dict[tuple[str, str], list[list[str]]] = {}
    section, rows = "", None
    for line in spec.splitlines():
        heading = re.match(r"## (\d+)\. ", line)
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if heading:
            section = heading[1]
        if not cells:
            rows = None
        elif cells[-1] == "code":
            rows = tables.setdefault((section, cells[0]), [])
        elif rows is not None and set(cells[-1]) != {"-"}:
            rows.append(re.findall(r"`([A-Z_]+)`", cells[-1]))
    return tables


def test_every_row_of_every_refusal_table_has_a_vector() -> None:
    counts = Counter((case.request.get("kind"), case.expect["refused"]) for case in CASES if "refused" in case.expect)
    tables = refusal_tables(SPEC.read_text("utf-8"))
    seen = set()
    for (section, title), rows in tables.items():
        begun = [place for place in TABLES if place[0] == section and title.startswith(place[1])]
        places = sorted(begun, key=lambda place: len(place[1]))[-1:]
        assert len(places) == 1, f"section {section}, table {title!r}: which kind of request tests it?"
        seen.update(places)
        for name, number in Counter(name for row in rows for name in row).items():
            found = sum(counts[kind, int(Code[name])] for kind in TABLES[places[0]])
            assert found >= number, f"section {section}, {title}: {number} rows with {name}, {found} vectors"
    assert seen == set(TABLES)


def test_a_table_row_without_a_vector_would_be_found() -> None:
    table = "## 9. X\n| header | code |\n|---|---|\n| a | `VERSION` |\n| b | `BAD_KEY`, `TRUNCATED` |\n\n| c | `LATE` |"
    assert refusal_tables(table) == {("9", "header"): [["VERSION"], ["BAD_KEY", "TRUNCATED"]]}


# ---------------------------------------------------------------- memory


def peak_bytes(request: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The answer, and the most memory that was allocated at once to find it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = answer(request)
        return found, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_refusing_takes_no_more_than_twice_the_bytes() -> None:
    kinds = {"section", "update-section", "packet", "packet-wire", "update", "update-wire", "bundle"}
    cases = [case for case in CASES if "refused" in case.expect and case.request.get("kind") in kinds]
    assert len(cases) > 250
    for case in cases:
        found, peak = peak_bytes(case.request)
        assert found == case.expect, case.name
        assert peak <= 2 * len(json.dumps(case.request)) + SMALL_BYTES, case.name


HUGE = make_run(shapes=[("huge", (1 << 14, 1 << 14))])
HUGE_CHUNKS = 1 << 16
HUGE_BOUND = section_bytes_max(1 << 28, 64, 2)


def zeros(length: int) -> bytes:
    """A zstd frame of so many zeros: a byte of it stands for 30 kB."""
    blocks = [block(b"\0", min(1 << 17, length - start)) for start in range(0, length, 1 << 17)]
    return zstd(length, *blocks, block(b"", last=True), size_bytes=4)


def huge_frame(gaps_length: int, gaps: bytes) -> Frame:
    ones = zstd(HUGE_CHUNKS, block(b"\1", HUGE_CHUNKS, last=True), size_bytes=4)
    return Frame(1, gaps_length, (ones, zeros(HUGE_CHUNKS), zeros(4 * 63), gaps, zeros(1 << 20)))


def hostile_packets() -> Iterator[tuple[str, Frame, Code]]:
    """A kilobyte each, which claims megabytes or gigabytes."""
    most = HUGE_CHUNKS * 79
    yield "gap bytes as many as there can be, too few of them gaps", huge_frame(most, zeros(most)), Code.BAD_FRAME
    yield "gap bytes beyond the bound", huge_frame(most + 1, zeros(most + 1)), Code.TOO_LARGE
    yield "four gigabytes of gap bytes", huge_frame(2**32 - 1, zeros(1)), Code.TOO_LARGE
    bomb = zstd(most, *[block(b"\0", 1 << 17)] * 2000, block(b"", last=True), size_bytes=4)
    yield "a plane that goes on for 262 MB", huge_frame(most, bomb), Code.BAD_ZSTD
    hole = zstd(2**40, block(b"", last=True), size_bytes=8)
    yield "a plane that declares a terabyte", huge_frame(most, hole), Code.BAD_ZSTD
    lengths = (2**32 - 1,) * 5
    yield "planes of four gigabytes", Frame(1, most, (b"",) * 5, lengths), Code.TRUNCATED


@pytest.mark.parametrize(
    ("frame", "code"), [row[1:] for row in hostile_packets()], ids=[r[0] for r in hostile_packets()]
)
def test_a_small_packet_that_claims_much_takes_no_more_than_twice_its_bound(frame: Frame, code: Code) -> None:
    packet = packets.Packet(run_id=HUGE.run_id, sections=[b""])
    data = packet.header + frame.data
    assert len(data) < 12_000
    request = {"verb": "check", "kind": "packet-wire", "run": text_of(HUGE), "bytes": data.hex()}
    found, peak = peak_bytes(request)
    assert found == {"refused": int(code)}
    assert peak <= 2 * packet_wire_bytes_max(HUGE) + SCRATCH_BYTES


def test_a_large_section_is_refused_in_little_memory() -> None:
    """All but the last code of a tensor of 268 million values is in order."""
    tables = b"\x80" * HUGE_CHUNKS + bytes(HUGE_CHUNKS) + (64 * 1024).to_bytes(4, "little") * 63
    data = tables + gap_bytes(range(0, 4096, 64)) * HUGE_CHUNKS + bytes((1 << 20) - 1) + b"\x80"
    assert len(data) > 0.8 * HUGE_BOUND
    packet = packets.Packet(run_id=HUGE.run_id, root=merkle_root([data]))
    fields = {"run": text_of(HUGE), "round": 3, "base_root": packet.base_root.hex(), "header": packet.header.hex()}
    found, peak = peak_bytes({"verb": "check", "kind": "packet", **fields, "sections": [data.hex()]})
    assert found == {"refused": int(Code.BAD_CODE)}
    # The request itself becomes bytes once.
    assert peak <= 2 * len(data) + SCRATCH_BYTES


def test_a_large_update_section_is_refused_in_little_memory() -> None:
    """All but the last of four million values is in order."""
    size = 1 << 22
    data = b"\0\x10" * 1024 + bytes(1024) + bytes(size) + b"\1" * (size - 1) + b"\0"
    assert len(data) == update_section_bytes_max(size)
    request = {"verb": "check", "kind": "update-section", "size": size, "bytes": data.hex()}
    found, peak = peak_bytes(request)
    assert found == {"refused": int(Code.BAD_VALUE)}
    assert peak <= 2 * len(data) + SCRATCH_BYTES


# ---------------------------------------------------------------- the machine against `follow`

# The machine keeps its newest record alone, so of an older contradiction it cannot tell.
FORGOTTEN = {"chain/second-later"}


class Driver:
    """Drives the replica's machine by the events of a vector. Updates and states always arrive and fit."""

    def __init__(
        self, run: RunConfig, held: RoundRecord, packets: Mapping[int, bytes], stored: Mapping[bytes, bytes]
    ) -> None:
        self.run = run
        self.stored = stored
        self.chain = self.loaded(held)
        self.machine = ReplicaRound(self.chain.config_at(held.round + 1), record=held)
        self.packets = dict(packets)
        self.settled: list[list[Any]] = []
        self.now_s = 0.0
        self.feed(Connected(held))
        self.make_packet()

    def feed(self, event: ReplicaEvent) -> list[ReplicaEffect]:
        """Hand in an event; answer what can be answered; return all that was wanted."""
        self.now_s += 1
        effects: list[ReplicaEffect] = list(self.machine.handle(event, self.now_s))
        for effect in list(effects):
            match effect:
                case ApplyUpdate() | LoadState():
                    run = self.chain.config_at(effect.record.round + 1)
                    effects += self.feed(Applied(effect.record.round, effect.record.state_root, run))
                case StopInner():
                    effects += self.feed(InnerDone(effect.round, 0, 0))
                case CatchUp():
                    effects += self.feed(Failed("the records between are not there yet"))
                case Settle():
                    self.settled.append([effect.round, effect.accepted])
                case MakePacket():
                    effects += self.feed(PacketReady(self.packets.pop(effect.round)))
        return effects

    def bring_in(self, record: RoundRecord) -> None:
        """Fetch the amendments of a record before the machine sees it, and refuse it when they are broken."""
        head = self.machine.record
        assert head is not None
        if record.epoch < head.epoch or record.digest == head.digest:
            return
        if record.round == head.round + 1 and record.previous == head.digest:
            self.chain = self.chain.follow(record, self.fetched(self.chain, record.amendment))
        elif record.epoch > head.epoch and record.round <= head.round + 1:
            self.chain = self.loaded(record)

    def loaded(self, record: RoundRecord) -> Amendments:
        chain = Amendments(self.run)
        for amendment in self.fetched(chain, record.amendment):
            chain = chain.append(amendment)
        chain.check(record)
        return chain

    def fetched(self, known: Amendments, head: bytes) -> list[Amendment]:
        found: list[Amendment] = []
        while head not in (known.head, NO_DIGEST):
            if head not in self.stored:
                raise ProtocolError(Code.NOT_FOUND, "no such amendment")
            found.insert(0, Amendment.from_bytes(self.stored[head], self.run))
            head = found[0].previous if found[0].number > 1 else NO_DIGEST
        return found

    def make_packet(self) -> None:
        """Train and make the packet of the round after the head, if the vector has one."""
        head = self.machine.record
        assert head is not None
        if head.round + 1 in self.packets:
            effects = self.feed(Opened(head.round + 1, head.state_root, 1, 300.0))
            assert any(isinstance(effect, TrainInner) for effect in effects)
            self.digest = self.packets[head.round + 1]
            self.feed(InnerDone(head.round + 1, 1, 1))

    def decide(self, event: Mapping[str, Any]) -> str | int:
        """One event of a vector, and what the machine made of it in the words of `follow`."""
        if "opened" in event:
            opened = event["opened"]
            base_root, steps = bytes.fromhex(opened["base_root"]), opened["inner_steps"]
            effects = self.feed(Opened(opened["round"], base_root, steps, 300.0))
            return next((effect.steps for effect in effects if isinstance(effect, TrainInner)), 0)
        if "receipt" in event:
            effects = self.feed(Receipt(self.digest, event["receipt"] == 0, event["receipt"]))
            effects += self.feed(Tick())
            return "again" if any(isinstance(effect, Send) for effect in effects) else "rest"
        try:
            record = RoundRecord.from_bytes(bytes.fromhex(event["record"]))
            check_record(record, self.run)
            self.bring_in(record)
        except ProtocolError as error:
            return int(error.code)
        assert self.machine.record is not None
        epoch = self.machine.record.epoch
        effects = self.feed(Recorded((record,)))
        self.make_packet()
        words: dict[type[ReplicaEffect], str] = {
            ApplyUpdate: "next",
            LoadState: "rollback" if record.kind == Kind.ROLLBACK and record.epoch == epoch else "branch",
            CatchUp: "gap",
            Alarm: "second",
        }
        return next((words[type(effect)] for effect in effects if type(effect) in words), "nothing")


@pytest.mark.parametrize("case", [case for case in CASES if case.file == "follow.json"], ids=lambda case: case.name)
def test_the_machine_follows_as_the_vectors_say(case: Case) -> None:
    request, wanted = case.request, case.expect["ok"]
    run = RunConfig.from_json(request["run"].encode("ascii"))
    held = RoundRecord.from_bytes(bytes.fromhex(request["held"]))
    stored = {digest("amendment", data): data for data in map(bytes.fromhex, request["amendments"])}
    driver = Driver(run, held, {round: bytes.fromhex(packet) for round, packet in request["packets"]}, stored)
    decisions = [driver.decide(event) for event in request["events"]]
    driver.now_s += 100
    driver.feed(Tick())  # what failed before is tried again
    head = driver.machine.record
    assert head is not None
    assert (head.digest.hex(), head.state_root.hex()) == (wanted["head"], wanted["state_root"])
    assert driver.settled == wanted["settled"]
    quiet = {"known": "nothing", "lower": "nothing", "old": "nothing"}
    expected = [quiet.get(decision, decision) for decision in wanted["decisions"]]
    # Beyond a gap the machine waits until it is closed, and then does all at once.
    if "gap" not in expected and case.name not in FORGOTTEN:
        assert decisions == expected

"""An audit passes over what is whole, and names the file and the place of every bit that is not."""

import dataclasses
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.audit import audit
from peer.audit_report import Finding, Report
from peer.core import codec
from peer.core.replica import initial_state
from peer.journal import PacketRow, RecordRow
from peer.merge import merge_packets
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.store import Home, RunFolder
from protocol.arithmetic import weight_of
from protocol.errors import Code
from protocol.identity import NO_DIGEST, PrivateKey
from protocol.layout import piece_hashes, state_root
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, genesis_record, sign_record
from protocol.limits import CLIP_ONE
from protocol.packet import PACKET_HEADER_BYTES, Packet, make_packet
from protocol.run import RunConfig, parse_settings
from protocol.update import make_update
from protocol.wire import bundle_to_wire, packet_to_wire, update_from_wire, update_to_wire
from tests.peer.swarm import SETTINGS, run_cli

SEED = 77
ROUNDS, PEERS, SNAPSHOT_ROUNDS = 12, 3, 4
NULL_ROUND, BUNDLE_ROUND = 5, 3
ROUND_OF_STATE = 8
PEER_KEYS = [PrivateKey.from_bytes(bytes([number + 1]) * 32) for number in range(PEERS)]


class Maker:
    """Writes the ledger of a run as an aggregator does, without one."""

    def __init__(self, folder: Path) -> None:
        settings = parse_settings(SETTINGS.format(rounds=ROUNDS, steps=5, grace_s=3.0))
        new_run(settings, folder, RunPlace("127.0.0.1", 7700, 7701))
        operator = OperatorFolder(folder)
        self.run: RunConfig = operator.load()[0].config
        home = Home(operator.aggregator_home)
        self.store: RunFolder = home.run(self.run.run_id)
        self.key = PrivateKey.from_text(home.key_path.read_text())
        self.flat = initial_state(self.run.model)
        self.random = np.random.default_rng(SEED)
        begun = self.store.journal.head()
        if begun is None:
            self.append(genesis_record(self.run, self.key, 1))
        else:
            self.record = RoundRecord.from_bytes(begun.data)

    def append(self, record: RoundRecord) -> None:
        row = RecordRow(record.round, record.digest, record.state_root, record.update_digest, record.to_bytes())
        verdicts = {entry.packet_digest: (int(entry.verdict), entry.code) for entry in record.entries}
        self.store.journal.close_round(row, verdicts)
        self.record = record

    def packet(self, round: int, key: PrivateKey) -> Packet:
        rules, outer = self.run.compression, torch.from_numpy(self.flat)
        change = torch.from_numpy(self.random.normal(scale=1e-3, size=self.flat.size).astype(np.float32))
        residual = torch.zeros_like(outer)
        sections, _ = codec.compress(residual, outer, outer - change, self.run.layout, 0.9, rules.k, rules.code_bits)
        tokens = self.run.nominal_tokens * (1 + round % 2)
        packet = make_packet(self.run, key, round, self.record.state_root, tokens, 5, sections)
        wire, header = packet_to_wire(packet, self.run), packet.header
        self.store.blobs.put("packet", header.digest.hex(), wire)
        self.store.journal.add_packet(PacketRow(header.digest, round, header.peer, tokens, 5, 1))
        return packet

    def round(self, round: int, *, cheats: bool = False) -> None:
        """Make the packets of the next round and close it; with `cheats` the aggregator adds something of its own."""
        packets = sorted((self.packet(round, key) for key in PEER_KEYS), key=lambda packet: packet.header.peer)
        applied = round != NULL_ROUND
        entries = tuple(self.entry(packet, accepted=applied) for packet in packets)
        base_root, update_digest = self.record.state_root, NO_DIGEST
        if applied:
            merged = [*packets[:-1], self.packet(round, PEER_KEYS[-1])] if cheats else packets
            sections = merge_packets(merged, entries, self.run)
            codec.outer_step(torch.from_numpy(self.flat), self.run.layout, sections)
        root = state_root(self.flat)
        if round % SNAPSHOT_ROUNDS == 0:
            self.store.states.save(self.flat, self.run.layout, {"run": self.run.name, "round": str(round)})
        if applied:
            update = make_update(self.run, round, base_root, root, sections)
            update_digest = update.header.digest
            self.store.blobs.put("update", update_digest.hex(), update_to_wire(update, self.run))
        kind, reason = (Kind.APPLIED, CloseReason.COMPLETE) if applied else (Kind.NULL, CloseReason.DEADLINE)
        record = RoundRecord(
            self.run.run_id, round, 0, self.record.digest, kind, reason, root, update_digest, round, round + 1, entries
        )
        self.append(sign_record(record, self.key))
        if round == BUNDLE_ROUND:
            raw = [packet_to_wire(packet, self.run) for packet in packets]
            self.store.blobs.put("bundle", self.record.digest.hex(), bundle_to_wire(raw))

    def entry(self, packet: Packet, *, accepted: bool) -> Entry:
        header = packet.header
        weight = weight_of(header.tokens, self.run.nominal_tokens) if accepted else 0
        verdict, code = (Verdict.ACCEPTED, 0) if accepted else (Verdict.REFUSED, int(Code.NO_QUORUM))
        clip = CLIP_ONE if accepted else 0
        return Entry(header.peer, header.digest, verdict, code, header.tokens, 5, weight, clip)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "run"
    maker = Maker(folder)
    for round in range(1, ROUNDS + 1):
        maker.round(round)
    maker.store.close()
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def audited(folder: Path, first: int | None = None, last: int | None = None) -> Report:
    (report,) = audit(folder, first, last, lambda *_: None)
    return report


def journal(folder: Path) -> Path:
    (path,) = folder.rglob("journal.sqlite")
    return path


def record_of(folder: Path, round: int) -> RoundRecord:
    with closing(sqlite3.connect(journal(folder))) as connection:
        (data,) = connection.execute("SELECT data FROM records WHERE round = ?", (round,)).fetchone()
    return RoundRecord.from_bytes(data)


def blob(folder: Path, kind: str, digest: bytes) -> Path:
    return journal(folder).parent / "blobs" / kind / digest.hex()[:2] / digest.hex()


def flip_in(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_column(folder: Path, table: str, column: str, where: str, bit: int) -> None:
    with closing(sqlite3.connect(journal(folder))) as connection:
        (value,) = connection.execute(f"SELECT {column} FROM {table} WHERE {where}").fetchone()
        data = bytearray(value)
        data[bit // 8] ^= 1 << bit % 8
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (bytes(data),))
        connection.commit()


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, "\n".join(map(str, report.findings))
    assert not report.passed
    return report.findings[0]


def test_a_whole_run_passes_in_full_and_in_part(whole: Path) -> None:
    report = audited(whole)
    assert report.passed and report.recomputed == ROUNDS + 1, report.lines()
    assert (report.records, report.packets, report.updates) == (ROUNDS + 1, ROUNDS * PEERS, ROUNDS - 1)
    assert (report.bundles, report.states) == (1, 1 + ROUNDS // SNAPSHOT_ROUNDS)
    for first, last in ((1, 1), (7, 9), (9, 12), (12, 12), (0, 0)):
        part = audited(whole, first, last)
        assert part.passed and part.recomputed == last - first + 1, part.lines()


def test_it_only_reads(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert audited(whole).passed
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_of_a_record(copy: Path, seed: int) -> None:
    chance = random.Random(f"{SEED} record {seed}")
    round = chance.randint(0, ROUNDS)
    bit = chance.randrange(8 * len(record_of(copy, round).to_bytes()))
    flip_column(copy, "records", "data", f"round = {round}", bit)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (round, str(journal(copy)))
    assert f"byte {bit // 8}: " in finding.why and "field" in finding.why


@pytest.mark.parametrize("column", ["digest", "state_root", "update_digest"])
def test_a_bit_of_a_column_of_the_records(copy: Path, column: str) -> None:
    flip_column(copy, "records", column, "round = 6", 77)
    finding = only(audited(copy))
    assert finding.round == 6 and f"column {column}, byte 9" in finding.why


def test_a_bit_of_a_row_of_the_packets(copy: Path) -> None:
    digest = record_of(copy, 4).entries[1].packet_digest
    flip_column(copy, "packets", "peer", f"digest = x'{digest.hex()}'", 9)
    finding = only(audited(copy))
    assert finding.round == 4 and digest.hex()[:16] in finding.what and "column peer" in finding.why


def test_a_bit_of_the_journal_as_it_lies_in_the_file(copy: Path) -> None:
    data = record_of(copy, 9).to_bytes()
    with closing(sqlite3.connect(journal(copy))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    at = journal(copy).read_bytes().index(data[:100])
    flip_in(journal(copy), 8 * (at + 60) + 5)
    finding = only(audited(copy))
    assert finding.round == 9 and "field previous, byte 12" not in finding.why and "byte 60: " in finding.why


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_of_the_header_of_a_packet(copy: Path, seed: int) -> None:
    chance = random.Random(f"{SEED} header {seed}")
    round, bit = chance.randint(1, ROUNDS), chance.randrange(8 * PACKET_HEADER_BYTES)
    path = blob(copy, "packet", chance.choice(record_of(copy, round).entries).packet_digest)
    flip_in(path, bit)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (round, str(path))
    assert f"byte {bit // 8}: " in finding.why and "header, field" in finding.why


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_of_the_body_of_a_packet(copy: Path, seed: int) -> None:
    chance = random.Random(f"{SEED} body {seed}")
    round = chance.choice([round for round in range(1, ROUNDS + 1) if round != NULL_ROUND])
    path = blob(copy, "packet", chance.choice(record_of(copy, round).entries).packet_digest)
    bit = 8 * PACKET_HEADER_BYTES + chance.randrange(8 * (path.stat().st_size - PACKET_HEADER_BYTES))
    flip_in(path, bit)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (round, str(path)), str(finding)
    assert path.name[:16] in finding.what
    # Either the byte of a plane or of the file, or the section that it belongs to.
    assert "section" in finding.why or "frame" in finding.why, finding.why


def test_a_bit_of_a_packet_whose_copy_is_in_a_bundle(copy: Path) -> None:
    path = blob(copy, "packet", record_of(copy, BUNDLE_ROUND).entries[2].packet_digest)
    flip_in(path, 8 * (path.stat().st_size - 9) + 1)
    finding = only(audited(copy))
    assert finding.file == str(path) and f"in the file, byte {path.stat().st_size - 9}: " in finding.why


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_of_an_update(copy: Path, seed: int) -> None:
    chance = random.Random(f"{SEED} update {seed}")
    round = chance.choice([round for round in range(1, ROUNDS + 1) if round != NULL_ROUND])
    path = blob(copy, "update", record_of(copy, round).update_digest)
    bit = chance.randrange(8 * path.stat().st_size)
    flip_in(path, bit)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (round, str(path)), str(finding)
    assert ", byte " in finding.why, finding.why


def test_a_bit_of_a_bundle(copy: Path) -> None:
    path = blob(copy, "bundle", record_of(copy, BUNDLE_ROUND).digest)
    flip_in(path, 8 * 1000 + 7)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (BUNDLE_ROUND, str(path)) and "byte 1000: " in finding.why


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_of_a_snapshot(copy: Path, seed: int) -> None:
    chance = random.Random(f"{SEED} state {seed}")
    root = record_of(copy, ROUND_OF_STATE).state_root
    path = journal(copy).parent / "states" / f"{root.hex()}.safetensors"
    bit = chance.randrange(8 * path.stat().st_size)
    flip_in(path, bit)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (ROUND_OF_STATE, str(path))
    header_bytes = path.stat().st_size - 4 * len(initial_state_of(copy))
    if bit // 8 < header_bytes:
        assert f"header, byte {bit // 8}: " in finding.why, finding.why
    else:
        value = (bit // 8 - header_bytes) // 4
        tensor, inside = tensor_of(copy, value)
        assert f"({tensor}), value {inside} " in finding.why, finding.why


def test_a_bit_of_the_hashes_of_a_snapshot(copy: Path) -> None:
    root = record_of(copy, ROUND_OF_STATE).state_root
    path = journal(copy).parent / "states" / f"{root.hex()}.pieces"
    flip_in(path, 8 * 17)
    finding = only(audited(copy))
    assert (finding.round, finding.file) == (ROUND_OF_STATE, str(path)) and "byte 17: " in finding.why


def initial_state_of(folder: Path) -> NDArray[np.float32]:  # f32[N]
    return initial_state(OperatorFolder(folder).load()[0].config.model)


def tensor_of(folder: Path, value: int) -> tuple[str, int]:
    layout = OperatorFolder(folder).load()[0].config.layout
    number = next(i for i, stop in enumerate(layout.offsets[1:]) if value < stop)
    return layout.tensors[number].name, value - layout.offsets[number]


Break = Callable[[Path], Path]


def _packet(folder: Path) -> Path:
    return blob(folder, "packet", record_of(folder, 7).entries[0].packet_digest)


def _update(folder: Path) -> Path:
    return blob(folder, "update", record_of(folder, 7).update_digest)


@pytest.mark.parametrize("which", [_packet, _update])
def test_what_is_gone_is_told_apart_from_what_is_wrong(copy: Path, which: Break) -> None:
    path = which(copy)
    path.unlink()
    finding = only(audited(copy))
    assert finding.missing and (finding.round, finding.file) == (7, str(path))
    assert audited(copy, 8).passed


def test_with_packet_and_update_gone_it_goes_on_from_the_next_state(copy: Path) -> None:
    _packet(copy).unlink()
    _update(copy).unlink()
    report = audited(copy)
    assert {finding.round for finding in report.findings} == {7, 8} and all(f.missing for f in report.findings)
    assert report.recomputed == ROUNDS + 1 - 2


def test_an_aggregator_that_adds_something_of_its_own_is_found_out(tmp_path: Path) -> None:
    maker = Maker(tmp_path / "run")
    for round in range(1, 5):
        maker.round(round, cheats=round == 2)
    maker.store.close()
    report = audited(tmp_path / "run")
    wrong = [finding for finding in report.findings if "the update of round 2" in finding.what]
    assert wrong and "section " in wrong[0].why and ", byte " in wrong[0].why
    assert {finding.round for finding in report.findings} == {2}


def test_a_forged_weight_is_found(tmp_path: Path) -> None:
    class Unfair(Maker):
        def entry(self, packet: Packet, *, accepted: bool) -> Entry:
            entry = super().entry(packet, accepted=accepted)
            return dataclasses.replace(entry, weight=entry.weight + 1) if entry.weight else entry

    maker = Unfair(tmp_path / "run")
    maker.round(1)
    maker.store.close()
    report = audited(tmp_path / "run")
    assert len(report.findings) == PEERS and all("field weight" in finding.why for finding in report.findings)


def test_the_command_line(copy: Path) -> None:
    passed = run_cli("audit", str(copy), "--json")
    assert passed.returncode == 0, passed.stderr
    (report,) = json.loads(passed.stdout)
    assert report["passed"] and report["recomputed"] == ROUNDS + 1
    flip_in(_packet(copy), 8 * 40)
    failed = run_cli("audit", str(copy), "--from", "6", "--to", "8")
    assert failed.returncode == 1
    assert "of round 7" in failed.stdout and "header, field round, byte 40: " in failed.stdout
    assert "NOT PASSED" in failed.stdout
    for wrong in (["audit", str(copy), "--to", "99"], ["audit", str(copy / "nothing")]):
        refused = run_cli(*wrong)
        assert refused.returncode == 1 and "try:" in refused.stderr


def test_pieces_of_the_whole_states_have_the_hashes_beside_them(whole: Path) -> None:
    root = record_of(whole, 0).state_root
    path = journal(whole).parent / "states" / f"{root.hex()}.pieces"
    assert path.read_bytes() == b"".join(piece_hashes(initial_state_of(whole)))


def test_updates_of_the_whole_run_can_be_read(whole: Path) -> None:
    run = OperatorFolder(whole).load()[0].config
    assert update_from_wire(_update(whole).read_bytes(), run).header.round == 7

"""`sparseloco-peer audit`: recompute rounds from the packets that a folder holds, and name the first byte that differs.

Nothing that is stored is believed: every record, packet, update, bundle and state is read from its file, and what one
follows from the others is computed anew, from the state before the first round on. A file that is no longer there is
told apart from one that is wrong. The folder is only read, so it may be in use.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from peer import locate
from peer.amendments import follow, stored_amendments
from peer.audit_packets import Made, PacketsOfRound
from peer.audit_report import Finding, Report
from peer.core import codec
from peer.core.replica import initial_state
from peer.errors import UserCode, UserError, os_errors
from peer.locate import Place
from peer.merge import accepted, sections_of_update
from peer.stored import Stored, find_stores
from protocol.amendment import Amendments, check_rollback
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, digest, merkle_root
from protocol.layout import piece_hashes, state_root
from protocol.ledger import Kind, RoundRecord, check_link, check_record
from protocol.packet import PACKET_HEADER_BYTES, PacketHeader
from protocol.run import RunConfig
from protocol.update import UPDATE_FORM, UPDATE_HEADER_BYTES, Update, UpdateHeader, make_update
from protocol.wire import bundle_to_wire, update_from_wire, update_to_wire

Flat = NDArray[np.float32]  # f32[N]
Watch = Callable[[int, int], None]  # rounds done, of how many
PROGRESS_S = 2.0


def audit(folder: Path, first: int | None, last: int | None, watch: Watch) -> list[Report]:
    """Audit every ledger in a folder, from round `first` to `last`. Raises UserError."""
    reports = []
    for path in find_stores(folder):
        with closing(Stored(path)) as store:
            if store.head() >= 0:
                reports.append(_Audit(store, first, last, watch).run())
    if not reports:
        raise UserError(
            UserCode.NO_SUCH_FILE,
            f"there is no ledger in {folder}",
            "name the folder of a run, of an aggregator or of a mirror; a peer's own home holds no records",
        )
    return reports


def show_progress(stream: TextIO) -> Watch:
    """Say every few seconds how far an audit is, and how long it will take."""
    began_s = said_s = time.monotonic()

    def watch(done: int, asked: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s >= PROGRESS_S and done < asked:
            said_s = now_s
            left_s = (now_s - began_s) / done * (asked - done)
            print(f"audit: {done} of {asked} rounds, {left_s:.0f} s left", file=stream, flush=True)

    return watch


class _Audit:
    def __init__(self, store: Stored, first: int | None, last: int | None, watch: Watch) -> None:
        self.store, self.watch = store, watch
        self.run_config = store.run()
        head = store.head()
        self.report = Report(str(store.path), self.run_config.name, first or 0, head if last is None else last)
        if not 0 <= self.report.first <= self.report.last <= head:
            raise UserError(
                UserCode.BAD_ARGUMENT,
                f"rounds {self.report.first} to {self.report.last} are not all in {store.path}: it ends with {head}",
                "name rounds that are there with --from and --to",
            )
        self._compared: set[bytes] = set()
        self._flat: Flat | None = None  # the parameters after the round before, None when they cannot be known
        self._amendments = Amendments(self.run_config)  # by the record of the round before

    def run(self) -> Report:
        report, began_s = self.report, time.monotonic()
        for problem in self.store.problems():
            self._find(0, "the journal", problem, self.store.journal)
        previous = self._begin()
        for round in range(report.first, report.last + 1):
            previous = self._round(round, previous)
            self.watch(round - report.first + 1, report.asked)
        report.seconds = time.monotonic() - began_s
        return report

    def _find(self, round: int, what: str, why: str | Place, file: Path, *, missing: bool = False) -> Finding:
        finding = Finding(round, what, str(why), str(file), missing)
        self.report.findings.append(finding)
        return finding

    # The state before the first round

    def _begin(self) -> RoundRecord | None:
        """Get the record of the round before the first, its amendments and the parameters after it."""
        before = self.report.first - 1
        if before < 0:
            flat = self._stored(self.run_config.genesis_root)
            self._flat = flat if flat is not None else self._genesis()
            return None
        self._flat = self._state_after(before)
        record = self._peek(before)
        if record is not None:
            self._amendments = self._chain(record)
        return record

    def _state_after(self, last: int) -> Flat | None:
        """The parameters after a round, by a stored state and the updates since; None when nothing leads to them."""
        records: list[RoundRecord] = []
        flat, round = None, last
        while flat is None and round >= 0:
            record = self._peek(round)
            before = records[-1] if records else None
            if record is None or (before and before.kind != Kind.ROLLBACK and before.previous != record.digest):
                break
            records.append(record)
            flat = self._stored(record.state_root)
            if flat is None and round == 0:
                flat = self._genesis()
            # The way to the state of a rollback leads by way of the round to which it goes back.
            same = self.store.rounds_of(record.state_root) if record.kind == Kind.ROLLBACK else []
            round = min((other for other in same if other < round), default=round - 1)
        for base, record in pairwise(reversed(records)):
            flat = None if flat is None else self._follow(flat, record, base.state_root)
        return flat

    def _peek(self, round: int) -> RoundRecord | None:
        row = self.store.record(round)
        try:
            record = None if row is None else RoundRecord.from_bytes(row.data)
            if record is not None:
                check_record(record, self.run_config)
            return record
        except ProtocolError:
            return None

    def _genesis(self) -> Flat | None:
        flat = initial_state(self.run_config.model)
        return flat if state_root(flat) == self.run_config.genesis_root else None

    def _stored(self, root: bytes) -> Flat | None:
        try:
            return self.store.states.load(root, self.run_config.layout)
        except UserError:
            return None

    def _follow(self, flat: Flat, record: RoundRecord, base_root: bytes) -> Flat | None:
        """Apply the update of a record, stored or made from its packets; None when neither leads to its state."""
        run, sections = self._chain(record).config_at(record.round), None
        if record.update_digest != NO_DIGEST:
            raw = self.store.blobs.get("update", record.update_digest.hex())
            with suppress(ProtocolError):
                sections = None if raw is None else sections_of_update(raw, record, run)
            if sections is None:
                unheard = Report(self.report.store, run.name, record.round, record.round)
                sections = PacketsOfRound(self.store, run, record, base_root, unheard).check().sections
            if sections is None:
                return None
            codec.outer_step(torch.from_numpy(flat), run.layout, sections)
        return flat if state_root(flat) == record.state_root else None

    # One round

    def _round(self, round: int, previous: RoundRecord | None) -> RoundRecord | None:
        """Audit one round, and leave the parameters after it in `_flat`; return its record, mended if need be."""
        report, before = self.report, len(self.report.findings)
        record = self._record(round, previous)
        if record is None:
            self._flat = None
            return None
        known = self._flat is not None and (round == 0 or previous is not None)
        if not known and round:
            what = f"the parameters before round {round}"
            self._find(round, what, "they are not here, nor what leads to them", self.store.states.folder, missing=True)
        self._amend(record, previous)
        base_root = previous.state_root if previous is not None else self._base_root(record)
        run = self._amendments.config_at(round)
        made = PacketsOfRound(self.store, run, record, base_root, report).check()
        sections = self._update(record, base_root, made)
        self._bundle(record, made)
        self._apply(record, sections)
        self._states(record)
        if known and len(report.findings) == before:
            report.recomputed += 1
            report.state_root = record.state_root.hex()
        return record

    # Amendments

    def _chain(self, record: RoundRecord) -> Amendments:
        """The amendments that a record names, or those that are known where some are not here."""
        try:
            return stored_amendments(self.store.blobs, self._amendments, record.amendment)
        except ProtocolError:
            return self._amendments

    def _amend(self, record: RoundRecord, previous: RoundRecord | None) -> None:
        """Bring in the amendments that a record names, and check that it keeps to all of them."""
        what, folder = f"the amendments of round {record.round}", self.store.blobs.folder / "amendment"
        before = self._amendments
        try:
            newest = stored_amendments(self.store.blobs, before, record.amendment)
        except ProtocolError as error:
            paths = (path for path in sorted(folder.glob("*/*")) if _is_damaged(path))
            missing = error.code == Code.NOT_FOUND
            self._find(record.round, what, f"{error.code.name}: {error.detail}", next(paths, folder), missing=missing)
            return
        try:
            if previous is not None or record.round == 0:
                follow(before, record, newest)
            else:
                newest.check(record)
            to_round = newest.rollback_at(record.round)
            target = None if to_round is None else self._peek(to_round)
            if target is not None:
                check_rollback(record, target)
        except ProtocolError as error:
            self._find(record.round, what, f"{error.code.name}: {error.detail}", self.store.journal)
        self.report.amendments += len(newest.chain) - len(before.chain)
        self._amendments = newest

    def _base_root(self, record: RoundRecord) -> bytes:
        """The state root before a round whose predecessor is not here: what its own packets say."""
        for entry in accepted(record.entries):
            raw = self.store.blobs.get("packet", entry.packet_digest.hex())
            if raw is not None and digest("packet", raw[:PACKET_HEADER_BYTES]) == entry.packet_digest:
                return PacketHeader.from_bytes(raw[:PACKET_HEADER_BYTES]).base_root
        return record.state_root

    def _record(self, round: int, previous: RoundRecord | None) -> RoundRecord | None:
        """Check a record by itself, against its row, the one before and the one after it."""
        row, following = self.store.record(round), self.store.record(round + 1)
        what, journal = f"the record of round {round}", self.store.journal
        if row is None:
            self._find(round, what, "it is not here", journal, missing=True)
            return None
        self.report.records += 1
        data, found = row.data, digest("record", row.data)
        named = {row.digest} | ({following.data[48:80]} if following is not None else set())
        if found not in named:
            mended = locate.mend_record(data, named)
            if mended is None:
                self._find(round, what, f"its digest is {found.hex()[:16]}, not {row.digest.hex()[:16]}", journal)
            else:
                data = mended[0]
                self._find(round, what, mended[1], journal)
        try:
            record = RoundRecord.from_bytes(data)
            check_record(record, self.run_config)
            if previous is not None:
                check_link(previous, record)
        except ProtocolError as error:
            self._find(round, what, f"{error.code.name}: {error.detail}", journal)
            return None
        columns = ("digest", row.digest, record.digest), ("state_root", row.state_root, record.state_root)
        for name, stored, wanted in (*columns, ("update_digest", row.update_digest, record.update_digest)):
            place = locate.first_difference(wanted, stored, f"column {name}")
            if place is not None:
                self._find(round, f"the journal's row of round {round}", place, journal)
        return record

    def _update(self, record: RoundRecord, base_root: bytes, made: "Made") -> Sequence[bytes] | None:
        """Check the stored update against what the packets lead to; return the sections that the record names."""
        if record.kind != Kind.APPLIED:
            return ()
        run, what = self.run_config, f"update {record.update_digest.hex()[:16]} of round {record.round}"
        path = self.store.blobs.path("update", record.update_digest.hex())
        made_digest = NO_DIGEST
        if made.sections is not None:
            made_digest = make_update(run, record.round, base_root, record.state_root, made.sections).header.digest
        truth = made.sections if made_digest == record.update_digest else None
        stored = None
        if path is None:
            self._find(record.round, what, self._gone(record.round), self._blob_path("update", record), missing=True)
        else:
            self.report.updates += 1
            with os_errors(path):
                raw = path.read_bytes()
            stored, place = _read_update(raw, record, run, truth)
            if place is not None:
                self._find(record.round, what, place, path)
        if made.sections is not None and truth is None:
            why: str | Place = f"packets lead to update {made_digest.hex()[:16]}, the record names another"
            if stored is not None:
                pairs = zip(made.sections, stored, strict=True)
                number = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
                if number is not None:
                    ours, theirs = made.sections[number], stored[number]
                    why = locate.section_place(ours, theirs, number, run.layout, UPDATE_FORM)
            self._find(record.round, f"the update of round {record.round}", why, path or self.store.blobs.folder)
        made.blame(stored if stored is not None else truth)
        return truth if truth is not None else stored

    def _blob_path(self, kind: str, record: RoundRecord) -> Path:
        name = record.update_digest if kind == "update" else record.digest
        return self.store.blobs.folder / kind / name.hex()[:2] / name.hex()

    def _gone(self, round: int) -> str:
        if round < self.store.kept_from():
            return "it is no longer here, for only the newest rounds are kept"
        return "it is not here"

    def _bundle(self, record: RoundRecord, made: "Made") -> None:
        raw = self.store.blobs.get("bundle", record.digest.hex())
        if raw is None:
            return
        self.report.bundles += 1
        packets = [made.raw.get(entry.packet_digest) for entry in accepted(record.entries)]
        whole = [packet for packet in packets if packet is not None]
        if len(whole) == len(packets):
            place = locate.first_difference(bundle_to_wire(whole), raw, "the packets in it")
            if place is not None:
                self._find(
                    record.round, f"the bundle of round {record.round}", place, self._blob_path("bundle", record)
                )

    def _apply(self, record: RoundRecord, sections: Sequence[bytes] | None) -> None:
        """Take the parameters on to the state after the round."""
        flat = self._flat
        if record.kind == Kind.ROLLBACK:
            to_round = self._amendments.rollback_at(record.round)
            self._flat = flat = None if to_round is None else self._state_after(to_round)
            if flat is None:
                what, why = f"the parameters after round {record.round}", "the state that they go back to is not here"
                self._find(record.round, what, why, self.store.states.folder, missing=True)
        if flat is not None and sections is not None:
            if sections:
                codec.outer_step(torch.from_numpy(flat), self.run_config.layout, sections)
            root = state_root(flat)
            if root == record.state_root:
                return
            why = f"state root {root.hex()[:16]}, the record says {record.state_root.hex()[:16]}"
            self._find(record.round, f"the parameters after round {record.round}", why, self.store.journal)
        self._flat = self._stored(record.state_root)

    def _states(self, record: RoundRecord) -> None:
        """Compare a stored state with the parameters that were computed."""
        root, states = record.state_root, self.store.states
        path, hashes_path = (states.folder / f"{root.hex()}{end}" for end in (".safetensors", ".pieces"))
        if root in self._compared or not (path.exists() or hashes_path.exists()):
            return
        self._compared.add(root)
        self.report.states += 1
        what, flat = f"the state after round {record.round}", self._flat
        if flat is None:
            self._find(record.round, what, "it is damaged, and nothing else leads to these parameters", path)
            return
        for part in (path, hashes_path):
            if not part.exists():
                self._find(record.round, what, "its other half is here alone", part, missing=True)
        if path.exists():
            rounds = sorted({record.round, *self.store.rounds_of(root)})
            with os_errors(path):
                place = locate.state_place(path, flat, root, rounds, self.run_config)
            if place is not None:
                self._find(record.round, what, place, path)
        if hashes_path.exists():
            with os_errors(hashes_path):
                stored = hashes_path.read_bytes()
            place = locate.first_difference(b"".join(piece_hashes(flat)), stored, "hashes of pieces")
            if place is not None:
                self._find(record.round, what, place, hashes_path)


def _read_update(
    raw: bytes, record: RoundRecord, run: RunConfig, truth: Sequence[bytes] | None
) -> tuple[Sequence[bytes] | None, Place | None]:
    """The sections of a stored update, and where it is wrong. `truth` are those that it should have, if known."""
    place = locate.header_place(raw, "update", record.update_digest)
    if place is not None:
        return None, place
    header = UpdateHeader.from_bytes(raw[:UPDATE_HEADER_BYTES])
    try:
        sections = update_from_wire(raw, run).sections
    except ProtocolError as error:
        if truth is not None:
            return None, locate.file_place(update_to_wire(Update(header, tuple(truth)), run), raw, "update", run)
        return None, locate.plane_place(raw, "update", run, error, header.sections_root)
    if truth is not None:
        pairs = enumerate(zip(truth, sections, strict=True))
        number = next((number for number, (ours, theirs) in pairs if ours != theirs), None)
        if number is None:
            return sections, None
        return None, locate.section_place(truth[number], sections[number], number, run.layout, UPDATE_FORM)
    if merkle_root(sections) != header.sections_root:
        suspects = [(number, "") for number in range(len(sections))]
        return None, locate.packet_section_place(sections, header.sections_root, suspects, run.layout)
    try:
        codec.check_update_sections(sections, run.layout)
    except ProtocolError as error:
        return None, Place("its sections", -1, "an update", f"{error.code.name} ({error.detail})")
    return sections, None


def _is_damaged(path: Path) -> bool:
    """Whether an amendment's file does not hold what its name says."""
    with os_errors(path):
        return digest("amendment", path.read_bytes()).hex() != path.name

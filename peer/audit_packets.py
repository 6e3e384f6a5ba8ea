"""The packets of one round under audit: each checked by itself, then merged, and what is wrong with them named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer import locate
from peer.audit_report import Finding, Report
from peer.core import codec
from peer.locate import Place
from peer.merge import accepted, check_contents, merge_packets
from peer.stored import Stored
from protocol.arithmetic import weight_of
from protocol.errors import ProtocolError
from protocol.identity import merkle_root
from protocol.layout import Layout
from protocol.ledger import Entry, RoundRecord, Verdict
from protocol.packet import PACKET_HEADER_BYTES, Packet, PacketHeader, check_claims
from protocol.run import RunConfig
from protocol.update import UPDATE_FORM
from protocol.wire import bundle_from_wire, packet_from_wire


@dataclass
class Made:
    """What the packets of a round lead to."""

    sections: list[bytes] | None  # of the update, None when a packet is missing or wrong
    raw: dict[bytes, bytes]  # good packets as they are stored
    blame: Callable[[Sequence[bytes] | None], None]  # look for the wrong bytes of packets, by the update's sections


class PacketsOfRound:
    """Reads and checks the packets of one round."""

    def __init__(self, store: Stored, run: RunConfig, record: RoundRecord, base_root: bytes, report: Report) -> None:
        self.store, self.run, self.record, self.base_root, self.report = store, run, record, base_root, report
        self._good: dict[bytes, Packet] = {}
        self._raw: dict[bytes, bytes] = {}
        # Packets whose sections are not those of their header: how the file looks, and where it lies.
        self._doubtful: dict[bytes, tuple[Packet, bytes, Path]] = {}

    def check(self) -> Made:
        """Read and check all packets; what they lead to."""
        for entry in self.record.entries:
            self._entry(entry)
        self._rows()
        entries = accepted(self.record.entries)
        sections = None
        if entries and all(entry.packet_digest in self._good for entry in entries):
            sections = merge_packets([self._good[entry.packet_digest] for entry in entries], entries, self.run)
        return Made(sections, self._raw, self._blame)

    def _find(self, entry: Entry, why: str | Place, path: Path, *, missing: bool = False) -> None:
        what = f"packet {entry.packet_digest.hex()[:16]} of round {self.record.round} (peer {entry.peer.hex()[:16]})"
        self.report.findings.append(Finding(self.record.round, what, str(why), str(path), missing))

    def _entry(self, entry: Entry) -> None:
        name = entry.packet_digest.hex()
        path = self.store.blobs.folder / "packet" / name[:2] / name
        counts = entry.verdict == Verdict.ACCEPTED
        weight = weight_of(entry.tokens, self.run.nominal_tokens) if counts else 0
        if entry.weight != weight:
            place = Place("its entry in the record, field weight", -1, str(weight), str(entry.weight))
            self._find(entry, place, self.store.journal)
        raw = self.store.blobs.get("packet", name)
        if raw is None:
            # Only packets that count have to be kept.
            if counts:
                gone = self.record.round < self.store.kept_from()
                why = "it is no longer here, for only the newest rounds are kept" if gone else "it is not here"
                self._find(entry, why, path, missing=True)
            return
        self.report.packets += 1
        self._file(entry, raw, path)

    def _file(self, entry: Entry, raw: bytes, path: Path) -> None:
        run, place = self.run, locate.header_place(raw, "packet", entry.packet_digest)
        if place is not None:
            self._find(entry, self._copy_place(entry, raw) or place, path)
            return
        header = PacketHeader.from_bytes(raw[:PACKET_HEADER_BYTES])
        try:
            packet = packet_from_wire(raw, run)
        except ProtocolError as error:
            root = header.sections_root
            place = self._copy_place(entry, raw) or locate.plane_place(raw, "packet", run, error, root)
            self._find(entry, place, path)
            return
        if merkle_root(packet.sections) != header.sections_root:
            self._doubtful[entry.packet_digest] = packet, raw, path
            return
        for name in ("peer", "tokens", "inner_steps"):
            if getattr(header, name) != getattr(entry, name):
                place = Place(f"field {name}", -1, _text(getattr(entry, name)), _text(getattr(header, name)))
                self._find(entry, place, path)
        try:
            check_claims(packet, run, round=self.record.round, base_root=self.base_root)
            check_contents(packet, run)
        except ProtocolError as error:
            self._find(entry, f"{error.code.name}: {error.detail}", path)
            return
        self._good[entry.packet_digest], self._raw[entry.packet_digest] = packet, raw

    def _rows(self) -> None:
        """Compare the journal's rows of the round's packets with the record."""
        rows = {row.digest: row for row in self.store.packets(self.record.round)}
        for entry in self.record.entries if rows else ():
            row = rows.pop(entry.packet_digest, None)
            if row is None:
                if entry.verdict == Verdict.ACCEPTED:
                    self._find(entry, "the journal has no row of it", self.store.journal)
                continue
            for name in ("peer", "tokens", "inner_steps", "verdict", "code"):
                stored, wanted = getattr(row, name), getattr(entry, name)
                if stored != wanted:
                    self._find(
                        entry, Place(f"its row, column {name}", -1, _text(wanted), _text(stored)), self.store.journal
                    )
        for row in rows.values():
            if row.verdict == Verdict.ACCEPTED:
                what = f"packet {row.digest.hex()[:16]}"
                why = f"the journal says that it counted in round {self.record.round}, the record does not have it"
                self.report.findings.append(Finding(self.record.round, what, why, str(self.store.journal)))

    def _copy_place(self, entry: Entry, raw: bytes) -> Place | None:
        """Compare a damaged file with the copy of the packet in the round's bundle, if there is a good one."""
        entries = accepted(self.record.entries)
        bundle = self.store.blobs.get("bundle", self.record.digest.hex())
        if bundle is None or entry not in entries:
            return None
        try:
            copy = bundle_from_wire(bundle, len(entries), self.run)[entries.index(entry)]
            header = PacketHeader.from_bytes(copy[:PACKET_HEADER_BYTES])
        except ProtocolError:
            return None
        good = header.digest == entry.packet_digest and locate.reads_as(copy, "packet", self.run, header.sections_root)
        return locate.file_place(copy, raw, "packet", self.run) if good else None

    def _blame(self, update: Sequence[bytes] | None) -> None:
        """Say where packets differ from what they were, by the update that they led to."""
        for name, (packet, raw, path) in self._doubtful.items():
            entry = next(entry for entry in self.record.entries if entry.packet_digest == name)
            place = self._copy_place(entry, raw) or locate.packet_section_place(
                packet.sections, packet.header.sections_root, self._suspects(packet, update), self.run.layout
            )
            self._find(entry, place, path)

    def _suspects(self, packet: Packet, update: Sequence[bytes] | None) -> list[tuple[int, str]]:
        """The sections of a packet, those first that cannot be right: malformed, or with another merge than it had."""
        run, layout = self.run, self.run.layout
        broken, other, rest = list[tuple[int, str]](), list[tuple[int, str]](), list[tuple[int, str]]()
        packets = self._all_with(packet)
        for number, tensor in enumerate(layout.tensors):
            alone, section = Layout((tensor,)), packet.sections[number]
            try:
                codec.check_sections([section], alone, run.compression.k, run.compression.code_bits)
            except ProtocolError as error:
                broken.append((number, f"which is malformed ({error.code.name})"))
                continue
            merged = None if update is None or packets is None else self._merge_alone(packets, number, alone)
            if merged is not None and update is not None and merged != update[number]:
                place = locate.section_place(update[number], merged, number, layout, UPDATE_FORM)
                other.append((number, f"which leads to another update from its byte {place.byte} on"))
            else:
                rest.append((number, ""))
        return broken + other + rest

    def _all_with(self, packet: Packet) -> list[Packet] | None:
        """All packets of the round that count, with this doubtful one among them; None when others are lacking."""
        digests = [entry.packet_digest for entry in accepted(self.record.entries)]
        known = {**self._good, packet.header.digest: packet}
        return [known[name] for name in digests] if all(name in known for name in digests) else None

    def _merge_alone(self, packets: Sequence[Packet], number: int, alone: Layout) -> bytes:
        entries, run = accepted(self.record.entries), self.run
        parts = [[packet.sections[number]] for packet in packets]
        weights, clips = [entry.weight for entry in entries], [entry.clip for entry in entries]
        k, code_bits = run.compression.k, run.compression.code_bits
        return codec.merge(parts, weights, clips, alone, k, code_bits, run.outer.rule, run.outer.alpha_q16)[0]


def _text(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)

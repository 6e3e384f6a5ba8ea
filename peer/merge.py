"""From packets to the update of their round: the aggregator's work when a round closes, and a peer's with a bundle."""

from collections.abc import Iterable, Sequence

from peer.core import codec
from protocol.errors import Code, ProtocolError
from protocol.ledger import Entry, RoundRecord, Verdict
from protocol.packet import Packet, check_claims
from protocol.run import RunConfig
from protocol.update import check_update_claims, make_update
from protocol.wire import bundle_from_wire, packet_from_wire, update_from_wire


def accepted(entries: Iterable[Entry]) -> list[Entry]:
    """The entries whose packets make up the update, in the order of the record."""
    return [entry for entry in entries if entry.verdict == Verdict.ACCEPTED]


def check_contents(packet: Packet, run: RunConfig) -> int:
    """Check the contents of a packet's sections, and count the values in them. Raises ProtocolError."""
    return codec.check_sections(packet.sections, run.layout, run.compression.k, run.compression.code_bits)


def merge_packets(packets: Sequence[Packet], entries: Sequence[Entry], run: RunConfig) -> list[bytes]:
    """The sections of the update that these packets, all checked, lead to with their entries' weights and clips."""
    weights, clips = [entry.weight for entry in entries], [entry.clip for entry in entries]
    k, code_bits = run.compression.k, run.compression.code_bits
    sections = [packet.sections for packet in packets]
    return codec.merge(sections, weights, clips, run.layout, k, code_bits, run.outer.rule, run.outer.alpha_q16)


def sections_of_update(data: bytes, record: RoundRecord, run: RunConfig) -> Sequence[bytes]:
    """The sections of a record's update in transport form, checked in full. Raises ProtocolError."""
    update = update_from_wire(data, run)
    check_update_claims(update, run, digest=record.update_digest)
    if update.header.round != record.round or update.header.new_root != record.state_root:
        raise ProtocolError(Code.WRONG_ROOT, "the update belongs to another round")
    codec.check_update_sections(update.sections, run.layout)
    return update.sections


def sections_of_bundle(data: bytes, record: RoundRecord, base_root: bytes, run: RunConfig) -> Sequence[bytes]:
    """The sections of a record's update, merged from the bundle of its packets (SPEC 11).

    `base_root` is the state root of the record before. Raises ProtocolError unless every packet is the one that the
    record names and the merge is the update that it names.
    """
    entries = accepted(record.entries)
    packets = []
    for raw, entry in zip(bundle_from_wire(data, len(entries), run), entries, strict=True):
        packet = packet_from_wire(raw, run)
        if packet.header.digest != entry.packet_digest:
            raise ProtocolError(Code.WRONG_DIGEST, "a packet of the bundle is not the one that the record names")
        check_claims(packet, run, round=record.round, base_root=base_root)
        check_contents(packet, run)
        packets.append(packet)
    sections = merge_packets(packets, entries, run)
    update = make_update(run, record.round, base_root, record.state_root, sections)
    if update.header.digest != record.update_digest:
        raise ProtocolError(Code.WRONG_DIGEST, "the bundle does not lead to the update that the record names")
    return sections

"""Bundles: the packets of a round instead of its update (SPEC 11)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from protocol.arithmetic import Contribution, merge
from protocol.cases.packets import Packet
from protocol.cases.records import APPLIED, LATE, Entry, Record, ordered
from protocol.cases.sections import Part, gap_bytes, pack
from protocol.cases.transport import frame_of
from protocol.cases.updates import Update
from protocol.cases.vector import BASE, PEER, STRANGER, Fields, Row, Vector, make_run, table, text_of
from protocol.errors import Code
from protocol.identity import PrivateKey, digest, merkle_root
from protocol.packing import decode_section
from protocol.run import RunConfig
from protocol.update import encode_update_section
from protocol.wire import bundle_bytes_max

SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (("bias", (3,)), ("weight", (4100,)))
STATE = bytes([0x53]) * 32
BIAS = (
    Part(3, 8, 2, b"\x88", b"\0", (), b"\1", b"\1"),
    Part(3, 8, 2, b"\x8a", b"\0", (), b"\1", b"\0"),
)
EVERY = Part(4100, 8, 2, b"\x90\x91", b"\x20\0", (), gap_bytes(range(0, 4096, 512)) + b"\3", pack([0, 3] * 4 + [0], 2))
SOME = replace(EVERY, scales=b"\x96\0", gaps=gap_bytes(range(1, 4096, 512)), codes=pack([3, 0] * 4, 2))
PARTS = ((BIAS[0], EVERY), (BIAS[1], SOME))


def run_of(rule: str) -> RunConfig:
    """The run of these bundles."""
    return make_run(k=8, rule=rule, alpha=0.75, shapes=SHAPES)


def packets_of(run: RunConfig) -> list[tuple[PrivateKey, Packet, Sequence[Part]]]:
    """Two packets of round 1, in the order of the record."""
    made = []
    for key, parts in zip((PEER, STRANGER), PARTS, strict=True):
        packet = Packet(run_id=run.run_id, round=1, sections=[part.data for part in parts], peer=key.public, key=key)
        made.append((key, packet, parts))
    return sorted(made, key=lambda item: item[0].public)


def wire(packet: Packet, parts: Sequence[Part]) -> bytes:
    """A packet in transport form, nothing compressed."""
    return packet.header + frame_of(parts).data


def joined(wires: Sequence[bytes]) -> bytes:
    """A bundle."""
    return b"".join(len(each).to_bytes(4, "little") + each for each in wires)


def record_of(run: RunConfig, weights: Sequence[int] = (1024, 500), clips: Sequence[int] = (65536, 40000)) -> Record:
    """The record of the round that these packets lead to."""
    made = packets_of(run)
    contributions = []
    for (_, packet, _), weight, clip in zip(made, weights, clips, strict=True):
        sizes = zip(packet.sections, run.layout.tensors, strict=True)
        tensors = [decode_section(section, tensor.size, 8, 2) for section, tensor in sizes]
        contributions.append(Contribution(tensors, weight, clip))
    merged = merge(contributions, run.layout, run.outer.rule, run.outer.alpha_q16)
    update = Update(run_id=run.run_id, round=1, root=merkle_root([encode_update_section(each) for each in merged]))
    header = update.header[:44] + BASE + STATE + update.header[108:]
    entries = [
        Entry(key.public, packet.digest, weight=weight, clip=clip)
        for (key, packet, _), weight, clip in zip(made, weights, clips, strict=True)
    ]
    late = replace(LATE, peer=bytes([1]) * 32)
    named = digest("update", header)
    return replace(APPLIED, run_id=run.run_id, state_root=STATE, update_digest=named, entries=ordered(*entries, late))


def asked(run: RunConfig, record: Record, data: bytes) -> Fields:
    """The fields of a request."""
    return {"run": text_of(run), "base_root": BASE, "record": record.data, "bytes": data}


def good_rows() -> Iterator[Row]:
    """Bundles in order."""
    for rule in ("mean", "mean_of_senders"):
        run = run_of(rule)
        wires = [wire(packet, parts) for _, packet, parts in packets_of(run)]
        yield (
            rule,
            "Two packets lead to the update; a late one is no part of it.",
            asked(run, record_of(run), joined(wires)),
            None,
        )


def bad_rows() -> Iterator[Row]:
    """Bundles that are refused; the update is fetched instead."""
    run = run_of("mean_of_senders")
    record, made = record_of(run), packets_of(run)
    first, second = (wire(packet, parts) for _, packet, parts in made)
    data = joined([first, second])
    key, packet, parts = made[1]
    unsigned = replace(packet, key=PEER if key is STRANGER else STRANGER)
    flaw = replace(parts[0], codes=b"\x11")
    padded = replace(packet, sections=[flaw.data, parts[1].data])
    hostile = joined([first]) + b"\xff\xff\xff\xff"
    rows: list[tuple[str, str, bytes, Code]] = [
        ("empty", "Nothing is there.", b"", Code.TRUNCATED),
        ("size-cut", "The second size is not whole.", data[: 4 + len(first) + 3], Code.TRUNCATED),
        ("one-packet", "The second packet is missing.", joined([first]), Code.TRUNCATED),
        ("cut", "The last byte is missing.", data[:-1], Code.TRUNCATED),
        ("trailing", "A byte is left over.", data + b"\0", Code.TRAILING),
        ("too-large", "One byte more than two packets can have.", bytes(bundle_bytes_max(run, 2) + 1), Code.TOO_LARGE),
        ("hostile", "A size is believed of nobody.", hostile, Code.TOO_LARGE),
        ("order", "Packets are in the order of the record.", joined([second, first]), Code.WRONG_DIGEST),
        ("twice", "The same packet twice.", joined([first, first]), Code.WRONG_DIGEST),
        (
            "tokens",
            "Another packet of the same sections.",
            joined([first, wire(replace(packet, tokens=65), parts)]),
            Code.WRONG_DIGEST,
        ),
        ("magic", "A packet is damaged.", joined([first, b"SLPX" + second[4:]]), Code.BAD_MAGIC),
        (
            "frame",
            "A packet's frame is damaged.",
            joined([first, second[:216] + bytes(4) + second[220:]]),
            Code.BAD_FRAME,
        ),
        (
            "section",
            "A section is another than the signed one.",
            joined([first, packet.header + frame_of([flaw, parts[1]]).data]),
            Code.BAD_MERKLE,
        ),
    ]
    for name, why, each, code in rows:
        yield name, why, asked(run, record, each), code
    for name, why, other, each_parts, code in (
        ("signature", "A packet whose signature is not its peer's.", unsigned, parts, Code.BAD_SIGNATURE),
        ("contents", "A packet whose section breaks a rule.", padded, (flaw, parts[1]), Code.BAD_PADDING),
        ("round", "A packet of another round.", replace(packet, round=2), parts, Code.WRONG_ROUND),
        ("base", "A packet from another state.", replace(packet, base_root=bytes(32)), parts, Code.WRONG_BASE),
    ):
        listed = [replace(e, packet=other.digest) if e.packet == packet.digest else e for e in record.entries]
        named = replace(record, entries=ordered(*listed))
        yield (
            name,
            f"{why} An aggregator has listed it.",
            asked(run, named, joined([first, wire(other, each_parts)])),
            code,
        )
    for name, other_record in {
        "update": replace(record, update_digest=bytes([9]) * 32),
        "state": replace(record, state_root=bytes([9]) * 32),
        "weight": replace(record, entries=[replace(e, weight=1) if e.weight == 500 else e for e in record.entries]),
        "clip": replace(record, entries=[replace(e, clip=30000) if not e.code else e for e in record.entries]),
    }.items():
        yield (
            f"wrong-{name}",
            "The packets do not lead to the update that the record names.",
            asked(run, other_record, data),
            Code.WRONG_DIGEST,
        )


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("bundle", "check bundle", good_rows())
    yield from table("bundle-refused", "check bundle", bad_rows())

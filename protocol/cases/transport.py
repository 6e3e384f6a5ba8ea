"""Packets and updates as they travel (SPEC 6). Every zstd frame here is built by hand or frozen: nothing compresses."""

import base64
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from protocol.cases import packets, updates
from protocol.cases.packets import Packet
from protocol.cases.sections import LONG, LONG_UPDATE, Part, UpdatePart, gap_bytes
from protocol.cases.updates import Update
from protocol.cases.vector import Fields, Row, Vector, make_run, noise, table, text_of
from protocol.errors import Code
from protocol.run import RunConfig
from protocol.wire import packet_wire_bytes_max, update_wire_bytes_max

MAGIC = b"\x28\xb5\x2f\xfd"

# What zstd 1.5 made of GAPS at level 1 (Huffman codes, four streams) and of CODES at level 19 (sequences, a checksum).
GAPS = bytes((octet & 0x1F).bit_count() for octet in noise("gaps", 1024))
CODES = noise("codes", 40) * 6 + noise("other codes", 16)
GAPS_ZSTD = base64.b64decode(
    "KLUv/WAAA20LAEbhKoQSMzAmACkAKAClx7zel7zEvSDtPNHmuBYmWJXete5cXkpgaEZNBnJX+Kdl0jxFO12Yyoi/iQdJmlIytVMM"
    "qQNB+d0EbM2YC0ZzqSglqafIhqFMCJXaylkMD15JNMiwi+hzrK+4+hdxoB55JOScPIH0cP+y6ZjR/8TYm0XxeAqR+0FmgBSYIK3H"
    "lNcJTAh+NB4D8UB+fWNjG1UqvoECiGgDul1Sxp8STIMqYF2oMRVljAmJjKQgLTUGIAJCiFK4BxDC7aS9gJ+tO2s+jC7uCxPosb7S"
    "oG0k/x4qQPoA/ijTppmi2BgmA7gjCPWk7H0YahLXTEs4KevZAClAPOFOpMug8gg8uAvbMTkLml5IT5zpac8fGsDo5eALlpmE5eBJ"
    "MMggoX6tBWHkYQdkZWKzYnvIWLMY7ZJJEcL/VpkI0mF9Aq/zaRhQMcvNaBHa6a6okU95z7D8HaX8HzFOYVjCGGVaSb1RczjBgasC"
)
CODES_ZSTD = base64.b64decode(
    "KLUv/WQAAA0CAIQDBcKaTyre1KiY85BZgwvt/Qx8pnIE6k0o5my4alDnWfUwlyS6k6lylR7g4T/I/WoJb0eXdPessPQBACguSpUBBveiYQ=="
)

# Two full chunks that keep every 64th value, and a short one with one value.
SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (("a", (4096,)), ("b", (64, 64)), ("c", (13,)))
RUN = make_run(shapes=SHAPES)
EVEN = Part(4096, 64, 2, b"\x80", b"\0", (), gap_bytes(range(0, 4096, 64)), bytes(16))
ODD = replace(EVEN, scales=b"\x90", ratios=b"\x20", gaps=gap_bytes(range(60, 4096, 64)), codes=bytes(15) + b"\x80")
SHORT = Part(13, 64, 2, b"\x70", b"\0", (), b"\5", b"\1")
PARTS = (EVEN, ODD, SHORT)
PACKET = Packet(run_id=RUN.run_id, sections=tuple(part.data for part in PARTS))

U_RUN = updates.RUN
U_PARTS = (updates.SCALAR, updates.MATRIX, updates.NORM)


@dataclass(frozen=True)
class Frame:
    """A transport frame of any content; lengths are those of the stored planes unless said otherwise."""

    sections: int
    gaps_length: int
    planes: tuple[bytes, ...]
    lengths: tuple[int, ...] | None = None

    @property
    def data(self) -> bytes:
        """The bytes of the frame."""
        lengths = self.lengths or tuple(len(plane) for plane in self.planes)
        return struct.pack(f"<II{len(lengths)}I", self.sections, self.gaps_length, *lengths) + b"".join(self.planes)


def frame_of(parts: Sequence[Part]) -> Frame:
    """The frame of these sections with all planes stored as they are."""
    blocks = b"".join(number.to_bytes(4, "little") for part in parts for number in part.blocks)
    scales, ratios = (b"".join(getattr(part, name) for part in parts) for name in ("scales", "ratios"))
    gaps, codes = (b"".join(getattr(part, name) for part in parts) for name in ("gaps", "codes"))
    return Frame(len(parts), len(gaps), (scales, ratios, blocks, gaps, codes))


def update_frame_of(parts: Sequence[UpdatePart]) -> Frame:
    """The frame of these sections of an update with all planes stored as they are."""
    counts = [number for part in parts for number in part.counts]
    blocks = b"".join(number.to_bytes(4, "little") for part in parts for number in part.blocks)
    exponents, gaps, values = (
        b"".join(getattr(part, name) for part in parts) for name in ("exponents", "gaps", "values")
    )
    heads = bytes(number & 255 for number in counts), bytes(number >> 8 for number in counts)
    return Frame(len(parts), len(gaps), (*heads, exponents, blocks, gaps, values))


def block(content: bytes, repeat: int = 0, *, last: bool = False, kind: int | None = None) -> bytes:
    """A zstd block: these bytes, or with `repeat` one byte so many times."""
    size, default = (repeat, 1) if repeat else (len(content), 0)
    header = int(last) | (default if kind is None else kind) << 1 | size << 3
    return header.to_bytes(3, "little") + content


def zstd(
    length: int, *blocks: bytes, size_bytes: int | None = None, window: int | None = None, extra: int = 0
) -> bytes:
    """A zstd frame that declares this content size in 1, 2, 4 or 8 bytes, or none in 0.

    Without a window byte it is a single segment. `extra` are further bits of its descriptor.
    """
    if size_bytes is None:
        size_bytes = 1 if length < 256 else 2
    flag = {0: 0, 1: 0, 2: 1, 4: 2, 8: 3}[size_bytes]
    descriptor = flag << 6 | (window is None) << 5 | extra
    stated = {0: 0, 2: length - 256}.get(size_bytes, length)
    head = bytes([descriptor]) + (b"" if window is None else bytes([window]))
    return MAGIC + head + stated.to_bytes(size_bytes, "little") + b"".join(blocks)


def swap(frame: Frame, place: int, plane: bytes) -> Frame:
    """The frame with one plane stored differently."""
    return replace(frame, planes=(*frame.planes[:place], plane, *frame.planes[place + 1 :]))


WHOLE = frame_of(PARTS)
SCALES, RATIOS, BLOCKS, GAP_PLANE, CODE_PLANE = range(5)
# The codes are 15 + 16 zeros, a byte 80 and a byte 1.
ZEROS, REST = block(b"\0", 31), block(b"\x80\1", last=True)
CODES_OF_WHOLE = zstd(33, ZEROS, REST)


def asked(run: RunConfig, header: bytes, *frames: Frame | bytes) -> Fields:
    """The fields of a request."""
    body = b"".join(frame if isinstance(frame, bytes) else frame.data for frame in frames)
    return {"run": text_of(run), "bytes": header + body}


def sent(*frames: Frame | bytes) -> Fields:
    """The usual packet in these frames."""
    return asked(RUN, PACKET.header, *frames)


def coded(plane: bytes) -> Fields:
    """The usual packet with its plane of codes stored so."""
    return sent(swap(WHOLE, CODE_PLANE, plane))


def good_rows() -> Iterator[Row]:
    """Transport forms in order."""
    one, two, three = (frame_of([part]) for part in PARTS)
    yield "stored", "One frame, no plane compressed.", sent(WHOLE), None
    yield "three-frames", "A frame for each section.", sent(one, two, three), None
    yield "two-frames", "A reader accepts any split.", sent(one, frame_of(PARTS[1:])), None
    gaps = [block(b"\0"), block(b"\x3f", 63), block(b"\x3c"), block(b"\x3f", 63), block(b"\5", last=True)]
    both = swap(swap(WHOLE, GAP_PLANE, zstd(129, *gaps)), CODE_PLANE, CODES_OF_WHOLE)
    yield "compressed", "Two planes are zstd frames of raw and repeated bytes.", sent(both), None
    for size_bytes in (4, 8):
        each = zstd(33, ZEROS, REST, size_bytes=size_bytes)
        yield f"size-in-{size_bytes}", f"The content size takes {size_bytes} bytes.", coded(each), None
    windows = {0x00: "1 KiB", 0x68: "8 MiB, the largest allowed"}
    for window, why in windows.items():
        each = zstd(33, ZEROS, REST, window=window, size_bytes=4)
        yield f"window-{window:02x}", f"A window of {why}.", coded(each), None
    empty_last = zstd(33, ZEROS, block(b"\x80\1"), block(b"", last=True))
    yield "empty-block", "The last block may be empty.", coded(empty_last), None
    bits = make_run(code_bits=1, shapes=SHAPES)
    parts = [replace(part, code_bits=1, ratios=b"", codes=part.codes[: (len(part.codes) + 1) // 2]) for part in PARTS]
    packet = Packet(run_id=bits.run_id, sections=tuple(part.data for part in parts))
    yield (
        "one-bit",
        "With code_bits = 1 the plane of ratios is empty.",
        asked(bits, packet.header, frame_of(parts)),
        None,
    )
    for name, frame, code_bits in (("zstd-gaps", frozen_frame(), 2), ("zstd-codes", frozen_frame(codes=True), 2)):
        run, packet = frozen(code_bits)
        yield name, "As zstd itself compresses.", asked(run, packet.header, frame), None
    run = make_run(k=1, shapes=[("long", (1025, 4096))])
    packet = Packet(run_id=run.run_id, sections=(LONG.data,))
    scales = zstd(1025, block(LONG.scales[:1]), block(b"\0", 1022), block(LONG.scales[-2:], last=True))
    frame = swap(swap(frame_of([LONG]), SCALES, scales), RATIOS, zstd(1025, block(b"\0", 1025, last=True)))
    yield "blocks", "A tensor of two blocks has a plane of blocks.", asked(run, packet.header, frame), None
    unsigned = asked(RUN, PACKET.header[:-1] + b"\0", WHOLE)
    yield "unsigned", "Signature, Merkle root and contents are not the transport's affair.", unsigned, None
    worse = [replace(EVEN, ratios=b"\xff", codes=b"\xff" * 16), *PARTS[1:]]
    yield "contents", "Signature, Merkle root and contents are not the transport's affair.", sent(frame_of(worse)), None


def frozen(code_bits: int) -> tuple[RunConfig, Packet]:
    """A run and a packet with one chunk of 1024 values, whose planes zstd itself compressed."""
    run = make_run(k=1024, code_bits=code_bits, shapes=[("dense", (4096,))])
    part = Part(4096, 1024, 2, b"\x80", b"\x20", (), GAPS, CODES)
    return run, Packet(run_id=run.run_id, sections=(part.data,))


def frozen_frame(*, codes: bool = False) -> Frame:
    """Its frame."""
    planes = (b"\x80", b"\x20", b"", GAPS if codes else GAPS_ZSTD, CODES_ZSTD if codes else CODES)
    return Frame(1, len(GAPS), planes)


def header_rows() -> Iterator[Row]:
    """What comes before the frames."""
    header, body, bound = PACKET.header, WHOLE.data, packet_wire_bytes_max(RUN)
    full = header + body + bytes(bound - len(header) - len(body))
    yield "too-large", "One byte beyond the bound.", asked(RUN, full, b"\0"), Code.TOO_LARGE
    yield (
        "too-large-first",
        "The whole is bounded before anything is read.",
        asked(RUN, bytes(bound + 1)),
        Code.TOO_LARGE,
    )
    yield (
        "at-the-bound",
        "The bound itself is allowed; the bytes after the frame are not.",
        asked(RUN, full),
        Code.TRAILING,
    )
    changed: dict[str, tuple[Packet, Code]] = {
        "magic": (replace(PACKET, magic=b"SLUP"), Code.BAD_MAGIC),
        "version": (replace(PACKET, version=2), Code.VERSION),
        "reserved": (replace(PACKET, reserved=1), Code.RESERVED),
        "tokens": (replace(PACKET, tokens=0), Code.BAD_TOKENS),
        "run": (replace(PACKET, run_id=bytes(32)), Code.OTHER_RUN),
    }
    for name, (packet, code) in changed.items():
        yield name, "The header is checked before the frames.", asked(RUN, packet.header, b"\0"), code
    yield "empty", "No bytes have no magic.", asked(RUN, b""), Code.BAD_MAGIC
    yield "header-cut", "The header is not whole.", asked(RUN, header[:215]), Code.TRUNCATED


def frame_rows() -> Iterator[Row]:
    """Frames whose lengths or numbers are wrong."""
    one, rest, data = frame_of(PARTS[:1]), frame_of(PARTS[1:]), WHOLE.data
    cuts = {"no-frame": 0, "head": 6, "lengths": 20, "planes": 28, "last-byte": len(data) - 1}
    for name, length in cuts.items():
        yield f"cut-{name}", "It ends inside a frame.", sent(data[:length]), Code.TRUNCATED
    yield "cut-second-frame", "A section is missing.", sent(one), Code.TRUNCATED
    lengths = [len(plane) for plane in WHOLE.planes]
    for name, length in {"one-more": lengths[4] + 1, "hostile": 2**32 - 1}.items():
        each = replace(WHOLE, lengths=(*lengths[:4], length))
        yield f"stored-{name}", "A stored length reaches beyond the end.", sent(each), Code.TRUNCATED
    wrapped = replace(WHOLE, lengths=(2**32 - 1, lengths[1] + lengths[0] + 1, 0, *lengths[3:]))
    yield "stored-wrap", "Stored lengths are added in more than 32 bits.", sent(wrapped), Code.TRUNCATED
    for number in (0, 4, 2**32 - 1):
        yield (
            f"sections-{number}",
            "A frame has 1 to 3 sections here.",
            sent(replace(WHOLE, sections=number)),
            Code.BAD_FRAME,
        )
    again = [one, replace(rest, sections=3)]
    yield "sections-in-second", "Two are missing, the second frame claims three.", sent(*again), Code.BAD_FRAME
    yield "four-frames", "A frame after the last section is left over.", sent(WHOLE, frame_of(PARTS[2:])), Code.TRAILING
    yield "trailing", "A byte follows.", sent(WHOLE, b"\0"), Code.TRAILING
    bound = 2 * (64 + 15) + 1 + 0
    for name, length in {"one-more": bound + 1, "hostile": 2**32 - 1}.items():
        each = replace(WHOLE, gaps_length=length)
        yield f"gaps-{name}", "More gap bytes than the sections can have.", sent(each), Code.TOO_LARGE
    for place, name in enumerate(("scales", "ratios", "blocks", "gaps", "codes")):
        each = swap(WHOLE, place, WHOLE.planes[place] + b"\0")
        yield f"plane-{name}", "A plane is stored in more bytes than it has.", sent(each), Code.BAD_FRAME
    gaps = WHOLE.planes[GAP_PLANE]
    wrong = {
        "less": ("A gap is missing.", gaps[:-1]),
        "more": ("A gap is left over.", gaps + b"\0"),
        "unfinished": ("The last gap does not end.", gaps[:-1] + b"\xff"),
        "continued": ("A byte 255 follows the last gap.", gaps + b"\xff"),
        "none": ("No gaps at all.", b""),
    }
    for name, (why, plane) in wrong.items():
        each = replace(swap(WHOLE, GAP_PLANE, plane), gaps_length=len(plane))
        yield f"values-{name}", why, sent(each), Code.BAD_FRAME


def zstd_rows() -> Iterator[Row]:
    """Compressed planes that are not as described: 33 bytes of codes are stored in fewer."""
    good = CODES_OF_WHOLE
    dictionary = MAGIC + bytes([0x21, 7, 33]) + ZEROS + REST
    wrong: dict[str, tuple[str, bytes]] = {
        "none": ("Nothing is stored.", b""),
        "short": ("Too short for a frame.", MAGIC),
        "not-zstd": ("Shorter than the plane, and no zstd frame.", bytes(20)),
        "magic": ("Another magic number.", b"\x27" + good[1:]),
        "gzip": ("Another compression.", b"\x1f\x8b\x08" + bytes(17)),
        "no-size": ("It declares no content size.", zstd(33, ZEROS, REST, size_bytes=0, window=0)),
        "size-less": ("It declares a byte less.", zstd(32, ZEROS, REST)),
        "size-more": ("It declares a byte more.", zstd(34, ZEROS, REST)),
        "size-0": ("It declares nothing.", zstd(0, ZEROS, REST)),
        "size-hostile": ("It declares 2^63 bytes.", zstd(2**63, ZEROS, REST, size_bytes=8)),
        "size-wraps": (
            "It declares 33 bytes in the lower half of 64 bits.",
            zstd(2**32 + 33, ZEROS, REST, size_bytes=8),
        ),
        "expands-to-less": ("It declares 33 bytes and has 32.", zstd(33, block(b"\0", 30), REST)),
        "expands-to-more": ("It declares 33 bytes and has 34.", zstd(33, block(b"\0", 32), REST)),
        "expands-to-all": (
            "It declares 33 bytes and is a single block of 34 zeros.",
            zstd(33, block(b"\0", 34, last=True)),
        ),
        "bomb": ("It declares 33 bytes and has 256 KiB.", zstd(33, *[block(b"\0", 1 << 17)] * 2, REST)),
        "window": ("A window of 9 MiB.", zstd(33, ZEROS, REST, size_bytes=4, window=0x69)),
        "window-largest": ("A window of 3.75 TiB.", zstd(33, ZEROS, REST, size_bytes=4, window=0xFF)),
        "trailing": ("A byte follows the frame.", good + b"\0"),
        "two-frames": ("Another frame follows, of no content.", good + zstd(0, block(b"", last=True))),
        "skippable-after": ("A skippable frame follows.", good + b"\x50\x2a\x4d\x18\0\0\0\0"),
        "skippable-before": ("A skippable frame comes first.", b"\x50\x2a\x4d\x18\0\0\0\0" + good),
        "skippable": ("A skippable frame and nothing else.", b"\x50\x2a\x4d\x18\x0c\0\0\0" + bytes(12)),
        "dictionary": ("It wants dictionary 7.", dictionary),
        "cut": ("Its last byte is missing.", good[:-1]),
        "cut-head": ("It ends in its head.", good[:5]),
        "no-last-block": ("No block is the last.", zstd(33, ZEROS, block(b"\x80\1"))),
        "reserved-block": ("A block of the reserved type 3.", zstd(33, ZEROS, block(b"\x80\1", last=True, kind=3))),
        "reserved-bit": ("The reserved bit of the descriptor is set.", zstd(33, ZEROS, REST, extra=8)),
        "checksum-missing": ("It announces a checksum and has none.", zstd(33, ZEROS, REST, extra=4)),
        "checksum": ("Its checksum is wrong.", zstd(33, ZEROS, REST, extra=4) + bytes(4)),
        "old-format": ("The format of zstd 0.7.", b"\x27\xb5\x2f\xfd" + good[4:]),
        "literals": ("A compressed block of nonsense.", zstd(33, block(b"\xff" * 12, last=True, kind=2))),
    }
    for name, (why, plane) in wrong.items():
        assert len(plane) < 33, name
        yield name, why, coded(plane), Code.BAD_ZSTD
    run, packet = frozen(2)
    damaged = CODES_ZSTD[:-1] + bytes([CODES_ZSTD[-1] ^ 1])
    frame = swap(frozen_frame(codes=True), CODE_PLANE, damaged)
    yield "frozen-checksum", "The checksum of a real frame is wrong.", asked(run, packet.header, frame), Code.BAD_ZSTD
    flipped = GAPS_ZSTD[:200] + GAPS_ZSTD[201:]
    frame = swap(frozen_frame(), GAP_PLANE, flipped)
    yield "frozen-damaged", "A byte of a real frame is missing.", asked(run, packet.header, frame), Code.BAD_ZSTD


def order_rows() -> Iterator[Row]:
    """Two rules are broken, and the first one decides: frame by frame, then plane by plane."""
    lengths = tuple(len(plane) for plane in WHOLE.planes)
    no_zstd, gaps = bytes(20), WHOLE.planes[GAP_PLANE][:-1]
    beyond = replace(WHOLE, sections=0, lengths=(*lengths[:4], 99))
    few_gaps = replace(swap(WHOLE, GAP_PLANE, gaps), gaps_length=len(gaps))
    one = frame_of(PARTS[:1])
    rows: list[tuple[str, Fields, Code]] = [
        ("end-before-sections", sent(beyond), Code.TRUNCATED),
        ("sections-before-gaps", sent(replace(WHOLE, sections=0, gaps_length=2**31)), Code.BAD_FRAME),
        ("gaps-before-planes", sent(replace(swap(WHOLE, SCALES, bytes(9)), gaps_length=2**31)), Code.TOO_LARGE),
        ("first-plane-first", sent(swap(swap(WHOLE, SCALES, b"\1"), CODE_PLANE, bytes(99))), Code.BAD_ZSTD),
        ("values-before-codes", sent(swap(few_gaps, CODE_PLANE, no_zstd)), Code.BAD_FRAME),
        ("plane-before-trailing", sent(swap(WHOLE, CODE_PLANE, no_zstd), b"\0"), Code.BAD_ZSTD),
        (
            "first-frame-first",
            sent(swap(one, CODE_PLANE, b"\1"), replace(frame_of(PARTS[1:]), sections=0)),
            Code.BAD_ZSTD,
        ),
        ("frame-before-end", sent(swap(one, CODE_PLANE, b"\1")), Code.BAD_ZSTD),
    ]
    for name, fields, code in rows:
        yield name, f"{name.replace('-', ' ')}.".capitalize(), fields, code


def good_update_rows() -> Iterator[Row]:
    """Transport forms of updates in order."""
    header, whole = updates.GOOD.header, update_frame_of(U_PARTS)
    yield "stored", "Six planes, none compressed.", asked(U_RUN, header, whole), None
    each = [update_frame_of([part]) for part in U_PARTS]
    yield "three-frames", "A frame for each section.", asked(U_RUN, header, *each), None
    run = make_run(shapes=[("long", (1025, 4096))])
    low = zstd(1025, block(b"\1"), block(b"\0", 1022), block(b"\2\1", last=True))
    zeros = zstd(1025, block(b"\0", 1025, last=True))
    frame = swap(swap(swap(update_frame_of([LONG_UPDATE]), 0, low), 1, zeros), 2, zeros)
    update = Update(run_id=run.run_id, sections=(LONG_UPDATE.data,))
    yield "blocks", "A tensor of two blocks, with compressed planes.", asked(run, update.header, frame), None
    wide = make_run(shapes=[("wide", (300,))])
    part = UpdatePart(300, (300,), b"\0", (), bytes(300), b"\1" * 300)
    update = Update(run_id=wide.run_id, sections=(part.data,))
    ones = zstd(300, block(b"\1", 300, last=True))
    frame = swap(update_frame_of([part]), 5, ones)
    yield "wide", "A count above 255 has a high byte.", asked(wide, update.header, frame), None


def bad_update_rows() -> Iterator[Row]:
    """Transport forms of updates that are refused."""
    header, whole, bound = updates.GOOD.header, update_frame_of(U_PARTS), update_wire_bytes_max(U_RUN)
    lengths = [len(plane) for plane in whole.planes]
    gaps, size = whole.planes[4], 1 + 5000 + 13
    rows: list[tuple[str, str, Fields, Code]] = [
        ("too-large", "One byte beyond the bound.", asked(U_RUN, bytes(bound + 1)), Code.TOO_LARGE),
        ("magic", "A packet is no update.", asked(U_RUN, packets.GOOD.header, whole), Code.BAD_MAGIC),
        ("version", "Version 1.", asked(U_RUN, replace(updates.GOOD, version=2).header, whole), Code.VERSION),
        ("header-cut", "The header is not whole.", asked(U_RUN, header[:139]), Code.TRUNCATED),
        ("reserved", "Zero.", asked(U_RUN, replace(updates.GOOD, reserved=1).header, whole), Code.RESERVED),
        ("run", "Another run.", asked(U_RUN, replace(updates.GOOD, run_id=bytes(32)).header, whole), Code.OTHER_RUN),
        ("no-frame", "There is no frame.", asked(U_RUN, header), Code.TRUNCATED),
        ("cut", "The last byte is missing.", asked(U_RUN, header, whole.data[:-1]), Code.TRUNCATED),
        ("sections-0", "No sections.", asked(U_RUN, header, replace(whole, sections=0)), Code.BAD_FRAME),
        ("sections-4", "One too many.", asked(U_RUN, header, replace(whole, sections=4)), Code.BAD_FRAME),
        (
            "gaps",
            "More gap bytes than values.",
            asked(U_RUN, header, replace(whole, gaps_length=size + 1)),
            Code.TOO_LARGE,
        ),
        ("trailing", "A byte follows.", asked(U_RUN, header, whole, b"\0"), Code.TRAILING),
        ("count", "A scalar has one value.", asked(U_RUN, header, swap(whole, 0, b"\2\2\1\0")), Code.BAD_COUNT),
        ("count-high", "256 values of one.", asked(U_RUN, header, swap(whole, 1, b"\1\0\0\0")), Code.BAD_COUNT),
        (
            "values",
            "The values are not compressed as described.",
            asked(U_RUN, header, swap(whole, 5, b"\1")),
            Code.BAD_ZSTD,
        ),
    ]
    for name, plane in {"less": gaps[:-1], "more": gaps + b"\0", "unfinished": gaps + b"\xff"}.items():
        each = replace(swap(whole, 4, plane), gaps_length=len(plane))
        rows.append((f"gaps-{name}", "As many gaps as values.", asked(U_RUN, header, each), Code.BAD_FRAME))
    for place, name in enumerate(("low", "high", "exponents", "blocks", "gaps", "values")):
        each = swap(whole, place, whole.planes[place] + b"\0")
        rows.append((f"plane-{name}", "More bytes than the plane has.", asked(U_RUN, header, each), Code.BAD_FRAME))
    early = swap(swap(whole, 0, b"\2\2\1\0"), 2, b"\1")
    rows.append(
        (
            "count-before-exponents",
            "Counts are checked when they are there.",
            asked(U_RUN, header, early),
            Code.BAD_COUNT,
        )
    )
    late = swap(swap(whole, 0, b"\2\2\1\0"), 1, b"\1")
    rows.append(("plane-before-count", "Both planes of counts come first.", asked(U_RUN, header, late), Code.BAD_ZSTD))
    beyond = replace(whole, lengths=(*lengths[:5], 2**32 - 1))
    rows.append(("hostile", "A stored length beyond the end.", asked(U_RUN, header, beyond), Code.TRUNCATED))
    yield from rows


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("wire", "check packet-wire", good_rows())
    yield from table("wire-header", "check packet-wire", header_rows())
    yield from table("wire-frame", "check packet-wire", frame_rows())
    yield from table("wire-zstd", "check packet-wire", zstd_rows())
    yield from table("wire-order", "check packet-wire", order_rows())
    yield from table("update-wire", "check update-wire", good_update_rows())
    yield from table("update-wire-refused", "check update-wire", bad_update_rows())

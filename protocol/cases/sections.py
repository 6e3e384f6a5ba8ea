"""Sections of packets and updates by themselves (SPEC 5 and 7): each byte has one meaning."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from protocol.cases.vector import Fields, Row, Vector, noise, table
from protocol.errors import Code


def gap_bytes(positions: Iterable[int]) -> bytes:
    """The gaps between the positions of one chunk."""
    data, previous = b"", -1
    for position in positions:
        gap = position - previous - 1
        data += b"\xff" * (gap // 255) + bytes([gap % 255])
        previous = position
    return data


def pack(codes: Sequence[int], bits: int) -> bytes:
    """Codes, least significant bit first."""
    total = sum(code << (bits * number) for number, code in enumerate(codes))
    return total.to_bytes(-(-len(codes) * bits // 8), "little")


@dataclass(frozen=True)
class Part:
    """A section of a packet, in or out of order."""

    size: int
    k: int
    code_bits: int
    scales: bytes
    ratios: bytes
    blocks: tuple[int, ...]
    gaps: bytes
    codes: bytes

    @property
    def data(self) -> bytes:
        """The bytes of the section."""
        blocks = b"".join(number.to_bytes(4, "little") for number in self.blocks)
        return self.scales + self.ratios + blocks + self.gaps + self.codes


@dataclass(frozen=True)
class UpdatePart:
    """A section of an update, in or out of order."""

    size: int
    counts: tuple[int, ...]
    exponents: bytes
    blocks: tuple[int, ...]
    gaps: bytes
    values: bytes

    @property
    def data(self) -> bytes:
        """The bytes of the section."""
        counts = b"".join(number.to_bytes(2, "little") for number in self.counts)
        blocks = b"".join(number.to_bytes(4, "little") for number in self.blocks)
        return counts + self.exponents + blocks + self.gaps + self.values


# Three chunks, the last of 100 values; k = 2 keeps two, two and one.
USUAL = Part(
    size=2 * 4096 + 100,
    k=2,
    code_bits=2,
    scales=bytes([200, 150, 90]),
    ratios=bytes([32, 0, 0]),
    blocks=(),
    gaps=gap_bytes([5, 4000]) + gap_bytes([0, 4095]) + gap_bytes([99]),
    codes=pack([0b00, 0b11, 0b00, 0b01, 0b01], 2),
)
ONE_BIT = replace(USUAL, code_bits=1, ratios=b"", codes=pack([0, 1, 0, 1, 1], 1))
ONE_CHUNK = Part(4096, 2, 2, b"\x80", b"\0", (), gap_bytes([1, 2]), pack([0, 1], 2))
# Two blocks: 1024 chunks, of which the first and the last are present, and one more.
LONG = Part(
    size=1025 * 4096,
    k=1,
    code_bits=2,
    scales=b"\x90" + bytes(1022) + b"\x91\x92",
    ratios=bytes(1025),
    blocks=(len(gap_bytes([7])) + len(gap_bytes([4095])),),
    gaps=gap_bytes([7]) + gap_bytes([4095]) + gap_bytes([600]),
    codes=pack([0, 1, 0], 2),
)
# Four values: two in the first chunk, none in the second, two in the short last one.
UPDATE = UpdatePart(
    size=2 * 4096 + 100,
    counts=(2, 0, 2),
    exponents=bytes([20, 0, 0]),
    blocks=(),
    gaps=gap_bytes([5, 4000]) + gap_bytes([0, 99]),
    values=bytes([127, 256 - 64, 1, 256 - 127]),
)
LONG_UPDATE = UpdatePart(
    size=1025 * 4096,
    counts=(1, *[0] * 1022, 2, 1),
    exponents=bytes(1025),
    blocks=(1 + len(gap_bytes([0, 4095])),),
    gaps=gap_bytes([7]) + gap_bytes([0, 4095]) + gap_bytes([600]),
    values=bytes([1, 2, 3, 4]),
)


def asked(part: Part, data: bytes | None = None) -> Fields:
    """The fields of a request for a packet's section."""
    fields: Fields = {"size": part.size, "k": part.k, "code_bits": part.code_bits}
    return {**fields, "bytes": part.data if data is None else data}


def good_rows() -> Iterator[Row]:
    """Sections in order."""
    yield "usual", "Three chunks, the first with a low value.", asked(USUAL), None
    yield "one-bit", "With one bit a value there are no ratios.", asked(ONE_BIT), None
    yield "two-blocks", "The first block's gap bytes are stated, the last block has the rest.", asked(LONG), None
    blocks = replace(LONG, size=2049 * 4096, scales=bytes(2048) + b"\x90", ratios=bytes(2049), blocks=(0, 0))
    empty = replace(blocks, gaps=gap_bytes([3]), codes=b"\1")
    yield "three-blocks", "Blocks may be empty.", asked(empty), None
    absent = replace(USUAL, scales=bytes(3), ratios=bytes(3), gaps=b"", codes=b"")
    yield "absent", "All chunks are absent.", asked(absent), None
    middle = replace(USUAL, scales=b"\xc8\0\x5a", gaps=gap_bytes([5, 4000]) + gap_bytes([99]), codes=pack([0, 3, 1], 2))
    yield "absent-between", "An absent chunk has no gaps and no codes.", asked(middle), None
    yield (
        "one-value",
        "A scalar has one chunk of one value.",
        asked(Part(1, 1, 2, b"\1", b"\0", (), b"\0", b"\1")),
        None,
    )
    yield "one-value-one-bit", "The least of sections.", asked(Part(1, 4096, 1, b"\xff", b"", (), b"\0", b"\0")), None
    for index in (254, 255, 256, 509, 510, 4095):
        part = replace(ONE_CHUNK, k=1, gaps=gap_bytes([index]), codes=b"\0")
        yield f"gap-{index}", "A byte 255 adds 255 and continues, any other ends the gap.", asked(part), None
    scales = {1: "2^-30 is never sent; this is the least scale.", 8: "One more binade.", 255: "15 * 2^36 units."}
    for scale, why in scales.items():
        for ratio in (1, 63):
            part = replace(ONE_CHUNK, scales=bytes([scale]), ratios=bytes([ratio]), codes=pack([0, 3], 2))
            yield f"scale-{scale}-ratio-{ratio}", why, asked(part), None
    every = Part(300, 4096, 2, b"\xa5", b"\7", (), bytes(300), pack([number % 4 for number in range(300)], 2))
    yield "all-kept", "k = 4096 keeps every value.", asked(every), None
    dense = Part(4096, 64, 2, b"\x77", b"\x10", (), gap_bytes(range(0, 4096, 64)), noise("codes", 16))
    yield "k-64", "64 of 4096, as usual.", asked(dense), None


def short_rows() -> Iterator[Row]:
    """Sections that end before what they must hold."""
    data = USUAL.data
    cuts = {
        "empty": (0, "No bytes."),
        "scales": (2, "One scale is missing."),
        "ratios": (5, "One ratio is missing."),
        "codes": (7, "The scales ask for two bytes of codes, and one is left."),
    }
    for name, (length, why) in cuts.items():
        yield name, why, asked(USUAL, data[:length]), Code.TRUNCATED
    yield "blocks", "The block's length is cut off.", asked(LONG, LONG.data[: 2 * 1025 + 3]), Code.TRUNCATED
    yield "one-bit", "The codes are missing.", asked(ONE_BIT, ONE_BIT.data[:3]), Code.TRUNCATED
    both = replace(USUAL, ratios=b"\xff\xff\xff", gaps=b"", codes=b"")
    yield "before-ratio", "Lengths are checked before ratios.", asked(both), Code.TRUNCATED


def content_rows() -> Iterator[Row]:
    """Ratios and codes."""
    wrong_ratio = {
        "64": ("A ratio is at most 63.", bytes([64, 0, 0])),
        "255": ("A ratio is at most 63.", bytes([255, 0, 0])),
        "64-in-the-last": ("A ratio is at most 63, in every chunk.", bytes([32, 0, 64])),
    }
    for name, (why, ratios) in wrong_ratio.items():
        yield f"ratio-{name}", why, asked(replace(USUAL, ratios=ratios)), Code.BAD_RATIO
    absent = replace(USUAL, scales=b"\xc8\x96\0", ratios=b"\x20\0\1", gaps=USUAL.gaps[:-1], codes=USUAL.codes[:1])
    yield "ratio-absent", "An absent chunk has ratio 0.", asked(absent), Code.BAD_RATIO
    high, low = pack([0, 1, 0, 1, 1], 2), pack([2, 3, 0, 1, 1], 2)
    yield "ratio-all-high", "A ratio needs a low value.", asked(replace(USUAL, codes=high)), Code.BAD_RATIO
    yield "ratio-all-low", "A ratio needs a high value.", asked(replace(USUAL, codes=low)), Code.BAD_RATIO
    one = Part(1, 1, 2, b"\x80", b"\x10", (), b"\0", b"\0")
    yield "ratio-of-one-value", "One value cannot be both.", asked(one), Code.BAD_RATIO
    code = pack([0, 3, 0, 3, 1], 2)
    yield "code-low", "Where the ratio is 0 no value is low.", asked(replace(USUAL, codes=code)), Code.BAD_CODE
    last = pack([0, 3, 0, 1, 3], 2)
    yield "code-low-in-the-last", "In every chunk.", asked(replace(USUAL, codes=last)), Code.BAD_CODE
    for bit in (10, 15):
        codes = (int.from_bytes(USUAL.codes, "little") | 1 << bit).to_bytes(2, "little")
        yield (
            f"padding-bit-{bit}",
            "No bit is set after the last code.",
            asked(replace(USUAL, codes=codes)),
            Code.BAD_PADDING,
        )
    padded = replace(ONE_BIT, codes=bytes([ONE_BIT.codes[0] | 0x20]))
    yield "padding-one-bit", "No bit is set after the last code.", asked(padded), Code.BAD_PADDING


def gap_rows() -> Iterator[Row]:
    """Gaps, blocks and indices."""
    first, second, third = gap_bytes([5, 4000]), gap_bytes([0, 4095]), gap_bytes([99])
    blocks: dict[str, tuple[str, Part]] = {
        "none": ("There are no gaps at all.", replace(USUAL, gaps=b"")),
        "one-less": ("A gap is missing.", replace(USUAL, gaps=first + second)),
        "one-more": ("A gap is left over.", replace(USUAL, gaps=USUAL.gaps + b"\0")),
        "unfinished": ("The last gap does not end.", replace(USUAL, gaps=first + second + b"\xff")),
        "continued": ("A 255 follows the last gap.", replace(USUAL, gaps=USUAL.gaps + b"\xff")),
        "absent": ("Absent chunks have no gaps.", replace(USUAL, scales=bytes(3), ratios=bytes(3), codes=b"")),
        "stated-less": (
            "The block states a byte less than its chunks have.",
            replace(LONG, blocks=(LONG.blocks[0] - 1,)),
        ),
        "stated-more": ("The block states a byte more.", replace(LONG, blocks=(LONG.blocks[0] + 1,))),
        "stated-0": ("The block states none.", replace(LONG, blocks=(0,))),
        "stated-all": ("The block states all gap bytes.", replace(LONG, blocks=(len(LONG.gaps),))),
        "stated-beyond": ("The block states a byte more than there are.", replace(LONG, blocks=(len(LONG.gaps) + 1,))),
        "stated-hostile": ("A stated length is believed of nobody.", replace(LONG, blocks=(2**32 - 1,))),
        "last-block": ("The last block has a gap too many.", replace(LONG, gaps=LONG.gaps + b"\0")),
        "across": (
            "A gap must not cross the border of two blocks.",
            replace(LONG, blocks=(1,), gaps=b"\7\xff\0\0"),
        ),
    }
    for name, (why, part) in blocks.items():
        yield f"blocks-{name}", why, asked(part), Code.BAD_BLOCKS
    ends = replace(LONG, scales=LONG.scales[:-1] + b"\0", gaps=LONG.gaps[:-3], codes=b"\4")
    beyond = replace(ends, blocks=(len(ends.gaps) + 1,))
    yield (
        "blocks-beyond-the-end",
        "All gaps are there, but the block states a byte more.",
        asked(beyond),
        Code.BAD_BLOCKS,
    )
    # Together the blocks state 2^32 + 4: in 32 bits that would be what is there.
    wrap = replace(LONG, size=2049 * 4096, scales=LONG.scales + bytes(1024), ratios=bytes(2049))
    yield (
        "blocks-wrap",
        "Stated lengths are added in more than 32 bits.",
        asked(replace(wrap, blocks=(2**32 - 1, len(LONG.gaps) + 1))),
        Code.BAD_BLOCKS,
    )
    indices: dict[str, tuple[str, bytes]] = {
        "first-chunk": ("Index 4096 is in the next chunk.", gap_bytes([5, 4096]) + second + third),
        "middle-chunk": ("Index 4096 is in the next chunk.", first + gap_bytes([0, 4096]) + third),
        "short-chunk": ("The last chunk has 100 values.", first + second + gap_bytes([100])),
        "far": ("Far outside.", first + second + gap_bytes([254])),
    }
    for name, (why, gaps) in indices.items():
        yield f"index-{name}", why, asked(replace(USUAL, gaps=gaps)), Code.BAD_INDEX
    for name, part in {"one-bit": ONE_BIT, "long": LONG}.items():
        each = replace(part, gaps=part.gaps[:-1] + b"\xff" * 16 + b"\xfe") if part is LONG else part
        each = replace(each, gaps=first + second + gap_bytes([100])) if part is ONE_BIT else each
        yield f"index-{name}", "An index is inside its chunk.", asked(each), Code.BAD_INDEX
    every = Part(300, 4096, 1, b"\xa5", b"", (), bytes(299) + b"\1", pack([0] * 300, 1))
    yield "index-all-kept", "When all are kept no gap is above 0.", asked(every), Code.BAD_INDEX


def order_rows() -> Iterator[Row]:
    """Two rules are broken, and the first of the table decides, wherever in the section the bytes are."""
    outside = gap_bytes([5, 4096]) + gap_bytes([0, 4095]) + gap_bytes([99])
    padding = bytes([USUAL.codes[0], USUAL.codes[1] | 0x80])
    low = pack([0, 1, 0, 1, 3], 2)
    rows: list[tuple[str, Part, Code]] = [
        ("ratio-blocks", replace(USUAL, ratios=b"\x20\0\x40", gaps=b""), Code.BAD_RATIO),
        ("absent-ratio-blocks", replace(USUAL, scales=b"\xc8\x96\0", ratios=b"\x20\0\1"), Code.BAD_RATIO),
        ("ratio-index", replace(USUAL, ratios=b"\x20\0\x40", gaps=outside), Code.BAD_RATIO),
        ("blocks-index", replace(USUAL, gaps=outside[:-1]), Code.BAD_BLOCKS),
        ("blocks-padding", replace(USUAL, gaps=USUAL.gaps[:-1], codes=padding), Code.BAD_BLOCKS),
        ("index-padding", replace(USUAL, gaps=outside, codes=padding), Code.BAD_INDEX),
        ("index-code", replace(USUAL, gaps=outside, codes=low), Code.BAD_INDEX),
        ("padding-code", replace(USUAL, codes=bytes([low[0], low[1] | 0x80])), Code.BAD_PADDING),
        ("code-ratio", replace(USUAL, codes=low), Code.BAD_CODE),
        ("padding-ratio", replace(USUAL, codes=bytes([0, 0x80])), Code.BAD_PADDING),
    ]
    for name, part, code in rows:
        earlier, later = name.split("-")[-2:]
        yield name, f"The rule of the {earlier} comes before that of the {later}.", asked(part), code


def asked_update(part: UpdatePart, data: bytes | None = None) -> Fields:
    """The fields of a request for an update's section."""
    return {"size": part.size, "bytes": part.data if data is None else data}


def good_update_rows() -> Iterator[Row]:
    """Sections of updates in order."""
    yield "usual", "Four values, an empty chunk between them.", asked_update(UPDATE), None
    yield (
        "two-blocks",
        "The first block's gap bytes are stated, the last block has the rest.",
        asked_update(LONG_UPDATE),
        None,
    )
    empty = replace(UPDATE, counts=(0, 0, 0), exponents=bytes(3), gaps=b"", values=b"")
    yield "empty", "An update may change nothing.", asked_update(empty), None
    yield "one-value", "A scalar.", asked_update(UpdatePart(1, (1,), b"\0", (), b"\0", b"\x81")), None
    for exponent, value, why in (
        (35, 127, "The largest exponent."),
        (1, 64, "64 needs its exponent."),
        (0, 1, "The least."),
    ):
        part = UpdatePart(1, (1,), bytes([exponent]), (), b"\0", bytes([value]))
        yield f"exponent-{exponent}", why, asked_update(part), None
    full = UpdatePart(300, (300,), b"\3", (), bytes(300), bytes([number % 100 + 1 for number in range(300)]))
    yield "full", "Every value of the chunk is there.", asked_update(full), None
    coarse = replace(UPDATE, exponents=bytes([0, 0, 0]), values=bytes([1, 255, 1, 255]))
    yield "small-values", "Small values are fine when the exponent is 0.", asked_update(coarse), None


def bad_update_rows() -> Iterator[Row]:
    """Sections of updates that are refused."""
    data = UPDATE.data
    cuts = {"empty": 0, "counts": 5, "exponents": 8, "values": 12}
    for name, length in cuts.items():
        yield f"cut-{name}", f"It ends inside the {name}.", asked_update(UPDATE, data[:length]), Code.TRUNCATED
    yield (
        "cut-blocks",
        "It ends inside the blocks.",
        asked_update(LONG_UPDATE, LONG_UPDATE.data[: 3 * 1025 + 2]),
        Code.TRUNCATED,
    )
    claimed = replace(UPDATE, counts=(4096, 0, 2))
    yield "cut-claimed", "The counts ask for more values than there are bytes.", asked_update(claimed), Code.TRUNCATED
    counts = {"short-chunk": (2, 0, 101), "full-chunk": (4097, 0, 2), "largest": (65535, 0, 2)}
    for name, each in counts.items():
        part = replace(UPDATE, counts=each)
        yield f"count-{name}", "A chunk has no more values than its length.", asked_update(part), Code.BAD_COUNT
    exponents = {
        "36": ("An exponent is at most 35.", bytes([36, 0, 0])),
        "255": ("An exponent is at most 35.", bytes([255, 0, 0])),
        "empty-chunk": ("An empty chunk has exponent 0.", bytes([20, 1, 0])),
        "too-coarse": ("With an exponent the largest value is above 63.", bytes([20, 0, 1])),
    }
    small = bytes([127, 192, 63, 256 - 63])
    for name, (why, each_exponent) in exponents.items():
        part = replace(UPDATE, exponents=each_exponent, values=small)
        yield f"exponent-{name}", why, asked_update(part), Code.BAD_EXPONENT
    for name, value in {"0": 0, "minus-128": 128}.items():
        for place in (0, 3):
            values = bytes(value if number == place else 100 for number in range(4))
            part = replace(UPDATE, values=values)
            yield f"value-{name}-at-{place}", "No value is 0 or -128.", asked_update(part), Code.BAD_VALUE


def bad_update_gap_rows() -> Iterator[Row]:
    """Gaps, blocks and indices of updates."""
    first, last = gap_bytes([5, 4000]), gap_bytes([0, 99])
    blocks: dict[str, tuple[str, UpdatePart]] = {
        "none": ("There are no gaps at all.", replace(UPDATE, gaps=b"")),
        "one-less": ("A gap is missing.", replace(UPDATE, gaps=first + last[:-1])),
        "one-more": ("A gap is left over.", replace(UPDATE, gaps=first + last + b"\0")),
        "unfinished": ("The last gap does not end.", replace(UPDATE, gaps=first + last[:-1] + b"\xff")),
        "continued": ("A 255 follows the last gap.", replace(UPDATE, gaps=UPDATE.gaps + b"\xff")),
        "stated-less": ("A byte less than its chunks have.", replace(LONG_UPDATE, blocks=(LONG_UPDATE.blocks[0] - 1,))),
        "stated-more": ("A byte more.", replace(LONG_UPDATE, blocks=(LONG_UPDATE.blocks[0] + 1,))),
        "stated-hostile": ("Believed of nobody.", replace(LONG_UPDATE, blocks=(2**32 - 1,))),
    }
    for name, (why, part) in blocks.items():
        yield f"blocks-{name}", why, asked_update(part), Code.BAD_BLOCKS
    outside = {"full-chunk": gap_bytes([5, 4096]) + last, "short-chunk": first + gap_bytes([0, 100])}
    for name, gaps in outside.items():
        part = replace(UPDATE, gaps=gaps)
        yield f"index-{name}", "An index is inside its chunk.", asked_update(part), Code.BAD_INDEX
    wrong = outside["full-chunk"]
    order: list[tuple[str, UpdatePart, Code]] = [
        ("count-before-values", replace(UPDATE, counts=(2, 0, 101), values=b""), Code.BAD_COUNT),
        ("cut-before-exponent", replace(UPDATE, counts=(2, 0, 90), exponents=b"\x40\0\0"), Code.TRUNCATED),
        ("empty-exponent-before-blocks", replace(UPDATE, exponents=b"\x14\1\0", gaps=b""), Code.BAD_EXPONENT),
        ("exponent-before-blocks", replace(UPDATE, exponents=b"\x40\0\0", gaps=b""), Code.BAD_EXPONENT),
        ("blocks-before-index", replace(UPDATE, gaps=wrong + b"\0"), Code.BAD_BLOCKS),
        ("index-before-value", replace(UPDATE, gaps=wrong, values=bytes(4)), Code.BAD_INDEX),
        ("value-before-too-coarse", replace(UPDATE, values=bytes([1, 1, 0, 1])), Code.BAD_VALUE),
    ]
    for name, part, code in order:
        yield name, "Two rules are broken, and the first of the table decides.", asked_update(part), code


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("section", "check section", good_rows())
    yield from table("section-short", "check section", short_rows())
    yield from table("section-content", "check section", content_rows())
    yield from table("section-gaps", "check section", gap_rows())
    yield from table("section-order", "check section", order_rows())
    yield from table("update-section", "check update-section", good_update_rows())
    yield from table("update-section-refused", "check update-section", bad_update_rows())
    yield from table("update-section-gaps", "check update-section", bad_update_gap_rows())

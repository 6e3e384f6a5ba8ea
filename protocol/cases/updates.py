"""Whole updates in canonical form (SPEC 7)."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from protocol.cases.sections import UpdatePart, gap_bytes
from protocol.cases.vector import BASE, Fields, Row, Vector, make_run, table, text_of
from protocol.errors import Code
from protocol.identity import digest, merkle_root

# A scalar, a matrix of two chunks and a vector of 13 values, as vector.SHAPES says.
RUN = make_run(k=2)
TEXT = text_of(RUN)
NEW = bytes([0x4E]) * 32
SCALAR = UpdatePart(1, (1,), b"\0", (), b"\0", b"\x81")
MATRIX = UpdatePart(5000, (2, 1), b"\x14\0", (), gap_bytes([5, 4000]) + b"\x63", bytes([127, 192, 1]))
NORM = UpdatePart(13, (0,), b"\0", (), b"", b"")
SECTIONS = (SCALAR.data, MATRIX.data, NORM.data)


@dataclass(frozen=True)
class Update:
    """An update of any content."""

    run_id: bytes = RUN.run_id
    round: int = 3
    sections: Sequence[bytes] = SECTIONS
    root: bytes | None = None
    magic: bytes = b"SLUP"
    version: int = 1
    reserved: int = 0

    @cached_property
    def header(self) -> bytes:
        """The 140 bytes."""
        root = merkle_root(self.sections or [b""]) if self.root is None else self.root
        head = self.magic + struct.pack("<HH", self.version, self.reserved) + self.run_id
        return head + struct.pack("<I", self.round) + BASE + NEW + root


GOOD = Update()


def asked(update: Update, header: bytes | None = None, sections: Sequence[bytes] | None = None) -> Fields:
    """The fields of a request: the update is the one that the record names, whatever else is wrong with it."""
    sent = update.header if header is None else header
    parts = update.sections if sections is None else sections
    return {"run": TEXT, "digest": digest("update", sent), "header": sent, "sections": parts}


def good_rows() -> Iterator[Row]:
    """Updates in order."""
    yield "usual", "A scalar, two chunks and an empty one.", asked(GOOD), None
    empty = (UpdatePart(1, (0,), b"\0", (), b"", b"").data, UpdatePart(5000, (0, 0), b"\0\0", (), b"", b"").data)
    nothing = replace(GOOD, sections=(*empty, NORM.data))
    yield "empty", "An update may change nothing.", asked(nothing), None


def header_rows() -> Iterator[Row]:
    """Headers that are refused."""
    header = GOOD.header
    yield "magic", "It begins with SLUP.", asked(replace(GOOD, magic=b"SLPK")), Code.BAD_MAGIC
    yield "empty", "No bytes have no magic.", asked(GOOD, b""), Code.BAD_MAGIC
    yield "six-bytes", "Less than eight bytes.", asked(GOOD, header[:6]), Code.TRUNCATED
    yield "version", "Version 1.", asked(replace(GOOD, version=2)), Code.VERSION
    short = replace(GOOD, version=2).header[:7]
    yield (
        "length-before-version",
        "With less than eight bytes nobody speaks of versions.",
        asked(GOOD, short),
        Code.TRUNCATED,
    )
    yield "cut", "The last byte is missing.", asked(GOOD, header[:-1]), Code.TRUNCATED
    yield "longer", "A byte follows.", asked(GOOD, header + b"\0"), Code.TRAILING
    yield "reserved", "Bytes 6 and 7 are zero.", asked(replace(GOOD, reserved=256)), Code.RESERVED
    other = {**asked(GOOD), "digest": bytes(32)}
    yield "digest", "It is not the update that the record names.", other, Code.WRONG_DIGEST
    yield "run", "An update of another run.", asked(replace(GOOD, run_id=bytes(32))), Code.OTHER_RUN
    first = {**asked(replace(GOOD, run_id=bytes(32))), "digest": bytes(32)}
    yield "digest-before-run", "The digest is compared first.", first, Code.WRONG_DIGEST
    reserved = {**asked(replace(GOOD, reserved=1)), "digest": bytes(32)}
    yield "reserved-before-digest", "A header is well-formed before it is hashed.", reserved, Code.RESERVED
    yield (
        "version-before-length",
        "The version comes first.",
        asked(replace(GOOD, version=3), replace(GOOD, version=3).header[:99]),
        Code.VERSION,
    )


def section_rows() -> Iterator[Row]:
    """Sections that are not those of the header, or not in order."""
    scalar, matrix, norm = SECTIONS
    yield "one-less", "There is a section for each tensor.", asked(replace(GOOD, sections=SECTIONS[:2])), Code.TRUNCATED
    yield "one-more", "And no more.", asked(replace(GOOD, sections=(*SECTIONS, b""))), Code.TRAILING
    long = replace(GOOD, sections=(scalar + b"\0", matrix, norm))
    yield "too-large", "One byte beyond the bound.", asked(long), Code.TOO_LARGE
    yield "root", "The header names other sections.", asked(replace(GOOD, root=bytes(32))), Code.BAD_MERKLE
    changed = (scalar[:-1] + b"\x7f", matrix, norm)
    yield "changed", "One byte of a section differs.", asked(GOOD, sections=changed), Code.BAD_MERKLE
    wrong: list[tuple[str, str, UpdatePart, Code]] = [
        ("count", "5000 - 4096 is less than 905.", replace(MATRIX, counts=(2, 905)), Code.BAD_COUNT),
        ("short", "A value is missing.", replace(MATRIX, gaps=b"", values=b"\x7f\x7f"), Code.TRUNCATED),
        ("exponent", "An exponent of 36.", replace(MATRIX, exponents=b"\x24\0"), Code.BAD_EXPONENT),
        ("blocks", "A gap is missing.", replace(MATRIX, gaps=MATRIX.gaps[:-1]), Code.BAD_BLOCKS),
        ("index", "Outside its chunk.", replace(MATRIX, gaps=gap_bytes([5, 4096]) + b"\x63"), Code.BAD_INDEX),
        ("value", "No value is 0.", replace(MATRIX, values=b"\x7f\xc0\0"), Code.BAD_VALUE),
        ("coarse", "The exponent could be less.", replace(MATRIX, values=b"\x3f\xc1\1"), Code.BAD_EXPONENT),
    ]
    for name, why, part, code in wrong:
        yield f"section-{name}", why, asked(replace(GOOD, sections=(scalar, part.data, norm))), code
    first, last = replace(SCALAR, values=b"\0").data, replace(NORM, exponents=b"\1").data
    both = asked(replace(GOOD, sections=(first, matrix, last)))
    yield "first-section-first", "Sections are checked in their order.", both, Code.BAD_VALUE
    order: list[tuple[str, Fields, Code]] = [
        ("number-before-bound", asked(GOOD, sections=(bytes(99),)), Code.TRUNCATED),
        ("bound-before-root", asked(GOOD, sections=(bytes(99), matrix, norm)), Code.TOO_LARGE),
        ("root-before-sections", asked(GOOD, sections=(first, matrix, norm)), Code.BAD_MERKLE),
    ]
    for name, fields, code in order:
        yield name, "Two rules are broken, and the first one decides.", fields, code


def make_rows() -> Iterator[Row]:
    """Updates as anybody can compute them."""
    fields = {"run": TEXT, "round": 3, "base_root": BASE, "new_root": NEW, "sections": SECTIONS}
    yield "usual", "Header and Merkle root.", fields, None


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("update", "check update", good_rows())
    yield from table("update-header", "check update", header_rows())
    yield from table("update-parts", "check update", section_rows())
    yield from table("make-update", "make update", make_rows())

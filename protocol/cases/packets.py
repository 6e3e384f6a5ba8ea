"""Whole packets in canonical form (SPEC 5): what a header claims, and that the sections are those it names."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from protocol.cases.sections import Part, gap_bytes, pack
from protocol.cases.vector import BASE, PEER, STRANGER, Fields, Row, Vector, make_run, noise, table, text_of
from protocol.errors import Code
from protocol.identity import PrivateKey, digest, merkle_root

# A scalar, a matrix of two chunks and a vector of 13 values, as vector.SHAPES says; k = 2.
RUN = make_run(k=2)
TEXT = text_of(RUN)
SCALAR = Part(1, 2, 2, b"\x80", b"\0", (), b"\0", b"\1")
MATRIX = Part(5000, 2, 2, b"\xc8\x5a", b"\x20\0", (), gap_bytes([5, 4000]) + b"\x63", pack([0, 3, 1], 2))
NORM = Part(13, 2, 2, b"\0", b"\0", (), b"", b"")
SECTIONS = (SCALAR.data, MATRIX.data, NORM.data)


@dataclass(frozen=True)
class Packet:
    """A packet of any content, signed as it stands."""

    run_id: bytes = RUN.run_id
    round: int = 3
    base_root: bytes = BASE
    tokens: int = 64
    inner_steps: int = 4
    sections: Sequence[bytes] = SECTIONS
    root: bytes | None = None
    magic: bytes = b"SLPK"
    version: int = 1
    reserved: int = 0
    peer: bytes = PEER.public
    key: PrivateKey = field(default=PEER, repr=False)

    @cached_property
    def header(self) -> bytes:
        """The 216 bytes."""
        head = self.magic + struct.pack("<HH", self.version, self.reserved) + self.run_id
        head += struct.pack("<I", self.round) + self.base_root + self.peer
        head += struct.pack("<QI", self.tokens, self.inner_steps)
        head += merkle_root(self.sections or [b""]) if self.root is None else self.root
        return head + self.key.sign("packet", head)

    @property
    def digest(self) -> bytes:
        """What names it."""
        return digest("packet", self.header)


GOOD = Packet()


def asked(packet: Packet, header: bytes | None = None, sections: Sequence[bytes] | None = None) -> Fields:
    """The fields of a request: the packet of round 3 from the state BASE."""
    fields: Fields = {"run": TEXT, "round": 3, "base_root": BASE}
    sent = packet.sections if sections is None else sections
    return {**fields, "header": packet.header if header is None else header, "sections": sent}


def good_rows() -> Iterator[Row]:
    """Packets in order."""
    yield "usual", "A scalar, two chunks and an absent one.", asked(GOOD), None
    bounds = {"tokens-1": {"tokens": 1}, "tokens-2-48": {"tokens": 2**48}, "steps-1": {"inner_steps": 1}}
    for name, changes in bounds.items():
        packet = replace(GOOD, tokens=changes.get("tokens", 64), inner_steps=changes.get("inner_steps", 4))
        yield name, "At the end of what a header may claim.", asked(packet), None
    steps = replace(GOOD, inner_steps=2**32 - 1)
    yield "steps-2-32", "inner.steps does not bound what a header may claim.", asked(steps), None


def header_rows() -> Iterator[Row]:
    """Headers that are refused."""
    header = GOOD.header
    yield "magic", "It begins with SLPK.", asked(replace(GOOD, magic=b"SLUP")), Code.BAD_MAGIC
    yield "empty", "No bytes have no magic.", asked(GOOD, b""), Code.BAD_MAGIC
    yield "three-bytes", "A part of the magic is none.", asked(GOOD, header[:3]), Code.BAD_MAGIC
    yield "seven-bytes", "Without a version there is nothing to say about.", asked(GOOD, header[:7]), Code.TRUNCATED
    short = replace(GOOD, version=2).header
    yield (
        "length-before-version",
        "With less than eight bytes nobody speaks of versions.",
        asked(GOOD, short[:7]),
        Code.TRUNCATED,
    )
    yield "eight-bytes", "Eight bytes have a version.", asked(GOOD, short[:8]), Code.VERSION
    for version in (0, 2, 256):
        packet = replace(GOOD, version=version)
        yield f"version-{version}", "Version 1, in 16 bits.", asked(packet), Code.VERSION
    yield "cut", "The last byte is missing.", asked(GOOD, header[:-1]), Code.TRUNCATED
    yield "cut-early", "It ends in the run_id.", asked(GOOD, header[:20]), Code.TRUNCATED
    yield "longer", "A byte follows.", asked(GOOD, header + b"\0"), Code.TRAILING
    for reserved in (1, 0x8000):
        packet = replace(GOOD, reserved=reserved)
        yield f"reserved-{reserved}", "Bytes 6 and 7 are zero.", asked(packet), Code.RESERVED
    yield "tokens-0", "At least one token.", asked(replace(GOOD, tokens=0)), Code.BAD_TOKENS
    yield "tokens-above", "At most 2^48 tokens.", asked(replace(GOOD, tokens=2**48 + 1)), Code.BAD_TOKENS
    yield "tokens-largest", "At most 2^48 tokens.", asked(replace(GOOD, tokens=2**64 - 1)), Code.BAD_TOKENS
    yield "steps-0", "At least one inner step.", asked(replace(GOOD, inner_steps=0)), Code.BAD_TOKENS
    yield "run", "A packet of another run.", asked(replace(GOOD, run_id=bytes(32))), Code.OTHER_RUN
    yield "round-before", "The round before.", asked(replace(GOOD, round=2)), Code.WRONG_ROUND
    yield "round-after", "The round after.", asked(replace(GOOD, round=4)), Code.WRONG_ROUND
    yield "base", "It started from another state.", asked(replace(GOOD, base_root=bytes(32))), Code.WRONG_BASE
    yield "key", "The peer's key is of small order.", asked(replace(GOOD, peer=bytes(32))), Code.BAD_KEY
    yield "key-not-a-point", "The peer's key is no point.", asked(replace(GOOD, peer=b"\2" + bytes(31))), Code.BAD_KEY
    yield "signer", "Somebody else signed.", asked(replace(GOOD, key=STRANGER)), Code.BAD_SIGNATURE
    flipped = header[:-1] + bytes([header[-1] ^ 1])
    yield "signature", "One bit of the signature differs.", asked(GOOD, flipped), Code.BAD_SIGNATURE
    more = header[:108] + b"\x41" + header[109:]
    yield "tokens-changed", "The signature covers the tokens.", asked(GOOD, more), Code.BAD_SIGNATURE
    other = header[:120] + bytes(32) + header[152:]
    yield "root-changed", "The signature covers the Merkle root.", asked(GOOD, other), Code.BAD_SIGNATURE


def section_rows() -> Iterator[Row]:
    """Sections that are not those of the header, or not in order."""
    few, many = asked(replace(GOOD, sections=SECTIONS[:2])), asked(replace(GOOD, sections=(*SECTIONS, b"")))
    yield "one-less", "There is a section for each tensor.", few, Code.TRUNCATED
    yield "none", "There is a section for each tensor.", asked(GOOD, sections=()), Code.TRUNCATED
    yield "one-more", "There is no section without a tensor.", many, Code.TRAILING
    scalar, matrix, norm = SECTIONS
    long = (scalar, matrix, norm + bytes(40))
    yield (
        "too-large",
        "A section is at most section_bytes_max long.",
        asked(replace(GOOD, sections=long)),
        Code.TOO_LARGE,
    )
    at_bound = (scalar + b"\0", matrix, norm)
    yield "scalar-too-large", "One byte beyond the bound.", asked(replace(GOOD, sections=at_bound)), Code.TOO_LARGE
    yield "root", "The header names other sections.", asked(replace(GOOD, root=bytes(32))), Code.BAD_MERKLE
    swapped = (norm, matrix, scalar)
    yield (
        "changed",
        "One bit of a section differs.",
        asked(GOOD, sections=(b"\x81" + scalar[1:], matrix, norm)),
        Code.BAD_MERKLE,
    )
    yield "order", "Sections are in the order of the layout.", asked(GOOD, sections=swapped), Code.BAD_MERKLE
    leaf = merkle_root([scalar + matrix + norm])
    yield "one-leaf", "Each section is a leaf of its own.", asked(replace(GOOD, root=leaf)), Code.BAD_MERKLE
    inner = merkle_root([merkle_root([scalar]), merkle_root([matrix])])
    yield "leaf-as-node", "Leaves and nodes are hashed apart.", asked(replace(GOOD, root=inner)), Code.BAD_MERKLE
    wrong: list[tuple[str, str, Part, Code]] = [
        ("short", "The matrix lacks its codes.", replace(MATRIX, gaps=b"", codes=b""), Code.TRUNCATED),
        ("ratio", "A ratio of 64.", replace(MATRIX, ratios=b"\x40\0"), Code.BAD_RATIO),
        ("blocks", "A gap is missing.", replace(MATRIX, gaps=MATRIX.gaps[:-1]), Code.BAD_BLOCKS),
        ("index", "An index outside its chunk.", replace(MATRIX, gaps=gap_bytes([5, 4096]) + b"\x63"), Code.BAD_INDEX),
        ("padding", "A bit after the last code.", replace(MATRIX, codes=b"\x5c"), Code.BAD_PADDING),
        ("code", "A low value where the ratio is 0.", replace(MATRIX, codes=b"\x3c"), Code.BAD_CODE),
        ("all-high", "A ratio without a low value.", replace(MATRIX, codes=b"\x10"), Code.BAD_RATIO),
    ]
    for name, why, part, code in wrong:
        yield f"section-{name}", why, asked(replace(GOOD, sections=(scalar, part.data, norm))), code
    first, last = replace(SCALAR, codes=b"\5").data, replace(NORM, ratios=b"\1").data
    both = asked(replace(GOOD, sections=(first, matrix, last)))
    yield "first-section-first", "Sections are checked in their order.", both, Code.BAD_PADDING
    whole = asked(replace(GOOD, sections=(scalar, replace(MATRIX, codes=b"\x3c").data, last)))
    yield "section-by-section", "All of a section comes before the next one.", whole, Code.BAD_CODE


def order_rows() -> Iterator[Row]:
    """Two rules are broken, and the first one decides."""
    flawed = replace(MATRIX, codes=b"\x5c").data
    broken = (SECTIONS[0], flawed, SECTIONS[2])
    base = replace(GOOD, base_root=bytes(32))
    cut = replace(GOOD, version=2).header[:100]
    rows: list[tuple[str, Fields, Code]] = [
        ("magic-before-length", asked(GOOD, b"SLP"), Code.BAD_MAGIC),
        ("magic-before-version", asked(replace(GOOD, magic=b"SLPX", version=2)), Code.BAD_MAGIC),
        ("version-before-length", asked(GOOD, cut), Code.VERSION),
        ("length-before-reserved", asked(GOOD, replace(GOOD, reserved=1).header[:-1]), Code.TRUNCATED),
        ("reserved-before-tokens", asked(replace(GOOD, reserved=1, tokens=0)), Code.RESERVED),
        ("tokens-before-run", asked(replace(GOOD, tokens=0, run_id=bytes(32))), Code.BAD_TOKENS),
        ("run-before-round", asked(replace(GOOD, run_id=bytes(32), round=2)), Code.OTHER_RUN),
        ("round-before-base", asked(replace(base, round=2)), Code.WRONG_ROUND),
        ("base-before-key", asked(replace(base, peer=bytes(32))), Code.WRONG_BASE),
        ("key-before-signature", asked(replace(GOOD, peer=bytes(32), key=STRANGER)), Code.BAD_KEY),
        ("signature-before-number", asked(replace(GOOD, key=STRANGER), sections=()), Code.BAD_SIGNATURE),
        ("number-before-bound", asked(GOOD, sections=(bytes(99),)), Code.TRUNCATED),
        ("bound-before-root", asked(GOOD, sections=(bytes(99), *SECTIONS[1:])), Code.TOO_LARGE),
        ("root-before-sections", asked(replace(GOOD, root=bytes(32), sections=broken)), Code.BAD_MERKLE),
        ("signature-before-sections", asked(replace(GOOD, key=STRANGER, sections=broken)), Code.BAD_SIGNATURE),
    ]
    for name, fields, code in rows:
        yield name, f"{name.replace('-', ' ')}.".capitalize(), fields, code


def make_rows() -> Iterator[Row]:
    """Packets as peers make them; Ed25519 leaves no choice."""
    fields = {"run": TEXT, "seed": PEER.to_bytes(), "round": 3, "base_root": BASE, "tokens": 64, "inner_steps": 4}
    yield "usual", "Header, Merkle root and signature.", {**fields, "sections": SECTIONS}, None
    least = {**fields, "round": 0, "tokens": 1, "inner_steps": 1}
    yield "least", "The least claims.", {**least, "sections": SECTIONS}, None
    large = {**fields, "round": 2**32 - 1, "tokens": 2**48, "inner_steps": 2**32 - 1, "base_root": noise("base", 32)}
    yield "largest", "The largest claims.", {**large, "sections": SECTIONS}, None
    run = make_run(k=2, shapes=tuple((f"t{number:02}", (13,)) for number in range(11)))
    many = {**fields, "run": text_of(run), "sections": [NORM.data] * 11}
    yield "eleven-tensors", "A Merkle tree of eleven leaves.", many, None


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("packet", "check packet", good_rows())
    yield from table("packet-header", "check packet", header_rows())
    yield from table("packet-sections", "check packet", section_rows())
    yield from table("packet-order", "check packet", order_rows())
    yield from table("make-packet", "make packet", make_rows())

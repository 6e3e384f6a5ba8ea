"""What one peer sends in a round: a signed header and one section per tensor (SPEC 5)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from protocol.errors import Code, ProtocolError
from protocol.identity import SIGNATURE_BYTES, Buffer, PrivateKey, digest, merkle_root, verify
from protocol.limits import TOKENS_MAX, VERSION
from protocol.packing import (
    SectionForm,
    SparseTensor,
    check_header,
    check_section,
    check_sections,
    decode_section,
)
from protocol.run import RunConfig

_MAGIC = b"SLPK"
_HEADER = struct.Struct("<4sHH32sI32s32sQI32s64s")
PACKET_HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class PacketHeader:
    """What a packet claims, and the peer's signature over it."""

    run_id: bytes
    round: int
    base_root: bytes
    peer: bytes
    tokens: int
    inner_steps: int
    sections_root: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """The 216 bytes of SPEC 5."""
        return _HEADER.pack(
            _MAGIC,
            VERSION,
            0,
            self.run_id,
            self.round,
            self.base_root,
            self.peer,
            self.tokens,
            self.inner_steps,
            self.sections_root,
            self.signature,
        )

    @classmethod
    def from_bytes(cls, data: Buffer) -> "PacketHeader":
        """Read a header; the signature is not checked yet.

        Raises ProtocolError BAD_MAGIC, TRUNCATED, VERSION, TRAILING, RESERVED or BAD_TOKENS.
        """
        check_header(data, _MAGIC, PACKET_HEADER_BYTES)
        header = cls(*_HEADER.unpack(data)[3:])
        if not 1 <= header.tokens <= TOKENS_MAX or header.inner_steps < 1:
            claim = f"{header.tokens} tokens in {header.inner_steps} inner steps"
            raise ProtocolError(Code.BAD_TOKENS, f"the packet claims {claim}")
        return header

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers."""
        return self.to_bytes()[:-SIGNATURE_BYTES]

    @cached_property
    def digest(self) -> bytes:
        """The 32 bytes that name this packet."""
        return digest("packet", self.to_bytes())


@dataclass(frozen=True)
class Packet:
    """A packet in canonical form: one section per tensor, in the order of the layout."""

    header: PacketHeader
    sections: tuple[bytes, ...]


def packet_form(run: RunConfig) -> SectionForm:
    """How the sections of this run's packets are laid out."""
    return SectionForm(run.compression.k, run.compression.code_bits)


def make_packet(
    run: RunConfig,
    key: PrivateKey,
    round: int,
    base_root: bytes,
    tokens: int,
    inner_steps: int,
    sections: Sequence[bytes],
) -> Packet:
    """Sign a peer's contribution to a round; one canonical section per tensor, in the order of the layout."""
    assert len(sections) == len(run.layout.tensors)
    assert 1 <= tokens <= TOKENS_MAX and inner_steps >= 1
    header = PacketHeader(
        run.run_id, round, base_root, key.public, tokens, inner_steps, merkle_root(sections), bytes(SIGNATURE_BYTES)
    )
    return Packet(replace(header, signature=key.sign("packet", header.signed_bytes)), tuple(sections))


def check_claims(packet: Packet, run: RunConfig, *, round: int, base_root: bytes) -> None:
    """Check that a packet belongs to this round and is its peer's: everything but the contents of the sections.

    Raises ProtocolError: OTHER_RUN, WRONG_ROUND, WRONG_BASE, BAD_KEY, BAD_SIGNATURE, TRUNCATED, TRAILING, TOO_LARGE or
    BAD_MERKLE.
    """
    header = packet.header
    if header.run_id != run.run_id:
        raise ProtocolError(Code.OTHER_RUN, "the packet belongs to another run")
    if header.round != round:
        raise ProtocolError(Code.WRONG_ROUND, f"the packet is for round {header.round}, this is round {round}")
    if header.base_root != base_root:
        raise ProtocolError(Code.WRONG_BASE, "the packet starts from other outer parameters than this round")
    verify(header.peer, "packet", header.signed_bytes, header.signature)
    check_sections(packet.sections, run.layout, packet_form(run), header.sections_root)


def check_packet(packet: Packet, run: RunConfig, *, round: int, base_root: bytes) -> list[SparseTensor]:
    """Return the tensors of a packet that belongs to this round. Nothing is decoded before everything is checked.

    Raises ProtocolError like `check_claims`, or with a section's code.
    """
    check_claims(packet, run, round=round, base_root=base_root)
    k, code_bits = run.compression.k, run.compression.code_bits
    pairs = [*zip(packet.sections, run.layout.tensors, strict=True)]
    for section, tensor in pairs:
        check_section(section, tensor.size, k, code_bits)
    return [decode_section(section, tensor.size, k, code_bits) for section, tensor in pairs]

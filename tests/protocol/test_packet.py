import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import Code, ProtocolError
from protocol.identity import digest, merkle_root
from protocol.limits import TOKENS_MAX
from protocol.packet import Packet, PacketHeader, check_claims, check_packet, make_packet
from protocol.packing import SparseTensor, encode_section
from tests.protocol.codec_samples import BASE, KEY, OTHER_KEY, make_run, packet_sections, refused, same, sparse_tensors

RUN = make_run()
TENSORS = sparse_tensors(RUN, seed=1)
PACKET = make_packet(RUN, KEY, 5, BASE, 40_960, 20, packet_sections(RUN, TENSORS))
HEADER = PACKET.header.to_bytes()


def signed(header: PacketHeader, sections: tuple[bytes, ...] = PACKET.sections) -> Packet:
    """A packet whose signature is right, whatever else is wrong."""
    return Packet(replace(header, signature=KEY.sign("packet", header.signed_bytes)), sections)


def with_sections(*sections: bytes) -> Packet:
    return signed(replace(PACKET.header, sections_root=merkle_root(sections)), sections)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4096), st.sampled_from([1, 2]), st.integers(0, 2**31), st.integers(1, TOKENS_MAX))
def test_a_packet_is_accepted_and_gives_back_its_tensors(k: int, code_bits: int, seed: int, tokens: int) -> None:
    run = make_run(k, code_bits)
    tensors = sparse_tensors(run, seed)
    packet = make_packet(run, KEY, 3, BASE, tokens, 20, packet_sections(run, tensors))
    received = Packet(PacketHeader.from_bytes(packet.header.to_bytes()), packet.sections)
    decoded = check_packet(received, run, round=3, base_root=BASE)
    assert all(same(left, right) for left, right in zip(decoded, tensors, strict=True))
    again = make_packet(run, KEY, 3, BASE, tokens, 20, packet_sections(run, decoded))
    assert again == packet
    assert again.header.digest == packet.header.digest


def test_header_bytes_are_those_of_the_spec() -> None:
    assert len(HEADER) == 216
    assert HEADER[:8] == b"SLPK\1\0\0\0"
    assert HEADER[8:40] == RUN.run_id
    assert HEADER[40:44] == struct.pack("<I", 5)
    assert HEADER[44:76] == BASE
    assert HEADER[76:108] == KEY.public
    assert HEADER[108:120] == struct.pack("<QI", 40_960, 20)
    assert HEADER[120:152] == merkle_root(PACKET.sections)
    assert HEADER[152:] == KEY.sign("packet", HEADER[:152])
    assert PACKET.header.digest == digest("packet", HEADER)


def header_with(offset: int, new: bytes) -> bytes:
    return HEADER[:offset] + new + HEADER[offset + len(new) :]


@pytest.mark.parametrize(
    ("what", "data", "code"),
    [
        ("empty", b"", Code.BAD_MAGIC),
        ("an update", header_with(0, b"SLUP"), Code.BAD_MAGIC),
        ("magic alone", b"SLPK", Code.TRUNCATED),
        ("one byte short", HEADER[:-1], Code.TRUNCATED),
        ("one byte more", HEADER + b"\0", Code.TRAILING),
        ("version 0", header_with(4, b"\0"), Code.VERSION),
        ("version 2, whatever its length", header_with(4, b"\2") + b"\0", Code.VERSION),
        ("version 257", header_with(5, b"\1"), Code.VERSION),
        ("reserved low byte", header_with(6, b"\1"), Code.RESERVED),
        ("reserved high byte", header_with(7, b"\1"), Code.RESERVED),
        ("no tokens", header_with(108, bytes(8)), Code.BAD_TOKENS),
        ("too many tokens", header_with(108, struct.pack("<Q", TOKENS_MAX + 1)), Code.BAD_TOKENS),
        ("no inner steps", header_with(116, bytes(4)), Code.BAD_TOKENS),
    ],
)
def test_refused_headers(what: str, data: bytes, code: Code) -> None:
    with refused(code):
        PacketHeader.from_bytes(data)


def test_the_sample_that_the_refusals_start_from_is_accepted() -> None:
    assert len(check_packet(with_sections(*PACKET.sections), RUN, round=5, base_root=BASE)) == 5


CLAIMS = [
    ("another run", signed(replace(PACKET.header, run_id=bytes(32))), Code.OTHER_RUN),
    ("the last round", signed(replace(PACKET.header, round=4)), Code.WRONG_ROUND),
    ("another base", signed(replace(PACKET.header, base_root=bytes(32))), Code.WRONG_BASE),
    ("small-order key", signed(replace(PACKET.header, peer=bytes(32))), Code.BAD_KEY),
    ("stolen name", signed(replace(PACKET.header, peer=OTHER_KEY.public)), Code.BAD_SIGNATURE),
    ("tokens raised", replace(PACKET, header=replace(PACKET.header, tokens=9**9)), Code.BAD_SIGNATURE),
    ("no signature", replace(PACKET, header=replace(PACKET.header, signature=bytes(64))), Code.BAD_SIGNATURE),
    ("a section too few", with_sections(*PACKET.sections[:-1]), Code.TRUNCATED),
    ("a section too many", with_sections(*PACKET.sections, b""), Code.TRAILING),
    ("a section too large", with_sections(*PACKET.sections[:-1], bytes(99_999)), Code.TOO_LARGE),
    ("sections of another packet", signed(PACKET.header, (*PACKET.sections[:-1], b"x")), Code.BAD_MERKLE),
    ("sections exchanged", signed(PACKET.header, PACKET.sections[::-1]), Code.TOO_LARGE),
]
CONTENTS = [
    ("an empty section", with_sections(b"", *PACKET.sections[1:]), Code.TRUNCATED),
    ("a last section cut", with_sections(*PACKET.sections[:-1], PACKET.sections[-1][:-1]), Code.BAD_BLOCKS),
    ("two bad sections", with_sections(bytes([0] * 3 + [9] * 3), *PACKET.sections[1:-1], b""), Code.BAD_RATIO),
]


@pytest.mark.parametrize(("what", "packet", "code"), CLAIMS)
def test_refused_claims(what: str, packet: Packet, code: Code) -> None:
    with refused(code):
        check_claims(packet, RUN, round=5, base_root=BASE)
    with refused(code):
        check_packet(packet, RUN, round=5, base_root=BASE)


@pytest.mark.parametrize(("what", "packet", "code"), CONTENTS)
def test_the_contents_of_sections_are_no_claims(what: str, packet: Packet, code: Code) -> None:
    check_claims(packet, RUN, round=5, base_root=BASE)
    with refused(code):
        check_packet(packet, RUN, round=5, base_root=BASE)


def test_nothing_is_decoded_before_everything_is_checked() -> None:
    """The first section is decoded to 72 bits a value, but only when the last is known to be good."""
    size = 1 << 22
    run = make_run(4096, 1, [("a", (size,)), ("b", (1,))])
    scales, ratios = np.full(size >> 12, 99, np.uint8), np.zeros(size >> 12, np.uint8)
    big = SparseTensor(size, scales, ratios, np.arange(size), np.zeros(size, np.uint8))
    packet = make_packet(run, KEY, 3, BASE, 1, 1, [encode_section(big, 4096, 1), b""])
    tracemalloc.start()
    with refused(Code.TRUNCATED):
        check_packet(packet, run, round=3, base_root=BASE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_every_bit_of_the_header_is_protected() -> None:
    for bit in range(8 * len(HEADER)):
        data = bytearray(HEADER)
        data[bit // 8] ^= 1 << bit % 8
        try:
            header = PacketHeader.from_bytes(data)
        except ProtocolError as error:
            assert error.code in {Code.BAD_MAGIC, Code.VERSION, Code.RESERVED, Code.BAD_TOKENS}  # noqa: PT017  either outcome is allowed
            continue
        with pytest.raises(ProtocolError) as caught:
            check_packet(Packet(header, PACKET.sections), RUN, round=5, base_root=BASE)
        wrong_field = {Code.OTHER_RUN, Code.WRONG_ROUND, Code.WRONG_BASE, Code.BAD_KEY}
        assert caught.value.code in wrong_field | {Code.BAD_SIGNATURE}

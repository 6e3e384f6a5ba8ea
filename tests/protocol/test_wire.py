import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.arithmetic import Contribution, merge
from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.layout import TensorSpec
from protocol.packet import Packet, check_packet, make_packet
from protocol.packing import SparseTensor
from protocol.run import RunConfig
from protocol.update import Update, make_update
from protocol.wire import (
    bundle_bytes_max,
    bundle_from_wire,
    bundle_to_wire,
    packet_from_wire,
    packet_to_wire,
    packet_wire_bytes_max,
    update_from_wire,
    update_to_wire,
    update_wire_bytes_max,
)
from tests.protocol.codec_samples import (
    BASE,
    KEY,
    SHAPES,
    make_run,
    packet_sections,
    refused,
    sparse_tensors,
    update_sections,
)

NEW = bytes([9]) * 32


def packet_of(run: RunConfig, seed: int) -> Packet:
    return make_packet(run, KEY, 2, BASE, 1000, 10, packet_sections(run, sparse_tensors(run, seed)))


def update_of(run: RunConfig, seed: int) -> Update:
    contributions = [Contribution(sparse_tensors(run, seed + number), 1024, 65536) for number in range(3)]
    return make_update(run, 2, BASE, NEW, update_sections(merge(contributions, run.layout, "mean", 65536)))


@dataclass(frozen=True)
class Frame:
    """One frame of SPEC 6: its two claims, and the stored length and the stored bytes of each plane."""

    count: int
    gap_bytes: int
    planes: tuple[bytes, ...]
    lengths: tuple[int, ...] = ()  # where they are not those of the planes

    def to_bytes(self) -> bytes:
        lengths = self.lengths or tuple(map(len, self.planes))
        return struct.pack(f"<{2 + len(lengths)}I", self.count, self.gap_bytes, *lengths) + b"".join(self.planes)

    def with_plane(self, number: int, stored: bytes) -> "Frame":
        return replace(self, planes=(*self.planes[:number], stored, *self.planes[number + 1 :]))


def frames_of(wire: bytes, header: int, planes: int) -> list[Frame]:
    frames, place = [], header
    while place < len(wire):
        count, gap_bytes, *lengths = struct.unpack_from(f"<{2 + planes}I", wire, place)
        place += 8 + 4 * planes
        stops = [place + sum(lengths[: number + 1]) for number in range(planes)]
        parts = [wire[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
        frames.append(Frame(count, gap_bytes, tuple(parts)))
        place = stops[-1]
    return frames


def expanded(raw: int, stored: bytes) -> bytes:
    return stored if len(stored) == raw else zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4096), st.sampled_from([1, 2]), st.integers(0, 2**31))
def test_round_trip(k: int, code_bits: int, seed: int) -> None:
    run = make_run(k, code_bits)
    packet, update = packet_of(run, seed), update_of(run, seed)
    wire = packet_to_wire(packet, run)
    assert packet_from_wire(wire, run) == packet
    assert len(wire) <= packet_wire_bytes_max(run)
    wire = update_to_wire(update, run)
    assert update_from_wire(memoryview(wire), run) == update
    assert len(wire) <= update_wire_bytes_max(run)


def test_frames_close_at_one_mebibyte_and_a_larger_section_has_its_own() -> None:
    shapes = [(f"t{number}", (size,)) for number, size in enumerate([300_000, 200_000, 5_000, 1_200_000, 100])]
    run = make_run(4096, 2, shapes)
    packet = packet_of(run, seed=1)
    wire = packet_to_wire(packet, run)
    frames = frames_of(wire, 216, 5)
    assert [frame.count for frame in frames] == [3, 1, 1]
    assert sum(map(len, packet.sections[:3])) <= 1 << 20 < len(packet.sections[3])
    assert packet_from_wire(wire, run) == packet


def test_planes_far_above_the_window_of_zstd_travel() -> None:
    run = make_run(4096, 1, [("big", (9 << 20,))])
    chunks, size = 9 << 8, 9 << 20
    scales, ratios = np.full(chunks, 100, np.uint8), np.zeros(chunks, np.uint8)
    codes = np.random.default_rng(1).integers(0, 2, size).astype(np.uint8)
    sections = packet_sections(run, [SparseTensor(size, scales, ratios, np.arange(size), codes)])
    packet = make_packet(run, KEY, 2, BASE, 1, 1, sections)
    wire = packet_to_wire(packet, run)
    assert len(wire) < size // 8 + 10_000
    assert packet_from_wire(wire, run) == packet


def planes_of(section: bytes, tensor: TensorSpec, code_bits: int, count: int) -> tuple[bytes, ...]:
    """Scales, ratios, blocks, gaps and codes of one section that sends `count` values."""
    n = tensor.chunks
    marks = [0, n, n * code_bits, n * code_bits + 4 * (-(-n // 1024) - 1), len(section) - -(-count * code_bits // 8)]
    return tuple(section[start:stop] for start, stop in zip(marks, [*marks[1:], len(section)], strict=True))


@pytest.mark.parametrize("code_bits", [1, 2])
def test_like_bytes_travel_together(code_bits: int) -> None:
    run = make_run(64, code_bits, [*SHAPES, ("zz", (1025, 4096))])
    tensors = sparse_tensors(run, seed=1)
    packet = packet_of(run, seed=1)
    (frame,) = frames_of(packet_to_wire(packet, run), 216, 5)
    parts = zip(packet.sections, run.layout.tensors, tensors, strict=True)
    planes = zip(*(planes_of(s, t, code_bits, len(values.codes)) for s, t, values in parts), strict=True)
    raw = [b"".join(plane) for plane in planes]
    assert (frame.count, frame.gap_bytes) == (len(packet.sections), len(raw[3]))
    assert [expanded(len(whole), stored) for whole, stored in zip(raw, frame.planes, strict=True)] == raw
    assert (len(raw[1]) > 0) == (code_bits == 2)
    assert len(raw[2]) == 4


def test_an_update_has_planes_of_low_and_high_bytes_of_its_counts() -> None:
    run = make_run(600, 2, [("a", (9000,)), ("b", (100,))])
    update = update_of(run, seed=1)
    (frame,) = frames_of(update_to_wire(update, run), 140, 6)
    counts = update.sections[0][:6] + update.sections[1][:2]
    assert [expanded(4, stored) for stored in frame.planes[:2]] == [counts[0::2], counts[1::2]]
    assert expanded(4, frame.planes[2]) == update.sections[0][6:9] + update.sections[1][2:3]
    assert frame.planes[3] == b""
    assert any(counts[1::2])


@pytest.mark.parametrize("code_bits", [1, 2])
def test_a_reader_accepts_any_split_and_planes_that_are_not_compressed(code_bits: int) -> None:
    run = make_run(64, code_bits)
    packet = packet_of(run, seed=1)
    wire = packet.header.to_bytes()
    parts = zip(packet.sections, run.layout.tensors, sparse_tensors(run, seed=1), strict=True)
    for section, tensor, values in parts:
        planes = planes_of(section, tensor, code_bits, len(values.codes))
        wire += Frame(1, len(planes[3]), planes).to_bytes()
    assert packet_from_wire(wire, run) == packet


def test_sections_without_values_travel_before_between_and_after_others() -> None:
    run = make_run(64, 2, [("a", (9,)), ("b", (99,)), ("c", (9,)), ("d", (9,)), ("e", (99,)), ("f", (9,))])
    rng = np.random.default_rng(3)
    for present in range(64):
        values = [
            compress((rng.standard_normal(tensor.size) * (present >> number & 1)).astype(np.float32), 64, 2)[0]
            for number, tensor in enumerate(run.layout.tensors)
        ]
        packet = make_packet(run, KEY, 2, BASE, 1, 1, packet_sections(run, values))
        assert packet_from_wire(packet_to_wire(packet, run), run) == packet


def test_the_bound_is_that_of_single_raw_frames_of_full_sections() -> None:
    run = make_run(4096, 2, [("a", (5000,)), ("b", (7,))])
    assert update_wire_bytes_max(run) == 140 + (3 * 2 + 2 * 5000) + (3 + 2 * 7) + 2 * 32
    assert packet_wire_bytes_max(run) == 216 + (2 * 2 + 5000 + 1250) + (2 + 7 + 2) + 2 * 32


# A run whose planes compress well: k = 4096 makes every gap byte 0.
RUN = make_run(4096, 2, [("a", (9000,)), ("b", (100,))])
PACKET = packet_of(RUN, seed=2)
WIRE = packet_to_wire(PACKET, RUN)
SCALES, RATIOS, BLOCKS, GAPS, CODES = range(5)
(FRAME,) = frames_of(WIRE, 216, 5)


def test_the_sample_that_the_refusals_start_from_is_accepted_and_compressed() -> None:
    assert packet_from_wire(WIRE[:216] + FRAME.to_bytes(), RUN) == PACKET
    assert len(FRAME.planes[GAPS]) < FRAME.gap_bytes == 9100
    assert FRAME.planes[BLOCKS] == b""
    assert len(check_packet(packet_from_wire(WIRE, RUN), RUN, round=2, base_root=BASE)) == 2


def with_plane(number: int, stored: bytes) -> bytes:
    return with_frame(FRAME.with_plane(number, stored))


def with_frame(frame: Frame) -> bytes:
    return WIRE[:216] + frame.to_bytes()


def with_gaps(raw: bytes) -> bytes:
    return with_frame(replace(FRAME.with_plane(GAPS, zstd(raw)), gap_bytes=len(raw)))


def zstd(data: bytes, *, declared: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=declared).compress(data)


GAPS_RAW = FRAME.gap_bytes
STORED = FRAME.planes[GAPS]
SKIPPABLE = struct.pack("<II", 0x184D2A50, 3) + b"abc"


def with_checksum() -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(GAPS_RAW))


def with_dictionary() -> bytes:
    """A frame that names dictionary 7, in a field of one byte behind the descriptor."""
    plain = zstd(bytes(GAPS_RAW))
    named = plain[:4] + bytes([plain[4] | 1]) + b"\7" + plain[5:]
    assert zstandard.get_frame_parameters(named).dict_id == 7
    return named


def wide_window(log: int) -> bytes:
    """A frame with a window of 2^log: descriptor with an 8-byte size, window, one block that repeats a zero."""
    block = (GAPS_RAW << 3 | 0b011).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd" + bytes([0xC0, log - 10 << 3]) + struct.pack("<Q", GAPS_RAW) + block


@pytest.mark.parametrize(
    ("what", "wire", "code"),
    [
        ("nothing", b"", Code.BAD_MAGIC),
        ("half a header", WIRE[:100], Code.TRUNCATED),
        ("a header alone", WIRE[:216], Code.TRUNCATED),
        ("cut in the count", WIRE[:218], Code.TRUNCATED),
        ("cut in a length", WIRE[:230], Code.TRUNCATED),
        ("cut after the lengths", WIRE[:244], Code.TRUNCATED),
        ("cut in the last plane", WIRE[:-1], Code.TRUNCATED),
        ("one byte more", WIRE + b"\0", Code.TRAILING),
        ("a frame too many", WIRE + FRAME.to_bytes(), Code.TRAILING),
        ("beyond the bound", WIRE + bytes(50_000), Code.TOO_LARGE),
        ("another run", WIRE[:8] + bytes(32) + WIRE[40:], Code.OTHER_RUN),
        ("no sections in a frame", with_frame(replace(FRAME, count=0)), Code.BAD_FRAME),
        ("too many sections in a frame", with_frame(replace(FRAME, count=3)), Code.BAD_FRAME),
        ("4 Gi sections in a frame", with_frame(replace(FRAME, count=0xFFFFFFFF)), Code.BAD_FRAME),
        ("no sections in a frame that is cut", with_frame(replace(FRAME, count=0))[:-1], Code.TRUNCATED),
        ("4 GiB stored", with_frame(replace(FRAME, lengths=(4, 4, 0, 0xFFFFFFFF, 9))), Code.TRUNCATED),
        ("one gap byte above the bound", with_frame(replace(FRAME, gap_bytes=9101)), Code.TOO_LARGE),
        ("4 GiB of gaps", with_frame(replace(FRAME, gap_bytes=0xFFFFFFFF)), Code.TOO_LARGE),
        ("4 GiB of gaps of no section", with_frame(replace(FRAME, count=0, gap_bytes=2**32 - 1)), Code.BAD_FRAME),
        ("scales stored in more", with_plane(SCALES, bytes(5)), Code.BAD_FRAME),
        ("ratios stored in more", with_plane(RATIOS, bytes(5)), Code.BAD_FRAME),
        ("blocks where there are none", with_plane(BLOCKS, bytes(4)), Code.BAD_FRAME),
        ("gaps stored in more", with_plane(GAPS, bytes(GAPS_RAW + 1)), Code.BAD_FRAME),
        ("codes stored in more", with_plane(CODES, bytes(9000)), Code.BAD_FRAME),
        (
            "bad codes behind bad gaps",
            with_frame(FRAME.with_plane(CODES, bytes(9000)).with_plane(GAPS, b"")),
            Code.BAD_ZSTD,
        ),
        ("fewer scales", with_plane(SCALES, bytes(3)), Code.BAD_ZSTD),
        ("no ratios", with_plane(RATIOS, b""), Code.BAD_ZSTD),
        ("fewer codes", with_plane(CODES, bytes(2)), Code.BAD_ZSTD),
        ("a gap too few", with_gaps(bytes(GAPS_RAW - 1)), Code.BAD_FRAME),
        ("no gaps", with_frame(replace(FRAME.with_plane(GAPS, b""), gap_bytes=0)), Code.BAD_FRAME),
        ("a continuation at the end", with_gaps(bytes(GAPS_RAW - 1) + b"\xff"), Code.BAD_FRAME),
        ("a continuation among the gaps", with_gaps(b"\xff" + bytes(GAPS_RAW - 1)), Code.BAD_FRAME),
        ("fewer scales, so fewer codes than stored", with_plane(SCALES, b"\0\0\0\1"), Code.BAD_FRAME),
        ("not zstd", with_plane(GAPS, bytes(50)), Code.BAD_ZSTD),
        ("nothing stored", with_plane(GAPS, b""), Code.BAD_ZSTD),
        ("magic alone", with_plane(GAPS, STORED[:4]), Code.BAD_ZSTD),
        ("zstd cut", with_plane(GAPS, STORED[:-1]), Code.BAD_ZSTD),
        ("bytes after zstd", with_plane(GAPS, STORED + b"\0"), Code.BAD_ZSTD),
        ("two zstd frames", with_plane(GAPS, STORED + zstd(b"")), Code.BAD_ZSTD),
        ("skippable frame first", with_plane(GAPS, SKIPPABLE + STORED), Code.BAD_ZSTD),
        ("skippable frame alone", with_plane(GAPS, SKIPPABLE), Code.BAD_ZSTD),
        ("no size declared", with_plane(GAPS, zstd(bytes(GAPS_RAW), declared=False)), Code.BAD_ZSTD),
        ("expands to more", with_plane(GAPS, zstd(bytes(GAPS_RAW + 1))), Code.BAD_ZSTD),
        ("expands to less", with_plane(GAPS, zstd(bytes(GAPS_RAW - 1))), Code.BAD_ZSTD),
        ("a wrong checksum", with_plane(GAPS, with_checksum()[:-1] + b"\0"), Code.BAD_ZSTD),
        ("a dictionary", with_plane(GAPS, with_dictionary()), Code.BAD_ZSTD),
        ("a window above 8 MiB", with_plane(GAPS, wide_window(24)), Code.BAD_ZSTD),
        ("a window of 2 GiB", with_plane(GAPS, wide_window(31)), Code.BAD_ZSTD),
        ("a window of 2 TiB", with_plane(GAPS, wide_window(41)), Code.BAD_ZSTD),
    ],
)
def test_refused_packets(what: str, wire: bytes, code: Code) -> None:
    with refused(code):
        packet_from_wire(wire, RUN)


def test_a_right_checksum_is_accepted() -> None:
    assert packet_from_wire(with_plane(GAPS, with_checksum()), RUN) == PACKET


def test_a_window_of_8_mib_is_accepted() -> None:
    assert packet_from_wire(with_plane(GAPS, wide_window(23)), RUN) == PACKET


def test_a_bomb_that_declares_the_right_size_is_refused() -> None:
    bomb = bytearray(zstd(bytes(10_000_000)))
    honest = zstandard.get_frame_parameters(bomb).content_size
    struct.pack_into("<I", bomb, bytes(bomb).index(struct.pack("<I", honest)), GAPS_RAW)
    assert zstandard.get_frame_parameters(bomb).content_size == GAPS_RAW
    assert len(bomb) < GAPS_RAW
    with refused(Code.BAD_ZSTD):
        packet_from_wire(with_plane(GAPS, bytes(bomb)), RUN)


def test_counts_above_the_chunk_are_refused_before_the_planes_behind_them() -> None:
    update = update_of(RUN, seed=1)
    wire = update_to_wire(update, RUN)
    (frame,) = frames_of(wire, 140, 6)
    assert update_from_wire(wire[:140] + frame.to_bytes(), RUN) == update
    too_many = replace(frame, planes=(b"\xff" * 4, b"\xff" * 4, b"\xff" * 5, *frame.planes[3:]))
    with refused(Code.BAD_COUNT):
        update_from_wire(wire[:140] + too_many.to_bytes(), RUN)
    with refused(Code.TOO_LARGE):
        update_from_wire(wire[:140] + replace(frame, gap_bytes=9101).to_bytes(), RUN)


def test_a_packet_is_no_update_and_an_update_no_packet() -> None:
    with refused(Code.BAD_MAGIC):
        update_from_wire(WIRE, RUN)
    with refused(Code.BAD_MAGIC):
        packet_from_wire(update_to_wire(update_of(RUN, seed=1), RUN), RUN)


def test_refusing_lies_about_sizes_takes_no_memory() -> None:
    run = make_run(4096, 2, [("a", (1 << 26,))])
    head = replace(PACKET.header, run_id=run.run_id).to_bytes()
    heads = zstd(bytes([1]) * (1 << 14)), zstd(bytes(1 << 14)), bytes(60)
    lie = Frame(1, (1 << 26) + 1, (*heads, zstd(bytes(1 << 26)), b"")).to_bytes()
    tracemalloc.start()
    with refused(Code.TOO_LARGE):
        packet_from_wire(head + lie, run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_reading_and_refusing_take_no_more_than_twice_the_canonical_size() -> None:
    size = 8 << 20
    run = make_run(4096, 1, [("a", (size,))])
    scales, ratios = np.full(size >> 12, 99, np.uint8), np.zeros(size >> 12, np.uint8)
    sections = packet_sections(run, [SparseTensor(size, scales, ratios, np.arange(size), np.zeros(size, np.uint8))])
    wire = packet_to_wire(make_packet(run, KEY, 2, BASE, 1, 1, sections), run)
    assert len(wire) < 10_000
    tracemalloc.start()
    packet_from_wire(wire, run)
    with refused(Code.TRAILING):
        packet_from_wire(wire + b"\0", run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(sections[0]) + 4_000_000


@pytest.mark.parametrize("kind", ["packet", "update"])
def test_mutated_bytes_are_refused_or_read_as_sections_that_travel_again(kind: str) -> None:
    rng = np.random.default_rng(31)
    run = make_run(200, 2)
    packet, update = packet_of(run, seed=4), update_of(run, seed=4)
    good = packet_to_wire(packet, run) if kind == "packet" else update_to_wire(update, run)
    read: Callable[[bytes, RunConfig], Packet | Update] = packet_from_wire if kind == "packet" else update_from_wire
    start = 216 if kind == "packet" else 140
    codes = set()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(start, len(data))] = rng.integers(256)
        if rng.random() < 0.1:
            del data[rng.integers(start, len(data)) :]
        try:
            received = read(bytes(data), run)
        except ProtocolError as error:
            codes.add(error.code)
            continue
        again = packet_to_wire(received, run) if isinstance(received, Packet) else update_to_wire(received, run)
        assert read(again, run) == received
    assert {Code.BAD_FRAME, Code.TRUNCATED, Code.BAD_ZSTD} <= codes


BUNDLE = [packet_to_wire(packet_of(RUN, seed), RUN) for seed in range(3)]
BUNDLE_WIRE = bundle_to_wire(BUNDLE)


def test_a_bundle_gives_back_its_packets_in_their_order() -> None:
    assert b"".join(struct.pack("<I", len(packet)) + packet for packet in BUNDLE) == BUNDLE_WIRE
    assert bundle_from_wire(memoryview(BUNDLE_WIRE), 3, RUN) == BUNDLE
    assert bundle_from_wire(b"", 0, RUN) == []
    assert len(BUNDLE_WIRE) <= bundle_bytes_max(RUN, 3) == 3 * (4 + packet_wire_bytes_max(RUN))


@pytest.mark.parametrize(
    ("what", "data", "count", "code"),
    [
        ("empty", b"", 1, Code.TRUNCATED),
        ("cut in a size", BUNDLE_WIRE[:3], 3, Code.TRUNCATED),
        ("cut in a packet", BUNDLE_WIRE[:-1], 3, Code.TRUNCATED),
        ("a packet too few", BUNDLE_WIRE, 4, Code.TRUNCATED),
        ("a packet too many", BUNDLE_WIRE, 2, Code.TRAILING),
        ("one byte more", BUNDLE_WIRE + b"\0", 3, Code.TRAILING),
        ("a packet of 4 GiB", b"\xff" * 4 + BUNDLE_WIRE, 3, Code.TOO_LARGE),
        ("a packet of more than the bound", struct.pack("<I", packet_wire_bytes_max(RUN) + 1), 1, Code.TOO_LARGE),
        ("the whole of more than the bound", bytes(bundle_bytes_max(RUN, 1) + 1), 1, Code.TOO_LARGE),
    ],
)
def test_refused_bundles(what: str, data: bytes, count: int, code: Code) -> None:
    with refused(code):
        bundle_from_wire(data, count, RUN)

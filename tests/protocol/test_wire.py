import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.arithmetic import Contribution, merge
from protocol.errors import Code, ProtocolError
from protocol.packet import Packet, check_packet, make_packet
from protocol.packing import SparseTensor
from protocol.run import RunConfig
from protocol.update import Update, make_update
from protocol.wire import (
    packet_from_wire,
    packet_to_wire,
    packet_wire_bytes_max,
    update_from_wire,
    update_to_wire,
    update_wire_bytes_max,
)
from tests.protocol.codec_samples import BASE, KEY, make_run, refused, sparse_tensors

NEW = bytes([9]) * 32


def packet_of(run: RunConfig, seed: int) -> Packet:
    return make_packet(run, KEY, 2, BASE, 1000, 10, sparse_tensors(run, seed))


def update_of(run: RunConfig, seed: int) -> Update:
    contributions = [Contribution(sparse_tensors(run, seed + number), 1024, 65536) for number in range(3)]
    return make_update(run, 2, BASE, NEW, merge(contributions, run.layout, "mean", 65536))


def frames_of(wire: bytes, header: int) -> list[tuple[int, list[tuple[int, bytes]]]]:
    """Take the frames apart by SPEC 6: sections of each and raw length and stored bytes of its planes."""
    frames, place = [], header
    while place < len(wire):
        (count,) = struct.unpack_from("<I", wire, place)
        place += 4
        planes = []
        for _ in range(6):
            raw, stored = struct.unpack_from("<II", wire, place)
            planes.append((raw, wire[place + 8 : place + 8 + stored]))
            place += 8 + stored
        frames.append((count, planes))
    return frames


def frame_bytes(count: int, planes: list[tuple[int, bytes]]) -> bytes:
    parts = [struct.pack("<II", raw, len(stored)) + stored for raw, stored in planes]
    return struct.pack("<I", count) + b"".join(parts)


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
    frames = frames_of(wire, 216)
    assert [count for count, _ in frames] == [3, 1, 1]
    assert sum(raw for raw, _ in frames[0][1]) <= 1 << 20 < sum(raw for raw, _ in frames[1][1])
    assert packet_from_wire(wire, run) == packet


def test_planes_far_above_the_window_of_zstd_travel() -> None:
    run = make_run(4096, 1, [("big", (9 << 20,))])
    chunks, size = 9 << 8, 9 << 20
    scales, ratios = np.full(chunks, 100 << 7, np.uint16), np.zeros(chunks, np.uint8)
    codes = np.random.default_rng(1).integers(0, 2, size).astype(np.uint8)
    packet = make_packet(run, KEY, 2, BASE, 1, 1, [SparseTensor(size, scales, ratios, np.arange(size), codes)])
    wire = packet_to_wire(packet, run)
    assert len(wire) < size // 8 + 10_000
    assert packet_from_wire(wire, run) == packet


def test_like_bytes_travel_together() -> None:
    run = make_run()
    packet = packet_of(run, seed=1)
    ((count, planes),) = frames_of(packet_to_wire(packet, run), 216)
    assert count == len(packet.sections)
    raw = [expanded(length, stored) for length, stored in planes]
    chunks = [tensor.chunks for tensor in run.layout.tensors]
    scales = b"".join(section[: 2 * n] for section, n in zip(packet.sections, chunks, strict=True))
    ratios = b"".join(section[2 * n : 3 * n] for section, n in zip(packet.sections, chunks, strict=True))
    blocks = b"".join(section[3 * n : 3 * n + 4] for section, n in zip(packet.sections, chunks, strict=True))
    assert raw[:4] == [scales[0::2], scales[1::2], ratios, blocks]
    assert sum(map(len, raw)) == sum(map(len, packet.sections))


def test_a_reader_accepts_any_split_and_planes_that_are_not_compressed() -> None:
    run = make_run()
    packet = packet_of(run, seed=1)
    wire = packet.header.to_bytes()
    for section, tensor in zip(packet.sections, run.layout.tensors, strict=True):
        n = tensor.chunks
        gaps = struct.unpack_from("<I", section, 3 * n)[0]
        stop = 3 * n + 4 + gaps
        low, high = section[0 : 2 * n : 2], section[1 : 2 * n : 2]
        planes = [
            low,
            high,
            section[2 * n : 3 * n],
            section[3 * n : 3 * n + 4],
            section[3 * n + 4 : stop],
            section[stop:],
        ]
        wire += frame_bytes(1, [(len(plane), plane) for plane in planes])
    assert packet_from_wire(wire, run) == packet


def test_the_bound_is_that_of_single_raw_frames_of_full_sections() -> None:
    run = make_run(4096, 2, [("a", (5000,)), ("b", (7,))])
    assert update_wire_bytes_max(run) == 140 + (3 * 2 + 4 + 2 * 5000) + (3 + 4 + 2 * 7) + 2 * 52
    assert packet_wire_bytes_max(run) == 216 + (3 * 2 + 4 + 5000 + 1250) + (3 + 4 + 7 + 2) + 2 * 52


# A run whose planes compress well: k = 4096 makes every gap byte 0.
RUN = make_run(4096, 2, [("a", (9000,)), ("b", (100,))])
PACKET = packet_of(RUN, seed=2)
WIRE = packet_to_wire(PACKET, RUN)
LOW, HIGH, RATIOS, BLOCKS, GAPS, CODES = range(6)
((COUNT, PLANES),) = frames_of(WIRE, 216)


def test_the_sample_that_the_refusals_start_from_is_accepted_and_compressed() -> None:
    assert packet_from_wire(WIRE[:216] + frame_bytes(COUNT, PLANES), RUN) == PACKET
    assert len(PLANES[GAPS][1]) < PLANES[GAPS][0]
    assert len(check_packet(packet_from_wire(WIRE, RUN), RUN, round=2, base_root=BASE)) == 2


def with_plane(number: int, raw: int, stored: bytes) -> bytes:
    planes = [*PLANES[:number], (raw, stored), *PLANES[number + 1 :]]
    return WIRE[:216] + frame_bytes(COUNT, planes)


def zstd(data: bytes, *, declared: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=declared).compress(data)


GAPS_RAW = PLANES[GAPS][0]
STORED = PLANES[GAPS][1]
SKIPPABLE = struct.pack("<II", 0x184D2A50, 3) + b"abc"
BLOCKS_4_GIB = struct.pack("<2I", 0xFFFFFFFF, 0)


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
        ("cut in a length", WIRE[:225], Code.TRUNCATED),
        ("cut in the last plane", WIRE[:-1], Code.TRUNCATED),
        ("one byte more", WIRE + b"\0", Code.TRAILING),
        ("a frame too many", WIRE + frame_bytes(COUNT, PLANES), Code.TRAILING),
        ("beyond the bound", WIRE + bytes(50_000), Code.TOO_LARGE),
        ("another run", WIRE[:8] + bytes(32) + WIRE[40:], Code.OTHER_RUN),
        ("no sections in a frame", WIRE[:216] + frame_bytes(0, PLANES), Code.BAD_FRAME),
        ("too many sections in a frame", WIRE[:216] + frame_bytes(3, PLANES), Code.BAD_FRAME),
        ("4 Gi sections in a frame", WIRE[:216] + frame_bytes(0xFFFFFFFF, PLANES), Code.BAD_FRAME),
        ("too few scales", with_plane(LOW, 3, bytes(3)), Code.BAD_FRAME),
        ("planes of scales differ", with_plane(HIGH, 5, bytes(5)), Code.BAD_FRAME),
        ("no ratios", with_plane(RATIOS, 0, b""), Code.BAD_FRAME),
        ("half a block", with_plane(BLOCKS, 6, bytes(6)), Code.BAD_FRAME),
        ("4 GiB of gaps by block", with_plane(BLOCKS, 8, BLOCKS_4_GIB), Code.TOO_LARGE),
        ("4 GiB of gaps by length", with_plane(GAPS, 0xFFFFFFFF, STORED), Code.BAD_FRAME),
        ("a gap byte less", with_plane(GAPS, GAPS_RAW - 1, zstd(bytes(GAPS_RAW - 1))), Code.BAD_FRAME),
        ("fewer codes", with_plane(CODES, 2, bytes(2)), Code.BAD_FRAME),
        ("stored longer than raw", with_plane(RATIOS, 4, bytes(5)), Code.BAD_FRAME),
        ("not zstd", with_plane(GAPS, GAPS_RAW, bytes(50)), Code.BAD_ZSTD),
        ("nothing stored", with_plane(GAPS, GAPS_RAW, b""), Code.BAD_ZSTD),
        ("magic alone", with_plane(GAPS, GAPS_RAW, STORED[:4]), Code.BAD_ZSTD),
        ("zstd cut", with_plane(GAPS, GAPS_RAW, STORED[:-1]), Code.BAD_ZSTD),
        ("bytes after zstd", with_plane(GAPS, GAPS_RAW, STORED + b"\0"), Code.BAD_ZSTD),
        ("two zstd frames", with_plane(GAPS, GAPS_RAW, STORED + zstd(b"")), Code.BAD_ZSTD),
        ("skippable frame first", with_plane(GAPS, GAPS_RAW, SKIPPABLE + STORED), Code.BAD_ZSTD),
        ("skippable frame alone", with_plane(GAPS, GAPS_RAW, SKIPPABLE), Code.BAD_ZSTD),
        ("no size declared", with_plane(GAPS, GAPS_RAW, zstd(bytes(GAPS_RAW), declared=False)), Code.BAD_ZSTD),
        ("expands to more", with_plane(GAPS, GAPS_RAW, zstd(bytes(GAPS_RAW + 1))), Code.BAD_ZSTD),
        ("expands to less", with_plane(GAPS, GAPS_RAW, zstd(bytes(GAPS_RAW - 1))), Code.BAD_ZSTD),
        ("a window above 8 MiB", with_plane(GAPS, GAPS_RAW, wide_window(24)), Code.BAD_ZSTD),
        ("a window of 2 GiB", with_plane(GAPS, GAPS_RAW, wide_window(31)), Code.BAD_ZSTD),
        ("a window of 2 TiB", with_plane(GAPS, GAPS_RAW, wide_window(41)), Code.BAD_ZSTD),
    ],
)
def test_refused_packets(what: str, wire: bytes, code: Code) -> None:
    with refused(code):
        packet_from_wire(wire, RUN)


def test_a_window_of_8_mib_is_accepted() -> None:
    assert packet_from_wire(with_plane(GAPS, GAPS_RAW, wide_window(23)), RUN) == PACKET


def test_a_bomb_that_declares_the_right_size_is_refused() -> None:
    bomb = bytearray(zstd(bytes(10_000_000)))
    honest = zstandard.get_frame_parameters(bomb).content_size
    struct.pack_into("<I", bomb, bytes(bomb).index(struct.pack("<I", honest)), GAPS_RAW)
    assert zstandard.get_frame_parameters(bomb).content_size == GAPS_RAW
    assert len(bomb) < GAPS_RAW
    with refused(Code.BAD_ZSTD):
        packet_from_wire(with_plane(GAPS, GAPS_RAW, bytes(bomb)), RUN)


def test_counts_above_the_chunk_are_refused_before_values_are_read() -> None:
    update = update_of(RUN, seed=1)
    wire = update_to_wire(update, RUN)
    ((count, planes),) = frames_of(wire, 140)
    planes[0], planes[1] = (4, bytes([255] * 4)), (4, bytes([255] * 4))
    with refused(Code.BAD_COUNT):
        update_from_wire(wire[:140] + frame_bytes(count, planes), RUN)


def test_a_packet_is_no_update_and_an_update_no_packet() -> None:
    with refused(Code.BAD_MAGIC):
        update_from_wire(WIRE, RUN)
    with refused(Code.BAD_MAGIC):
        packet_from_wire(update_to_wire(update_of(RUN, seed=1), RUN), RUN)


def test_refusing_lies_about_sizes_takes_no_memory() -> None:
    run = make_run(4096, 2, [("a", (1 << 26,))])
    head = replace(PACKET.header, run_id=run.run_id).to_bytes()
    chunks = 1 << 14
    tables = [(chunks, zstd(bytes(chunks))), (chunks, zstd(bytes(chunks))), (chunks, zstd(bytes(chunks)))]
    lie = frame_bytes(1, [*tables, (64, bytes([255]) * 64), (1 << 26, zstd(bytes(1 << 26))), (0, b"")])
    tracemalloc.start()
    with refused(Code.TOO_LARGE):
        packet_from_wire(head + lie, run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


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

"""Feed the decoders with mutations of valid bytes: `make fuzz`, or `python -m tests.core.kernels.fuzz --help`.

First sections, in C++ under AddressSanitizer and UBSan (fuzz.cpp). Then packets, updates and bundles in transport form,
through the reader that everybody uses and the check of their sections. One seed repeats everything.
"""

import argparse
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import zstandard

from peer.core import codec
from protocol.arithmetic import Contribution, merge
from protocol.compress import compress
from protocol.errors import ProtocolError
from protocol.packet import PACKET_HEADER_BYTES, Packet, make_packet
from protocol.run import RunConfig
from protocol.update import UPDATE_HEADER_BYTES, Update, make_update
from protocol.wire import (
    bundle_from_wire,
    bundle_to_wire,
    packet_from_wire,
    packet_to_wire,
    packet_wire_bytes_max,
    update_from_wire,
    update_to_wire,
    update_wire_bytes_max,
)
from tests.protocol.codec_samples import BASE, KEY, SHAPES, gradient, make_run, packet_sections, update_sections

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = (ROOT / "peer/core/kernels/kernels.cpp", HERE / "fuzz.cpp")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# As setup.py builds the kernels, but for the optimization, which would hide from the sanitizers what it removes.
FLAGS = ("-std=c++17", "-g", "-O1", "-ffp-contract=off", "-pthread", *SANITIZE)
SLOWEST_S = 1.0
SCRATCH_BYTES_MAX = 8 << 20
_TRACED_EVERY = 50  # to follow allocations makes a call several times slower
_BOMB_BYTES = 1 << 26
_MAGIC = b"\x28\xb5\x2f\xfd"


def compiler() -> str:
    """A C++ compiler with both sanitizers. Raises LookupError that says what is missing."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise LookupError("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "empty"
        command = [found, "-x", "c++", *SANITIZE, "-o", str(program), "-"]
        built = subprocess.run(command, input="int main() { return 0; }", text=True, capture_output=True, check=False)
        if built.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
            raise LookupError(f"{found} has no AddressSanitizer and UBSan that run here")
    return found


def fuzz_sections(folder: Path, seed: int, mutations: int, seconds: float) -> str:
    """Build the C++ driver in this folder and run it; its figures, or CalledProcessError with what it wrote."""
    program = str(folder / "fuzz")
    subprocess.run([compiler(), *FLAGS, *map(str, SOURCES), "-o", program], check=True)
    command = [program, str(seed), str(mutations), str(seconds)]
    figures: str = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return figures


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One change at one place, of a kind that decoders stumble over."""
    changed = bytearray(data or b"\0")
    at = rng.randrange(len(changed)) if rng.random() < 0.7 else rng.randrange(min(len(changed), 64))
    length = 1 + rng.randrange(min(len(changed) - at, rng.choice((4, 4, 64, 5000))))
    extreme = rng.choice((0, 1, 2, 3, 35, 36, 63, 64, 127, 128, 254, 255))
    kind = rng.randrange(9)
    if kind == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        changed[at : at + length] = bytes([extreme]) * length
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed[at:at] = bytes([extreme]) * length
    elif kind == 4:
        del changed[at : at + length]
    elif kind == 5:  # one index moves, those behind it stay
        to, step = rng.randrange(len(changed)), rng.randrange(1, 5)
        changed[at] = (changed[at] + step) % 256
        changed[to] = (changed[to] - step) % 256
    elif kind == 6:
        number = rng.choice((0, 1, 2**32 - 1, 2**31, len(changed)))
        changed[at : at + 4] = number.to_bytes(4, "little")
    elif kind == 7:
        changed[at:] = other[at:]
    else:
        changed[at : at + length] = other[at : at + length]
    return bytes(changed)


@dataclass
class Frame:
    """A transport frame taken apart: two numbers, and each plane as it is stored."""

    count: int
    gap_bytes: int
    planes: list[bytes]
    lengths: list[int] = field(default_factory=list)  # what is claimed; empty for the truth

    def to_bytes(self) -> bytes:
        """SPEC 6."""
        lengths = self.lengths or [len(plane) for plane in self.planes]
        head = struct.pack(f"<{2 + len(lengths)}I", self.count, self.gap_bytes, *(n % 2**32 for n in lengths))
        return head + b"".join(self.planes)


def frames_of(data: bytes, planes: int) -> list[Frame]:
    """Take valid frames apart."""
    frames, place = [], 0
    while place < len(data):
        count, gap_bytes, *lengths = struct.unpack_from(f"<{2 + planes}I", data, place)
        place += 8 + 4 * planes
        stored = []
        for length in lengths:
            stored.append(data[place : place + length])
            place += length
        frames.append(Frame(count, gap_bytes, stored))
    return frames


def expanded(plane: bytes) -> bytes:
    """What a plane holds."""
    return zstandard.ZstdDecompressor().decompress(plane) if plane.startswith(_MAGIC) else plane


def _bomb() -> bytes:
    compressed = zstandard.ZstdCompressor().compress(bytes(_BOMB_BYTES))
    assert compressed[4] >> 6 == 2, "the length stands in four bytes"
    return compressed


_BOMB = _bomb()  # 64 MiB of zeros in some kB


def restored(raw: bytes, rng: random.Random) -> bytes:
    """The same plane in another form, hardly any of which is allowed."""
    kind = rng.randrange(8)
    if kind == 0:
        return zstandard.ZstdCompressor(level=rng.randrange(-5, 20)).compress(raw)
    if kind == 1:
        return zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    if kind == 2:
        return zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    if kind == 3:
        half = len(raw) // 2
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))
    if kind == 4:
        return b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstandard.ZstdCompressor().compress(raw)
    if kind == 5:  # expands to 64 MiB, whatever it claims
        descriptor = 4 + 1 + (0 if _BOMB[4] & 0x20 else 1)
        return _BOMB[:descriptor] + struct.pack("<I", len(raw)) + _BOMB[descriptor + 4 :]
    if kind == 6:  # a window of up to 2 GiB
        return _MAGIC + bytes([0x80, rng.choice((0x60, 0x68, 0x70, 0xA8))]) + struct.pack("<I", len(raw)) + b"\1\0\0"
    return raw


def mutated_frames(frames: Sequence[Frame], others: Sequence[Frame], rng: random.Random) -> bytes:
    """Change the frames where bytes alone would hardly meet: inside a plane, in its form, in a number, in the order."""
    changed = [Frame(frame.count, frame.gap_bytes, list(frame.planes)) for frame in frames]
    frame, number = rng.choice(changed), rng.randrange(len(changed[0].planes))
    other = rng.choice(others).planes[number]
    kind = rng.randrange(12)
    if kind < 6:
        raw = mutate(expanded(frame.planes[number]), expanded(other), rng)
        if number == len(frame.planes) - 2 and kind < 3:
            frame.gap_bytes = len(raw)
        frame.planes[number] = zstandard.ZstdCompressor(level=1).compress(raw) if kind % 2 else raw
    elif kind == 6:
        frame.planes[number] = restored(expanded(frame.planes[number]), rng)
    elif kind == 7:
        frame.planes[number] = mutate(frame.planes[number], other, rng)
    elif kind == 8:
        frame.lengths = [len(plane) for plane in frame.planes]
        frame.lengths[number] = rng.choice((0, 1, 2**31, 2**32 - 1, frame.lengths[number] + rng.choice((-1, 1))))
    elif kind == 9:
        frame.count = rng.choice((0, 1, 2, frame.count + 1, 2**16, 2**32 - 1))
    elif kind == 10:
        frame.gap_bytes = rng.choice((0, frame.gap_bytes + 1, max(frame.gap_bytes - 1, 0), 2**31, 2**32 - 1))
    else:
        place = rng.randrange(len(changed))
        changed[place : place + rng.randrange(2)] = [rng.choice(changed)] * rng.randrange(3)
    return b"".join(part.to_bytes() for part in changed)


@dataclass(frozen=True)
class Sample:
    """Valid packets, or valid updates, of one run in transport form."""

    run: RunConfig
    header_bytes: int
    planes: int
    wires: tuple[bytes, ...]

    @cached_property
    def frames(self) -> list[list[Frame]]:
        """The frames of each."""
        return [frames_of(wire[self.header_bytes :], self.planes) for wire in self.wires]

    def mutated(self, rng: random.Random) -> bytes:
        """One of them with a few changes."""
        number, other = rng.randrange(len(self.wires)), rng.randrange(len(self.wires))
        if rng.random() < 0.7:
            head = self.wires[number][: self.header_bytes]
            data = head + mutated_frames(self.frames[number], self.frames[other], rng)
        else:
            data = mutate(self.wires[number], self.wires[other], rng)
        return mutate(data, self.wires[other], rng) if rng.random() < 0.1 else data

    @property
    def is_packet(self) -> bool:
        """Whether these are packets and not updates."""
        return self.header_bytes == PACKET_HEADER_BYTES

    def read(self, data: bytes) -> Packet | Update:
        """Do what a receiver does before it looks at signatures and digests."""
        layout, k, code_bits = self.run.layout, self.run.compression.k, self.run.compression.code_bits
        if self.is_packet:
            packet = packet_from_wire(data, self.run)
            codec.check_sections(packet.sections, layout, k, code_bits)
            return packet
        update = update_from_wire(data, self.run)
        codec.check_update_sections(update.sections, layout)
        return update

    def write(self, accepted: Packet | Update) -> bytes:
        """What was read, in the transport form that this client writes."""
        if isinstance(accepted, Packet):
            return packet_to_wire(accepted, self.run)
        return update_to_wire(accepted, self.run)

    @property
    def bytes_max(self) -> int:
        """The most that a receiver accepts."""
        return packet_wire_bytes_max(self.run) if self.is_packet else update_wire_bytes_max(self.run)


def in_frames_of_one(wire: bytes, header_bytes: int, read: Callable[[bytes], Packet | Update], run: RunConfig) -> bytes:
    """The same content with a frame for each tensor, as a writer with smaller frames makes it."""
    parts = [wire[:header_bytes]]
    for section, tensor in zip(read(wire).sections, run.layout.tensors, strict=True):
        alone = make_run(run.compression.k, run.compression.code_bits, ((tensor.name, tensor.shape),))
        if header_bytes == PACKET_HEADER_BYTES:
            whole = packet_to_wire(make_packet(alone, KEY, 1, BASE, 1, 1, [section]), alone)
        else:
            whole = update_to_wire(make_update(alone, 1, BASE, BASE, [section]), alone)
        parts.append(whole[header_bytes:])
    return b"".join(parts)


def samples_of(run: RunConfig, seed: int) -> list[Sample]:
    """Three packets of a run and two updates made of them, each once more in small frames."""
    k, code_bits = run.compression.k, run.compression.code_bits
    packets, contributions = [], []
    for number in range(3):
        place = 100 * (seed + number)
        tensors = [
            compress(gradient(tensor.size, place + n), k, code_bits)[0] for n, tensor in enumerate(run.layout.tensors)
        ]
        contributions.append(Contribution(tensors, 1024, 65536))
        packet = make_packet(run, KEY, 1, BASE, 4096, 16, packet_sections(run, tensors))
        packets.append(packet_to_wire(packet, run))
    updates = []
    for some in (contributions, contributions[:1]):
        sections = update_sections(merge(some, run.layout, "mean_of_senders", 65536))
        updates.append(update_to_wire(make_update(run, 1, BASE, BASE, sections), run))
    packets += [
        in_frames_of_one(wire, PACKET_HEADER_BYTES, lambda data: packet_from_wire(data, run), run) for wire in packets
    ]
    updates += [
        in_frames_of_one(wire, UPDATE_HEADER_BYTES, lambda data: update_from_wire(data, run), run) for wire in updates
    ]
    return [
        Sample(run, PACKET_HEADER_BYTES, 5, tuple(packets)),
        Sample(run, UPDATE_HEADER_BYTES, 6, tuple(updates)),
    ]


@dataclass
class Figures:
    """What came of the mutations."""

    mutations: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    memory_bytes: int = 0  # beyond twice the most bytes that the run admits, the most that one call took

    def lines(self) -> list[str]:
        """For the terminal and the log."""
        outcomes = [f"{name}: {count}" for name, count in sorted(self.outcomes.items())]
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return [
            f"mutations: {self.mutations}",
            *outcomes,
            f"slowest call: {self.slowest_s * 1e6:.0f} us ({self.slowest})",
            f"memory of a call: at most twice the bound of what is read and {self.memory_bytes} bytes",
            f"peak memory of the process: {peak_mib} MiB",
        ]


def fuzz_transport(seed: int, mutations: int, seconds: float) -> Figures:
    """Read mutated packets, updates and bundles. Whatever is not a ProtocolError goes through, with a note."""
    runs = [make_run(64, 2), make_run(300, 1), make_run(4096, 2), make_run(3, 1, SHAPES[2:])]
    small = [sample for number, run in enumerate(runs) for sample in samples_of(run, number)]
    large = samples_of(make_run(1, 2, (("big", (1025 * 4096 + 1,)),)), 9)
    figures = Figures()
    end = time.monotonic() + seconds
    while figures.mutations < mutations and time.monotonic() < end:
        rng = random.Random(seed << 40 | figures.mutations)
        sample = rng.choice(large if rng.random() < 0.01 else small)
        try:
            _try(sample, rng, figures)
        except Exception as error:
            error.add_note(f"seed {seed}, mutation {figures.mutations}")
            raise
        figures.mutations += 1
    assert figures.slowest_s < SLOWEST_S, figures.lines()
    assert figures.memory_bytes < SCRATCH_BYTES_MAX, figures.lines()
    return figures


def _try(sample: Sample, rng: random.Random, figures: Figures) -> None:
    """One mutation. What is accepted must survive being written and read again."""
    data = sample.mutated(rng)
    count = 2 if sample.is_packet and rng.random() < 0.1 else 0
    if count:
        data = mutate(bundle_to_wire([sample.wires[0], data]), data, rng)
    if figures.mutations % _TRACED_EVERY == 0:
        tracemalloc.start()
        _read(sample, data, count)
        excess = tracemalloc.get_traced_memory()[1] - 2 * sample.bytes_max * max(count, 1)
        tracemalloc.stop()
        figures.memory_bytes = max(figures.memory_bytes, excess)
    outcome, took_s, turns = "", SLOWEST_S, 0
    accepted: list[Packet | Update] = []
    while turns < 5 and took_s > figures.slowest_s:  # other work on the machine delays calls too
        before = time.perf_counter()
        outcome, accepted = _read(sample, data, count)
        took_s, turns = min(took_s, time.perf_counter() - before), turns + 1
    if took_s > figures.slowest_s:
        kind = "bundle" if count else "packet" if sample.is_packet else "update"
        figures.slowest_s, figures.slowest = took_s, f"{kind} of {sample.run.layout.size} values, {outcome}"
    figures.outcomes[outcome] += 1
    for value in accepted:
        assert sample.read(sample.write(value)) == value


def _read(sample: Sample, data: bytes, count: int) -> tuple[str, list[Packet | Update]]:
    """Read a bundle of so many packets, or one packet or update: what came of it, and what was accepted."""
    try:
        parts = bundle_from_wire(data, count, sample.run) if count else [data]
        return "accepted", [sample.read(part) for part in parts]
    except ProtocolError as error:
        return f"refused {error.code.value} {error.code.name}", []


def main() -> None:
    """Run both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sections", type=int, default=1_000_000, help="mutated sections, in C++")
    parser.add_argument(
        "--transport", type=int, default=1_000_000, help="mutated packets and updates at most, in Python"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="at most this long for the transport form")
    options = parser.parse_args()
    sys.stdout.write(f"seed {options.seed}\n\nsections, under ASan and UBSan\n")
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(fuzz_sections(Path(folder), options.seed, options.sections, 3600.0))
    sys.stdout.write(f"\ntransport form, numpy {np.__version__}, zstandard {zstandard.__version__}\n")
    sys.stdout.write("\n".join(fuzz_transport(options.seed, options.transport, options.seconds).lines()) + "\n")


if __name__ == "__main__":
    main()

"""How small and how fast are packets, against the memory's limit, against torch and against the published reference?

    python -m bench.codec                          16M values, k = 32, 64, 128, one thread, and the demo's own packets
    python -m bench.codec --sizes 16 128 --threads 2
    python -m bench.codec --json                   one JSON object for k = 64 at 16M values on one thread

The 16M values are a real pseudo-gradient with its residual: a model of that size trained here for a few rounds on the
embedded corpus. The 128M, and 15 of the 16 packets that are merged, are the same values with the columns of every chunk
in another order, so they serve for speed alone. Contestants take turns, a ratio is the median over the turns, and
everything that a turn overwrites is restored before the clock starts. On one thread the clock is the process's CPU
time, which other jobs on the machine disturb less.
"""

import argparse
import json
import platform
import statistics
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import lgamma, log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import reference_wire, torch_codec
from bench.floor import Floor
from bench.inputs import Inputs, enlarged, real_inputs, shuffled, with_packets
from bench.real_gradients import (
    OPERATOR,
    acc_of,
    demo_settings,
    exchange,
    kept_rows,
    make_run,
    merge,
    open_data,
    replicas_of,
    train_round,
    with_k,
)
from peer.core import codec
from peer.core.kernels import native
from protocol.layout import Layout, chunk_lengths, kept_per_chunk
from protocol.limits import CHUNK
from protocol.packet import PACKET_HEADER_BYTES, check_claims, make_packet
from protocol.run import RunConfig
from protocol.wire import packet_from_wire, packet_to_wire

PEERS = 16
MEMORY_BYTES = {16: 3 << 30, 128: 10 << 30}  # what a size needs beside the interpreter
ROOT = bytes(32)
FLOOR = "floor: in-place axpy over the same arrays"
AXPY = "in-place axpy over two arrays"
ENCODE = "ours: error feedback to packet"
ENCODE_TORCH = "torch: topk, gather, quantize, pack"
ENCODE_TORCH_BATCHES = "torch, a million values at a time"
ENCODE_REFERENCE = "reference wire in torch"
MERGE = "ours: from the wire to the update"
MERGE_TORCH = "torch: scatter_add_ of decoded values and counts"
MERGE_TORCH_SUM = "torch: scatter_add_ of decoded values alone"
# A second handle on the library that the codec uses: switching its instruction set switches the codec's.
KERNELS = native.load()
SETS = {2: "AVX-512", 1: "AVX2", 0: "portable"}

Times = Mapping[str, Sequence[float]]


def take_turns(
    turns: int, contestants: Mapping[str, Callable[[], object]], restore: Callable[[], object], threads: int
) -> dict[str, list[float]]:
    """Seconds of each contestant in each turn. One turn before the first is not counted."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, work in contestants.items():
            restore()
            began_s = clock()
            work()
            if turn:
                times[name].append(clock() - began_s)
    return times


def for_each_set(name: str, work: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The work with the best instruction set under its own name, and with each other one that this machine has."""
    if KERNELS is None:
        return {name: work}
    kernels = KERNELS

    def with_set(number: int) -> Callable[[], object]:
        def run() -> None:
            kernels.use_instructions(number)
            work()
            kernels.use_instructions(-1)

        return run

    best = kernels.instructions
    found = {name: work}
    for number, other in SETS.items():
        if kernels.use_instructions(number) and other != best:
            found[f"{name}, {other}"] = with_set(number)
    kernels.use_instructions(-1)
    return found


def ratio(times: Times, over: str, under: str) -> float:
    """Median over the turns of one contestant's time in another's."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def show(times: Times, values: int) -> None:
    """Both sides of every ratio."""
    for name, seconds in times.items():
        median_s = statistics.median(seconds)
        print(f"    {name:<44} {median_s * 1e3:>9.2f} ms {values / median_s / 1e6:>9.0f} M values/s")


@dataclass(frozen=True)
class Packets:
    """One packet in all its forms."""

    sections: list[bytes]
    wire: bytes
    values: int
    positions: Tensor  # i64[m] in the flat model
    sent: Tensor  # f32[m]


def make_packets(inputs: Inputs, count: int) -> list[Packets]:
    """The packet of this acc, and `count` - 1 of the same values in other columns."""
    run, rules = inputs.run, inputs.run.compression
    acc, packets = inputs.acc, []
    mixed, residual, nothing = acc.clone(), torch.empty_like(acc), torch.zeros_like(acc)
    for copy in islice(shuffled(acc), count):
        mixed[: len(copy)] = copy
        # With an empty residual and nothing local, error feedback leaves acc as it is.
        sections, taken = codec.compress(residual.zero_(), mixed, nothing, run.layout, 0.0, rules.k, rules.code_bits)
        sent = mixed[taken.positions] - residual[taken.positions]
        packets.append(Packets(sections, to_wire(run, sections), len(sent), taken.positions, sent))
    return packets


def to_wire(run: RunConfig, sections: Sequence[bytes]) -> bytes:
    """Sign a packet with these sections and put it into transport form."""
    return packet_to_wire(make_packet(run, OPERATOR, 1, ROOT, run.nominal_tokens, 1, sections), run)


def bound_bits(layout: Layout, k: int) -> float:
    """log2 of the number of ways to choose the kept positions, per kept value."""
    bits, values = 0.0, 0
    for tensor in layout.tensors:
        lengths = chunk_lengths(tensor.size).tolist()
        for length, count in zip(lengths, kept_per_chunk(tensor.size, k).tolist(), strict=True):
            bits += (lgamma(length + 1) - lgamma(count + 1) - lgamma(length - count + 1)) / log(2)
            values += count
    return bits / values


def gap_bytes(wire: bytes) -> int:
    """Bytes that the indices take in a packet's transport form (SPEC 6): the fourth plane of every frame."""
    total, offset = 0, PACKET_HEADER_BYTES
    while offset < len(wire):
        stored = struct.unpack_from("<5I", wire, offset + 8)
        total += stored[3]
        offset += 28 + sum(stored)
    return total


@dataclass(frozen=True)
class Sizes:
    """Bits per sent value and errors of the kept values, ours and the reference's."""

    bits_per_value: float
    index_bits: float
    bound: float
    rel_error: float
    reference_bits_per_value: float
    reference_rel_error: float
    reference_rel_error_per_tensor: float


def measure_sizes(inputs: Inputs, packet: Packets) -> Sizes:
    """Sizes of a real packet; the reference has one grid for the whole packet, or one per tensor."""
    run, k = inputs.run, inputs.run.compression.k
    acc = inputs.acc.numpy()
    left = acc.copy()
    left[packet.positions.numpy()] -= packet.sent.numpy()
    total = error = 0.0
    tensors: dict[int, list[np.ndarray]] = {}
    for index, positions, values in kept_rows(acc, run.layout, k):
        total += float(np.square(values, dtype=np.float64).sum())
        error += float(np.square(left[positions], dtype=np.float64).sum())
        tensors.setdefault(index, []).append(values.reshape(-1))
    grids = [np.concatenate(parts) for parts in tensors.values()]
    return Sizes(
        bits_per_value=8 * len(packet.wire) / packet.values,
        index_bits=8 * gap_bytes(packet.wire) / packet.values,
        bound=bound_bits(run.layout, k),
        rel_error=error / total,
        reference_bits_per_value=8 * reference_wire.packet_bytes(sum(map(len, grids)), 1) / sum(map(len, grids)),
        reference_rel_error=reference_wire.relative_error([np.concatenate(grids)]),
        reference_rel_error_per_tensor=reference_wire.relative_error(grids),
    )


def measure_encode(inputs: Inputs, turns: int, threads: int) -> dict[str, list[float]]:
    """Error feedback to canonical packet, against the floor, torch and the reference."""
    run, rules = inputs.run, inputs.run.compression
    residual, delta = inputs.residual.clone(), inputs.delta
    whole = len(residual) // CHUNK * CHUNK
    cut = slice(0, whole)
    scratch: list[list[bytes]] = []
    floor = Floor(in_torch=threads > 1)

    def ours() -> None:
        sections, _ = codec.compress(
            residual, inputs.outer, inputs.local, run.layout, rules.beta, rules.k, rules.code_bits
        )
        scratch[:] = [sections]
        make_packet(run, OPERATOR, 1, ROOT, run.nominal_tokens, 1, sections)

    def in_torch(batch: int) -> None:
        torch_codec.encode(residual[cut], inputs.outer[cut], inputs.local[cut], rules.beta, rules.k, batch)

    def reference() -> None:
        for start in range(0, whole, torch_codec.BATCH_VALUES):
            part = slice(start, min(start + torch_codec.BATCH_VALUES, whole))
            reference_wire.encode(residual[part].mul_(rules.beta).add_(delta[part]), rules.k)

    contestants: dict[str, Callable[[], object]] = {
        FLOOR: lambda: floor.three(residual, inputs.outer, inputs.local, rules.beta),
        AXPY: lambda: floor.two(residual, delta, rules.beta),
        **for_each_set(ENCODE, ours),
        "ours: packet to transport form": lambda: to_wire(run, scratch[0]),
        ENCODE_TORCH: lambda: in_torch(whole),
        ENCODE_TORCH_BATCHES: lambda: in_torch(torch_codec.BATCH_VALUES),
        ENCODE_REFERENCE: reference,
    }
    return take_turns(turns, contestants, lambda: residual.copy_(inputs.residual), threads)


def measure_merge(inputs: Inputs, packets: Sequence[Packets], turns: int, threads: int) -> dict[str, list[float]]:
    """Sixteen packets from the wire to the update's sections, against scatter_add_ on decoded ones."""
    run, rules = inputs.run, inputs.run.compression
    dense, senders = torch.empty(run.layout.size), torch.empty(run.layout.size)
    decoded = [(packet.positions, packet.sent) for packet in packets]

    def checked() -> None:
        for packet in packets:
            arrived = packet_from_wire(packet.wire, run)
            check_claims(arrived, run, round=1, base_root=ROOT)
            codec.check_sections(arrived.sections, run.layout, rules.k, rules.code_bits)

    update = merge(run, [packet.sections for packet in packets])
    outer = inputs.outer.clone()
    contestants: dict[str, Callable[[], object]] = {
        **for_each_set(MERGE, lambda: merge(run, [packet_from_wire(packet.wire, run).sections for packet in packets])),
        "ours: transport form to sections": lambda: [packet_from_wire(packet.wire, run) for packet in packets],
        "ours: sections to the update": lambda: merge(run, [packet.sections for packet in packets]),
        "ours: from the wire, all checks": checked,
        "ours: outer step": lambda: codec.outer_step(outer, run.layout, update),
        MERGE_TORCH: lambda: torch_codec.scatter_add_and_count(dense, senders, decoded),
        MERGE_TORCH_SUM: lambda: torch_codec.scatter_add(dense, decoded),
    }
    return take_turns(turns, contestants, lambda: None, threads)


def measure(inputs: Inputs, packets: Sequence[Packets], sizes: Sizes | None, turns: int, threads: int) -> None:
    """Print everything about one size and k."""
    values, rules = inputs.run.layout.size, inputs.run.compression
    print(
        f"\n{values:,} values in {len(inputs.run.layout.tensors)} tensors, k = {rules.k}, {rules.code_bits} bit codes"
    )
    if sizes is not None:
        show_sizes(sizes, len(packets[0].wire))
    encode = measure_encode(inputs, turns, threads)
    print("  encode")
    show(encode, values)
    for name in encode:
        if name.startswith(ENCODE):
            print(f"    {name}: {ratio(encode, name, FLOOR):.2f} floors", end=", ")
            print(f"{ratio(encode, name, AXPY):.2f} axpys over two arrays", end="; ")
            print(f"{ratio(encode, ENCODE_TORCH, name):.1f} x faster than torch", end=", ")
            print(f"{ratio(encode, ENCODE_TORCH_BATCHES, name):.1f} x than in batches", end=", ")
            print(f"{ratio(encode, ENCODE_REFERENCE, name):.1f} x than the reference wire")
    merged = measure_merge(inputs, packets, turns, threads)
    sent = sum(packet.values for packet in packets)
    print(f"  merge of {len(packets)} packets, {sent:,} sent values")
    show(merged, sent)
    for name in merged:
        if name.startswith(MERGE):
            print(f"    {name}: {ratio(merged, MERGE_TORCH, name):.2f} x faster than scatter_add_", end=", ")
            print(f"{ratio(merged, MERGE_TORCH_SUM, name):.2f} x than without the counts")


def show_sizes(sizes: Sizes, wire_bytes: int) -> None:
    """Bits and errors in words."""
    over = 100 * (sizes.index_bits / sizes.bound - 1)
    print(f"  packet: {wire_bytes:,} bytes, {sizes.bits_per_value:.3f} bits a sent value, everything included", end="")
    print(f" (reference {sizes.reference_bits_per_value:.3f})")
    print(f"  indices: {sizes.index_bits:.3f} bits, the bound is {sizes.bound:.3f} ({over:+.2f} %)")
    print(f"  relative squared error of the kept values: {sizes.rel_error:.5f}", end="; reference grid ")
    print(f"{sizes.reference_rel_error:.5f} (one a packet), {sizes.reference_rel_error_per_tensor:.5f} (one a tensor)")


def summary(inputs: Inputs, turns: int) -> dict[str, float]:
    """What `--json` prints."""
    packets = make_packets(inputs, PEERS)
    sizes = measure_sizes(inputs, packets[0])
    encode = measure_encode(inputs, turns, 1)
    merged = measure_merge(inputs, packets, turns, 1)
    return {
        "encode_x_floor": ratio(encode, ENCODE, FLOOR),
        "encode_vs_torch": ratio(encode, ENCODE_TORCH, ENCODE),
        "merge_vs_scatter_add": ratio(merged, MERGE_TORCH, MERGE),
        "bits_per_value": sizes.bits_per_value,
        "index_bits": sizes.index_bits,
        "rel_error": sizes.rel_error,
        "reference_rel_error": sizes.reference_rel_error,
        "reference_bits_per_value": sizes.reference_bits_per_value,
    }


def demo_packets(rounds: int, seed: int, cache: Path) -> None:
    """Sizes of the packets that the demo's peers send in these first rounds, with k = 64."""
    for code_bits in (2, 1):
        run = make_run(with_k(demo_settings(), 64, code_bits))
        data = open_data(run, cache)
        replicas = replicas_of(run, 4)
        print(
            f"\nthe demo's model, {run.layout.size:,} parameters, one of four replicas, k = 64, {code_bits} bit codes"
        )
        for round in range(1, rounds + 1):
            train_round(replicas, data, round, seed)
            acc = torch.from_numpy(acc_of(replicas[0]))
            inputs = Inputs(run, torch.zeros_like(acc), acc, torch.zeros_like(acc))
            (packet,) = make_packets(inputs, 1)
            print(f" round {round}")
            show_sizes(measure_sizes(inputs, packet), len(packet.wire))
            exchange(replicas)


def available_bytes() -> int | None:
    """Memory that is free for us, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16], choices=(16, 128), help="millions of values")
    parser.add_argument("--k", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="which windows the model is trained on")
    parser.add_argument("--demo-rounds", type=int, default=5, help="0 leaves the demo's packets out")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"), help="where the token shards are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.json else arguments.threads)
    inputs = real_inputs(64, arguments.seed, arguments.cache)
    if arguments.json:
        print(json.dumps(summary(inputs, arguments.turns)))
        return
    print(f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, {arguments.threads} threads")
    print(f"kernels: {codec.kernels_in_use(torch.device('cpu'))}")
    for millions in arguments.sizes:
        free = available_bytes()
        if free is not None and free < MEMORY_BYTES[millions]:
            print(f"\n{millions}M values are left out: {free >> 20} MiB free, {MEMORY_BYTES[millions] >> 20} needed")
            continue
        whole = inputs if millions == 16 else enlarged(inputs, millions)
        for k in arguments.k:
            sized = with_packets(whole, k, 2)
            packets = make_packets(sized, PEERS)
            sizes = measure_sizes(sized, packets[0]) if millions == 16 else None
            measure(sized, packets, sizes, arguments.turns, arguments.threads)
    if arguments.demo_rounds:
        demo_packets(arguments.demo_rounds, arguments.seed, arguments.cache)


if __name__ == "__main__":
    main()

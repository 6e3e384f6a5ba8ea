"""Which quantizer for the kept values? `errors` measures them on real pseudo-gradients, `loss` trains with them.

    python -m bench.quantizers errors --k 64 256 --rounds 1 5 10 20
    python -m bench.quantizers loss --k 64 --total 30 --steps 10 --seeds 0 1

`errors` trains the demo's model with our packets and prints the squared error of the kept values, relative to their own
squares, summed over the replicas. `loss` trains a smaller model once per quantizer: same data, same first weights.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import reference_wire
from bench.real_gradients import (
    acc_of,
    demo_settings,
    kept_rows,
    make_run,
    open_data,
    replicas_of,
    train_round,
    with_k,
)
from peer.core.replica import Replica
from peer.data.prepare import Dataset
from protocol.compress import compress
from protocol.layout import Layout
from protocol.run import RunConfig

Rows = NDArray[np.float64]  # f64[c, n]: magnitudes of c chunks that keep n values each
Sparse = tuple[NDArray[np.int64], NDArray[np.float32]]  # flat positions i64[m], what the receiver makes of them f32[m]
Quantizer = Callable[[NDArray[np.float32], Layout, int], Sparse]  # acc f32[N], its layout, k

EVAL_WINDOWS = 192
EVAL_BATCH = 16


def rounded(scales: Rows, bits: int) -> Rows:
    """Keep so many significant bits."""
    fraction, exponent = np.frexp(scales)
    kept: Rows = np.ldexp(np.round(fraction * 2.0**bits), exponent - bits)
    return kept


def two_means(rows: Rows, passes: int, scale_bits: int = 0, ratio_steps: int = 0) -> Rows:
    """Split each chunk at its mean, then `passes - 1` times half-way between the means of both parts.

    `scale_bits` rounds the high mean, and `ratio_steps` the ratio of the low one to it, where they are not 0.
    """
    threshold = rows.mean(axis=1, keepdims=True)
    for _ in range(passes):
        is_high = rows > threshold
        is_high |= ~is_high.any(axis=1, keepdims=True)
        high_count = is_high.sum(axis=1, keepdims=True)
        high_sum = (rows * is_high).sum(axis=1, keepdims=True)
        high = high_sum / high_count
        low_count = rows.shape[1] - high_count
        low = np.where(low_count > 0, (rows.sum(axis=1, keepdims=True) - high_sum) / np.maximum(low_count, 1), high)
        threshold = (high + low) / 2
    if scale_bits:
        high = rounded(high, scale_bits)
    if ratio_steps:
        steps = np.round((1 - low / np.where(high > 0, high, 1)) * ratio_steps)
        low = high * (1 - np.clip(steps, 0, ratio_steps - 1) / ratio_steps)
    if scale_bits or ratio_steps:
        is_high = rows > (high + low) / 2
    sent: Rows = np.where(is_high, high, low)
    return sent


def fixed_ratio(rows: Rows, ratio: float, scale_bits: int) -> Rows:
    """One scale a chunk; the low magnitude is always `ratio` of it."""
    high = rows.mean(axis=1, keepdims=True)
    for _ in range(3):
        is_high = rows > high * (1 + ratio) / 2
        weights = np.where(is_high, 1.0, ratio)
        high = (rows * weights).sum(axis=1, keepdims=True) / (weights**2).sum(axis=1, keepdims=True)
    high = rounded(high, scale_bits)
    sent: Rows = high * np.where(rows > high * (1 + ratio) / 2, 1.0, ratio)
    return sent


def of_maximum(rows: Rows, low: float, high: float) -> Rows:
    """Two fixed fractions of the largest magnitude."""
    largest = rows.max(axis=1, keepdims=True)
    sent: Rows = largest * np.where(rows > largest * (low + high) / 2, high, low)
    return sent


PER_CHUNK: dict[str, Callable[[Rows], Rows]] = {
    "2 bit, two means, exact, one pass": lambda rows: two_means(rows, 1),
    "2 bit, two means, exact, two passes": lambda rows: two_means(rows, 2),
    "2 bit, two means, exact, four passes": lambda rows: two_means(rows, 4),
    "2 bit, one pass, one-byte scale, ratio/64": lambda rows: two_means(rows, 1, 4, 64),
    "2 bit, two passes, one-byte scale, ratio/64": lambda rows: two_means(rows, 2, 4, 64),
    "2 bit, two passes, bfloat16 scale, ratio/64": lambda rows: two_means(rows, 2, 8, 64),
    "2 bit, fixed ratio 7/8, one-byte scale": lambda rows: fixed_ratio(rows, 7 / 8, 4),
    "2 bit, fixed ratio 7/8, bfloat16 scale": lambda rows: fixed_ratio(rows, 7 / 8, 8),
    "2 bit, 1/3 and 1 of the maximum": lambda rows: of_maximum(rows, 1 / 3, 1),
    "2 bit, 1/4 and 3/4 of the maximum": lambda rows: of_maximum(rows, 1 / 4, 3 / 4),
    "1 bit, mean, exact": lambda rows: np.broadcast_to(rows.mean(axis=1, keepdims=True), rows.shape),
    "1 bit, mean, bfloat16": lambda rows: np.broadcast_to(rounded(rows.mean(axis=1, keepdims=True), 8), rows.shape),
}


def relative_errors(acc: NDArray[np.float32], layout: Layout, k: int) -> dict[str, float]:  # acc: f32[N]
    """Relative squared error of the kept values, for every quantizer."""
    groups = list(kept_rows(acc, layout, k))
    total = sum(float((values.astype(np.float64) ** 2).sum()) for _, _, values in groups)
    found = {}
    for code_bits in (2, 1):
        positions, sent = ours(acc, layout, k, code_bits)
        left = acc.copy()
        left[positions] -= sent
        kept_error = sum(float((left[where].astype(np.float64) ** 2).sum()) for _, where, _ in groups)
        found[f"**{code_bits} bit, ours (SPEC 4)**"] = kept_error / total
    for name, quantize in PER_CHUNK.items():
        error = 0.0
        for _, _, values in groups:
            magnitudes = np.abs(values).astype(np.float64)
            error += float(((magnitudes - quantize(magnitudes)) ** 2).sum())
        found[name] = error / total
    found["2 bit, reference grid per tensor"] = reference_wire.relative_error(list(by_tensor(groups)))
    everything = np.concatenate([values.reshape(-1) for _, _, values in groups])
    found["2 bit, reference grid, one for the packet"] = reference_wire.relative_error([everything])
    return found


def by_tensor(
    groups: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float32]]],
) -> Iterator[NDArray[np.float32]]:  # -> f32[m] of each tensor
    """Join the groups of `kept_rows` that belong to one tensor."""
    for tensor in sorted({index for index, _, _ in groups}):
        yield np.concatenate([values.reshape(-1) for index, _, values in groups if index == tensor])


def ours(acc: NDArray[np.float32], layout: Layout, k: int, code_bits: int) -> Sparse:  # acc: f32[N]
    """What a packet of this protocol sends."""
    positions, values = [], []
    for tensor, offset in zip(layout.tensors, layout.offsets[:-1], strict=True):
        part = acc[offset : offset + tensor.size]
        sparse, residual = compress(part, k, code_bits)
        positions.append(sparse.indices + offset)
        # The residual is one rounded subtraction, so this is the sent value to a last bit.
        values.append(part[sparse.indices] - residual[sparse.indices])
    return np.concatenate(positions), np.concatenate(values)


def unquantized(acc: NDArray[np.float32], layout: Layout, k: int) -> Sparse:  # acc: f32[N]
    """The kept values as they are."""
    groups = list(kept_rows(acc, layout, k))
    positions = np.concatenate([where.reshape(-1) for _, where, _ in groups])
    return positions, acc[positions]


def reference(acc: NDArray[np.float32], layout: Layout, k: int) -> Sparse:  # acc: f32[N]
    """The reference's grid, one per tensor."""
    groups = list(kept_rows(acc, layout, k))
    grids = [reference_wire.quantize(torch.from_numpy(values)) for values in by_tensor(groups)]
    positions = np.concatenate([where.reshape(-1) for _, where, _ in groups])
    return positions, torch.cat([reference_wire.dequantize(codes, grid) for codes, grid in grids]).numpy()


def reference_packet(acc: NDArray[np.float32], layout: Layout, k: int) -> Sparse:  # acc: f32[N]
    """The reference's grid, one for the whole packet."""
    positions, values = unquantized(acc, layout, k)
    return positions, reference_wire.dequantize(*reference_wire.quantize(torch.from_numpy(values))).numpy()


TRAINED: dict[str, Quantizer] = {
    "float32 values": unquantized,
    "2 bit, ours": lambda acc, layout, k: ours(acc, layout, k, 2),
    "1 bit, ours": lambda acc, layout, k: ours(acc, layout, k, 1),
    "1 bit, ours, k * 9 / 8": lambda acc, layout, k: ours(acc, layout, k * 9 // 8, 1),
    "2 bit, reference grid per tensor": reference,
    "2 bit, reference grid, one for the packet": reference_packet,
}


def outer_round(replicas: Sequence[Replica], quantize: Quantizer, k: int) -> None:
    """Send, merge by `mean_of_senders` and apply, in floating point, for any quantizer."""
    run = replicas[0].run
    total = np.zeros(run.layout.size)
    senders = np.zeros(run.layout.size)
    for replica in replicas:
        acc = acc_of(replica)
        positions, values = quantize(acc, run.layout, k)
        total[positions] += values
        senders[positions] += 1
        acc[positions] -= values
        replica.residual.copy_(torch.from_numpy(acc))
    update = run.outer.alpha * total / np.maximum(senders, 1)
    outer = (replicas[0].outer_state() - update).astype(np.float32)
    for replica in replicas:
        replica.load_outer(outer)


def print_errors(arguments: argparse.Namespace) -> None:
    """Train the demo's model with k of each kind and print a table of errors."""
    for k in arguments.k:
        run = make_run(with_k(demo_settings(), k))
        data = open_data(run, arguments.cache)
        replicas = replicas_of(run, arguments.peers)
        columns: dict[int, dict[str, float]] = {}
        for round in range(1, max(arguments.rounds) + 1):
            train_round(replicas, data, round, arguments.seeds[0])
            if round in arguments.rounds:
                found = [relative_errors(acc_of(replica), run.layout, k) for replica in replicas]
                columns[round] = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
            outer_round(replicas, TRAINED["2 bit, ours"], k)
        print(f"\nk = {k}, {run.layout.size:,} parameters, {run.inner.steps} inner steps, seed {arguments.seeds[0]}\n")
        print("| relative squared error | " + " | ".join(f"round {round}" for round in columns) + " |")
        print("|---|" + "---|" * len(columns))
        for name in next(iter(columns.values())):
            print(f"| {name} | " + " | ".join(f"{column[name]:.5f}" for column in columns.values()) + " |", flush=True)


def loss_run(k: int, total: int, steps: int) -> RunConfig:
    """A smaller model than the demo's, so that many trainings are affordable; its matrices are whole chunks too."""
    settings = demo_settings()
    model = replace(
        settings.model,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    inner = replace(settings.inner, steps=steps)
    settings = replace(settings, model=model, inner=inner, outer=replace(settings.outer, rounds=total))
    return make_run(with_k(settings, k))


def final_loss(run: RunConfig, data: Dataset, peers: int, seed: int, quantize: Quantizer) -> float:
    """Validation loss in nats a token after the run."""
    replicas = replicas_of(run, peers)
    for round in range(1, run.outer.rounds + 1):
        train_round(replicas, data, round, seed)
        outer_round(replicas, quantize, run.compression.k)
    return replicas[0].evaluate(data.validation_batches(EVAL_WINDOWS, EVAL_BATCH))


def print_losses(arguments: argparse.Namespace) -> None:
    """Train once per quantizer and seed and print a table of validation losses."""
    for k in arguments.k:
        run = loss_run(k, arguments.total, arguments.steps)
        data = open_data(run, arguments.cache)
        print(
            f"\nk = {k}, {run.layout.size:,} parameters, {run.outer.rounds} rounds of {run.inner.steps} inner steps\n"
        )
        print("| validation loss | " + " | ".join(f"seed {seed}" for seed in arguments.seeds) + " |")
        print("|---|" + "---|" * len(arguments.seeds))
        for name, quantize in TRAINED.items():
            losses = [final_loss(run, data, arguments.peers, seed, quantize) for seed in arguments.seeds]
            print(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantizers", description=__doc__)
    parser.add_argument("what", choices=("errors", "loss"))
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5, 10, 20], help="when errors are measured")
    parser.add_argument("--total", type=int, default=30, help="rounds of each training of `loss`")
    parser.add_argument("--steps", type=int, default=10, help="inner steps of each round of `loss`")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="which windows the peers train on")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"), help="where the token shards are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.process_time()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, numpy {np.__version__}")
    {"errors": print_errors, "loss": print_losses}[arguments.what](arguments)
    print(f"\n{time.process_time() - began_s:.0f} s of one core")


if __name__ == "__main__":
    main()

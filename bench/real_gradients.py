"""Real pseudo-gradients: replicas of one run, trained in this process on the embedded corpus, round after round."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from peer.core import codec
from peer.core.model import layout_of
from peer.core.replica import Replica, initial_state
from peer.data.prepare import Dataset, prepare
from protocol.identity import PrivateKey
from protocol.layout import Layout, kept, state_root
from protocol.limits import CHUNK, CLIP_ONE, WEIGHT_UNIT
from protocol.run import ModelConfig, RunConfig, RunSettings, parse_settings

DEMO = Path(__file__).parents[1] / "peer" / "demo.toml"
OPERATOR = PrivateKey.from_bytes(bytes(range(32)))


def demo_settings() -> RunSettings:
    """The run that `sparseloco-peer demo` trains."""
    return parse_settings(DEMO.read_text("utf-8"))


def with_model(settings: RunSettings, model: ModelConfig) -> RunSettings:
    """The same run with another model."""
    return dataclasses.replace(settings, model=model)


def with_k(settings: RunSettings, k: int, code_bits: int = 2) -> RunSettings:
    """The same run with other packets."""
    return dataclasses.replace(
        settings, compression=dataclasses.replace(settings.compression, k=k, code_bits=code_bits)
    )


def make_run(settings: RunSettings) -> RunConfig:
    """Complete the settings as `run new` does, with a key that is not secret."""
    return RunConfig.of(
        settings,
        operator=OPERATOR.public,
        aggregators=(OPERATOR.public,),
        layout=layout_of(settings.model),
        genesis_root=state_root(initial_state(settings.model)),
    )


def peer_key(seed: int, index: int) -> bytes:
    """Stands for a peer's public key: it decides which windows the peer trains on."""
    return hashlib.sha256(f"bench peer {seed} {index}".encode("ascii")).digest()


def open_data(run: RunConfig, cache: Path) -> Dataset:
    """The run's corpus as token shards below `cache`."""
    return prepare(run.data, cache, {})


def replicas_of(run: RunConfig, count: int) -> list[Replica]:
    """Replicas at the start of the run, on the CPU in float32."""
    return [Replica(run, torch.device("cpu"), torch.float32) for _ in range(count)]


def train_round(replicas: Sequence[Replica], data: Dataset, round: int, seed: int) -> float:
    """Let every replica do its inner steps of a round; return the mean training loss."""
    losses = []
    for index, replica in enumerate(replicas):
        inner = replica.run.inner
        batches = data.training_batches(round, peer_key(seed, index), inner.steps, inner.batch_size)
        losses.append(replica.train_steps(round, batches, lambda: False, lambda _steps, _loss: None).mean_loss)
    return float(np.mean(losses))


def exchange(replicas: Sequence[Replica]) -> None:
    """Send, merge and apply the packets of a round as the swarm does."""
    packets = []
    for replica in replicas:
        packets.append(replica.make_contribution())
        replica.commit()
    update = merge(replicas[0].run, packets)
    for replica in replicas:
        replica.apply(update)


def merge(run: RunConfig, packets: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Merge packets of nominal weight that no clip touches."""
    rules, count = run.compression, len(packets)
    return codec.merge(
        packets,
        [WEIGHT_UNIT] * count,
        [CLIP_ONE] * count,
        run.layout,
        rules.k,
        rules.code_bits,
        run.outer.rule,
        run.outer.alpha_q16,
    )


def acc_of(replica: Replica) -> NDArray[np.float32]:  # f32[N]
    """What a packet is made from after the inner steps: beta * residual + (outer - local), two roundings."""
    acc: NDArray[np.float32] = (
        replica.residual.mul(replica.run.compression.beta).add_(replica.outer - replica.flat.values).numpy()
    )
    return acc


def kept_rows(
    acc: NDArray[np.float32], layout: Layout, k: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:  # acc: f32[N]
    """The k largest of 4096 of each chunk: index of the tensor, flat positions (i64[c, count]), values (f32[c, count]).

    Each tensor comes as its full chunks and then its short one. Ties go to the lowest index.
    """
    for index, (tensor, offset) in enumerate(zip(layout.tensors, layout.offsets[:-1], strict=True)):
        full = tensor.size // CHUNK * CHUNK
        for start, stop in ((0, full), (full, tensor.size)):
            if start == stop:
                continue
            rows = acc[offset + start : offset + stop].reshape(-1, min(CHUNK, stop - start))
            count = kept(rows.shape[1], k)
            columns = np.sort(np.argsort(-np.abs(rows), axis=1, kind="stable")[:, :count], axis=1)
            starts = offset + start + np.arange(len(rows)) * rows.shape[1]
            yield index, columns + starts[:, None], np.take_along_axis(rows, columns, axis=1)

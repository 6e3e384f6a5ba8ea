"""The methods: one object plays all peers of a training, a round at a time.

All share the model, its first parameters, the windows that each peer trains on, AdamW's betas, decay and clipping, and
the schedule of the learning rate over the steps of the run. They differ in what peers tell each other, and when.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.convergence.setup import Setup, run_of
from bench.convergence.weather import Fate
from bench.quantizers import TRAINED
from bench.real_gradients import OPERATOR, acc_of, peer_key, replicas_of
from peer.core import codec
from peer.core.inner import learning_rate
from peer.core.replica import Replica
from peer.data.prepare import Dataset
from protocol.arithmetic import weight_of
from protocol.limits import CLIP_ONE, WEIGHT_UNIT
from protocol.packet import make_packet
from protocol.run import RunConfig
from protocol.update import make_update
from protocol.wire import packet_to_wire, update_to_wire

FLOAT_BYTES = 4
FLOAT_QUANTIZERS = {"global grid": "2 bit, reference grid, one for the packet", "fp32": "float32 values"}


@dataclass(frozen=True)
class Cost:
    """What a round took: tokens trained and tokens accepted, bytes that all peers sent and bytes that one received."""

    trained: int
    accepted: int
    bytes_up: int
    bytes_down: int


class Method(Protocol):
    """One training of all peers."""

    run: RunConfig

    def round(self, round: int, fates: Sequence[Fate]) -> Cost:
        """Train a round, from 1, and exchange."""
        ...

    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The parameters that all peers share."""
        ...


class Windows:
    """The batches of every peer: as many sequences of every kind of text in each, or a kind for each peer."""

    def __init__(self, setup: Setup, run: RunConfig, corpora: Sequence[Dataset], seed: int) -> None:
        assert setup.domains or setup.batch % len(corpora) == 0, "a batch has as many sequences of every kind"
        self.setup, self.run, self.corpora, self.seed = setup, run, corpora, seed

    def of(self, peer: int, round: int, start: int, stop: int) -> Iterator[NDArray[np.int64]]:  # i64[B, T + 1] each
        """The batches from step `start` of the peer's round to before step `stop`."""
        corpora = [self.corpora[peer % len(self.corpora)]] if self.setup.domains else self.corpora
        key, steps, size = peer_key(self.seed, peer), self.run.inner.steps, self.run.inner.batch_size // len(corpora)
        each = [data.training_batches(round, key, steps, size) for data in corpora]
        return (np.concatenate(parts) for parts in islice(zip(*each, strict=True), start, stop))


class SparseLoCo:
    """Our production path: compress, commit or restore, merge, apply. Other quantizers go through float arithmetic."""

    def __init__(self, setup: Setup, windows: Windows) -> None:
        self.setup, self.windows, self.run = setup, windows, windows.run
        self.replicas = replicas_of(self.run, setup.peers)
        self._ahead = [0] * setup.peers

    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The outer parameters."""
        return self.replicas[0].outer_state()

    def round(self, round: int, fates: Sequence[Fate]) -> Cost:
        """Train, then send, merge and apply what is in time."""
        trained = sum(self._train(peer, round, fate) for peer, fate in enumerate(fates))
        if self.setup.quantizer in FLOAT_QUANTIZERS:
            return self._exchange_floats(trained)
        packets, weights, accepted, up = [], [], 0, 0
        tokens_a_step = self.setup.batch * self.setup.sequence
        for peer, fate in enumerate(fates):
            if not fate.steps:
                continue
            replica = self.replicas[peer]
            if not self.setup.error_feedback:
                replica.residual.zero_()
            sections = replica.make_contribution()
            if self.setup.ahead:
                self._train_ahead(peer, round)
            up += packet_bytes(self.run, round, sections)
            if fate.late:
                self._miss(replica)
                continue
            replica.commit()
            tokens = fate.steps * tokens_a_step
            accepted += tokens
            packets.append(sections)
            weights.append(weight_of(tokens, self.run.nominal_tokens))
        rules, outer = self.run.compression, self.run.outer
        update = codec.merge(
            packets,
            weights,
            [CLIP_ONE] * len(packets),
            self.run.layout,
            rules.k,
            rules.code_bits,
            outer.rule,
            outer.alpha_q16,
        )
        for replica in self.replicas:
            replica.apply(update)
        return Cost(trained, accepted, up, update_bytes(self.run, round, update))

    def _train(self, peer: int, round: int, fate: Fate) -> int:
        replica = self.replicas[peer]
        if fate.forgetful and fate.steps:
            replica.inner.first.zero_()
            replica.inner.second.zero_()
            replica.inner.load_state(replica.inner.state() | {"own_steps": torch.tensor(0)})
            if self.setup.weather.forgets_residual:
                replica.residual.zero_()
        done, self._ahead[peer] = self._ahead[peer], 0
        batches = self.windows.of(peer, round, done, fate.steps)
        trained = replica.train_steps(round, batches, lambda: False, lambda _steps, _loss: None, done)
        return trained.tokens + done * self.setup.batch * self.setup.sequence

    def _miss(self, replica: Replica) -> None:
        """A packet missed its round: what it took out of the residual returns, or a share of it."""
        returned, left = self.setup.weather.returned, replica.residual.clone()
        replica.restore()
        if returned < 1:
            replica.residual.mul_(returned).add_(left, alpha=1 - returned)

    def _train_ahead(self, peer: int, round: int) -> None:
        """Do the first steps of the next round before this one's update is there."""
        replica, steps = self.replicas[peer], self.setup.ahead
        replica.begin_ahead()
        batches = self.windows.of(peer, round + 1, 0, steps)
        replica.train_steps(round + 1, batches, lambda: False, lambda _steps, _loss: None)
        self._ahead[peer] = steps

    def _exchange_floats(self, trained: int) -> Cost:
        """The same round with a quantizer that the protocol does not have. It has no packets and so no bytes."""
        assert self.setup.weather.calm and not self.setup.ahead and self.setup.error_feedback
        quantize, layout = TRAINED[FLOAT_QUANTIZERS[self.setup.quantizer]], self.run.layout
        total, senders = np.zeros(layout.size), np.zeros(layout.size)
        for replica in self.replicas:
            acc = acc_of(replica)
            positions, values = quantize(acc, layout, self.run.compression.k)
            total[positions] += values
            senders[positions] += 1
            acc[positions] -= values
            replica.residual.copy_(torch.from_numpy(acc))
        by = np.maximum(senders, 1) if self.run.outer.rule == "mean_of_senders" else len(self.replicas)
        outer = (self.state() - self.run.outer.alpha * total / by).astype(np.float32)
        for replica in self.replicas:
            replica.load_outer(outer)
        return Cost(trained, trained, 0, 0)


class DiLoCo:
    """Nesterov momentum over the mean of dense float32 pseudo-gradients (Douillard et al., arXiv 2311.08105)."""

    def __init__(self, setup: Setup, windows: Windows) -> None:
        self.setup, self.windows, self.run = setup, windows, windows.run
        self.replicas = replicas_of(self.run, setup.peers)
        self.velocity = torch.zeros(self.run.layout.size)  # f32[N]

    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The outer parameters."""
        return self.replicas[0].outer_state()

    def round(self, round: int, fates: Sequence[Fate]) -> Cost:
        """Train, then take the outer step."""
        assert self.setup.weather.calm
        trained = 0
        mean = torch.zeros_like(self.velocity)
        for peer, replica in enumerate(self.replicas):
            batches = self.windows.of(peer, round, 0, self.run.inner.steps)
            trained += replica.train_steps(round, batches, lambda: False, lambda _steps, _loss: None).tokens
            mean += (replica.outer - replica.flat.values) / len(self.replicas)
        momentum = self.setup.momentum
        self.velocity.mul_(momentum).add_(mean)
        outer = self.replicas[0].outer - self.setup.outer_rate * (mean + momentum * self.velocity)
        for replica in self.replicas:
            replica.load_outer(outer.numpy())
        dense = FLOAT_BYTES * self.run.layout.size
        return Cost(trained, trained, dense * len(self.replicas), dense)


class DataParallel:
    """AdamW on the mean of all peers' gradients, at every step: the quality that others are measured by.

    One batch of all peers' sequences goes through the model a peer at a time, so the gradient is the mean of theirs.
    It is clipped at norm 1 as a whole, as data-parallel training does.
    """

    def __init__(self, setup: Setup, windows: Windows) -> None:
        self.setup, self.windows, self.run = setup, windows, windows.run
        (self.replica,) = replicas_of(self.run, 1)

    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The parameters after the last step."""
        local: NDArray[np.float32] = self.replica.flat.values.numpy()
        return local

    def round(self, round: int, fates: Sequence[Fate]) -> Cost:
        """Take as many steps as a peer of the others."""
        assert self.setup.weather.calm
        peers, steps, trained = self.setup.peers, self.run.inner.steps, 0
        each = [self.windows.of(peer, round, 0, steps) for peer in range(peers)]
        for number, batches in enumerate(zip(*each, strict=True)):
            tokens = torch.from_numpy(np.concatenate(batches))
            self._step(tokens, (round - 1) * steps + number)
            trained += tokens.shape[0] * (tokens.shape[1] - 1)
        return Cost(trained, trained, *self._bytes(steps))

    def _step(self, tokens: Tensor, step: int) -> None:  # i64[R * B, T + 1]
        self.replica.inner.step(tokens, step, self.setup.batch)

    def _bytes(self, steps: int) -> tuple[int, int]:
        dense = FLOAT_BYTES * self.run.layout.size * steps
        return dense * self.setup.peers, dense


class DeMo:
    """Decoupled momentum after DeMo (Peng et al., arXiv 2411.19870), every step, without its cosine transform.

    Each peer keeps a momentum m = momentum * m + gradient, sends the k largest of each chunk of 4096 of it (in our
    codes of 2 bits) and subtracts from m what it sent. Every peer then moves each parameter that anybody sent by the
    learning rate against the sign of the sum; weight decay is decoupled, and on matrices alone. Gradients are clipped
    peer by peer at norm 1, and the momentum is not: that is what the peers of DeMo know.
    """

    def __init__(self, setup: Setup, windows: Windows) -> None:
        self.setup, self.windows, self.run = setup, windows, windows.run
        (self.replica,) = replicas_of(self.run, 1)
        size = self.run.layout.size
        self.momenta = [torch.zeros(size) for _ in range(setup.peers)]  # f32[N] each
        self._zeros = torch.zeros(size)
        self._decays = torch.cat(
            [torch.full((tensor.size,), float(len(tensor.shape) > 1)) for tensor in self.run.layout.tensors]
        )

    def state(self) -> NDArray[np.float32]:  # f32[N]
        """The parameters after the last step."""
        local: NDArray[np.float32] = self.replica.flat.values.numpy()
        return local

    def round(self, round: int, fates: Sequence[Fate]) -> Cost:
        """Take as many steps as a peer of the others."""
        assert self.setup.weather.calm
        steps = self.run.inner.steps
        costs = []
        each = [self.windows.of(peer, round, 0, steps) for peer in range(self.setup.peers)]
        for number, batches in enumerate(zip(*each, strict=True)):
            costs.append(self._step(batches, (round - 1) * steps + number))
        trained = sum(cost.trained for cost in costs)
        return Cost(trained, trained, sum(cost.bytes_up for cost in costs), sum(cost.bytes_down for cost in costs))

    def _step(self, batches: Sequence[NDArray[np.int64]], step: int) -> Cost:
        inner, rules, layout = self.replica.inner, self.run.compression, self.run.layout
        packets = []
        for batch, momentum in zip(batches, self.momenta, strict=True):
            inner.backward(torch.from_numpy(batch), 0, torch.float32)
            gradients = self.replica.flat.gradients
            norm = torch.linalg.vector_norm(gradients)
            gradients.mul_((self.run.inner.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
            sections, _ = codec.compress(
                momentum, gradients, self._zeros, layout, self.setup.momentum, rules.k, rules.code_bits
            )
            packets.append(sections)
        weights, clips = [WEIGHT_UNIT] * len(packets), [CLIP_ONE] * len(packets)
        update = codec.merge(packets, weights, clips, layout, rules.k, rules.code_bits, "mean", 1 << 16)
        moved = torch.zeros_like(self._zeros)
        codec.outer_step(moved, layout, update)
        rate = learning_rate(self.run.inner, step, step, self.run.inner.steps * self.run.outer.rounds)
        values = self.replica.flat.values
        values.mul_(1 - rate * self.run.inner.weight_decay * self._decays).add_(moved.sign(), alpha=rate)
        up = sum(packet_bytes(self.run, 1, sections) for sections in packets)
        trained = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
        return Cost(trained, trained, up, update_bytes(self.run, 1, update))


def packet_bytes(run: RunConfig, round: int, sections: Sequence[bytes]) -> int:
    """Bytes of the packet in transport form, header and signature included."""
    root, tokens, steps = run.genesis_root, run.nominal_tokens, run.inner.steps
    return len(packet_to_wire(make_packet(run, OPERATOR, round, root, tokens, steps, list(sections)), run))


def update_bytes(run: RunConfig, round: int, update: list[bytes]) -> int:
    """Bytes of the update in transport form."""
    return len(update_to_wire(make_update(run, round, run.genesis_root, run.genesis_root, update), run))


def method_of(setup: Setup, corpora: Sequence[Dataset], seed: int) -> Method:
    """Start a training."""
    kinds: dict[str, type[SparseLoCo] | type[DiLoCo] | type[DataParallel] | type[DeMo]] = {
        "sparseloco": SparseLoCo,
        "diloco": DiLoCo,
        "adamw": DataParallel,
        "demo": DeMo,
    }
    return kinds[setup.method](setup, Windows(setup, run_of(setup), corpora, seed))


def replica_for_evaluation(run: RunConfig) -> Replica:
    """A replica that only evaluates parameters."""
    (replica,) = replicas_of(run, 1)
    return replica

"""What simulated peers train: a noisy quadratic, in place of a language model. All else is the production replica."""

import random
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peer.core.flat import Flat
from peer.core.inner import InnerOptimizer
from peer.core.model import Llama
from peer.core.replica import Replica
from peer.sim.settings import genesis_state
from protocol.layout import Layout
from protocol.limits import CHUNK
from protocol.run import RunConfig

_PACE_MAX = 0.6  # share of the way to the optimum that a round's inner steps go, at most
_NOISE = 0.3  # standard deviation of what they miss it by, as a share of their way and of the optimum
_SPREAD = 0.05  # standard deviation of the optimum
_POOL = 1 << 16


class Problem:
    """A quadratic whose optimum all peers look for, each through noise of its own."""

    def __init__(self, size: int, seed: int, k: int, steps: int) -> None:
        draw = np.random.default_rng(seed)
        # A coordinate is sent once in 4096 / k rounds or so; with a faster descent what has piled up would overshoot.
        self.pace = 1 - (1 - min(_PACE_MAX, 4 * k / CHUNK)) ** (1 / steps)
        self.optimum: NDArray[np.float32] = (_SPREAD * draw.standard_normal(size)).astype(np.float32)  # f32[N]
        # Drawing anew for each step would take longer than everything else; a window of one long draw will do.
        self._noise = draw.standard_normal(_POOL + size).astype(np.float32)

    def loss(self, state: NDArray[np.float32]) -> float:  # f32[N]
        """Mean squared distance from the optimum, 1 at the start."""
        return float(np.mean((state - self.optimum) ** 2) / np.mean(self.optimum**2))

    def noise(self, chance: random.Random) -> NDArray[np.float32]:  # -> f32[N]
        """Fresh noise."""
        start = chance.randrange(_POOL)
        return self._noise[start : start + self.optimum.size]


class _Numbers(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        for tensor in layout.tensors:
            self.register_parameter(tensor.name, nn.Parameter(torch.empty(tensor.shape, device="meta")))


class _NoMoments:
    """In place of AdamW, for a descent that keeps nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take up."""


class PlainReplica(Replica):
    """The production replica, from error feedback to the outer step, around plain numbers."""

    def __init__(self, run: RunConfig, problem: Problem, chance: random.Random) -> None:
        # The constructor of Replica builds a language model, so here is what else it does.
        self.run, self.device, self.dtype, self.micro_batch = run, torch.device("cpu"), torch.float32, 0
        self.model = cast(Llama, _Numbers(run.layout))
        self.flat = Flat(self.model, run.layout, self.device)
        self.inner = cast(InnerOptimizer, _NoMoments())
        self.outer = torch.zeros(run.layout.size)
        self.residual = torch.zeros(run.layout.size)
        self._sent = None
        self._taken = False
        self._start, self._ahead = None, False
        self._problem, self._chance = problem, chance
        self.load_outer(genesis_state(run.layout))

    def descend(self, steps: int) -> None:
        """Do so many inner steps from where the local parameters are."""
        local = self.flat.values.numpy()
        way = np.float32(1 - (1 - self._problem.pace) ** steps)
        noise = np.float32(_NOISE * _SPREAD) * way * self._problem.noise(self._chance)
        local -= way * (local - self._problem.optimum) - noise

    def diverge(self) -> None:
        """Let training end in NaN."""
        self.flat.values[7] = float("nan")

    def flip_bit(self) -> None:
        """Damage the outer parameters, as bad memory does."""
        self.outer.numpy().view(np.uint32)[11] ^= 1 << 20

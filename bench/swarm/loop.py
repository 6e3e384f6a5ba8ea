"""One peer of another system, a process of its own inside its namespace: the loop that all of them share.

It trains this client's model with this client's inner optimizer on the windows that the plan names; everything that
travels is the other system's. It says on standard output where others find it, begins at a line on standard input, and
leaves its parameters after each round in a file.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.optim import Optimizer

from bench.swarm.meter import Pacer
from bench.swarm.plan import Plan
from peer.core.inner import learning_rate
from peer.solo import Bench
from protocol.run import RunConfig


class Clocked:
    """Times an optimizer's own step, wherever the other system makes it. To be made before that adds hooks."""

    def __init__(self, adam: Optimizer) -> None:
        self._began = (0.0, 0.0)
        self.took = (0.0, 0.0)
        """Seconds and processor seconds of the last step."""
        adam.register_step_pre_hook(self._before)
        adam.register_step_post_hook(self._after)

    def _before(self, *_: object) -> None:
        self._began = (time.monotonic(), time.thread_time())

    def _after(self, *_: object) -> None:
        self.took = (time.monotonic() - self._began[0], time.thread_time() - self._began[1])


class Loop:
    """The training loop; `settle` is what the other system does after a gradient, its whole communication included."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, RunConfig.from_json(plan.run.encode("ascii"))
        self.bench = Bench(self.run, Path(plan.data), threads=1)
        self.inner = self.bench.replica.inner
        self.adam: Optimizer = self.inner._adam  # the very optimizer that this client has
        self.clocked: Clocked | None = None

    def places(self) -> list[str]:
        """Where the others find the swarm."""
        raise NotImplementedError

    def settle(self) -> None:
        """Take the gradient that there is."""
        raise NotImplementedError

    def averagings(self) -> int:
        """How often the peers have averaged."""
        raise NotImplementedError

    def _batches(self) -> Iterator[Tensor]:
        inner, key = self.run.inner, bytes.fromhex(self.plan.key)
        for round in itertools.count(1):
            for batch in self.bench.data.training_batches(round, key, inner.steps, inner.batch_size):
                yield torch.from_numpy(batch)

    def _gradient(self, batch: Tensor) -> float:
        """This client's inner step without its last line, the optimizer's."""
        flat = self.inner.flat
        loss = float(self.inner.backward(batch, 0, torch.float32))
        norm = torch.linalg.vector_norm(flat.gradients)
        assert math.isfinite(loss), "training diverged"
        assert math.isfinite(float(norm)), "training diverged"
        flat.gradients.mul_((self.run.inner.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return loss

    def _optimizer_step_took(self) -> tuple[float, float]:
        """That of the step before, as the one of now comes later."""
        return self.clocked.took if self.clocked is not None else (0.0, 0.0)

    def train(self) -> None:
        """Do all inner steps, write down the parameters after each round, and go on until killed.

        Who stopped would keep the others waiting in a last averaging that it does not come to.
        """
        pacer = Pacer(Path(self.plan.steps_path), self.plan.step_s)
        per_round, total_steps = self.run.inner.steps, self.run.inner.steps * self.run.outer.rounds
        states, times = [], []
        for step, batch in enumerate(self._batches()):

            def work(batch: Tensor = batch) -> float:
                return self._gradient(batch)

            pacer.step(work, self._optimizer_step_took)
            for group in self.adam.param_groups:
                group["lr"] = learning_rate(self.run.inner, step, step, total_steps)
            self.settle()
            if (step + 1) % per_round == 0:
                states.append(self.inner.flat.values.numpy().copy())
                times.append(time.monotonic())
            if step + 1 == total_steps:
                save_file({"states": np.stack(states), "times": np.array(times)}, self.plan.states_path)
                print(json.dumps(self.averagings()), flush=True)


def main(make: Callable[[Plan], Loop]) -> None:
    """Start, say where, wait for the word, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    loop = make(Plan.load(parser.parse_args().plan))
    print(json.dumps(loop.places()), flush=True)
    sys.stdin.readline()
    loop.train()

"""One hivemind peer, a process of its own: `python -m bench.swarm.hivemind_peer PLAN.json`, inside its namespace.

It trains this client's model with this client's inner optimizer on the windows that the plan names; everything that
travels is hivemind's. It says on standard output where it listens, begins at a line on standard input, and leaves its
parameters after each round in a file.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hivemind
import numpy as np
import torch
from hivemind.compression import Float16Compression
from torch import Tensor
from torch.optim import AdamW, Optimizer

from bench.swarm.meter import Pacer
from bench.swarm.plan import LOCAL, Plan
from peer.core.inner import learning_rate
from peer.solo import Bench
from protocol.run import RunConfig

TIMEOUT_S = 120.0


class _Clocked:
    """Times an optimizer's own step, which hivemind makes in a thread of its own."""

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


class Training:
    """The loop around hivemind's optimizer."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, RunConfig.from_json(plan.run.encode("ascii"))
        self.bench = Bench(self.run, Path(plan.data), threads=1)
        self.inner = self.bench.replica.inner
        self.dht: Any = hivemind.DHT(
            initial_peers=plan.first,
            host_maddrs=[f"/ip4/{plan.address}/tcp/0"],
            start=True,
            use_relay=False,
            use_auto_relay=False,
            auto_nat=False,
            nat_port_map=False,
        )
        self.optimizer: Any = self._local() if plan.mode == LOCAL else self._delayed()

    def _common(self) -> dict[str, Any]:
        inner, peers = self.run.inner, self.plan.peers
        return {
            "dht": self.dht,
            "run_id": "swarm",
            "batch_size_per_step": inner.batch_size,
            "target_batch_size": inner.batch_size * inner.steps * peers,
            "matchmaking_time": self.plan.matchmaking_s,
            "averaging_timeout": TIMEOUT_S,
            # Not its default, the matchmaking time, which a slow link would break.
            "next_chunk_timeout": TIMEOUT_S,
            "state_averaging_compression": Float16Compression(),
            # A group that is complete begins at once, and the end of a round is seen soon.
            "averager_opts": {"target_group_size": peers, "request_timeout": min(1.0, self.plan.matchmaking_s / 2)},
            "tracker_opts": {"min_refresh_period": 0.2, "default_refresh_period": 0.5},
            "verbose": True,
        }

    def _local(self) -> object:
        """Parameters averaged every round, its nearest mode; the averaging is delayed as far as it allows."""
        self.adam: Optimizer = self.inner._adam
        self._clocked = _Clocked(self.adam)
        return hivemind.Optimizer(
            optimizer=self.adam, use_local_updates=True, delay_state_averaging=True, **self._common()
        )

    def _delayed(self) -> object:
        """Gradients of a whole round averaged while the next is computed, its mode that hides the network."""
        inner = self.run.inner

        def make(groups: Any) -> Optimizer:
            betas = (inner.adam_beta1, inner.adam_beta2)
            self.adam = AdamW(groups, lr=inner.learning_rate, betas=betas, eps=inner.adam_eps, fused=True)
            return self.adam

        return hivemind.Optimizer(
            params=[dict(group) for group in self.inner._adam.param_groups],
            optimizer=make,
            delay_optimizer_step=True,
            delay_grad_averaging=True,
            offload_optimizer=True,
            average_state_every=5,
            grad_compression=Float16Compression(),
            **self._common(),
        )

    def _batches(self) -> Iterator[Tensor]:
        for round in range(1, self.run.outer.rounds + 1):
            inner, key = self.run.inner, bytes.fromhex(self.plan.key)
            for batch in self.bench.data.training_batches(round, key, inner.steps, inner.batch_size):
                yield torch.from_numpy(batch)

    def _gradient(self, batch: Tensor) -> float:
        """The other side's inner step without its last line, the optimizer's."""
        flat = self.inner.flat
        loss = float(self.inner.backward(batch, 0, torch.float32))
        norm = torch.linalg.vector_norm(flat.gradients)
        assert math.isfinite(loss) and math.isfinite(float(norm)), "training diverged"
        flat.gradients.mul_((self.run.inner.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return loss

    def train(self) -> None:
        """Do all inner steps and write down the parameters after each round."""
        pacer = Pacer(Path(self.plan.steps_path), self.plan.step_s)
        per_round, total_steps = self.run.inner.steps, self.run.inner.steps * self.run.outer.rounds
        local = self.plan.mode == LOCAL
        states, times = [], []
        for step, batch in enumerate(self._batches()):

            def work(batch: Tensor = batch) -> float:
                return self._gradient(batch)

            # The optimizer's own step comes later; that of the step before tells how long it takes.
            pacer.step(work, lambda: self._clocked.took if local else (0.0, 0.0))
            for group in self.adam.param_groups:
                group["lr"] = learning_rate(self.run.inner, step, step, total_steps)
            self.optimizer.step()
            if (step + 1) % per_round == 0:
                states.append(self.inner.flat.values.numpy().copy())
                times.append(time.monotonic())
        self.optimizer.state_averager.step(wait_for_delayed_updates=True)
        np.savez(self.plan.states_path, states=np.stack(states), times=np.array(times))


def main() -> None:
    """Start, say where, wait for the word, train, and stay until killed so that the others can finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    logging.getLogger("hivemind").setLevel(logging.INFO)
    training = Training(Plan.load(parser.parse_args().plan))
    print(json.dumps([str(address) for address in training.dht.get_visible_maddrs()]), flush=True)
    sys.stdin.readline()
    training.train()
    print("finished", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()

"""One peer of hivemind's Optimizer, by its two nearest modes."""

import logging
from typing import Any

import hivemind
from hivemind.compression import Float16Compression
from torch.optim import AdamW, Optimizer

from bench.swarm.loop import Clocked, Loop, main
from bench.swarm.plan import HIVEMIND_LOCAL, TIMEOUT_S, Plan


class HivemindLoop(Loop):
    """hivemind.Optimizer around the inner optimizer."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.averaged = _Count()
        logging.getLogger("hivemind").addHandler(self.averaged)
        self.dht: Any = hivemind.DHT(
            initial_peers=plan.first,
            host_maddrs=[f"/ip4/{plan.address}/tcp/0"],
            start=True,
            use_relay=False,
            use_auto_relay=False,
            auto_nat=False,
            nat_port_map=False,
        )
        self.optimizer: Any = self._local() if plan.side == HIVEMIND_LOCAL else self._delayed()

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
        self.clocked = Clocked(self.adam)
        return hivemind.Optimizer(
            optimizer=self.adam, use_local_updates=True, delay_state_averaging=True, **self._common()
        )

    def _delayed(self) -> object:
        """Gradients of a whole round averaged while the next is computed, its mode that hides the network."""
        inner, groups = self.run.inner, [dict(group) for group in self.adam.param_groups]

        def make(groups: Any) -> Optimizer:
            betas = (inner.adam_beta1, inner.adam_beta2)
            self.adam = AdamW(groups, lr=inner.learning_rate, betas=betas, eps=inner.adam_eps, fused=True)
            return self.adam

        return hivemind.Optimizer(
            params=groups,
            optimizer=make,
            delay_optimizer_step=True,
            delay_grad_averaging=True,
            offload_optimizer=True,
            average_state_every=5,
            grad_compression=Float16Compression(),
            **self._common(),
        )

    def places(self) -> list[str]:
        """Where its DHT or lighthouse listens."""
        return [str(place) for place in self.dht.get_visible_maddrs() if self.plan.address in str(place)]

    def settle(self) -> None:
        """Its step."""
        self.optimizer.step()

    def averagings(self) -> int:
        """How often it said so."""
        return self.averaged.count


class _Count(logging.Handler):
    """Counts the averagings that hivemind tells of: its step returns the same whether one has failed."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Averaged ")


if __name__ == "__main__":
    main(HivemindLoop)

"""One peer of torchft's DiLoCo, on the CPU over Gloo. Its package is not among our dependencies."""

from datetime import timedelta
from importlib import import_module
from typing import Any

import torch

from bench.swarm.loop import Clocked, Loop, main
from bench.swarm.plan import TIMEOUT_S, TORCHFT_STREAMING, Plan

PORT = 29_510


class TorchftLoop(Loop):
    """DiLoCo with its outer Nesterov step (0.7, 0.9); the first peer is also the lighthouse."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        torchft: Any = import_module("torchft")
        timeout = timedelta(seconds=TIMEOUT_S)
        if not plan.first:
            lighthouse = import_module("torchft.coordination").LighthouseServer
            self.lighthouse = lighthouse(bind=f"{plan.address}:{PORT}", min_replicas=plan.peers, join_timeout_ms=100)
        self.store = import_module("torch.distributed").TCPStore(
            plan.address, 0, is_master=True, wait_for_workers=False
        )
        self.manager: Any = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timeout),
            min_replica_size=plan.peers,
            use_async_quorum=False,
            # All start from the same parameters.
            init_sync=False,
            load_state_dict=self.bench.replica.model.load_state_dict,
            state_dict=self.bench.replica.model.state_dict,
            replica_id=plan.key[:8],
            store_addr=plan.address,
            store_port=self.store.port,
            rank=0,
            world_size=1,
            lighthouse_addr=self.places()[0],
            hostname=plan.address,
            timeout=timeout,
            quorum_timeout=timeout,
        )
        self.clocked = Clocked(self.adam)
        streaming = plan.side == TORCHFT_STREAMING
        outer = torch.optim.SGD(self.bench.replica.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        self.diloco: Any = import_module("torchft.local_sgd").DiLoCo(
            self.manager,
            [self.bench.replica.model],
            self.adam,
            outer,
            sync_every=self.run.inner.steps,
            backup_device=torch.device("cpu"),
            pin_memory=False,
            # One all-reduce instead of one for each tensor: fewer round trips.
            use_bucketization=True,
            # Streaming: the second half of the steps goes on meanwhile, and half of their way is kept.
            fragment_sync_delay=self.run.inner.steps // 2 if streaming else 0,
            fragment_update_alpha=0.5 if streaming else 0.0,
        )
        self.diloco.__enter__()

    def places(self) -> list[str]:
        """Where its DHT or lighthouse listens."""
        return self.plan.first or [f"http://{self.plan.address}:{PORT}"]

    def settle(self) -> None:
        """Its step."""
        self.adam.step()
        # After an outer step it leaves no gradients where they were.
        flat = self.inner.flat
        for parameter, view in zip(flat.parameters.values(), flat.views(flat.gradients), strict=True):
            parameter.grad = view

    def averagings(self) -> int:
        """How often it said so."""
        return int(self.manager.current_step())


if __name__ == "__main__":
    main(TorchftLoop)

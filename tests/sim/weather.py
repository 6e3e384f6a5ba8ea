"""Two hundred seeds in bad weather, in two files so that two processes share them."""

from peer.sim.settings import drawn
from peer.sim.swarm import simulate

BLOCK = 10


def live_through(first: int) -> None:
    """Simulate a block of seeds; each must learn, and no checker may fire."""
    for seed in range(first, first + BLOCK):
        outcome = simulate(drawn(seed))
        assert outcome.losses[-1] < outcome.losses[0], f"seed {seed} does not learn"

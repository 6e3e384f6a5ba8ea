"""What a run needs: bytes on the links, memory and disk, by the size of the model and the number of peers.

Computed, not measured: packets at the entropy of their positions plus codes and scales, updates by how positions of
several packets coincide (`peer.sim.settings.Sizes` says how near both are), memory and disk by what the programs hold.

    python -m bench.capacity
"""

from collections.abc import Iterator
from pathlib import Path

from peer.core.model import layout_of
from peer.sim.settings import Sizes
from protocol.run import RunSettings, parse_settings

RUNS = Path(__file__).parents[1] / "deploy" / "runs"
NAMES = ("tiny", "150m", "1b", "8b")
PEERS = (8, 20, 64)

# Parameters, gradients, two moments, outer parameters and residual, float32 each; with overlap the start of the steps.
REPLICA_BYTES, OVERLAP_BYTES = 24, 4
# Residual, two moments and outer parameters; twice while the file is replaced, and once more for what was fetched.
PEER_DISK_BYTES = 2 * 16 + 4
# Two states, and the next one while it is made.
AGGREGATOR_BYTES = 3 * 4
# Genesis, three snapshots and the one that is written.
SNAPSHOT_BYTES = 5 * 4
BLOB_BYTES = 8 << 30
PROGRAM_BYTES = 500_000_000


def settings_of(name: str) -> RunSettings:
    """One of the runs in deploy/runs."""
    return parse_settings((RUNS / f"{name}.toml").read_text("utf-8"))


def table() -> Iterator[str]:
    """The table of deploy/README.md, in Markdown, one line at a time."""
    yield (
        "| run | parameters | packet | "
        + " | ".join(f"down, R = {peers}" for peers in PEERS)
        + " | peer: memory | peer: disk | aggregator: memory, R = 20 | aggregator: disk |"
    )
    yield "|---" * (7 + len(PEERS)) + "|"
    for name in NAMES:
        settings = settings_of(name)
        size = layout_of(settings.model).size
        sizes = Sizes(size, settings.compression.k)
        packet = sizes.packet(b"")
        down = [min(sizes.update(b"", peers), sizes.bundle([b""] * peers)) for peers in PEERS]
        replica = size * (REPLICA_BYTES + OVERLAP_BYTES * settings.inner.overlap)
        # Packets as they came and as they are merged, and the update in both forms.
        merge = 2 * (20 * packet + sizes.update(b"", 20))
        cells = [f"{size / 1e6:,.1f} M", *(bytes_of(each) for each in (packet, *down)), bytes_of(replica)]
        cells += [bytes_of(size * PEER_DISK_BYTES), bytes_of(PROGRAM_BYTES + size * AGGREGATOR_BYTES + merge)]
        yield f"| {name} | " + " | ".join([*cells, bytes_of(BLOB_BYTES + size * SNAPSHOT_BYTES)]) + " |"


def bytes_of(count: float) -> str:
    """A number of bytes as people write it, to two or three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


if __name__ == "__main__":
    print("\n".join(table()))

"""What one peer of another system is told by the process that starts it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

TIMEOUT_S = 120.0
HIVEMIND_LOCAL, HIVEMIND_DELAYED = "hivemind", "hivemind-delayed"
TORCHFT, TORCHFT_STREAMING = "torchft", "torchft-streaming"


@dataclass(frozen=True)
class Plan:
    """What one peer is to do."""

    run: str
    """The run's canonical JSON."""
    key: str
    """Public key (hex) of the peer of the other side whose windows of the text it takes."""
    data: str
    address: str
    first: list[str]
    """Where the first peer listens; empty for the first."""
    peers: int
    side: str
    """One of the names above."""
    step_s: float
    matchmaking_s: float
    steps_path: str
    states_path: str

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))

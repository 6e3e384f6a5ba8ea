"""What a peer has done since it was started."""

import time
from dataclasses import dataclass


@dataclass
class Totals:
    """Counts of one life of a peer.

    `began_s` is when it first trained, `loss` that of its last round in nats a token, `learning_rate` its last step's.
    """

    rounds: int = 0
    accepted: int = 0
    tokens: int = 0
    steps_ahead: int = 0
    bytes_up: int = 0
    sent_values: int = 0
    inner_s: float = 0.0
    began_s: float | None = None
    loss: float | None = None
    learning_rate: float | None = None

    def facts(self) -> dict[str, int | float | None]:
        """What is told at the end."""
        wall_s = time.monotonic() - self.began_s if self.began_s is not None else 0.0
        return {
            "applied": self.rounds,
            "accepted": self.accepted,
            "tokens": self.tokens,
            "steps_ahead": self.steps_ahead,
            "bytes_up": self.bytes_up,
            "bits_per_value": 8 * self.bytes_up / self.sent_values if self.sent_values else None,
            "inner_time_share": self.inner_s / wall_s if wall_s else None,
        }

"""How much this program sends and receives, and how fast it may.

Every link of a program shares one `Traffic`, so a cap holds for all of them together. What counts are the bytes of
packets, updates and parameters; the few that rounds and heartbeats take are left out.
"""

import asyncio
import time

BYTES_PER_MBIT = 125_000
FRAME_S = 0.25  # a capped sender cuts its frames so that each takes about so long


class Bucket:
    """One direction. `total` counts bytes; `bytes_per_s` may change at any time, 0 is no cap."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self.total = 0
        self._free_at_s = 0.0  # when all that was let through so far has passed

    async def take(self, size: int) -> None:
        """Count bytes, and wait until they have passed at the capped speed. Callers are served in turn."""
        self.total += size
        if self.bytes_per_s <= 0:
            return
        now_s = time.monotonic()
        self._free_at_s = max(self._free_at_s, now_s) + size / self.bytes_per_s
        await asyncio.sleep(self._free_at_s - now_s)

    def frame_bytes(self, most: int) -> int:
        """How large a frame should be, lest a slow line moves in jerks."""
        return min(most, max(1 << 12, round(FRAME_S * self.bytes_per_s))) if self.bytes_per_s > 0 else most


class Traffic:
    """Both directions of one program."""

    def __init__(self) -> None:
        self.up, self.down = Bucket(), Bucket()

    def cap(self, up_mbit: float, down_mbit: float) -> None:
        """Set the caps in megabits a second, 0 for none."""
        self.up.bytes_per_s, self.down.bytes_per_s = up_mbit * BYTES_PER_MBIT, down_mbit * BYTES_PER_MBIT

    @property
    def total(self) -> int:
        """Bytes in both directions together."""
        return self.up.total + self.down.total

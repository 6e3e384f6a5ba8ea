"""From the command to the first contribution that counts: which phases that takes, and how long each one."""

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()

FIND, VERIFY, DOWNLOAD, REPLAY = "find", "verify", "download", "replay"
FIRST_STEP, FIRST_ACCEPTED = "first inner step", "first accepted packet"
PHASES = (FIND, VERIFY, DOWNLOAD, REPLAY, FIRST_STEP, FIRST_ACCEPTED)


class Phases:
    """Logs each phase once, when it is over, in seconds. `current` is the one under way, "" after the last."""

    def __init__(self, began_s: float, say: Callable[[str], None]) -> None:
        """`began_s` is the start on the monotonic clock; `say` takes a sentence for people."""
        self._began_s = self._phase_s = began_s
        self._say, self._over = say, 0

    @property
    def current(self) -> str:
        """The phase under way."""
        return PHASES[self._over] if self._over < len(PHASES) else ""

    def over(self, phase: str) -> None:
        """This phase is over, if it was not before; those before it that were not needed took no time."""
        place = PHASES.index(phase)
        if place < self._over:
            return
        now_s = time.monotonic()
        for skipped in PHASES[self._over : place]:
            log.info("phase", name=skipped, seconds=0.0)
        log.info("phase", name=phase, seconds=round(now_s - self._phase_s, 3))
        self._over, self._phase_s = place + 1, now_s
        if phase == FIRST_ACCEPTED:
            self._say(f"Your first contribution counts: it was accepted {now_s - self._began_s:.1f} s after the start.")

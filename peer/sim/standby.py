"""An aggregator that stands by: drives the production `Standby` machine while it copies what the leader has."""

from typing import TYPE_CHECKING

from peer.sim.aggregator import Aggregator, Disk
from peer.sim.clock import chance_of
from peer.sim.settings import key_of
from protocol.ledger import RoundRecord
from protocol.round import Tick, WakeAt
from protocol.standby import HEARTBEAT_S, Heard, Recorded, Standby, StandbyEvent, TakeOver

if TYPE_CHECKING:
    from peer.sim.swarm import Swarm

_COPY_S = (4.0, 4.0, 4.0, 60.0)  # what a copy may take; some have a large state in them


class StandbyDriver:
    """Follows whoever leads, and leads when that one is silent for too long."""

    def __init__(self, swarm: "Swarm", name: str, *, stood_by: int = 0, own: Disk | None = None) -> None:
        self.swarm, self.clock, self.name = swarm, swarm.clock, name
        self.machine = Standby(swarm.run, key_of(swarm.settings.seed, name).public)
        self.copy = Disk() if own is None else own
        self.over = False
        self._heard: RoundRecord | None = None
        self._chance = chance_of(swarm.settings.seed, f"{name} stands by {stood_by}")
        self._wakes = 0
        self._copying = False

    def follow(self) -> None:
        """Listen for signs of life for as long as this one stands by."""
        if self.over:
            return
        leader = self.swarm.aggregator
        if leader.up and leader.name != self.name and not self.swarm.split:
            head = self._heard = leader.head
            self._handle(Heard(head))
            if not self._copying:
                self._copying = True
                copy = leader.disk.mirror(self.copy)
                self.clock.after(self._chance.uniform(0.2, self._chance.choice(_COPY_S)), lambda: self._copied(copy))
        self.clock.after(self._chance.uniform(0.2, 1) * HEARTBEAT_S, self.follow)

    def _copied(self, copy: Disk) -> None:
        """The copy has all that the leader had when it was begun, if that one can still be reached."""
        self._copying = False
        if not self.over and self.swarm.aggregator.up and not self.swarm.split:
            self.copy = copy
            self._handle(Recorded(copy.records[-1]))

    def _handle(self, event: StandbyEvent) -> None:
        effects = self.machine.handle(event, self.clock.now_s)
        self.swarm.story.add(self.clock.now_s, self.name, event, effects)
        for effect in effects:
            if isinstance(effect, WakeAt):
                self._wakes += 1
                wake = self._wakes
                self.clock.at(effect.at_s, lambda wake=wake: self._tick(wake))  # type: ignore[misc]  # bound now
            elif isinstance(effect, TakeOver):
                self._lead(effect.epoch)

    def _tick(self, wake: int) -> None:
        if wake == self._wakes and not self.over:
            self._handle(Tick())

    def _lead(self, epoch: int) -> None:
        assert self._heard is not None, "it takes over from one that it has heard"
        self.over = True
        self.swarm.checkers.takes_over(self.copy.records[-1], self._heard, epoch)
        self.swarm.take_over(self, Aggregator(self.swarm, self.name, disk=self.copy, epoch=epoch))

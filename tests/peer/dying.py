"""The command line, with a peer that kills itself: `python -m tests.peer.dying POINT ROUND join ...`.

POINT says where in the round it dies, as by kill -9: nothing is closed, nothing is flushed.
"""

import os
import signal
import sys

import peer.client
from peer.cli import main
from peer.client import Client
from protocol.ledger import RoundRecord
from protocol.round import MakePacket, ReplicaEvent, Settle, TrainInner

POINTS = ("trained", "saving", "stored", "sent", "settled", "applied")


class Dying(Client):
    """It dies at POINT of ROUND."""

    def _at(self, point: str, round: int) -> None:
        if (point, round) == (POINT, ROUND):
            os.kill(os.getpid(), signal.SIGKILL)

    def _working_round(self) -> int:
        record = self._machine.record
        assert record is not None
        return record.round + 1

    async def _train(self, effect: TrainInner) -> ReplicaEvent:
        done = await super()._train(effect)
        self._at("trained", effect.round)
        return done

    def _leaving(self) -> bool:
        """Asked in the middle of a save, when a part of the new file is there."""
        self._at("saving", self._working_round())
        return super()._leaving()

    async def _make_packet(self, effect: MakePacket) -> ReplicaEvent:
        made = await super()._make_packet(effect)
        self._at("stored", effect.round)
        return made

    async def _send(self, digest: bytes) -> ReplicaEvent:
        receipt = await super()._send(digest)
        self._at("sent", self._working_round())
        return receipt

    def _settle(self, effect: Settle) -> None:
        super()._settle(effect)
        self._at("settled", effect.round)

    async def _apply_update(self, record: RoundRecord) -> ReplicaEvent:
        applied = await super()._apply_update(record)
        self._at("applied", record.round)
        return applied


if __name__ == "__main__":
    POINT, ROUND = sys.argv[1], int(sys.argv[2])
    assert POINT in POINTS
    peer.client.Client = Dying  # type: ignore[misc]  # the command takes its class from there
    sys.exit(main(sys.argv[3:]))

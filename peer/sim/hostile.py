"""Peers that break the rules: each attack with the codes that it must be refused with."""

import dataclasses
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import Code
from protocol.identity import PrivateKey, digest
from protocol.limits import TOKENS_MAX
from protocol.packet import PACKET_HEADER_BYTES, Packet, make_packet
from protocol.round import Opened
from protocol.run import RunConfig
from protocol.wire import packet_from_wire, packet_to_wire, packet_wire_bytes_max

if TYPE_CHECKING:
    from peer.sim.volunteer import Volunteer

_TOKENS_AT = 4 + 2 + 2 + 32 + 4 + 32 + 32
_SIGNATURE_AT = PACKET_HEADER_BYTES - 64


@dataclass(frozen=True)
class Attack:
    """Bytes to upload under a name, and the codes of which one must come back; none when they keep the rules."""

    digest: bytes
    wire: bytes
    expected: set[Code]


@dataclass(frozen=True)
class _Scene:
    """What an attacker has at hand: a packet with sections as anybody makes them, and the open round."""

    run: RunConfig
    key: PrivateKey
    round: int
    base_root: bytes
    other: Packet
    chance: random.Random

    def packet(
        self, *, sections: tuple[bytes, ...] | None = None, round: int = 0, base: bytes = b"", tokens: int = 500
    ) -> Packet:
        """A signed packet of ours; what is not said is right."""
        parts = self.other.sections if sections is None else sections
        return make_packet(self.run, self.key, round or self.round, base or self.base_root, tokens, 3, parts)

    def attack(self, packet: Packet, *expected: Code) -> Attack:
        """Upload this packet."""
        return Attack(packet.header.digest, packet_to_wire(packet, self.run), set(expected))

    def damaged(self, change: Callable[[bytes], bytes], *expected: Code) -> Attack:
        """Upload a good packet after a change to its bytes."""
        wire = change(packet_to_wire(self.packet(), self.run))
        return Attack(digest("packet", wire[:PACKET_HEADER_BYTES]), wire, set(expected))


def _at(place: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda wire: wire[:place] + data + wire[place + len(data) :]


def _sections(scene: _Scene, number: int, change: Callable[[bytearray], object]) -> Packet:
    parts = [bytearray(section) for section in scene.other.sections]
    change(parts[number])
    return scene.packet(sections=tuple(map(bytes, parts)))


def _ratio(section: bytearray) -> None:
    section[2] = 64  # behind the scales of two chunks


def _lost_gap(section: bytearray) -> None:
    # The first gap goes on instead of ending, or ends instead of going on: one is missing, or there is one too many.
    section[4] = 0 if section[4] == 255 else 255


def _far_gaps(section: bytearray) -> None:
    section[4:24] = bytes([254]) * 20


def _forged(scene: _Scene) -> Attack:
    packet = scene.packet()
    header = dataclasses.replace(
        packet.header, signature=bytes([packet.header.signature[0] ^ 1]) + packet.header.signature[1:]
    )
    return scene.attack(Packet(header, packet.sections), Code.BAD_SIGNATURE)


def _other_sections(scene: _Scene) -> Attack:
    packet = scene.packet()
    first = bytearray(packet.sections[0])
    first[-1] ^= 1
    return scene.attack(Packet(packet.header, (bytes(first), *packet.sections[1:])), Code.BAD_MERKLE)


ATTACKS: dict[str, Callable[[_Scene], Attack]] = {
    "magic": lambda s: s.damaged(_at(0, b"SLUP"), Code.BAD_MAGIC),
    "version": lambda s: s.damaged(_at(4, b"\2\0"), Code.VERSION),
    "reserved": lambda s: s.damaged(_at(6, b"\1\0"), Code.RESERVED),
    "run": lambda s: s.damaged(_at(8, bytes(32)), Code.OTHER_RUN),
    "no tokens": lambda s: s.damaged(_at(_TOKENS_AT, bytes(8)), Code.BAD_TOKENS),
    "too many tokens": lambda s: s.damaged(_at(_TOKENS_AT, struct.pack("<Q", TOKENS_MAX + 1)), Code.BAD_TOKENS),
    "cut off": lambda s: s.damaged(lambda wire: wire[:-1], Code.TRUNCATED),
    "half a header": lambda s: s.damaged(lambda wire: wire[:100], Code.TRUNCATED),
    "trailing": lambda s: s.damaged(lambda wire: wire + b"\0", Code.TRAILING),
    "huge": lambda s: s.damaged(lambda wire: wire + bytes(packet_wire_bytes_max(s.run)), Code.TOO_LARGE),
    "no sections": lambda s: s.damaged(_at(PACKET_HEADER_BYTES, bytes(4)), Code.BAD_FRAME),
    "signature": _forged,
    "S": lambda s: s.damaged(_at(_SIGNATURE_AT + 32, b"\xff" * 32), Code.BAD_SIGNATURE),
    "merkle": _other_sections,
    "ratio": lambda s: s.attack(_sections(s, 0, _ratio), Code.BAD_RATIO),
    "gaps": lambda s: s.attack(_sections(s, 0, _lost_gap), Code.BAD_FRAME),
    "indices": lambda s: s.attack(_sections(s, 0, _far_gaps), Code.BAD_INDEX, Code.BAD_FRAME),
    # By the time it arrives, the next round may be open, and after a null round on the same base.
    "future": lambda s: s.attack(s.packet(round=s.round + 1, base=s.run.run_id), Code.WRONG_ROUND, Code.WRONG_BASE),
    "past": lambda s: s.attack(s.packet(round=max(1, s.round - 1), base=s.run.run_id), Code.LATE, Code.WRONG_BASE),
    "base": lambda s: s.attack(s.packet(base=bytes([9]) * 32), Code.WRONG_BASE),
    "replay": lambda s: s.attack(s.other, *([] if s.other.header.peer == s.key.public else [Code.NOT_A_MEMBER])),
    "other digest": lambda s: dataclasses.replace(s.attack(s.packet()), digest=bytes([5]) * 32),
    "all tokens": lambda s: s.attack(s.packet(tokens=TOKENS_MAX)),
    "second packet": lambda s: s.attack(s.packet(tokens=s.chance.randrange(1, 10**6))),
}


def attack(peer: "Volunteer", opened: Opened) -> None:
    """Upload something bad in the round that has opened, at some time in it, once or twice."""
    swarm = peer.swarm
    if swarm.seen is None:
        return
    scene = _Scene(peer.run, peer.key, opened.round, opened.base_root, swarm.seen, peer.chance)
    for _ in range(peer.chance.randint(1, 2)):
        name = peer.chance.choice(list(ATTACKS))
        item = ATTACKS[name](scene)
        if name in ("all tokens", "second packet"):
            swarm.checkers.foreign(packet_from_wire(item.wire, peer.run))
        swarm.story.add(swarm.clock.now_s, peer.name, f"attacks: {name}")
        swarm.attacks += 1
        upload(peer, item)


def _ignore(accepted: bool, code: int) -> None:
    """A hostile peer does not care what becomes of it; the checkers do."""


def upload(peer: "Volunteer", item: Attack) -> None:
    """Send it at some time of the round, the last moment among them."""
    expected = item.expected or {Code.WRONG_DIGEST}
    wait_s = peer.chance.uniform(0, 1.2) * peer.run.rounds.deadline_s
    if peer.chance.random() < 0.7:
        wait_s /= 10
    wanted = expected if item.expected else None
    peer.later(wait_s, lambda: peer.submit(item.digest, item.wire, _ignore, wanted))

"""The messages between a peer and an aggregator as plain values, and the transcript that both sign (SPEC 9)."""

from dataclasses import dataclass

from protocol.limits import DHT_VALUE_BYTES_MAX
from protocol.run import AGGREGATORS_MAX

MESSAGE_BYTES_MAX = 2 << 20  # one gRPC message: a frame of 1 MiB or a round record, with room for their envelope
SERVICE = "sparseloco.v1.Swarm"
NONCE_BYTES = 32
SESSION_BYTES = 16
DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
AD_BYTES_MAX = 32 + DHT_VALUE_BYTES_MAX  # a key and its DHT record
ADS_MAX = AGGREGATORS_MAX
NO_CERTIFICATE = bytes(DIGEST_BYTES)  # stands for the certificate's fingerprint on a plaintext connection


@dataclass(frozen=True)
class RoundOpened:
    """A round is open: train `inner_steps` from `base_root` and submit within `closes_in_s` seconds."""

    round: int
    base_root: bytes
    inner_steps: int
    closes_in_s: float


@dataclass(frozen=True)
class RoundClosed:
    """A round has ended; `record` is its signed record, not yet checked.

    The sizes are those of the update and of the bundle of packets in transport form, 0 where there is none. Nobody
    signed them: they say what to fetch, not what to believe.
    """

    record: bytes
    update_bytes: int = 0
    bundle_bytes: int = 0


RoundEvent = RoundOpened | RoundClosed


@dataclass(frozen=True)
class PacketStored:
    """A packet of the open round is stored at the aggregator and has its receipt."""

    digest: bytes


@dataclass(frozen=True)
class Aggregators:
    """Where the other aggregators are: the key and the DHT record of each in one, not checked yet."""

    ads: tuple[bytes, ...]


@dataclass(frozen=True)
class Heartbeat:
    """The aggregator is there, and nothing happened."""


WatchEvent = RoundEvent | PacketStored | Aggregators


@dataclass(frozen=True)
class ReceiptMsg:
    """What the aggregator says about one packet. `code` says why it was not accepted, 0 when it was."""

    digest: bytes
    accepted: bool
    code: int


@dataclass(frozen=True)
class Amended:
    """The newest amendment that an aggregator has (32 zero bytes: none), and the round whose record takes the next."""

    newest: bytes
    round: int


@dataclass(frozen=True)
class Line:
    """What a probe found. Bytes are those of the payload, so what TLS and headers take is counted already.

    `clock_ahead_s` is how far this machine's clock is ahead of the aggregator's, known to within `round_trip_s` / 2.
    """

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    clock_ahead_s: float


def other_version(ours: int, theirs: int) -> str:
    """Which side is too old, as an aggregator says it to a peer: an old program knows no newer version by itself."""
    too_old = "your sparseloco-peer is too old" if theirs < ours else "the aggregator is too old"
    return f"this aggregator speaks version {ours}, you speak {theirs}: {too_old}"


def transcript(
    run_id: bytes, peer: bytes, client_nonce: bytes, server_nonce: bytes, certificate_sha256: bytes
) -> bytes:
    """The bytes T of SPEC 9.

    They name the certificate of this connection, so nobody in between can pass signatures on.
    """
    return run_id + peer + client_nonce + server_nonce + certificate_sha256

"""The untrusted phone book in which peers, aggregators and bootstraps find each other (SPEC 10).

Everything in it is a signed record of its own; losing the directory loses nothing but convenience, because the
addresses in an invite are enough to join. hivemind is imported only when a directory on its DHT is opened.
"""

import asyncio
import importlib
import ipaddress
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from peer.net.tls import split_address
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, check_key
from protocol.limits import DHT_TTL_S_MAX, DHT_TTL_S_MIN, DHT_VALUE_BYTES_MAX

if TYPE_CHECKING:
    from peer.net import hivemind_directory

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# A libp2p identity: multihash "identity" of the protobuf PublicKey{Type=Ed25519, Data=32 bytes}.
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])


class DirectoryError(Exception):
    """The directory could not be asked or told now. It is worth trying again later."""


@dataclass(frozen=True)
class DirectoryHealth:
    """How the directory is doing. `problem` is empty when it works."""

    connected: bool
    peers: int
    daemon_alive: bool
    problem: str


class Directory(Protocol):
    """Records by key and signer. Every call is bounded in time."""

    kind: str
    reason: str

    async def publish(self, dht_key: bytes, subkey: bytes, value: bytes, expires_s: int) -> None:
        """Store one signed record until `expires_s` (Unix seconds). Raises DirectoryError when nobody took it."""

    async def lookup(self, dht_key: bytes) -> dict[bytes, bytes]:
        """All records of a key by signer, each checked and unexpired. Raises DirectoryError without a network."""

    async def health(self) -> DirectoryHealth:
        """How the directory is doing now."""

    def good_peers(self) -> tuple[str, ...]:
        """Multiaddrs of nodes that answered: worth keeping, and passing as bootstraps the next time."""

    async def close(self) -> None:
        """Leave. Harmless when done twice."""


class StaticDirectory:
    """A directory without a network: it knows what was published in this process, invites say the rest."""

    kind = "static"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self._records: dict[bytes, dict[bytes, tuple[bytes, int]]] = {}

    async def publish(self, dht_key: bytes, subkey: bytes, value: bytes, expires_s: int) -> None:
        """Remember the record in this process."""
        check_publishable(value, expires_s)
        self._records.setdefault(dht_key, {})[subkey] = (value, expires_s)

    async def lookup(self, dht_key: bytes) -> dict[bytes, bytes]:
        """What this process has published."""
        now_s = time.time()
        return {subkey: value for subkey, (value, end_s) in self._records.get(dht_key, {}).items() if end_s > now_s}

    async def health(self) -> DirectoryHealth:
        """Never connected, and why."""
        return DirectoryHealth(connected=False, peers=0, daemon_alive=False, problem=self.reason)

    def good_peers(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def close(self) -> None:
        """Nothing to do."""


def check_publishable(value: bytes, expires_s: int) -> None:
    """Assert what every directory asks of our own records, lest the strict ones refuse them far away."""
    assert len(value) <= DHT_VALUE_BYTES_MAX
    assert DHT_TTL_S_MIN <= expires_s - time.time() <= DHT_TTL_S_MAX + 1


def bootstrap_multiaddr(public_key: bytes, host: str, port: int) -> str:
    """Where a bootstrap with this identity listens, in libp2p's notation. Needs no hivemind."""
    check_key(public_key)
    return f"{tcp_multiaddr(host, port)}/p2p/{peer_id(public_key)}"


def peer_id(public_key: bytes) -> str:
    """The libp2p name of an Ed25519 public key: base58 of the multihash, "12D3Koo..."."""
    data = _PEER_ID_PREFIX + public_key
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + digits


def tcp_multiaddr(host: str, port: int) -> str:
    """The multiaddr of a host and TCP port. Raises ValueError for a host that has no place in one."""
    try:
        family = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        family = "dns4"
    if not host or "/" in host or "," in host or host != host.strip():
        raise ValueError(f"{host!r} is not a host name or IP address")
    return f"/{family}/{host}/tcp/{port}"


def check_multiaddr(text: str) -> None:
    """Raise ProtocolError BAD_INVITE unless this is /ip4|ip6|dns4|dns6|dns/HOST/tcp/PORT/p2p/ID."""
    parts = text.split("/")
    good = (
        text.isascii()
        and text.isprintable()
        and len(text) <= 300
        and len(parts) == 7
        and not parts[0]
        and parts[1] in {"ip4", "ip6", "dns", "dns4", "dns6"}
        and parts[2]
        and "," not in text
        and parts[3] == "tcp"
        and parts[4].isdigit()
        and 0 < int(parts[4]) < 65536
        and parts[5] == "p2p"
        and set(parts[6]) <= set(_BASE58)
        and 40 <= len(parts[6]) <= 60
    )
    if not good:
        raise ProtocolError(Code.BAD_INVITE, f"{text[:80]!r} is not the address of a bootstrap")


@dataclass(frozen=True)
class DirectorySettings:
    """What a directory on the DHT needs to know."""

    identity: PrivateKey | None
    """Gives the node its libp2p name; None makes a fresh one. Two processes must not share one."""
    run_ids: tuple[bytes, ...]
    """The runs whose records are stored and looked up; all others are refused."""
    aggregators: Mapping[bytes, frozenset[bytes]]
    """Per run, who may publish as its aggregator; a run that is missing here admits any signer."""
    bootstraps: tuple[str, ...]
    listen: str | None
    """"host:port" to serve others from, or None to dial out only and store nothing for others."""
    announce: tuple[str, ...]
    """Where others reach us, when that differs from what we listen on: "host:port" each."""
    notice: Callable[[str], None]
    """Told, in a sentence, when the directory gets or loses its network, and why."""
    timeout_s: float
    check_s: float
    """How often the daemon and the routing table are looked after."""


async def open_directory(
    *,
    identity: PrivateKey | None,
    run_ids: Collection[bytes],
    bootstraps: Sequence[str],
    listen: str | None,
    notice: Callable[[str], None],
    announce: Sequence[str] = (),
    aggregators: Mapping[bytes, frozenset[bytes]] | None = None,
    timeout_s: float = 20.0,
    check_s: float = 10.0,
) -> Directory:
    """Open the directory that works here, and say in its `reason` why it is this one.

    Without hivemind, or where its daemon cannot run, this is the static one. When no bootstrap answers it is still the
    DHT: it goes on trying, tells `notice`, and its calls raise DirectoryError until then. Raises LinkError ADDRESS or
    ValueError for a `listen` or `announce` that is no address.
    """
    good = []
    for text in bootstraps:
        try:
            check_multiaddr(text)
            good.append(text)
        except ProtocolError as error:
            notice(f"left out: {error.detail}")
    if not good and listen is None:
        return StaticDirectory("no bootstrap is known")
    settings = DirectorySettings(
        identity=identity,
        run_ids=tuple(run_ids),
        aggregators=aggregators or {},
        bootstraps=tuple(good),
        listen=tcp_multiaddr(*split_address(listen)) if listen is not None else None,
        announce=tuple(tcp_multiaddr(*split_address(address)) for address in announce),
        notice=notice,
        timeout_s=timeout_s,
        check_s=check_s,
    )
    try:
        # The import takes two seconds and pulls in torch, so it must not stop the loop.
        module = await asyncio.to_thread(importlib.import_module, "peer.net.hivemind_directory")
    except Exception as error:  # noqa: BLE001 -- an optional dependency may break in any way at its import
        return StaticDirectory(f"hivemind cannot be used here: {error}")
    made = cast("type[hivemind_directory.HivemindDirectory]", module.HivemindDirectory)(settings)
    try:
        await made.start()
    except DirectoryError as error:
        return StaticDirectory(str(error))
    return made

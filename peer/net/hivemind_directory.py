"""The directory on hivemind's DHT. Importing this module imports hivemind, so only `open_directory` does.

It uses DHTNode and P2P in our own event loop, never hivemind.DHT, whose forked process outlives us and hangs its
callers. Everything that comes from other nodes passes the validator before hivemind decodes or keeps it.
"""

import asyncio
import logging
import math
import os
import random
import re
import socket
import stat
import tempfile
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import hivemind.p2p.p2p_daemon as daemon_module
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from peer.net.directory import DirectoryError, DirectoryHealth, DirectorySettings, check_publishable
from peer.net.errors import clean
from protocol.errors import ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import DHT_TTL_S_MAX, DHT_TTL_S_MIN, DHT_VALUE_BYTES_MAX
from protocol.records import aggregators_key, check_dht_record, peers_key

T = TypeVar("T")

_CALL_S = 10.0  # for one store or lookup: a frozen node costs hivemind 3 s, several in a row more
_DIAL_S = 8.0
_CLOSE_S = 3.0
_BACKOFF_S_MAX = 60.0
_CLOCK_SLACK_S = 10.0
_SUBKEYS_MAX = 2048  # with 1 KiB a record and its envelope this stays below the 4 MiB that breaks hivemind's messages
_DAEMON_MESSAGE_BYTES_MAX = 4 << 20
_STALE_SOCKET_S = 120.0
_BACKOFF = "dial backoff"  # libp2p tried a moment ago, and does not say again why that failed
_DIALED = re.compile(r"^\[[^\]]*\] (dial tcp\d? \S+: (connect: )?)?")

# hivemind logs at length, and as errors what is none. What matters reaches people through `notice` and DirectoryError.
logging.getLogger("hivemind").setLevel(logging.CRITICAL)


class _SubprocessInOwnSession:
    """asyncio.subprocess, but what it starts does not get the terminal's Ctrl+C, so that we can leave in order."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.subprocess, name)

    async def create_subprocess_exec(self, *args: Any, **options: Any) -> asyncio.subprocess.Process:
        return await asyncio.subprocess.create_subprocess_exec(*args, start_new_session=True, **options)


class _AsyncioForDaemon:
    """asyncio as hivemind's daemon module sees it."""

    subprocess = _SubprocessInOwnSession()

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


daemon_module.asyncio = _AsyncioForDaemon()


def _unpack_bytes(packed: bytes) -> bytes | None:
    """The byte string in this msgpack, or None when it is anything else or not in its shortest form."""
    if len(packed) >= 2 and packed[0] == 0xC4 and packed[1] == len(packed) - 2:
        return packed[2:]
    if len(packed) >= 3 and packed[0] == 0xC5 and int.from_bytes(packed[1:3], "big") == len(packed) - 3 >= 256:
        return packed[3:]
    return None


class _Validator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Admits the signed records of our runs and nothing else. hivemind asks it about every record, stored or found."""

    def __init__(self, settings: DirectorySettings) -> None:
        self._signers: dict[bytes, tuple[bytes, frozenset[bytes] | None]] = {}
        for run_id in settings.run_ids:
            for dht_key, signers in (
                (aggregators_key(run_id), settings.aggregators.get(run_id)),
                (peers_key(run_id), None),
            ):
                self._signers[DHTID.generate(dht_key).to_bytes()] = (dht_key, signers)

    def validate(self, record: DHTRecord) -> bool:
        """Whether this record may be kept or believed."""
        known = self._signers.get(record.key)
        subkey, value = _unpack_bytes(record.subkey), _unpack_bytes(record.value)
        if known is None or subkey is None or value is None:
            return False
        dht_key, signers = known
        return (signers is None or subkey in signers) and _is_good(dht_key, subkey, value, record.expiration_time)


def _is_good(dht_key: bytes, subkey: bytes, value: bytes, expires_s: object) -> bool:
    """Whether a record is signed by its subkey for this key, and neither long expired nor from the far future.

    The protocol's lower bound on the time to live holds when a record is stored, not when it is read later, so the
    check is made as of the moment at which that bound is just met, and our own clock is compared here.
    """
    if not isinstance(expires_s, float | int) or not math.isfinite(expires_s) or len(value) > DHT_VALUE_BYTES_MAX:
        return False
    left_s = expires_s - time.time()
    if not -_CLOCK_SLACK_S <= left_s <= DHT_TTL_S_MAX + _CLOCK_SLACK_S or expires_s != int(expires_s):
        return False
    try:
        check_dht_record(dht_key, subkey, value, int(expires_s), int(expires_s) - DHT_TTL_S_MIN - 1)
    except ProtocolError:
        return False
    return True


class _Storage(DHTLocalStorage):  # type: ignore[misc]  # hivemind has no types
    """hivemind's storage with a bound on the records of a key, and without two of its faults: an old record that
    comes again must not shorten the life of the newer one, and one refusal must not drop the rest of a dictionary."""

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Keep a record that the validator has admitted. False when there is no room for it."""
        if expiration_time - time.time() > DHT_TTL_S_MAX + _CLOCK_SLACK_S:
            return False
        held = self.get(key)
        if held is not None and isinstance(held.value, DictionaryDHTValue):
            older = held.value.get(subkey)
            if older is not None and older.expiration_time >= expiration_time:
                return True
            if older is None and len(held.value) >= _SUBKEYS_MAX:
                return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


class HivemindDirectory:
    """The directory on hivemind's DHT, with a task that keeps its daemon and its routing table alive."""

    kind = "hivemind"

    def __init__(self, settings: DirectorySettings) -> None:
        self.reason = "hivemind's daemon runs here"
        self._settings = settings
        self._node: Any = None
        self._problem = "the directory has not been opened yet"
        self._told = ""
        self._peak = 0
        self._good_peers: tuple[str, ...] = ()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the daemon and try the bootstraps once. Raises DirectoryError when the daemon cannot run here."""
        await asyncio.to_thread(_sweep_sockets)
        await self._start_node()
        await self._introduce()
        self._keeper = asyncio.create_task(self._keep())

    async def publish(self, dht_key: bytes, subkey: bytes, value: bytes, expires_s: int) -> None:
        """Store one signed record at up to five other nodes, and here when we serve others."""
        check_publishable(value, expires_s)
        node = await self._ready()
        # Only what other nodes say counts: hivemind reports success from an isolated node too.
        stored = node.store(dht_key, value, float(expires_s), subkey=subkey, exclude_self=True)
        taken = bool(await _bounded(stored, _CALL_S, "publishing")) if self._peers() else False
        if self._settings.listen is not None:
            packed = node.protocol.serializer.dumps(value)
            node.protocol.storage.store_subkey(DHTID.generate(dht_key), subkey, packed, float(expires_s))
            taken = taken or not self._settings.bootstraps
        if not taken:
            raise DirectoryError("no other node took the record: check that this machine's clock is right")

    async def lookup(self, dht_key: bytes) -> dict[bytes, bytes]:
        """All records of a key by signer, each checked and unexpired."""
        node = await self._ready()
        found = await _bounded(node.get(dht_key, latest=True), _CALL_S, "a lookup")
        if found is None or not isinstance(found.value, dict):
            return {}
        now_s = time.time()
        return {
            subkey: entry.value
            for subkey, entry in found.value.items()
            if entry.expiration_time > now_s and _is_good(dht_key, subkey, entry.value, entry.expiration_time)
        }

    async def health(self) -> DirectoryHealth:
        """How the directory is doing now."""
        peers = self._peers()
        alone = bool(self._settings.bootstraps) and not peers
        connected = self._daemon_alive() and not alone
        problem = "" if connected else self._problem
        return DirectoryHealth(connected=connected, peers=peers, daemon_alive=self._daemon_alive(), problem=problem)

    def good_peers(self) -> tuple[str, ...]:
        """Multiaddrs of the serving nodes that we are connected to."""
        return self._good_peers

    def multiaddrs(self) -> tuple[str, ...]:
        """Where other nodes reach this one; empty for a node that only dials out."""
        if self._node is None or self._settings.listen is None:
            return ()
        p2p = self._node.p2p
        return tuple(f"{address}/p2p/{p2p.peer_id}" for address in p2p._visible_maddrs)

    async def close(self) -> None:
        """Leave the DHT and end the daemon."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        await self._stop_node()
        self._problem = "the directory is closed"

    # The node

    async def _start_node(self) -> None:
        """Start p2pd and a DHT node on it that knows nobody yet. Raises DirectoryError with the reason."""
        settings = self._settings
        serving = settings.listen is not None
        identity = await asyncio.to_thread(_identity_file, settings.identity or PrivateKey.generate())
        try:
            p2p = await P2P.create(
                host_maddrs=[settings.listen] if serving else None,
                announce_maddrs=list(settings.announce) if serving and settings.announce else None,
                no_listen=not serving,
                dht_mode="server" if serving else "client",
                identity_path=str(identity),
                check_if_identity_free=False,
                # Volunteers' machines relay for nobody and open no ports in their routers.
                auto_nat=False,
                nat_port_map=False,
                use_relay=False,
                startup_timeout=settings.timeout_s,
                persistent_conn_max_msg_size=_DAEMON_MESSAGE_BYTES_MAX,
            )
        except (P2PDaemonError, OSError) as error:
            raise DirectoryError(f"hivemind's network daemon cannot run here: {clean(str(error))}") from None
        finally:
            await asyncio.to_thread(identity.unlink, missing_ok=True)
        try:
            node = await DHTNode.create(
                p2p=p2p,
                client_mode=not serving,
                record_validator=_Validator(settings),
                # Plain behaviour: what is asked for is looked up, and nothing is kept or asked again behind our back.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            )
        except BaseException:
            await _stop_daemon(p2p)
            raise
        node.protocol.storage, node.protocol.cache = _Storage(), _Storage()
        _distrust_answers(node.protocol)
        self._node, self._peak = node, 0

    async def _stop_node(self) -> None:
        node, self._node, self._good_peers = self._node, None, ()
        if node is None:
            return
        with suppress(TimeoutError, P2PDaemonError, OSError):
            async with asyncio.timeout(_CLOSE_S):
                await node.shutdown()
        await _stop_daemon(node.p2p)

    async def _introduce(self) -> None:
        """Dial the bootstraps, all at once, and fill the routing table from whoever answers."""
        node = self._node
        results = await asyncio.gather(*(self._meet(node, address) for address in self._settings.bootstraps))
        problems = [problem for problem in results if problem]
        if len(problems) < len(results):
            with suppress(DirectoryError):
                await _bounded(node.find_nearest_nodes([node.node_id]), _CALL_S, "filling the routing table")
        if self._peers() or not results:
            self._well()
            await self._remember()
        else:
            if not (self._problem and all(_BACKOFF in problem for problem in problems)):
                self._problem = "no bootstrap answers: " + "; ".join(problems)
            self._tell(self._problem)

    async def _meet(self, node: Any, address: str) -> str:
        """Dial one bootstrap. Returns the problem, or nothing when it answered."""
        where = address.rpartition("/p2p/")[0]
        name = PeerID.from_base58(address.rpartition("/")[2])
        try:
            async with asyncio.timeout(_DIAL_S):
                await node.p2p._client.connect(name, [Multiaddr(where)])
                if await node.protocol.call_ping(name) is None:
                    return f"{where} is connected but answers no calls"
        except TimeoutError:
            return f"{where} does not answer"
        except (P2PDaemonError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            return f"{where}: {_last_reason(str(error))}"
        except Exception as error:  # noqa: BLE001 -- hivemind raises bare exceptions of several kinds from here
            return f"{where}: {_last_reason(str(error)) or type(error).__name__}"
        # call_ping updates the routing table in a task of its own.
        await asyncio.sleep(0)
        return ""

    async def _ready(self) -> Any:
        """The node, introduced anew when it knows nobody. Raises DirectoryError."""
        if self._node is None or not self._daemon_alive():
            raise DirectoryError(self._problem or "hivemind's network daemon has ended and is being started again")
        if self._settings.bootstraps and not self._peers():
            raise DirectoryError(self._problem or "no other node of the directory answers at this moment")
        return self._node

    def _peers(self) -> int:
        return 0 if self._node is None else len(self._node.protocol.routing_table.uid_to_peer_id)

    def _daemon_alive(self) -> bool:
        return self._node is not None and self._node.p2p._child.returncode is None

    # Looking after it

    async def _keep(self) -> None:
        """Start the daemon again when it has died, and dial the bootstraps again when the table has shrunk."""
        failures = 0 if not self._problem else 1
        while True:
            await asyncio.sleep(_pause_s(self._settings.check_s, failures))
            try:
                failures = 0 if await self._look_after() else failures + 1
            except Exception as error:  # noqa: BLE001 -- the keeper is what recovers from such things
                failures += 1
                self._problem = f"the directory failed: {type(error).__name__} {clean(str(error))}"
                self._tell(self._problem)

    async def _look_after(self) -> bool:
        if not self._daemon_alive() or not await self._daemon_answers():
            self._problem = "hivemind's network daemon has ended and is being started again"
            self._tell(self._problem)
            await self._stop_node()
            try:
                await self._start_node()
            except DirectoryError as error:
                self._problem = str(error)
                self._tell(self._problem)
                return False
        peers = self._peers()
        self._peak = max(self._peak, peers)
        if self._settings.bootstraps and (not peers or 2 * peers < self._peak):
            self._peak = 0
            await self._introduce()
        elif self._problem:
            # A node that could reach nobody was met by somebody.
            self._well()
        await self._remember()
        return not self._settings.bootstraps or self._peers() > 0

    async def _daemon_answers(self) -> bool:
        try:
            await _bounded(self._node.p2p.list_peers(), _CALL_S, "asking the daemon")
        except DirectoryError:
            return False
        return True

    async def _remember(self) -> None:
        serving = {str(name) for name in self._node.protocol.routing_table.uid_to_peer_id.values()}
        infos = await _bounded(self._node.p2p.list_peers(), _CALL_S, "asking the daemon")
        addresses = {f"{i.addrs[0]}/p2p/{i.peer_id}" for i in infos if i.addrs and str(i.peer_id) in serving}
        self._good_peers = tuple(sorted(a for a in addresses if "/tcp/" in a))[:32]

    def _well(self) -> None:
        """Nothing is wrong, which is worth a notice only after one that said what was."""
        self._problem = ""
        if self._told:
            self._tell(f"the directory is connected to {self._peers()} nodes")

    def _tell(self, sentence: str) -> None:
        if sentence != self._told:
            self._told = sentence
            self._settings.notice(sentence)


async def _bounded(work: Awaitable[T], timeout_s: float, what: str) -> T:
    """The result of a hivemind call. Raises DirectoryError when it fails or takes too long."""
    try:
        return await asyncio.wait_for(work, timeout_s)
    except TimeoutError:
        raise DirectoryError(f"{what} in the directory took more than {timeout_s:g} s") from None
    except Exception as error:  # noqa: BLE001 -- hivemind raises whatever its network raised
        raise DirectoryError(f"{what} in the directory failed: {_last_reason(str(error))}") from None


def _distrust_answers(protocol: Any) -> None:
    """Drop answers that could end a search early: hivemind stops at the first one that claims a late enough expiry."""
    ask = protocol.call_find

    async def call_find(peer: PeerID, keys: Any) -> Any:
        answer = await ask(peer, keys)
        if answer is None:
            return None
        bound_s = time.time() + DHT_TTL_S_MAX + _CLOCK_SLACK_S
        return {
            key: (found if found is not None and _is_plausible(found, bound_s) else None, nearest)
            for key, (found, nearest) in answer.items()
        }

    protocol.call_find = call_find


def _is_plausible(found: Any, bound_s: float) -> bool:
    return isinstance(found.value, DictionaryDHTValue) and len(found.value) > 0 and found.expiration_time <= bound_s


async def _stop_daemon(p2p: Any) -> None:
    """End p2pd, by force when it does not go."""
    child = p2p._child
    try:
        await asyncio.wait_for(p2p.shutdown(), _CLOSE_S)
    except (TimeoutError, OSError):
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _identity_file(key: PrivateKey) -> Path:
    """The key in libp2p's form (protobuf PrivateKey{Type=Ed25519}), in a private file that p2pd reads once."""
    handle, name = tempfile.mkstemp(prefix="sparseloco-peer-id-")  # mode 0600
    with os.fdopen(handle, "wb") as file:
        file.write(bytes([0x08, 0x01, 0x12, 0x40]) + key.to_bytes() + key.public)
    return Path(name)


def _sweep_sockets() -> None:
    """Remove the sockets that killed daemons have left: ours, not young, and nobody listens."""
    now_s = time.time()
    for path in Path("/tmp").glob("hivemind-p2p*.sock"):  # noqa: S108 -- hivemind puts them there, whatever TMPDIR says
        with suppress(OSError):
            info = path.lstat()
            ours = stat.S_ISSOCK(info.st_mode) and info.st_uid == os.getuid()
            if ours and now_s - info.st_mtime > _STALE_SOCKET_S and not _listens(path):
                path.unlink()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def _pause_s(check_s: float, failures: int) -> float:
    """The time to the next look: soon after a failure, then longer and longer; never the same for all peers."""
    pause_s = min(2.0 ** min(failures - 1, 10), _BACKOFF_S_MAX) if failures else check_s
    return pause_s * random.uniform(0.8, 1.2)  # noqa: S311 -- spreads the load, guards nothing


def _last_reason(text: str) -> str:
    """The end of a libp2p error, which holds the cause; what goes before names every layer and address it passed."""
    return clean(_DIALED.sub("", text.strip().rpartition("\n")[2].strip(" *"))[-200:])

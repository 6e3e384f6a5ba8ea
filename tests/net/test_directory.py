"""The directory over real daemons and sockets: finding each other, strangers' records, dead bootstraps, clean ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from peer.net.directory import (
    Directory,
    DirectoryError,
    StaticDirectory,
    bootstrap_multiaddr,
    check_multiaddr,
    open_directory,
)
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.records import Ad, DhtKind, aggregators_key, make_dht_record, peers_key
from tests.net.room import until
from tests.peer.swarm import free_port

daemon_module: Any = pytest.importorskip("hivemind.p2p.p2p_daemon", reason="hivemind has no wheel here")
DHTNode: Any = pytest.importorskip("hivemind.dht.node").DHTNode
DHTID: Any = pytest.importorskip("hivemind.dht.routing").DHTID
DictionaryDHTValue: Any = pytest.importorskip("hivemind.dht.storage").DictionaryDHTValue
P2P: Any = daemon_module.P2P
pytestmark = pytest.mark.net

RUN = bytes(range(32))
BOOT = PrivateKey.from_bytes(b"b" * 32)


def record(key: PrivateKey, ttl_s: int = 120, *, kind: DhtKind = DhtKind.AGGREGATOR) -> tuple[bytes, bytes, bytes, int]:
    """Arguments for publish."""
    dht_key = aggregators_key(RUN) if kind is DhtKind.AGGREGATOR else peers_key(RUN)
    expires_s = int(time.time()) + ttl_s
    payload = Ad(("127.0.0.1:7000",), bytes(32), 3, bytes(32)).to_payload()
    return dht_key, key.public, make_dht_record(key, dht_key, kind, payload, expires_s), expires_s


@asynccontextmanager
async def node(
    bootstraps: list[str], *, listen: str | None = None, key: PrivateKey | None = None, **options: Any
) -> AsyncIterator[Any]:
    notices: list[str] = options.pop("notices", [])
    directory = await open_directory(
        identity=key, run_ids=[RUN], bootstraps=bootstraps, listen=listen, notice=notices.append, **options
    )
    try:
        yield directory
    finally:
        await directory.close()


@asynccontextmanager
async def bootstrap(**options: Any) -> AsyncIterator[tuple[Any, str]]:
    port = free_port()
    async with node([], listen=f"127.0.0.1:{port}", key=BOOT, **options) as directory:
        yield directory, bootstrap_multiaddr(BOOT.public, "127.0.0.1", port)


async def test_two_that_only_dial_out_find_each_other_through_a_bootstrap() -> None:
    async with bootstrap() as (boot, address), node([address]) as one, node([address]) as two:
        assert (one.kind, two.kind) == ("hivemind", "hivemind"), one.reason
        assert boot.multiaddrs() == (address,), "the multiaddr must follow from the public key"
        aggregator, volunteer = PrivateKey.generate(), PrivateKey.generate()
        ad, peer_ad = record(aggregator), record(volunteer, kind=DhtKind.PEER)
        await one.publish(*ad)
        await two.publish(*peer_ad)
        for reader in (one, two, boot):
            assert await reader.lookup(aggregators_key(RUN)) == {aggregator.public: ad[2]}
            assert await reader.lookup(peers_key(RUN)) == {volunteer.public: peer_ad[2]}
        newer = record(aggregator, 240)
        await one.publish(*newer)
        await one.publish(*newer)
        assert await two.lookup(aggregators_key(RUN)) == {aggregator.public: newer[2]}
        assert (await one.health()).connected
        assert one.good_peers() == (address,)
        assert (await boot.health()).peers == 0, "who only dials out is asked for nothing"


async def test_serving_nodes_find_each_other_and_outlive_the_bootstrap() -> None:
    async with AsyncExitStack() as house:
        inner = AsyncExitStack()
        _, address = await inner.enter_async_context(bootstrap())
        servers = [await house.enter_async_context(node([address], listen=f"127.0.0.1:{free_port()}")) for _ in "ab"]
        reader = await house.enter_async_context(node([address]))
        await until(lambda: servers[0]._peers() == 2)
        key = PrivateKey.generate()
        ad = record(key)
        await servers[0].publish(*ad)
        assert len(reader.good_peers()) >= 2
        await inner.aclose()
        assert await reader.lookup(aggregators_key(RUN)) == {key.public: ad[2]}
        async with node(list(reader.good_peers())) as newcomer:
            assert await newcomer.lookup(aggregators_key(RUN)) == {key.public: ad[2]}


async def test_a_dead_bootstrap_of_two_and_a_nonsense_third_do_no_harm() -> None:
    dead = bootstrap_multiaddr(PrivateKey.generate().public, "127.0.0.1", free_port())
    notices: list[str] = []
    async with bootstrap() as (_, address), node([dead, "/ip4/nonsense", address], notices=notices) as one:
        ad = record(PrivateKey.generate())
        await one.publish(*ad)
        assert await one.lookup(ad[0]) == {ad[1]: ad[2]}
    assert any("nonsense" in notice for notice in notices)


@pytest.mark.slow  # libp2p waits 5 s before it dials again what has refused
async def test_without_any_bootstrap_the_reason_is_told_and_a_late_one_is_found() -> None:
    port, notices = free_port(), list[str]()
    address = bootstrap_multiaddr(BOOT.public, "127.0.0.1", port)
    async with node([address], notices=notices, check_s=0.3) as one:
        assert one.kind == "hivemind"
        assert not (await one.health()).connected
        for call in (one.lookup(aggregators_key(RUN)), one.publish(*record(BOOT))):
            with pytest.raises(DirectoryError, match="no bootstrap answers"):
                await call
        await until(lambda: "refused" in (one._problem or ""))
        await asyncio.sleep(1.0)  # a few tries of which libp2p says only that they come too soon
        told = f"no bootstrap answers: /ip4/127.0.0.1/tcp/{port}: connection refused"
        assert notices == [told], "said once, without what libp2p wraps it in"
        async with node([], listen=f"127.0.0.1:{port}", key=BOOT):
            await until(lambda: notices[-1] == "the directory is connected to 1 nodes", timeout_s=30)
            assert await one.lookup(aggregators_key(RUN)) == {}


async def test_a_bootstrap_of_another_name_at_the_same_place_is_refused() -> None:
    async with bootstrap() as (_, address):
        other = bootstrap_multiaddr(PrivateKey.generate().public, *_place(address))
        async with node([other]) as one:
            assert not (await one.health()).connected


async def test_strangers_records_are_refused_and_harm_nobody() -> None:
    async with bootstrap() as (boot, address), node([address]) as reader:
        owner, stranger = PrivateKey.generate(), PrivateKey.generate()
        ad = record(owner, 120)
        await reader.publish(*ad)
        p2p = await P2P.create(initial_peers=[address], dht_mode="client", no_listen=True)
        evil = await DHTNode.create(p2p=p2p, initial_peers=[address], client_mode=True)
        key, later = ad[0], float(ad[3] + 300)
        forged = record(stranger, 400)
        short = record(owner, 40)
        other_key = peers_key(bytes(32))

        async def store(value: Any, expires_s: float, subkey: Any = None, dht_key: bytes = key) -> bool:
            return bool(await evil.store(dht_key, value, expires_s, subkey=subkey, exclude_self=True))

        assert not await store(forged[2], float(forged[3]), owner.public), "another's subkey"
        assert not await store(ad[2], later, owner.public), "another expiry than was signed"
        assert not await store(ad[2], ad[3] + 0.5, owner.public)
        assert not await store(ad[2], float("inf"), owner.public)
        assert not await store(ad[2], float("nan"), owner.public)
        assert not await store(b"plain", later), "a plain value would wipe the dictionary"
        assert not await store({1: 2}, later, owner.public), "a map with integer keys would hang readers"
        assert not await store(b"x" * 5000, later, owner.public)
        assert not await store(forged[2], float(forged[3]), stranger.public, other_key), "another run's key"
        far = record(stranger, 1700)
        tomorrow = make_dht_record(stranger, key, DhtKind.AGGREGATOR, b"", int(time.time()) + 86400)
        assert not await store(tomorrow, float(int(time.time()) + 86400), stranger.public)
        assert await store(far[2], float(far[3]), stranger.public), "any signer may publish when the run is not known"
        await store(short[2], float(short[3]), owner.public)
        entry = boot._node.protocol.storage.get(_dht_id(key)).value
        assert entry.key_to_heap[owner.public].expiration_time == ad[3], "an older record must not shorten the newer"
        assert await reader.lookup(key) == {owner.public: ad[2], stranger.public: far[2]}
        for raw in (b"\xc1", b"\xdd\xff\xff\xff\xff", msgpack.packb({1: 2})):
            answer = await evil.protocol.call_store(boot._node.peer_id, [_dht_id(key)], [raw], later, [b"sub"])
            assert not answer or answer == [False]
        assert len(await reader.lookup(key)) == 2
        await evil.shutdown()
        await p2p.shutdown()


async def test_an_aggregator_that_the_run_does_not_name_is_not_stored() -> None:
    named, stranger = PrivateKey.generate(), PrivateKey.generate()
    async with (
        bootstrap(aggregators={RUN: frozenset({named.public})}) as (_, address),
        node([address]) as one,
    ):
        await one.publish(*record(named))
        with pytest.raises(DirectoryError, match="no other node took the record"):
            await one.publish(*record(stranger))
        assert set(await one.lookup(aggregators_key(RUN))) == {named.public}


async def test_a_node_that_answers_with_an_endless_expiry_cannot_end_the_search() -> None:
    """hivemind stops a search at the first answer whose dictionary claims a late enough expiry, even an empty one."""
    async with (
        bootstrap() as (_, address),
        node([address], listen=f"127.0.0.1:{free_port()}") as evil,
        node([address, *evil.multiaddrs()]) as reader,
    ):
        ad = record(PrivateKey.generate())
        await reader.publish(*ad)
        empty = DictionaryDHTValue()
        empty.latest_expiration_time = float("inf")
        storage = evil._node.protocol.storage
        del storage[_dht_id(ad[0])]
        super(type(storage), storage).store(_dht_id(ad[0]), empty, float("inf"))
        for _ in range(5):
            assert await reader.lookup(ad[0]) == {ad[1]: ad[2]}


async def test_subkeys_of_a_key_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bootstrap() as (_, address), node([address]) as one:
        monkeypatch.setattr("peer.net.hivemind_directory._SUBKEYS_MAX", 3)
        keys = [PrivateKey.generate() for _ in range(4)]
        for key in keys[:3]:
            await one.publish(*record(key))
        with pytest.raises(DirectoryError):
            await one.publish(*record(keys[3]))
        await one.publish(*record(keys[0], 240))
        assert set(await one.lookup(aggregators_key(RUN))) == {key.public for key in keys[:3]}


async def test_a_killed_daemon_is_started_again_and_a_frozen_node_costs_bounded_time() -> None:
    notices: list[str] = []
    async with bootstrap() as (boot, address), node([address], notices=notices, check_s=0.3) as one:
        ad = record(PrivateKey.generate())
        await one.publish(*ad)
        os.kill(one._node.p2p._child.pid, signal.SIGKILL)
        await until(lambda: any("started again" in notice for notice in notices))
        await until(lambda: one._daemon_alive() and one._peers() == 1)
        assert await one.lookup(ad[0]) == {ad[1]: ad[2]}
        os.kill(boot._node.p2p._child.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(11):
                with suppress(DirectoryError):
                    assert await one.lookup(ad[0]) == {}
        finally:
            os.kill(boot._node.p2p._child.pid, signal.SIGCONT)


_PROGRAM = """
import asyncio, signal, sys
from peer.net.directory import bootstrap_multiaddr, open_directory
from protocol.identity import PrivateKey
async def main():
    stop = asyncio.Event()
    if sys.argv[2] == "orderly":
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    key = PrivateKey.from_bytes(b"b" * 32)
    place = ("127.0.0.1", int(sys.argv[1]))
    boot = await open_directory(identity=key, run_ids=[bytes(32)], bootstraps=[], listen="%s:%d" % place, notice=str)
    address = bootstrap_multiaddr(key.public, *place)
    node = await open_directory(identity=None, run_ids=[bytes(32)], bootstraps=[address], listen=None, notice=str)
    assert (await node.health()).connected
    print(*(d._node.p2p._child.pid for d in (boot, node)), flush=True)
    try:
        await stop.wait()
    finally:
        await node.close()
        await boot.close()
asyncio.run(main())
"""


@pytest.mark.slow
async def test_no_daemon_outlives_its_program_and_none_makes_noise() -> None:
    ends = [
        (signal.SIGINT, "orderly"),
        (signal.SIGTERM, "orderly"),
        (signal.SIGTERM, "abrupt"),
        (signal.SIGKILL, "abrupt"),
    ]
    await asyncio.gather(*(_end_a_program(number, style) for number, style in ends))


async def _end_a_program(number: signal.Signals, style: str) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(free_port()), style]
    pipe = subprocess.PIPE
    program = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, start_new_session=True)
    assert program.stdout is not None
    assert program.stderr is not None
    line = await program.stdout.readline()
    assert line, await program.stderr.read()
    daemons = [int(pid) for pid in line.split()]
    assert len(daemons) == 2
    assert all(_lives(pid) for pid in daemons)
    os.killpg(program.pid, number)  # as Ctrl+C does: to the whole group of the terminal
    noise = (await program.stderr.read()).decode()
    code = await program.wait()
    await until(lambda: not any(_lives(pid) for pid in daemons), timeout_s=8)
    if style == "orderly":
        assert (code, noise) == (0, ""), (number, noise)
    else:
        assert code != 0
        assert "Event loop is closed" not in noise
        assert "was destroyed" not in noise


async def test_what_cannot_run_here_falls_back_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = bootstrap_multiaddr(BOOT.public, "127.0.0.1", free_port())
    async with node([]) as nothing:
        assert (nothing.kind, nothing.reason) == ("static", "no bootstrap is known")
    monkeypatch.setattr(daemon_module, "P2PD_FILENAME", "no-such-file")
    async with node([address]) as broken:
        assert broken.kind == "static"
        assert "cannot run here" in broken.reason
        assert "no-such-file" in broken.reason
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "peer.net.hivemind_directory", raising=False)
        patch.setitem(sys.modules, "hivemind.p2p.p2p_daemon", None)
        async with node([address]) as missing:
            assert missing.kind == "static"
            assert "hivemind cannot be used here" in missing.reason


async def test_the_static_directory_keeps_what_this_process_published() -> None:
    directory: Directory = StaticDirectory("a test")
    ad = record(PrivateKey.generate())
    await directory.publish(*ad)
    assert await directory.lookup(ad[0]) == {ad[1]: ad[2]}
    assert await directory.lookup(peers_key(RUN)) == {}
    health = await directory.health()
    assert (health.connected, health.problem, directory.good_peers()) == (False, "a test", ())
    await directory.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/ip4/1.2.3.4/tcp/1",
        "/ip4/1.2.3.4/udp/1/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty",
        "/ip4/1.2.3.4/tcp/0/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty",
        "/ip4/1.2.3.4/tcp/9/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1t0",
        "/ip4/1.2.3.4,/tcp/9/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty",
        "/dns4//tcp/9/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty",
        "/dns4/a\nb/tcp/9/p2p/12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty",
    ],
)
def test_what_is_no_bootstrap_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_multiaddr(text)
    assert caught.value.code is Code.BAD_INVITE


def test_multiaddrs_of_all_kinds_of_host() -> None:
    name = "12D3KooWEmrvLmS1HD6MknBDXDYVQre6suDMjMwJ62m5c192x1ty"
    for host, start in [("1.2.3.4", "/ip4/1.2.3.4"), ("::1", "/ip6/::1"), ("boot.example", "/dns4/boot.example")]:
        made = bootstrap_multiaddr(BOOT.public, host, 31337)
        assert made.startswith(f"{start}/tcp/31337/p2p/12D3KooW")
        assert len(made.rpartition("/")[2]) == len(name)
        check_multiaddr(made)
    for host in ("", "a/b", "a,b", " a"):
        with pytest.raises(ValueError, match="not a host"):
            bootstrap_multiaddr(BOOT.public, host, 1)


def _place(address: str) -> tuple[str, int]:
    parts = address.split("/")
    return parts[2], int(parts[4])


def _dht_id(dht_key: bytes) -> Any:
    return DHTID.generate(dht_key)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"

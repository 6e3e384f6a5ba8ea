"""Whatever happens to clocks, links, disks and processes, rounds go on and all hold the same parameters.

`make chaos` runs longer forms of some of these and prints figures.
"""

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.chaos.boundaries import JumpingClock
from tests.chaos.siege import END_S, PEERS, Siege
from tests.chaos.training import READY_S, Swarm, cut_every, settings_of, slowed
from tests.peer.proxy import Faults, Proxy, proxy_thread
from tests.peer.test_swarm import ledger

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(400)]

SEED = 5
STOP_S = 20.0
FULL_S = 3.0
MBIT_PER_S = 125_000.0  # bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes; the test passes over itself where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_of_the_aggregator_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    siege = Siege(small_disk, quorum=PEERS, log=tmp_path / "aggregator")
    ballast = small_disk / "ballast"
    async with siege.peers_live():
        child = siege.start()
        await asyncio.to_thread(child.wait_event, "round closed", END_S, 2)
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        await asyncio.sleep(FULL_S)
        stuck = max(peer.head for peer in siege.peers)
        ballast.unlink()
        # It ends when a record cannot be written; packets that cannot be are sent again by their peers.
        if child.process.is_alive():
            await asyncio.to_thread(child.wait_event, "round closed", END_S, stuck + 2)
            child.kill()
        else:
            assert child.wait_end(END_S) == 1 and "SL803" in child.told(), child.told()
        siege.ended(-9)
        await siege.rest()
    siege.check(SEED)


async def test_an_aggregator_whose_clock_jumps_behind_links_that_are_cut(tmp_path: Path) -> None:
    async with Proxy(0) as proxy:
        siege = Siege(tmp_path, quorum=PEERS, through_port=proxy.port)
        proxy.target_port = int(siege.invite.addresses[0].rpartition(":")[2])
        cutter = asyncio.create_task(cut_every(proxy, 1.0))
        async with siege.peers_live():
            await siege.rest(30, JumpingClock((0.0, 3600.0, -7200.0, 86400.0), 0.7))
        cutter.cancel()
    assert proxy.cuts > 3
    siege.check(SEED)
    # Peers learn from the records how long rounds take.
    assert all(0 <= record.closed_ms - record.opened_ms < 1000 * END_S for record in ledger(siege.path))


def test_a_stopped_aggregator_holds_a_swarm_up_and_no_more(tmp_path: Path) -> None:
    names = ("one", "two")
    with Swarm(tmp_path, settings_of(steps=10, peers=2, grace_s=(0.5, 3.0))) as swarm:
        aggregator = swarm.aggregator()
        for name in names:
            swarm.peer(name)
        aggregator.wait_event("round closed", READY_S, 3)
        aggregator.signal(signal.SIGSTOP)
        time.sleep(STOP_S)
        assert all(swarm.children[name].all("connection lost") for name in names), "they notice that nothing comes"
        aggregator.signal(signal.SIGCONT)
        swarm.wait_all(names, 3, READY_S)
    swarm.check_roots(names)
    assert all(record.round == 0 or record.entries for record in swarm.records())


def test_slow_and_far_peers_are_counted(tmp_path: Path) -> None:
    """One peer has a tenth of the time, one a link of 1 Mbit/s; two have neither."""
    names = ("one", "two", "slow", "far")
    settings = settings_of(steps=40, peers=2, hidden=64, k=256, grace_s=(0.5, 3.0))
    with ExitStack() as stack:
        swarm = stack.enter_context(Swarm(tmp_path, settings))
        proxy = stack.enter_context(proxy_thread(swarm.port, Faults(bytes_per_s=MBIT_PER_S)))
        swarm.aggregator()
        for name in names:
            swarm.peer(name, proxy if name == "far" else None)
        swarm.children["slow"].wait_event("stored", READY_S)
        stack.enter_context(slowed(swarm.children["slow"], 0.1))
        for name in ("slow", "far"):
            swarm.wait_counted(name, 2, READY_S)
        swarm.wait_all(["one", "two"], 1, READY_S)
    assert proxy.up_bytes > 0
    swarm.check_roots(names)
    for name in ("slow", "far"):
        assert len(swarm.counted(name)) >= 2

"""Outer parameters from several sources over real sockets, with cut, slow, silent and lying ones among them."""

import asyncio
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from peer.download import Download, Rules
from peer.find import Place
from peer.net.errors import LinkError
from peer.net.link import Link
from peer.net.service import serve
from peer.partial import PartialState
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.layout import piece_hashes, state_pieces, state_root
from protocol.limits import PIECE_BYTES
from tests.net.room import AGGREGATOR, RUN, TLS, House
from tests.peer.proxy import Faults, Proxy

pytestmark = pytest.mark.net

SEED = 20
FLAT: NDArray[np.float32] = np.random.default_rng(SEED).normal(size=10 * PIECE_BYTES // 4 + 12_345).astype(np.float32)
ROOT, HASHES = state_root(FLAT), piece_hashes(FLAT)
NEEDED = FLAT.nbytes
QUICK = Rules(stall_s=1.0, rest_s=1.0, patience_s=3.0, report_s=0.5)


class Donor(House):
    """Offers the state, and counts the pieces that it was asked for. `lies` are pieces with a flipped bit."""

    def __init__(self, lies: Sequence[int] = (), lacks: bool = False) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._lies, self._lacks = lies, lacks

    async def blob(self, kind: str, digest: bytes) -> bytes | Path | None:
        if self._lacks or kind not in ("state", "piece"):
            return None
        if kind == "state":
            return b"".join(HASHES) if digest == ROOT else None
        index = HASHES.index(digest)
        self.asked.append(index)
        piece = bytearray(state_pieces(FLAT)[index])
        if index in self._lies:
            piece[len(piece) // 3] ^= 4
        return bytes(piece)


@asynccontextmanager
async def served(donor: House, folder: Path) -> AsyncIterator[int]:
    spool = folder / f"spool-{id(donor)}"
    server = await serve(donor, host="127.0.0.1", port=0, key=AGGREGATOR, run_id=RUN, tls=TLS, spool=spool)
    try:
        yield server.port
    finally:
        await server.close(0.2)


def place(port: int) -> Place:
    return Place(f"127.0.0.1:{port}", (AGGREGATOR.public,), None)


async def open_link(place: Place) -> Link:
    return await Link.open(
        place.address,
        run_id=RUN,
        key=PrivateKey.generate(),
        expect_aggregators=place.aggregators,
        certificate_sha256=place.certificate_sha256,
    )


def download(folder: Path, *ports: int, rules: Rules = QUICK, held: NDArray[np.float32] | None = None) -> Download:
    async def places() -> list[Place]:
        return [place(port) for port in ports]

    return Download(PartialState(folder / "partial", ROOT, NEEDED), places, open_link, rules=rules, held=held)


def assert_complete(folder: Path) -> None:
    state = PartialState(folder / "partial", ROOT, NEEDED)
    assert not state.missing and state.held_bytes == NEEDED
    assert np.array_equal(state.flat(), FLAT)
    assert not list((folder / "partial").rglob("*.part"))


async def test_with_a_connection_cut_every_few_megabytes_next_to_nothing_comes_twice(tmp_path: Path) -> None:
    async with (
        served(Donor(), tmp_path) as port,
        Proxy(port, Faults(cut_after_bytes=3_000_000, bytes_per_s=2e7)) as proxy,
    ):
        fetching = download(tmp_path, proxy.port)
        await fetching.run()
    assert_complete(tmp_path)
    assert proxy.cuts >= 10
    assert fetching.received_bytes == NEEDED
    assert proxy.down_bytes <= 1.05 * NEEDED


async def test_a_source_that_flips_one_bit_is_never_asked_again(tmp_path: Path) -> None:
    liar, honest = Donor(lies=range(11)), Donor()
    async with served(liar, tmp_path) as first, served(honest, tmp_path) as second:
        with capture_logs() as logs:
            await download(tmp_path, first, second).run()
    assert_complete(tmp_path)
    dropped = [entry for entry in logs if entry["event"] == "source dropped"]
    assert [entry["address"] for entry in dropped] == [f"127.0.0.1:{first}"] and dropped[0]["for_good"]
    assert len(liar.asked) <= QUICK.lanes and sorted(set(honest.asked)) == list(range(11))


async def test_one_lie_among_many_good_pieces_is_enough(tmp_path: Path) -> None:
    liar = Donor(lies=[1])
    async with served(liar, tmp_path) as first, served(Donor(), tmp_path) as second:
        await download(tmp_path, first, second).run()
    assert_complete(tmp_path)


async def test_when_all_lie_the_download_gives_up_and_keeps_what_is_good(tmp_path: Path) -> None:
    async with served(Donor(lies=[10]), tmp_path) as port:
        with pytest.raises(LinkError):
            await download(tmp_path, port).run()
    missing = PartialState(tmp_path / "partial", ROOT, NEEDED).missing
    # The other lane's piece may have been on its way when the source was dropped.
    assert 10 in missing and len(missing) <= QUICK.lanes
    async with served(Donor(), tmp_path) as port:
        await download(tmp_path, port).run()
    assert_complete(tmp_path)


async def test_a_source_that_stalls_loses_its_pieces_to_others(tmp_path: Path) -> None:
    async with (
        served(Donor(), tmp_path) as port,
        Proxy(port, Faults(stall_after_bytes=1_000_000)) as stalls,
        Proxy(port, Faults(bytes_per_s=8e6)) as works,
    ):
        await download(tmp_path, stalls.port, works.port).run()
        assert_complete(tmp_path)
        assert stalls.down_bytes + works.down_bytes <= 1.05 * NEEDED


async def test_a_slow_source_sends_fewer_pieces(tmp_path: Path) -> None:
    async with (
        served(Donor(), tmp_path) as port,
        Proxy(port, Faults(bytes_per_s=4e5)) as slow,
        Proxy(port, Faults(bytes_per_s=8e6)) as fast,
    ):
        await download(tmp_path, slow.port, fast.port).run()
        assert_complete(tmp_path)
        assert 0 < slow.down_bytes < fast.down_bytes / 3
        assert slow.down_bytes + fast.down_bytes <= 1.05 * NEEDED


async def test_what_nobody_has_is_said_at_once(tmp_path: Path) -> None:
    async with served(Donor(lacks=True), tmp_path) as port:
        with pytest.raises(ProtocolError) as raised:
            await download(tmp_path, port).run()
    assert raised.value.code == Code.NOT_FOUND


async def test_without_any_source_it_gives_up_after_a_while(tmp_path: Path) -> None:
    async with Proxy(9, Faults(refuse=True)) as proxy:
        with pytest.raises(LinkError):
            await download(tmp_path, proxy.port).run()


async def test_pieces_that_are_here_already_are_not_fetched(tmp_path: Path) -> None:
    held, donor = FLAT.copy(), Donor()
    held[5 * PIECE_BYTES // 4 + 7] += 1
    async with served(donor, tmp_path) as port:
        await download(tmp_path, port, held=held).run()
    assert_complete(tmp_path)
    assert donor.asked == [5]


async def test_the_beginning_of_a_piece_that_rotted_is_fetched_again_and_nobody_is_blamed(tmp_path: Path) -> None:
    state = PartialState(tmp_path / "partial", ROOT, NEEDED)
    with state.append_to(3) as file:
        file.write(bytes(100_000))
    donor = Donor()
    async with served(donor, tmp_path) as port:
        await download(tmp_path, port).run()
    assert_complete(tmp_path)
    assert donor.asked.count(3) == 2


async def test_memory_is_bounded_by_the_pieces_under_way(tmp_path: Path) -> None:
    async with served(Donor(), tmp_path) as port:
        fetching = download(tmp_path, port)
        tracemalloc.start()
        try:
            await fetching.run()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # Two lanes with a piece each, as it grows, as it is handed over and as it is hashed, and as much in the donor.
    assert peak <= 8 * PIECE_BYTES < NEEDED


def test_a_damaged_file_on_the_disk_is_noticed_at_the_next_start(tmp_path: Path) -> None:
    state = PartialState(tmp_path / "partial", ROOT, NEEDED)
    state.set_hashes(b"".join(HASHES))
    for index, piece in enumerate(state_pieces(FLAT)):
        assert state.finish(index, piece)
    assert not state.finish(4, bytes(PIECE_BYTES)) and not state.missing
    with (state.folder / "data").open("r+b") as file:
        file.seek(2 * PIECE_BYTES + 9)
        file.write(b"\0")
    assert PartialState(tmp_path / "partial", ROOT, NEEDED).missing == {2}
    with pytest.raises(ProtocolError):
        state.set_hashes(b"".join(reversed(HASHES)))
    other = PartialState(tmp_path / "partial", bytes(32), NEEDED)
    assert len(other.missing) == 11 and not state.folder.exists()


CHILD = """
import asyncio, sys
from pathlib import Path
from peer.download import Rules
from tests.peer.test_download import download

async def main():
    fetching = download(Path(sys.argv[1]), int(sys.argv[2]), rules=Rules())
    await fetching.run()
    print("received", fetching.received_bytes)

asyncio.run(main())
"""


def bytes_on_disk(folder: Path) -> int:
    """What of the state is there, whole pieces and beginnings."""
    state = PartialState(folder / "partial", ROOT, NEEDED)
    return state.held_bytes + sum(len(state.beginning(index)) for index in state.missing)


@pytest.mark.slow
async def test_a_killed_process_goes_on_at_the_very_byte(tmp_path: Path) -> None:
    async with served(Donor(), tmp_path) as port, Proxy(port, Faults(bytes_per_s=4e6)) as proxy:
        before = 0
        for kills in range(5):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CHILD, str(tmp_path), str(proxy.port), stdout=subprocess.PIPE
            )
            reading, carried = asyncio.create_task(child.communicate()), proxy.down_bytes
            while not reading.done() and (kills == 4 or proxy.down_bytes - carried < 7_000_000):
                await asyncio.wait({reading}, timeout=0.02)
            if kills == 4:
                break
            child.send_signal(signal.SIGKILL)
            await reading
            assert bytes_on_disk(tmp_path) > before, "each process gets on"
            before = bytes_on_disk(tmp_path)
        printed, _ = await reading
    assert child.returncode == 0
    assert_complete(tmp_path)
    assert int(printed.split()[-1]) == NEEDED - before

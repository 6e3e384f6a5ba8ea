"""A swarm in one process: real aggregators and peers over real sockets, so that a test can make one misbehave."""

import asyncio
import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from peer.aggregator import Aggregator
from peer.client import Client
from peer.config import PeerConfig
from peer.net.service import serve
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.store import Home, atomic_write, load_key
from peer.telemetry import Telemetry
from protocol.identity import PrivateKey
from protocol.run import RunSettings
from tests.peer.swarm import Event


def make_run_folder(folder: Path, settings: RunSettings, quorum: int) -> Path:
    """One run for all swarms of a test file, so that they train the same model on the same data with the same keys.

    Its rounds wait long for so many packets, and some seconds for the others, lest a busy machine decide what happens.
    """
    patient = dataclasses.replace(settings.rounds, quorum=quorum, grace_s_min=4.0, grace_s_max=60.0, deadline_s=100.0)
    new_run(dataclasses.replace(settings, rounds=patient), folder / "run", RunPlace("127.0.0.1", 7700, 7701))
    (folder / "data").mkdir()
    return folder


def peer_key(number: int) -> PrivateKey:
    """The key of the peer with this number, from 0: the same in every swarm."""
    return PrivateKey.from_bytes(bytes([number + 1]) * 32)


async def swarm(
    folder: Path,
    run_folder: Path,
    aggregator: type[Aggregator] = Aggregator,
    peers: Sequence[type[Client]] = (Client, Client),
) -> list[Event]:
    """Let these peers finish the run with this aggregator, and return everything that was logged."""
    threads = torch.get_num_threads()
    try:
        return await _swarm(folder, run_folder, aggregator, peers)
    finally:
        torch.set_num_threads(threads)


async def _swarm(
    folder: Path, run_folder: Path, aggregator: type[Aggregator], peers: Sequence[type[Client]]
) -> list[Event]:
    shutil.copytree(run_folder / "run", folder / "run")
    operator = OperatorFolder(folder / "run")
    signed, invite = operator.load()
    home, stop = Home(operator.aggregator_home), asyncio.Event()
    key, run_id, tls = load_key(home.key_path), signed.config.run_id, operator.tls()
    log, silent = folder / "log", io.StringIO()
    with (
        Telemetry("swarm", file=log, json_stdout=False, stderr=silent) as telemetry,
        closing(home.run(run_id)) as store,
    ):
        program = aggregator(signed, key, store)
        server = await serve(
            program, host="127.0.0.1", port=0, key=key, run_id=run_id, tls=tls, spool=home.path / "spool"
        )
        places = (f"127.0.0.1:{server.port}",)
        here = dataclasses.replace(invite, addresses=places, bootstraps=(), certificate_sha256=tls.fingerprint)
        clients = []
        for number, kind in enumerate(peers):
            peer = Home(folder / f"peer-{number}")
            (peer.path / "data").symlink_to(run_folder / "data")
            atomic_write(peer.key_path, peer_key(number).to_text().encode("ascii"), mode=0o600)
            config = PeerConfig(home=peer.path, device="cpu", dtype="float32", threads=1, micro_batch=4)
            clients.append(kind(here, peer, config, telemetry, stop))
        try:
            async with asyncio.timeout(100):
                await asyncio.gather(*(client.join() for client in clients))
        finally:
            await server.close(0.5)
            await program.close()
    return [json.loads(line) for line in log.read_text().splitlines()]


def fields(events: list[Event], event: str, field: str) -> list[Any]:
    return [each[field] for each in events if each["event"] == event]

"""`join`: take part in a run."""

import argparse
import asyncio
import dataclasses
from pathlib import Path

from peer.commands.options import AddParser, add_json, add_plaintext, invite_text, until_stopped
from peer.config import PeerConfig, read_config
from peer.telemetry import Telemetry


def add(add_parser: AddParser) -> None:
    """Add `join`."""
    join = add_parser("join", help="take part in a run: all you need is its invite")
    join.add_argument("invite", help="the word that starts with slp1, or a file that holds it")
    join.add_argument("--home", type=Path, help="folder of this peer's key and files (default ~/.sparseloco-peer)")
    join.add_argument("--config", type=Path, help="TOML file with this peer's settings")
    join.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    join.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="type of the matrix products")
    join.add_argument("--threads", type=int, help="CPU threads for training")
    join.add_argument(
        "--serve", metavar="HOST:PORT", help="offer others the parameters, under this address of this machine"
    )
    join.add_argument(
        "--patience", type=float, default=30.0, metavar="SECONDS", help="how long to try the first connection (30)"
    )
    join.set_defaults(command=_join)
    add_json(join)
    add_plaintext(join)


def _config(arguments: argparse.Namespace) -> PeerConfig:
    config = read_config(arguments.config) if arguments.config else PeerConfig()
    chosen = {
        name: getattr(arguments, name)
        for name in ("home", "device", "dtype", "threads", "serve")
        if getattr(arguments, name) is not None
    }
    return dataclasses.replace(config, **chosen)


def _join(arguments: argparse.Namespace) -> int:
    from peer.store import Home
    from protocol.invite import Invite

    invite = Invite.from_text(invite_text(arguments.invite))
    config = _config(arguments)
    home = Home(config.home)

    async def program(stop: asyncio.Event) -> None:
        from peer.client import Client

        client = Client(
            invite,
            home,
            config,
            telemetry,
            stop,
            plaintext=arguments.plaintext_local,
            patience_s=arguments.patience,
        )
        await client.join()

    with (
        home.lock(),
        Telemetry("peer", file=home.log_path, json_stdout=arguments.json or config.log_json) as telemetry,
    ):
        return until_stopped(program)

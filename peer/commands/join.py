"""`join`: take part in a run."""

import argparse
import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from peer.commands.options import (
    AddParser,
    add_json,
    add_plaintext,
    add_taste,
    add_tracker,
    config_of,
    read_invite,
)
from peer.config import PeerConfig
from peer.telemetry import Telemetry
from peer.trackers import open_tracker

if TYPE_CHECKING:
    from peer.client import Client
    from peer.store import Home
    from protocol.invite import Invite


def add(add_parser: AddParser) -> None:
    """Add `join`."""
    join = add_parser("join", help="take part in a run: all you need is its invite")
    join.add_argument("invite", help="the word that starts with slp1, or a file that holds it")
    add_taste(join)
    join.add_argument(
        "--serve", metavar="HOST:PORT", help="offer others the parameters, under this address of this machine"
    )
    add_tracker(join)
    join.add_argument(
        "--patience", type=float, default=30.0, metavar="SECONDS", help="how long to try the first connection (30)"
    )
    join.set_defaults(command=_join)
    add_json(join)
    add_plaintext(join)


def _join(arguments: argparse.Namespace) -> int:
    from peer.store import Home

    began_s = time.monotonic()
    invite = read_invite(arguments.invite)
    config = config_of(arguments)
    home = Home(config.home)
    json_stdout = arguments.json or config.log_json
    with (
        home.lock(),
        Telemetry(
            "peer",
            file=home.log_path,
            json_stdout=json_stdout,
            tracker=open_tracker(config.tracker) if config.tracker else None,
        ) as telemetry,
    ):
        return asyncio.run(_take_part(invite, home, config, telemetry, arguments, began_s))


async def _take_part(
    invite: "Invite",
    home: "Home",
    config: PeerConfig,
    telemetry: Telemetry,
    arguments: argparse.Namespace,
    began_s: float,
) -> int:
    """Be a peer until the run ends or Ctrl+C: the first one publishes what is done, the second ends it at once."""
    stop, asked, clients = asyncio.Event(), list[int](), list["Client"]()

    def ask(number: int) -> None:
        if asked:
            telemetry.console.show_cursor()
            os._exit(128 + number)
        asked.append(number)
        telemetry.say("leaving; Ctrl+C again leaves at once")
        if clients:
            clients[0].finish(INTERRUPT_S)
        else:
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask, number)
    from peer.client import INTERRUPT_S, Client

    client = Client(
        invite,
        home,
        config,
        telemetry,
        stop,
        plaintext=arguments.plaintext_local,
        patience_s=arguments.patience,
        began_s=began_s,
    )
    clients.append(client)
    await client.join()
    if stop.is_set():
        # A step or a build under way in a thread would hold the process up until it ends; nobody wants its result.
        telemetry.close()
        sys.stdout.flush()
        os._exit(0)
    return 0

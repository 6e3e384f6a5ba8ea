"""What several commands share: options, the invite as an argument, and programs that end on Ctrl+C."""

import argparse
import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from peer.config import PeerConfig, read_config
from peer.errors import os_errors
from peer.trackers import FORM
from protocol.errors import Code, ProtocolError

if TYPE_CHECKING:
    from protocol.invite import Invite

PATH_CHARS_MAX = 250  # a name that is longer is a damaged invite
FILE_CHARS_MAX = 1 << 16


AddParser = Callable[..., argparse.ArgumentParser]


def until_stopped(program: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> int:
    """Run a program until it ends or Ctrl+C: the first asks it to leave cleanly, the second ends it at once."""

    async def run() -> int:
        stop = asyncio.Event()
        asked: list[int] = []

        def ask(number: int) -> None:
            if asked:
                os._exit(128 + number)
            asked.append(number)
            print("leaving; Ctrl+C again leaves at once", file=sys.stderr)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ask, number)
        await program(stop)
        return 0

    return asyncio.run(run())


def invite_text(argument: str) -> str:
    """The invite itself, or what the file of this name holds."""
    if argument.startswith("slp1") or len(argument) > PATH_CHARS_MAX:
        return argument
    path = Path(argument)
    with os_errors(path):
        if not path.is_file():
            return argument
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(FILE_CHARS_MAX).strip()


def read_invite(argument: str) -> "Invite":
    """The invite itself, or the one in the file of this name. Raises ProtocolError BAD_INVITE and UserError."""
    from protocol.invite import Invite

    text = invite_text(argument)
    if text == argument and not text.startswith("slp"):
        raise ProtocolError(Code.BAD_INVITE, f"{text!r} is no file here, and does not start with slp1")
    return Invite.from_text(text)


def add_json(command: argparse.ArgumentParser) -> None:
    """The option of programs that write events."""
    command.add_argument("--json", action="store_true", help="also write each event to stdout as a JSON line")


def add_tracker(command: argparse.ArgumentParser) -> None:
    """The option of programs whose events make curves."""
    command.add_argument("--tracker", metavar="KIND:PLACE", help=f"also draw curves: {FORM}, each an extra to install")


def add_plaintext(command: argparse.ArgumentParser) -> None:
    """The option of programs that talk to an aggregator."""
    command.add_argument("--plaintext-local", action="store_true", help="no TLS; works on the loopback interface only")


def add_taste(command: argparse.ArgumentParser) -> None:
    """The options of programs that train on this machine."""
    command.add_argument("--home", type=Path, help="folder of this peer's key and files (default ~/.sparseloco-peer)")
    command.add_argument("--config", type=Path, help="TOML file with this peer's settings")
    command.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="type of the matrix products")
    command.add_argument("--threads", type=int, help="CPU threads for training")
    command.add_argument(
        "--micro-batch", type=int, metavar="SEQUENCES", help="how many at a time (default: found by trying)"
    )


def config_of(arguments: argparse.Namespace) -> PeerConfig:
    """The settings file, if one is named, with the options instead where they are given. Raises UserError."""
    config = read_config(arguments.config) if arguments.config else PeerConfig()
    chosen = {
        name: value
        for name in ("home", "device", "dtype", "threads", "micro_batch", "serve", "tracker")
        if (value := getattr(arguments, name, None)) is not None
    }
    return dataclasses.replace(config, **chosen)

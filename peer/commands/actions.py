"""What an operator does with a run that goes on: `run amend`, `run pause` and so on, `run peers` and `run invite`."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peer.commands.options import AddParser, add_plaintext, invite_text
from peer.errors import UserCode, UserError
from peer.telemetry import Telemetry

if TYPE_CHECKING:
    from peer.amend import Wish


def add_actions(add_parser: AddParser) -> None:
    """Add the actions to `run`."""
    amend = _signed(add_parser, "amend", "change settings of the run from a round on")
    amend.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="TABLE.KEY=VALUE",
        help="a setting of [inner], [compression], [outer] or [rounds]; may be given several times",
    )
    _signed(add_parser, "pause", "let no more rounds open")
    _signed(add_parser, "resume", "let rounds open again", starts=False)
    rollback = _signed(add_parser, "rollback", "take the parameters back to those after an earlier round")
    rollback.add_argument(
        "--to", type=int, required=True, metavar="ROUND", help="the round whose state is to come back"
    )
    for name, what in (("ban", "let no packet of a peer count"), ("unban", "let packets of a peer count again")):
        _signed(add_parser, name, what).add_argument(
            "peer", metavar="PEER", help="its key, or the beginning of it as `run peers` shows it"
        )
    _add_peers(add_parser("peers", help="show who contributes, and what was refused"))
    _add_invite(add_parser("invite", help="print the run's invite, or make one for a new address"))


def _signed(add_parser: AddParser, name: str, what: str, *, starts: bool = True) -> argparse.ArgumentParser:
    """A command that signs an amendment and brings it to the aggregators."""
    command = add_parser(name, help=what)
    command.add_argument("folder", type=Path, help="the folder that `run new` made, with operator.key in it")
    if starts:
        command.add_argument(
            "--from",
            dest="start",
            default="+1",
            metavar="ROUND",
            help="the first round that it holds for, or +N for the N-th after the open one (default +1)",
        )
    command.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    add_plaintext(command)
    command.set_defaults(command=_act, action=name)
    return command


def _act(arguments: argparse.Namespace) -> int:
    from peer.amend import amend
    from peer.operator import OperatorFolder

    wish, folder = _wish(arguments), OperatorFolder(arguments.folder)
    with _quiet("operator"):
        work = amend(folder, wish, dry_run=arguments.dry_run, plaintext=arguments.plaintext_local)
        lines = asyncio.run(work)
    print("\n".join(lines))
    return 0


@contextmanager
def _quiet(program: str) -> Iterator[None]:
    """Leave out what the link and the directory report while somebody only wants an answer."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        Telemetry(program, file=None, json_stdout=False, stderr=nowhere),
    ):
        yield


def _wish(arguments: argparse.Namespace) -> "Wish":
    """What the operator wants. Raises UserError."""
    from peer.amend import Wish, parse_settings
    from protocol.amendment import Ban, Pause, Resume, Rollback, Unban

    match arguments.action:
        case "amend":
            return Wish(parse_settings(arguments.set), arguments.start)
        case "pause":
            return Wish(Pause(), arguments.start)
        case "resume":
            return Wish(Resume())
        case "rollback":
            return Wish(Rollback(arguments.to), arguments.start)
        case "ban":
            return Wish(Ban(b""), arguments.start, arguments.peer)
        case _:
            return Wish(Unban(b""), arguments.start, arguments.peer)


def _add_peers(peers: argparse.ArgumentParser) -> None:
    peers.add_argument("source", help="an invite, or a folder that holds a ledger")
    peers.add_argument("--rounds", type=int, default=200, help="how many of the last rounds to look at (200)")
    peers.add_argument("--json", action="store_true", help="write it to stdout as JSON")
    add_plaintext(peers)
    peers.set_defaults(command=_peers)


def _peers(arguments: argparse.Namespace) -> int:
    from peer.contributors import contributors_of_folder, contributors_of_run

    text, count = invite_text(arguments.source), arguments.rounds
    if count < 1:
        raise UserError(UserCode.BAD_ARGUMENT, "there are no such last rounds", "give --rounds 1 or more")
    if text.startswith("slp1") or text != arguments.source:
        with _quiet("peers"):
            found = asyncio.run(contributors_of_run(text, count, plaintext=arguments.plaintext_local))
    else:
        found = contributors_of_folder(Path(text), count)
    print(json.dumps(found.to_json()) if arguments.json else "\n".join(found.lines()))
    return 0


def _add_invite(invite: argparse.ArgumentParser) -> None:
    invite.add_argument("folder", type=Path, help="the folder that `run new` made, or a standby's folder in it")
    invite.add_argument("--host", help="name or address under which others now reach the aggregator and the bootstrap")
    invite.add_argument("--port", type=int, help="TCP port of the aggregator")
    invite.add_argument("--bootstrap-port", type=int, help="TCP port of the bootstrap node")
    invite.set_defaults(command=_invite)


def _invite(arguments: argparse.Namespace) -> int:
    from peer.operator import OperatorFolder, move

    folder = OperatorFolder(arguments.folder)
    before = folder.load()[1]
    invite = move(folder, arguments.host, arguments.port, arguments.bootstrap_port)
    if invite != before:
        print(
            f"{folder.invite_path} names the new place. Start the servers again, so that they use it;", file=sys.stderr
        )
        print("peers that took part before find them by the directory, new ones need this invite:\n", file=sys.stderr)
    print(invite.to_text())
    return 0

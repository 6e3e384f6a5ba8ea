"""`pause`, `resume`, `finish` and `limits`: what the owner of a machine tells a peer that runs on it."""

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peer.commands.options import AddParser
from peer.config import PeerConfig, read_config
from peer.errors import UserCode, UserError, os_errors

if TYPE_CHECKING:
    from peer.controls import Wish

ANSWER_S = 10.0
POLL_S = 0.1


def add(add_parser: AddParser) -> None:
    """Add `pause`, `resume`, `finish` and `limits`."""
    pause = add_parser("pause", help="let a running peer train no more until `resume`; it stays in the run")
    resume = add_parser("resume", help="let a paused peer train again")
    finish = add_parser("finish", help="let a running peer send what it has trained, and leave")
    limits = add_parser("limits", help="show or change how much of this machine a peer may use, also while it runs")
    for command, run in ((pause, _pause), (resume, _resume), (finish, _finish), (limits, _limits)):
        command.add_argument("--home", type=Path, help="folder of the peer (default ~/.sparseloco-peer)")
        command.set_defaults(command=run)
    limits.add_argument("--config", type=Path, help="the settings file that the peer was started with")
    limits.add_argument("--reset", action="store_true", help="take back what this command set before")
    limits.add_argument("--schedule", metavar="HOURS", help='such as "22:00-07:00" or "mon-fri 19:00-08:00, sat-sun"')
    limits.add_argument("--idle-minutes", type=float, metavar="MINUTES", help="train when nobody was here for so long")
    limits.add_argument("--on-mains", type=_yes_or_no, metavar="yes|no", help="train only while not on battery")
    limits.add_argument(
        "--exclusive-app", dest="exclusive_apps", action="append", metavar="NAME", help="pause while this program runs"
    )
    limits.add_argument("--share", type=float, help="part of the time in which to train, 0.1 to 1")
    limits.add_argument(
        "--temperature-max", type=float, metavar="CELSIUS", help="pause above it, until 5 degrees below"
    )
    limits.add_argument("--up-mbit", type=float, metavar="MBIT", help="the most to send, in megabits a second")
    limits.add_argument("--down-mbit", type=float, metavar="MBIT", help="the most to receive, in megabits a second")
    limits.add_argument(
        "--mb-a-day", type=float, metavar="MB", help="go offline until midnight after so many megabytes"
    )
    limits.add_argument("--disk-mb", type=float, metavar="MB", help="the most that the home folder may take")
    limits.epilog = '0 or "" lifts a limit. Without options the limits in force are shown.'


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError("say yes or no")
    return text == "yes"


def _home(arguments: argparse.Namespace) -> Path:
    home = (arguments.home or PeerConfig().home).expanduser().absolute()
    with os_errors(home):
        is_folder = home.is_dir()
    if not is_folder:
        raise UserError(UserCode.NO_SUCH_FILE, f"no peer lives in {home}", "name the folder of the peer with --home")
    return home


def _pause(arguments: argparse.Namespace) -> int:
    return _ask(_home(arguments), lambda wish: dataclasses.replace(wish, paused=True))


def _resume(arguments: argparse.Namespace) -> int:
    return _ask(_home(arguments), lambda wish: dataclasses.replace(wish, paused=False))


def _finish(arguments: argparse.Namespace) -> int:
    from peer.controls import read_state

    home = _home(arguments)
    state = read_state(home)
    if state is None or not _runs(home):
        raise UserError(UserCode.BAD_ARGUMENT, f"no peer is running in {home}", "name its folder with --home")
    return _ask(home, lambda wish: dataclasses.replace(wish, finish=state.life))


def _limits(arguments: argparse.Namespace) -> int:
    from peer.controls import read_wish
    from peer.limits import Limits

    home, names = _home(arguments), [limit.name for limit in dataclasses.fields(Limits)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if given.get("exclusive_apps") == [""]:
        given["exclusive_apps"] = []
    Limits.of(given)
    if given or arguments.reset:
        kept = {} if arguments.reset else read_wish(home).limits
        _ask(home, lambda wish: dataclasses.replace(wish, limits={**kept, **given}))
    config = read_config(arguments.config) if arguments.config else PeerConfig()
    in_force = Limits.of(read_wish(home).limits, config.limits).in_force()
    for name, value in in_force.items():
        print(f"{name} = {json.dumps(value)}")
    if not in_force:
        print("no limits", file=sys.stderr)
    return 0


def _ask(home: Path, change: "Callable[[Wish], Wish]") -> int:
    """Write a wish down, and say what the peer makes of it."""
    from peer.controls import read_state, read_wish, write_wish

    wish = dataclasses.replace(change(read_wish(home)), token=secrets.token_hex(8))
    write_wish(home, wish)
    if not _runs(home):
        print(f"noted: no peer is running in {home} now, and the next one will know", file=sys.stderr)
        return 0
    end_s = time.monotonic() + ANSWER_S
    while time.monotonic() < end_s:
        state = read_state(home)
        if state is not None and state.token == wish.token:
            print(f"the peer in {home}: {state.state}{' ' if state.why else ''}{state.why}", file=sys.stderr)
            return 0
        time.sleep(POLL_S)
    print(f"noted: the peer in {home} has not answered yet, but will see it", file=sys.stderr)
    return 0


def _runs(home: Path) -> bool:
    """Whether a program holds this home."""
    from peer.store import Home

    try:
        with Home(home).lock():
            return False
    except UserError as error:
        if error.code != UserCode.HOME_IN_USE:
            raise
        return True

"""`run`: what an operator does with a run."""

import argparse
import sys
from pathlib import Path

from peer.commands.actions import add_actions
from peer.commands.options import AddParser


def add(add_parser: AddParser) -> None:
    """Add `run` and its actions."""
    run = add_parser("run", help="make and steer a run of your own").add_subparsers(required=True, metavar="ACTION")
    new = run.add_parser("new", help="make keys, sign the run and print its invite")
    new.add_argument("settings", type=Path, metavar="RUN.toml")
    new.add_argument("--out", type=Path, required=True, help="folder to make")
    new.add_argument(
        "--data", type=Path, metavar="FOLDER", help="the run's corpus, as `sparseloco-peer corpus` made it"
    )
    new.add_argument(
        "--host",
        default="127.0.0.1",
        help="name or address under which others reach this machine (default 127.0.0.1: only peers on it take part)",
    )
    new.add_argument("--port", type=int, default=7700, help="TCP port of the aggregator (7700)")
    new.add_argument("--bootstrap-port", type=int, default=7701, help="TCP port of the bootstrap node (7701)")
    new.add_argument(
        "--standby",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="name a further aggregator and where it will be reached; may be given several times, and not later. Each"
        " gets a folder OUT/standby-N with its own key: copy it to its machine and start `aggregate` there",
    )
    new.set_defaults(command=_new)
    add_actions(run.add_parser)


def _new(arguments: argparse.Namespace) -> int:
    from peer.operator import RunPlace, new_run, read_settings

    place = RunPlace(arguments.host, arguments.port, arguments.bootstrap_port, tuple(arguments.standby))
    invite = new_run(read_settings(arguments.settings), arguments.out, place, arguments.data)
    out = arguments.out
    print(f"The run is in {out}. Start it, each in a shell of its own:\n", file=sys.stderr)
    print(f"  sparseloco-peer bootstrap {out}\n  sparseloco-peer aggregate {out}", file=sys.stderr)
    for number in range(1, len(place.standbys) + 1):
        folder = out / f"standby-{number}"
        print(f"  sparseloco-peer aggregate {folder} --standby   (on its own machine: copy {folder})", file=sys.stderr)
    print(f"\n{_reach(place.host, place.port, place.bootstrap_port, out)}", file=sys.stderr)
    print("Give this invite to everybody who should join (sparseloco-peer join INVITE):\n", file=sys.stderr)
    print(invite.to_text())
    return 0


def _reach(host: str, port: int, bootstrap_port: int, out: Path) -> str:
    """Who can take part, as far as the address tells."""
    from peer.net.tls import is_loopback

    if is_loopback(host):
        return (
            f"{host} is this machine itself, so only peers on it can take part. To let others in:"
            f" sparseloco-peer run invite {out} --host ADDRESS"
        )
    return f"Others must reach {host} on TCP ports {port} and {bootstrap_port}: open them in firewall and router."

"""`bootstrap`, `aggregate`, `mirror` and `dashboard`: the programs that serve a run, keep a copy of it or show it."""

import argparse
from pathlib import Path

from peer.commands.options import AddParser, add_json, add_plaintext, add_tracker, read_invite, until_stopped
from peer.telemetry import Telemetry
from peer.trackers import open_tracker


def add(add_parser: AddParser) -> None:
    """Add `bootstrap`, `aggregate`, `mirror` and `dashboard`."""
    bootstrap = add_parser("bootstrap", help="serve the directory in which the swarm finds itself")
    bootstrap.add_argument("folder", type=Path, help="the folder that `run new` made")
    bootstrap.set_defaults(command=_bootstrap)
    _add_aggregate(add_parser)
    mirror = add_parser(
        "mirror", help="keep a complete copy of a run, each round checked, without taking part: for audits and backups"
    )
    mirror.add_argument("invite", help="the word that starts with slp1, or a file that holds it")
    mirror.add_argument("--home", type=Path, required=True, help="folder of the copy")
    mirror.set_defaults(command=_mirror)
    show = add_parser("dashboard", help="show the run of a mirror's folder, or of any copy of a ledger, in a browser")
    show.add_argument("folder", type=Path, help="a mirror's home, a run's folder, or a copy of one; it is only read")
    show.add_argument("--listen", metavar="HOST:PORT", help="where to listen (default 127.0.0.1 and a free port)")
    show.set_defaults(command=_dashboard)
    for command in (bootstrap, mirror, show):
        add_json(command)
    add_plaintext(mirror)


def _add_aggregate(add_parser: AddParser) -> None:
    aggregate = add_parser("aggregate", help="merge the packets of a run, or stand by to do so")
    aggregate.add_argument("folder", type=Path, help="the folder that `run new` made, or a standby's folder in it")
    aggregate.add_argument("--listen", metavar="HOST:PORT", help="where to listen (default 0.0.0.0 and the run's port)")
    aggregate.add_argument(
        "--standby",
        action="store_true",
        help="say that another aggregator leads: this one follows it, keeps a complete copy of the run, and takes over"
        " when it is silent. An aggregator in whose ledger another one signed last does so anyway",
    )
    aggregate.add_argument(
        "--lease",
        type=float,
        metavar="SECONDS",
        help="how long the leading aggregator may be silent before a standby takes over (default: the length of a"
        " round, within 10 to 60)",
    )
    aggregate.add_argument(
        "--take-over",
        action="store_true",
        help="lead from the newest record of this folder, though another aggregator led last. What only that one"
        " recorded is lost to the run, so do this only when it will not come back",
    )
    aggregate.add_argument(
        "--dashboard",
        metavar="HOST:PORT",
        help="where to show the run to browsers, and its metrics to Prometheus (default 127.0.0.1:7780, or a free port"
        " where that is taken: this machine alone). It needs no password, so name another address with care",
    )
    aggregate.add_argument("--no-dashboard", action="store_true", help="show nothing")
    aggregate.add_argument(
        "--evaluate-every",
        type=int,
        default=1,
        metavar="N",
        help="measure the validation loss of the newest parameters every N rounds, beside everything else (default 1;"
        " 0 is never). It goes into the next record",
    )
    add_tracker(aggregate)
    aggregate.set_defaults(command=_aggregate)
    add_json(aggregate)
    add_plaintext(aggregate)


def _bootstrap(arguments: argparse.Namespace) -> int:
    from peer.bootstrap import bootstrap
    from peer.operator import OperatorFolder

    folder = OperatorFolder(arguments.folder)
    folder.load()
    with Telemetry("bootstrap", file=folder.bootstrap_home / "log.jsonl", json_stdout=arguments.json):
        return until_stopped(lambda stop: bootstrap(folder, stop))


def _aggregate(arguments: argparse.Namespace) -> int:
    from peer.operator import OperatorFolder
    from peer.standby import Options, aggregate
    from peer.web.server import Address

    address = Address() if arguments.dashboard is None else Address.parse(arguments.dashboard, "--dashboard")
    options = Options(
        arguments.listen,
        arguments.plaintext_local,
        arguments.standby,
        arguments.take_over,
        arguments.lease,
        None if arguments.no_dashboard else address,
        arguments.evaluate_every,
    )
    folder = OperatorFolder(arguments.folder)
    folder.load()
    tracker = open_tracker(arguments.tracker) if arguments.tracker else None
    file = folder.aggregator_home / "log.jsonl"
    with Telemetry("aggregator", file=file, json_stdout=arguments.json, tracker=tracker):
        return until_stopped(lambda stop: aggregate(folder, stop, options))


def _mirror(arguments: argparse.Namespace) -> int:
    from peer.follow import mirror
    from peer.store import Home

    invite, home = read_invite(arguments.invite), Home(arguments.home)
    with home.lock(), Telemetry("mirror", file=home.log_path, json_stdout=arguments.json):
        return until_stopped(lambda stop: mirror(invite, home, stop, plaintext=arguments.plaintext_local))


def _dashboard(arguments: argparse.Namespace) -> int:
    from peer.web.server import Address, show

    address = Address() if arguments.listen is None else Address.parse(arguments.listen, "--listen")
    with Telemetry("dashboard", file=None, json_stdout=arguments.json):
        return until_stopped(lambda stop: show(arguments.folder, address, stop))

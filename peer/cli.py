"""The command line: `sparseloco-peer COMMAND`. Heavy rooms are imported by the command that needs them."""

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path

from peer.config import PeerConfig, read_config
from peer.errors import UserCode, UserError, os_errors, render
from peer.telemetry import Telemetry
from protocol.errors import ProtocolError

INTERRUPTED = 130
PATH_CHARS_MAX = 250  # a name that is longer is a damaged invite
FILE_CHARS_MAX = 1 << 16


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status. Users never see a traceback: bugs leave theirs in a file."""
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[2:] if argv is None else argv[1:]
    try:
        status: int = arguments.command(arguments) or 0
        return status
    except (UserError, ProtocolError) as error:
        print(render(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last door: whatever comes here is our own mistake
        place = Path("sparseloco-peer-crash.txt").absolute()
        try:
            place.write_text(traceback.format_exc())
            where = f"the details are in {place}"
        except OSError:
            where = "".join(traceback.format_exc().splitlines()[-3:])
        bug = UserError(
            UserCode.PROGRAM_DIED,
            f"this is a mistake in sparseloco-peer itself: {type(error).__name__}: {error}",
            f"start the same command again; please report it: {where}",
        )
        print(render(bug), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseloco-peer", description="Train one language model together over the open internet."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    join = commands.add_parser("join", help="take part in a run: all you need is its invite")
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

    run = commands.add_parser("run", help="make a run of your own").add_subparsers(required=True, metavar="ACTION")
    new = run.add_parser("new", help="make keys, sign the run and print its invite")
    new.add_argument("settings", type=Path, metavar="RUN.toml")
    new.add_argument("--out", type=Path, required=True, help="folder to make")
    new.add_argument("--host", default="127.0.0.1", help="name or address under which others reach the aggregator")
    new.add_argument("--port", type=int, default=7700, help="TCP port of the aggregator")
    new.add_argument("--bootstrap-port", type=int, default=7701, help="TCP port of the bootstrap node")
    new.add_argument(
        "--standby",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="name a further aggregator and where it will be reached; may be given several times. Each gets a folder"
        " OUT/standby-N with its own key: copy it to its machine and start `aggregate` there",
    )
    new.set_defaults(command=_run_new)

    bootstrap = commands.add_parser("bootstrap", help="serve the directory in which the swarm finds itself")
    bootstrap.add_argument("folder", type=Path, help="the folder that `run new` made")
    bootstrap.set_defaults(command=_bootstrap)

    aggregate = commands.add_parser("aggregate", help="merge the packets of a run, or stand by to do so")
    _add_aggregate(aggregate)

    mirror = commands.add_parser(
        "mirror", help="keep a complete copy of a run, each round checked, without taking part: for audits and backups"
    )
    mirror.add_argument("invite", help="the word that starts with slp1, or a file that holds it")
    mirror.add_argument("--home", type=Path, required=True, help="folder of the copy")
    mirror.set_defaults(command=_mirror)

    demo = commands.add_parser("demo", help="watch a whole swarm train on this machine")
    demo.add_argument("--out", type=Path, help="run folder to make (default runs/demo-DATE-TIME)")
    demo.add_argument("--peers", type=int, default=4)
    demo.add_argument("--settings", type=Path, help="RUN.toml to use instead of the demo's own")
    demo.add_argument("--rounds", type=int, help="rounds, instead of those of the settings")
    demo.set_defaults(command=_demo)

    _add_looking(commands.add_parser)

    _add_simulate(commands.add_parser("simulate", help="run a swarm of any size on a virtual clock, under faults"))

    for command in (join, bootstrap, aggregate, mirror):
        command.add_argument("--json", action="store_true", help="also write each event to stdout as a JSON line")
    for command in (join, aggregate, mirror):
        command.add_argument(
            "--plaintext-local", action="store_true", help="no TLS; works on the loopback interface only"
        )
    return parser


def _add_looking(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that look at what is there."""
    inspect = add_parser("inspect", help="say what a file of this project holds")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--run", type=Path, help="run.bin of the run, to decode packets and updates in full")
    inspect.set_defaults(command=_inspect)
    _add_audit(add_parser("audit", help="recompute rounds from packets, and name the first byte that differs"))
    _add_status(add_parser("status", help="show the chain of a run at a glance"))


def _add_audit(audit: argparse.ArgumentParser) -> None:
    audit.add_argument("folder", type=Path, help="folder of a run, of an aggregator or of a mirror")
    audit.add_argument("--from", dest="first", type=int, metavar="ROUND", help="first round (default 0)")
    audit.add_argument("--to", dest="last", type=int, metavar="ROUND", help="last round (default: the newest)")
    audit.add_argument("--json", action="store_true", help="write the report to stdout as JSON")
    audit.set_defaults(command=_audit)


def _add_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("source", help="an invite, or a folder that holds a ledger")
    status.add_argument("--rounds", type=int, default=10, help="how many of the last rounds to show (10)")
    status.add_argument("--json", action="store_true", help="write it to stdout as JSON")
    status.add_argument("--plaintext-local", action="store_true", help="no TLS; works on the loopback interface only")
    status.set_defaults(command=_status)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument("--peers", type=int, default=20)
    simulate.add_argument("--rounds", type=int, default=50)
    simulate.add_argument("--seed", type=int, default=1, help="decides everything that the other options leave open")
    simulate.add_argument("--seeds", type=int, default=1, help="simulate so many seeds, one after the other")
    simulate.add_argument("--weather", action="store_true", help="draw the swarm and its faults from the seed")
    simulate.add_argument("--faults", choices=("none", "mixed", "takeovers"), default="none")
    simulate.add_argument("--hostile", type=int, default=0, help="how many peers attack")
    simulate.add_argument("--up", type=float, default=100.0, metavar="MBIT", help="a peer's uplink, Mbit/s")
    simulate.add_argument("--down", type=float, default=100.0, metavar="MBIT", help="a peer's downlink, Mbit/s")
    simulate.add_argument("--latency-ms", type=float, default=50.0)
    simulate.add_argument("--loss", type=float, default=0.0, help="chance that a message is delayed by a loss")
    simulate.add_argument(
        "--half-life", type=float, default=0.0, metavar="SECONDS", help="of a peer's stay; 0: for ever"
    )
    simulate.add_argument("--away", type=float, default=60.0, metavar="SECONDS", help="mean time until it comes back")
    simulate.add_argument("--stragglers", type=float, default=0.0, help="share of peers that are 10 times slower")
    simulate.add_argument("--inner-seconds", type=float, default=10.0, help="time of a usual peer's inner steps")
    simulate.add_argument("--quorum", type=int, default=0, help="default: a quarter of the peers")
    simulate.add_argument("--deadline", type=float, default=0.0, metavar="SECONDS", help="default: 5 rounds and 30 s")
    simulate.add_argument("--values", type=float, default=0, help="sizes on the links as for a model of so many values")
    simulate.add_argument("--k", type=int, default=256, help="values kept of each chunk of 4096")
    simulate.add_argument("--overlap", action="store_true", help="let peers train on while packet and update travel")
    simulate.add_argument("--trace", action="store_true", help="show every event")
    simulate.set_defaults(command=_simulate)


def _add_aggregate(aggregate: argparse.ArgumentParser) -> None:
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
    aggregate.set_defaults(command=_aggregate)


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

    invite = Invite.from_text(_invite_text(arguments.invite))
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


def _invite_text(argument: str) -> str:
    """The invite itself, or what the file of this name holds."""
    if argument.startswith("slp1") or len(argument) > PATH_CHARS_MAX:
        return argument
    path = Path(argument)
    with os_errors(path):
        if not path.is_file():
            return argument
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(FILE_CHARS_MAX).strip()


def _run_new(arguments: argparse.Namespace) -> int:
    from peer.operator import RunPlace, new_run, read_settings

    place = RunPlace(arguments.host, arguments.port, arguments.bootstrap_port, tuple(arguments.standby))
    invite = new_run(read_settings(arguments.settings), arguments.out, place)
    out = arguments.out
    print(f"The run is in {out}. Start it, each in a shell of its own:\n", file=sys.stderr)
    print(f"  sparseloco-peer bootstrap {out}\n  sparseloco-peer aggregate {out}", file=sys.stderr)
    for number in range(1, len(place.standbys) + 1):
        folder = out / f"standby-{number}"
        print(f"  sparseloco-peer aggregate {folder} --standby   (on its own machine: copy {folder})", file=sys.stderr)
    print(file=sys.stderr)
    print("and give this invite to everybody who should join (sparseloco-peer join INVITE):\n", file=sys.stderr)
    print(invite.to_text())
    return 0


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

    options = Options(
        arguments.listen, arguments.plaintext_local, arguments.standby, arguments.take_over, arguments.lease
    )
    folder = OperatorFolder(arguments.folder)
    folder.load()
    with Telemetry("aggregator", file=folder.aggregator_home / "log.jsonl", json_stdout=arguments.json):
        return until_stopped(lambda stop: aggregate(folder, stop, options))


def _mirror(arguments: argparse.Namespace) -> int:
    from peer.follow import mirror
    from peer.store import Home
    from protocol.invite import Invite

    invite, home = Invite.from_text(_invite_text(arguments.invite)), Home(arguments.home)
    with home.lock(), Telemetry("mirror", file=home.log_path, json_stdout=arguments.json):
        return until_stopped(lambda stop: mirror(invite, home, stop, plaintext=arguments.plaintext_local))


def _demo(arguments: argparse.Namespace) -> int:
    from peer.demo import demo

    return demo(out=arguments.out, peers=arguments.peers, settings=arguments.settings, rounds=arguments.rounds)


def _simulate(arguments: argparse.Namespace) -> int:
    from peer.sim.command import command_of, failure_lines, report_lines, settings_of
    from peer.sim.swarm import SimulationError, simulate

    # Large swarms are many objects that live long; to walk over all of them again and again takes a third of the time.
    gc.set_threshold(50_000, 20, 100)
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        try:
            settings = settings_of(arguments, seed)
        except ValueError as error:
            raise UserError(UserCode.BAD_ARGUMENT, str(error), "see sparseloco-peer simulate --help") from error
        began_s = time.process_time()
        try:
            outcome = simulate(settings, print if arguments.trace else None)
        except SimulationError as error:
            print("\n".join(failure_lines(error, command_of(settings, arguments.argv))))
            return 1
        print("\n".join(report_lines(outcome, time.process_time() - began_s)))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from peer.audit import audit, show_progress

    reports = audit(arguments.folder, arguments.first, arguments.last, show_progress(sys.stderr))
    if arguments.json:
        print(json.dumps([report.to_json() for report in reports]))
    else:
        print("\n".join(line for report in reports for line in report.lines()))
    return 0 if all(report.passed for report in reports) else 1


def _status(arguments: argparse.Namespace) -> int:
    from peer.status import status_of_folder, status_of_run

    text = _invite_text(arguments.source)
    if text.startswith("slp1"):
        with Telemetry("status", file=None, json_stdout=False):
            chain = asyncio.run(status_of_run(text, arguments.rounds, plaintext=arguments.plaintext_local))
    else:
        chain = status_of_folder(Path(text), arguments.rounds)
    print(json.dumps(chain.to_json()) if arguments.json else "\n".join(chain.lines()))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from peer.inspect import inspect

    for line in inspect(arguments.file, arguments.run):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

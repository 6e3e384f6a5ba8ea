"""`inspect`, `audit` and `status`: look at what is there."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from peer.commands.options import AddParser, add_plaintext, invite_text
from peer.errors import UserCode, UserError
from peer.telemetry import Telemetry


def add(add_parser: AddParser) -> None:
    """Add `inspect`, `audit` and `status`."""
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
    add_plaintext(status)
    status.set_defaults(command=_status)


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

    if arguments.rounds < 1:
        raise UserError(UserCode.BAD_ARGUMENT, "there are no such last rounds", "give --rounds 1 or more")
    text = invite_text(arguments.source)
    if text.startswith("slp1") or text != arguments.source:
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

"""`doctor`: whether this machine will help a run."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from peer.commands.options import AddParser, add_plaintext, add_taste, config_of, read_invite
from peer.telemetry import Telemetry


def add(add_parser: AddParser) -> None:
    """Add `doctor`."""
    doctor = add_parser("doctor", help="say whether this machine will help a run, and what is in the way")
    doctor.add_argument("invite", nargs="?", help="the word that starts with slp1, or a file that holds it")
    add_taste(doctor)
    doctor.add_argument("--json", action="store_true", help="write the findings to stdout as JSON")
    add_plaintext(doctor)
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from peer.doctor import Doctor

    config = config_of(arguments)
    invite = read_invite(arguments.invite) if arguments.invite is not None else None
    doctor = Doctor(config, (lambda _line: None) if arguments.json else _say)
    # What the parts of a peer report while they work is not for whoever asked a question.
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        Telemetry("doctor", file=None, json_stdout=False, stderr=nowhere),
    ):
        doctor.look_around()
        if invite is not None:
            asyncio.run(doctor.look_at_run(invite, plaintext=arguments.plaintext_local))
    print(json.dumps(doctor.to_json()) if arguments.json else doctor.verdict())
    return 0 if doctor.helps else 1


def _say(line: str) -> None:
    print(line)
    sys.stdout.flush()

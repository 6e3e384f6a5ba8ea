"""The command line: `sparseloco-peer COMMAND`. Each file of `peer.commands` holds some commands and adds them here."""

import argparse
import contextlib
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

from peer.commands import control, corpus, demo, doctor, export, join, look, run, servers, simulate
from peer.errors import UserCode, UserError, from_os_error, render
from protocol.errors import ProtocolError

INTERRUPTED = 130
NOBODY_READS = 141
COMMANDS = (join, doctor, control, run, corpus, servers, demo, look, export, simulate)


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
    except BrokenPipeError:
        # Whoever read our output has enough, as `head` has; what is still buffered goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except OSError as error:
        if error.filename is None:
            return _our_mistake(error)
        print(render(from_os_error(error, str(error.filename))), file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - the last door: whatever comes here is our own mistake
        return _our_mistake(error)


def _our_mistake(error: Exception) -> int:
    """Say that this is a bug, and put what its finder needs into a file."""
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
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('sparseloco-peer')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands.add_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())

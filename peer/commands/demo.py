"""`demo`: a whole swarm on this machine."""

import argparse
from pathlib import Path

from peer.commands.options import AddParser


def add(add_parser: AddParser) -> None:
    """Add `demo`."""
    demo = add_parser("demo", help="watch a whole swarm train on this machine")
    demo.add_argument("--out", type=Path, help="run folder to make (default runs/demo-DATE-TIME)")
    demo.add_argument("--peers", type=int, default=4)
    demo.add_argument("--settings", type=Path, help="RUN.toml to use instead of the demo's own")
    demo.add_argument("--rounds", type=int, help="rounds, instead of those of the settings")
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from peer.demo import demo

    return demo(out=arguments.out, peers=arguments.peers, settings=arguments.settings, rounds=arguments.rounds)

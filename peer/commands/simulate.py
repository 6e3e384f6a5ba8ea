"""`simulate`: a swarm of any size on a virtual clock."""

import argparse
import gc
import time

from peer.commands.options import AddParser
from peer.errors import UserCode, UserError


def add(add_parser: AddParser) -> None:
    """Add `simulate`."""
    simulate = add_parser("simulate", help="run a swarm of any size on a virtual clock, under faults")
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

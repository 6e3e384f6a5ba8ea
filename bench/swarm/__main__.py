"""This client beside hivemind's Optimizer and torchft's DiLoCo, in one run.

Both train the same model with the same inner AdamW on the same windows of the same text. Each peer is a process
behind a link of the same speed in both directions, on one thread, with inner steps that take at least a fixed time.

    python -m bench.swarm                                        # the demo's model at 1000, 100 and 20 Mbit/s
    python -m bench.swarm --model 10m --peers 2 --rounds 6 --mbit 20 --points 1
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.swarm import ours, theirs
from bench.swarm.case import MODELS, Case, Went, settings_of
from bench.swarm.links import Link, possible

HEAD = ("side", "inner", "s/round", "up", "down", "CPU s", "step s", "step CPU", "final loss", "at equal time")


def sides(case: Case, folder: Path, others: Sequence[str]) -> Iterator[Went]:
    """Train each side in turn."""
    off, trained = ours.train(case, folder / "off", overlap=False)
    yield off
    yield ours.train(case, folder / "on", overlap=True)[0]
    for side in others:
        yield theirs.train(case, trained, folder / side, side)


def there() -> list[str]:
    """The other sides whose packages are installed."""
    return [side for side in theirs.LABELS if find_spec(side.partition("-")[0]) is not None]


def row(went: Went, equal_s: float) -> str:
    """A row of the table."""
    last = went.curve[-1]
    cells = (
        went.label,
        f"{went.mean('inner_share'):.1%}",
        f"{went.mean('round_s'):.2f}",
        _size(went.mean("up")),
        _size(went.mean("down")),
        f"{went.mean('cpu_s'):.2f}",
        f"{went.mean('step_s'):.3f}",
        f"{went.mean('step_cpu_s'):.3f}",
        f"{last.loss:.4f} ({last.seconds:.0f} s)",
        f"{went.at(equal_s):.4f}",
    )
    return "| " + " | ".join(cells) + " |"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def main() -> None:
    """Print a table for each link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=[1000.0, 100.0, 20.0], help="of each peer, up and down"
    )
    parser.add_argument("--latency-ms", type=float, default=50.0, help="round trip between any two machines")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--model", choices=sorted(MODELS), default="demo")
    parser.add_argument("--others", choices=theirs.LABELS, nargs="+", default=there(), help="other sides")
    parser.add_argument("--step-s", type=float, help="least seconds of an inner step")
    parser.add_argument("--points", type=int, default=12, help="how often the loss is evaluated")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the text")
    options = parser.parse_args()
    if not possible():
        sys.exit(
            "needs Linux, the rights of root, /dev/net/tun and ip(8): links are network namespaces with TUN devices"
        )
    # So that namespaces and processes are taken away then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    settings = settings_of(options.model, peers=options.peers, rounds=options.rounds, seed=options.seed)
    step_s = options.step_s or MODELS[options.model][1]
    names = tuple(f"peer{number}" for number in range(1, options.peers + 1))
    for mbit in options.mbit:
        case = Case(settings, names, step_s, Link(1e6 * mbit, 1e6 * mbit), options.latency_ms / 1000, options.points)
        print(
            f"\n{options.model}: {options.peers} peers at {mbit:g} Mbit/s up and down, "
            f"{options.latency_ms:g} ms round trip, {options.rounds} rounds of {settings.inner.steps} inner steps "
            f"of >= {step_s:g} s, seed {options.seed}, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for went in sides(case, Path(folder), options.others):
                found.append(went)
                print(f"  {went.label}: {went.note}; load {os.getloadavg()[0]:.1f}", flush=True)
        equal_s = min(went.curve[-1].seconds for went in found)
        print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        print("\n".join(row(went, equal_s) for went in found))
        print(f"equal time: {equal_s:.0f} s after the first inner step", flush=True)
        for went in found:
            print(
                f"  loss over seconds, {went.label}: " + ", ".join(f"{p.loss:.3f}@{p.seconds:.0f}" for p in went.curve)
            )


if __name__ == "__main__":
    main()

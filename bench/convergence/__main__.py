"""Does it learn as well as the paper says? Five methods and their settings on the same model, data and tokens.

    python -m bench.convergence run                 # fetch the text, train whatever is missing, print the tables
    python -m bench.convergence plot                # draw the curves of what is there into docs/img
    python -m bench.convergence run tune headline --size medium
    python -m bench.convergence table headline

One process plays all peers, one training after the other, on one thread. Finished trainings are appended to a file, so
a suite that was stopped goes on by the same command. The same seed gives the same figures on the same processor.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from bench.convergence import corpus, plots, table
from bench.convergence.results import Results
from bench.convergence.setup import Setup
from bench.convergence.suite import PARTS, SIZES, NotTunedError, Part
from bench.convergence.training import Point, Result, spent, train
from peer.data.prepare import Dataset


class Runner:
    """Trains what is missing and says how it goes."""

    def __init__(self, results: Results, cache: Path, deadline_s: float, seeds: list[int]) -> None:
        self.results, self.cache, self.deadline_s, self.seeds = results, cache, deadline_s, seeds
        self._s_per_work = 0.0
        self._text: dict[tuple[str, int], list[Dataset]] = {}

    def run(self, name: str, base: Setup) -> bool:
        """Train a part, seed after seed; whether it is complete."""
        while True:
            part = PARTS[name](base, self.results)
            seeds = [seed for seed in part.seeds if not self.seeds or seed in self.seeds]
            missing = [
                (trial, seed) for seed in seeds for trial in part.trials if not self.results.get(trial.setup, seed)
            ]
            if not missing:
                return True
            trial, seed = next((one for one in missing if one[0].label in part.urgent), missing[0])
            if time.time() + self._expected_s(trial.setup) > self.deadline_s:
                print(f"{name}: {len(missing)} trainings are left for the next time")
                return False
            print(f"{name}: {trial.label}, seed {seed}; {len(missing)} to go", flush=True)
            began_s = time.monotonic()
            self.results.add(self._train(trial.setup, seed))
            self._s_per_work = (time.monotonic() - began_s) / _work(trial.setup)

    def _expected_s(self, setup: Setup) -> float:
        return self._s_per_work * _work(setup)

    def _train(self, setup: Setup, seed: int) -> Result:
        began_s = time.monotonic()

        def tell(point: Point) -> None:
            share = spent(setup, point.round, point.trained, point.accepted) / setup.budget
            left_s = (time.monotonic() - began_s) * max(0.0, 1 / share - 1)
            if sys.stdout.isatty():
                sys.stdout.write(f"\r  {share:4.0%}, loss {point.loss:.4f}, {left_s:.0f} s left  ")
                sys.stdout.flush()

        text = self._open(setup.corpus, setup.sequence)
        result = train(setup, seed, text, tell)
        erase = "\r\033[K" if sys.stdout.isatty() else ""
        print(f"{erase}  loss {result.loss:.4f} after {result.cpu_s:.0f} s of one core", flush=True)
        return result

    def _open(self, name: str, sequence: int) -> list[Dataset]:
        if (name, sequence) not in self._text:
            try:
                self._text[name, sequence] = corpus.open_text(name, sequence, self.cache)
            except corpus.MissingTextError:
                corpus.fetch(self.cache)
                self._text[name, sequence] = corpus.open_text(name, sequence, self.cache)
        return self._text[name, sequence]


def _work(setup: Setup) -> float:
    """About how long a training takes, in units that only compare."""
    return setup.budget * (setup.hidden * setup.layers * (4 * setup.hidden + 3 * setup.intermediate) + 5e5)


def parts_of(names: list[str], base: Setup, results: Results) -> dict[str, Part]:
    """The parts that can be told, with what is tuned so far."""
    found = {}
    for name in names or PARTS:
        try:
            found[name] = PARTS[name](base, results)
        except NotTunedError as error:
            print(f"{name}: {error}")
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("fetch", "run", "table", "plot"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="of the seeds of a part, only these")
    parser.add_argument("--hours", type=float, default=1000.0, help="begin no training that would end later")
    parser.add_argument("--results", type=Path, default=Path("build/bench/convergence.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("build/bench/data"), help="packages and token shards")
    parser.add_argument("--images", type=Path, default=Path("docs/img"))
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    results, base = Results(options.results), SIZES[options.size]
    try:
        if options.what == "fetch":
            corpus.fetch(options.cache)
        elif options.what == "run":
            runner = Runner(results, options.cache, time.time() + 3600 * options.hours, options.seeds)
            for name in options.parts or PARTS:
                if not runner.run(name, base):
                    break
    except (corpus.MissingTextError, NotTunedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what is finished is kept, and the same command goes on from there")
    if options.what in ("run", "table"):
        for name, part in parts_of(options.parts, base, results).items():
            print("\n" + table.markdown(name, part, results))
    if options.what == "plot":
        for path in plots.draw(parts_of(options.parts, base, results), results, options.images, options.size):
            print(path)


if __name__ == "__main__":
    main()

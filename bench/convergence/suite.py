"""The trainings of the study: parts by name, each a question with the setups that answer it.

Parts after `tune` start from the best setup of each method that `tune` has found, so they need its results.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.convergence.results import Results
from bench.convergence.setup import Setup, Weather

SEEDS = (0, 1, 2)
RATES = (0.002, 0.004, 0.008, 0.016)
TUNING_SEED = 9  # no seed of a result that is shown
SIZES = {
    "small": Setup(hidden=64, intermediate=192),
    "medium": Setup(hidden=128, intermediate=384),
    "large": Setup(hidden=192, intermediate=512, heads=6),
}


@dataclass(frozen=True)
class Trial:
    """A setup and what a table calls it."""

    label: str
    setup: Setup


@dataclass(frozen=True)
class Part:
    """A question and its trials. The others are compared with the first trial. `urgent` ones are trained first."""

    question: str
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...] = SEEDS
    urgent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A method of the headline, and how it is tuned: on the outer grid first, then over learning rates."""

    label: str
    setup: Setup
    rates: tuple[float, ...]
    outer: tuple[tuple[float, float], ...]
    """Pairs of outer_rate and momentum; methods that do not know one of them ignore it."""


class NotTunedError(Exception):
    """A part needs results of `tune` that are not there."""


def entries(base: Setup) -> tuple[Entry, ...]:
    """The methods that are compared."""
    middle = replace(base, learning_rate=0.004)
    sparse = tuple((alpha, 0.9) for alpha in (0.5, 0.7, 1.0, 1.4))
    dense = ((0.7, 0.9), (0.5, 0.8), (1.0, 0.5))
    return (
        Entry("AdamW data-parallel", replace(middle, method="adamw"), RATES, ((1.0, 0.9),)),
        Entry("DiLoCo", replace(middle, method="diloco"), RATES, dense),
        Entry(
            "DeMo-like",
            replace(middle, method="demo", learning_rate=0.002),
            (0.001, 0.002, 0.004, 0.008, 0.016),
            ((1.0, 0.95), (1.0, 0.99)),
        ),
        Entry("SparseLoCo mean", replace(middle, rule="mean"), RATES, ((1.0, 0.9), (2.0, 0.9), (3.0, 0.9))),
        Entry("SparseLoCo mean of senders", middle, RATES, sparse),
    )


def _tuned_setup(setup: Setup) -> Setup:
    return replace(setup, rounds=setup.rounds // 2)


def _outer_trials(entry: Entry) -> list[Setup]:
    return [replace(entry.setup, outer_rate=outer, momentum=momentum) for outer, momentum in entry.outer]


def _best(setups: list[Setup], results: Results) -> Setup | None:
    """The setup with the least loss of the tuning runs, None while one is missing."""
    losses = []
    for setup in setups:
        result = results.get(_tuned_setup(setup), TUNING_SEED)
        if result is None:
            return None
        losses.append(result.loss if math.isfinite(result.loss) else math.inf)
    return setups[losses.index(min(losses))]


def _rate_trials(entry: Entry, results: Results) -> list[Setup]:
    """The learning rates with the best outer step, as far as that is known."""
    best = _best(_outer_trials(entry), results)
    return [] if best is None else [replace(best, learning_rate=rate) for rate in entry.rates]


def tuned(entry: Entry, results: Results) -> Setup:
    """The best setup of a method. Raises NotTunedError."""
    trials = _rate_trials(entry, results)
    best = _best(trials, results) if trials else None
    if best is None:
        raise NotTunedError(f"{entry.label} is not tuned yet; run the part `tune` of this size first")
    return best


def tune(base: Setup, results: Results) -> Part:
    """Half as many rounds, one seed that no other part uses."""
    trials = []
    for entry in entries(base):
        for setup in dict.fromkeys([*_outer_trials(entry), *_rate_trials(entry, results)]):
            what = f"{entry.label}: rate {setup.learning_rate}, outer {setup.outer_rate}, momentum {setup.momentum}"
            trials.append(Trial(what, _tuned_setup(setup)))
    return Part("Which learning rates suit each method?", tuple(trials), (TUNING_SEED,))


def headline(base: Setup, results: Results) -> Part:
    """All methods, tuned, at equal tokens."""
    trials = [Trial(entry.label, tuned(entry, results)) for entry in entries(base)]
    return Part("Which loss do the methods reach with equal tokens?", tuple(trials))


def headline8(base: Setup, results: Results) -> Part:
    """The same number of rounds with 8 peers, and so twice the tokens."""
    trials = [Trial(entry.label, replace(tuned(entry, results), peers=8)) for entry in entries(base)]
    return Part("And with 8 peers, twice the tokens?", tuple(trials))


def ours(base: Setup, results: Results) -> Setup:
    """What the ablations change one thing of: the rule that the defaults use."""
    return tuned(entries(base)[-1], results)


LATE = {
    "all in time": Weather(),
    "30 % late, conserved": Weather(late=0.3),
    "30 % late, half returns": Weather(late=0.3, returned=0.5),
    "30 % late, drained": Weather(late=0.3, returned=0.0),
}


def late(base: Setup, results: Results) -> Part:
    """Does it pay to keep what a late packet took out of the residual?"""
    setup = ours(base, results)
    trials = [Trial(label, replace(setup, weather=weather)) for label, weather in LATE.items()]
    # What the late ones' work is worth: nobody is late, and as many have not trained at all.
    trials.append(Trial("30 % absent, as many rounds", replace(setup, until="rounds", weather=Weather(absent=0.3))))
    return Part("Late packets: conserve the residual or drain it?", tuple(trials))


def late_kinds(base: Setup, results: Results) -> Part:
    """The same where nobody else knows what a late packet says."""
    setup = replace(ours(base, results), domains=True)
    trials = [Trial(label, replace(setup, weather=weather)) for label, weather in LATE.items()]
    return Part("Late packets, one kind of text a peer: conserve or drain?", tuple(trials))


def late_thin(base: Setup, results: Results) -> Part:
    """The same with packets of a quarter of the values."""
    setup = replace(ours(base, results), k=32)
    trials = [Trial(label, replace(setup, weather=weather)) for label, weather in LATE.items()]
    return Part("Late packets, k = 32: conserve or drain?", tuple(trials))


URGENT = (
    *("quantizer fp32", "no error feedback", "H = 40", "H = 5", "alpha = 1.0", "half of the steps ahead", "beta = 1.0"),
    *("alpha = 0.5", "beta = 0.9", "R = 8, equal tokens", "R = 2, equal tokens"),
)
"""The ablations that decide most."""


def ablations(base: Setup, results: Results) -> Part:
    """One setting changed at a time."""
    setup = ours(base, results)
    trials = [Trial("default", setup)]
    trials += [Trial(f"k = {k}", replace(setup, k=k)) for k in (16, 32, 64, 256, 512)]
    trials += [
        *(Trial(f"quantizer {kind}", replace(setup, quantizer=kind)) for kind in ("1 bit", "global grid", "fp32")),
        Trial("no error feedback", replace(setup, error_feedback=False)),
        *(Trial(f"beta = {beta}", replace(setup, beta=beta)) for beta in (0.8, 0.9, 0.99, 1.0)),
        *(Trial(f"alpha = {alpha}", replace(setup, outer_rate=alpha)) for alpha in (0.5, 0.7, 1.0, 1.4)),
        *(Trial(f"H = {steps}", _with_steps(setup, steps)) for steps in (5, 20, 40, 80)),
        Trial("half of the steps ahead", replace(setup, ahead=setup.steps // 2)),
        *(Trial(f"R = {peers}, equal tokens", _with_peers(setup, peers)) for peers in (2, 8, 16)),
        Trial("one kind of text a peer", replace(setup, domains=True)),
    ]
    seen = dict.fromkeys(trial.setup for trial in trials)
    once = [next(trial for trial in trials if trial.setup == setup) for setup in seen]
    return Part("What does each setting do?", tuple(once), (0,), URGENT)


def _with_steps(setup: Setup, steps: int) -> Setup:
    return replace(setup, steps=steps, rounds=setup.rounds * setup.steps // steps)


def _with_peers(setup: Setup, peers: int) -> Setup:
    return replace(setup, peers=peers, rounds=setup.rounds * setup.peers // peers)


# The swarm of six small peers whose members are killed in `make chaos`.
CHAOS = Setup(
    corpus="state-of-the-union",
    hidden=32,
    intermediate=64,
    heads=2,
    initializer=0.02,
    peers=6,
    rounds=50,
    steps=30,
    learning_rate=0.001,
    warmup=20,
    schedule="constant",
    k=64,
    until="accepted",
)


def churn(base: Setup, results: Results) -> Part:
    """One cause at a time, in the swarm that the chaos tests disturb, whatever the size asked for."""
    del base, results
    causes = {
        "calm": Weather(),
        "absent 10 %": Weather(absent=0.1),
        "absent 60 %": Weather(absent=0.6),
        "absent 60 %, 20 rounds on end": Weather(absent=0.6, spell=20),
        "partial 1 of 6": Weather(partial=1 / 6),
        "all partial": Weather(partial=1.0),
        "absent 10 %, 7 rounds on end, partial 30 %": Weather(absent=0.1, spell=7, partial=0.3, steps_min=6),
        "late 10 %": Weather(late=0.1),
        "late 60 %": Weather(late=0.6),
        "late 60 %, drained": Weather(late=0.6, returned=0.0),
        "moments and residual lost 10 %": Weather(forgetful=0.1, forgets_residual=True),
    }
    trials = [Trial(label, replace(CHAOS, weather=weather)) for label, weather in causes.items()]
    trials += [Trial(f"calm, {peers} peers", _with_peers(CHAOS, peers)) for peers in (2, 3, 5)]
    return Part("What does an unsteady swarm lose at equal accepted tokens?", tuple(trials))


PARTS: dict[str, Callable[[Setup, Results], Part]] = {
    "churn": churn,
    "tune": tune,
    "headline": headline,
    "late": late,
    "late-kinds": late_kinds,
    "late-thin": late_thin,
    "ablations": ablations,
    "headline8": headline8,
}

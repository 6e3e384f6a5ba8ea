"""The command `simulate`: from its options to settings, and from what came out to lines for people."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace

from peer.sim.network import Access
from peer.sim.settings import MBIT, MIXED, NEVER, Faults, Settings, drawn, key_of, make_run
from peer.sim.swarm import Outcome, SimulationError
from protocol.run import RoundConfig

_FAULTS = {"none": Faults(), "mixed": MIXED, "takeovers": replace(MIXED, takeover_s=60.0)}


def settings_of(options: argparse.Namespace, seed: int) -> Settings:
    """What the options of the command say, for one seed. Raises ValueError with the remedy."""
    # Written so that "nan" is refused too.
    for name in ("peers", "rounds", "k", "inner_seconds", "up", "down"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    for name in ("quorum", "hostile", "deadline", "latency_ms", "half_life", "away", "values"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0")
    for name in ("loss", "stragglers"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name} must be from 0 to 1")
    if options.weather:
        return drawn(seed, rounds=options.rounds)
    deadline_s = options.deadline or 5 * options.inner_seconds + 30
    rules = RoundConfig(
        quorum=min(options.quorum or max(1, options.peers // 4), options.peers),
        grace_s_min=1.0,
        grace_s_max=min(options.inner_seconds, deadline_s),
        deadline_s=deadline_s,
        start_peers=max(1, options.peers // 2),
    )
    settings = Settings(
        seed=seed,
        peers=options.peers,
        rounds=options.rounds,
        hostile=min(options.hostile, options.peers),
        faults=_FAULTS[options.faults],
        access=Access(options.up * MBIT, options.down * MBIT, options.latency_ms / 1000, options.loss),
        inner_s=options.inner_seconds,
        stragglers=options.stragglers,
        half_life_s=options.half_life or NEVER,
        away_s=options.away,
        rules=rules,
        k=options.k,
        values=int(options.values),
        overlap=options.overlap,
    )
    make_run(settings, (key_of(seed, "aggregator").public,))  # says what no run admits
    return settings


def command_of(settings: Settings, argv: list[str]) -> str:
    """The command that plays this seed again, from the options that were given."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in ("--seed", "--seeds", "--trace"):
            kept.append(word)
        skip = word in ("--seed", "--seeds")
    return " ".join(["sparseloco-peer simulate", *kept, "--seed", str(settings.seed), "--trace"])


def failure_lines(error: SimulationError, command: str) -> Iterator[str]:
    """What a person needs who wants to know why a seed failed."""
    yield "the last events:"
    yield from (f"  {line}" for line in error.story.last_lines())
    yield f"seed {error.settings.seed} failed at t={error.now_s:.3f} s: {error.checker}: {error.what}"
    yield f"replay it: {command}"


def report_lines(outcome: Outcome, cpu_s: float) -> Iterator[str]:
    """The report of one simulation."""
    settings = outcome.settings
    turns = max(1, outcome.peer_rounds)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.rounds.items()))
    yield f"seed {settings.seed}: {settings.peers} peers, {settings.rounds} rounds in {outcome.virtual_s:,.0f} s"
    yield f"  rounds closed         {reasons}"
    yield f"  packets accepted      {outcome.accepted} of {turns} peer-rounds ({outcome.accepted / turns:.1%})"
    yield f"  inner steps counted   {outcome.steps_counted:.1%} of those that were done"
    yield f"  utilisation           {outcome.inner_share:.1%} of the peers' time went into inner steps"
    yield f"  bytes a peer-round    {_bytes(outcome.up_bytes / turns)} up, {_bytes(outcome.down_bytes / turns)} down"
    yield f"  loss                  {outcome.losses[0]:.3f} after the first round, {outcome.losses[-1]:.3f} at the end"
    yield (
        f"  what went wrong       {outcome.deaths} deaths of peers, {outcome.crashes} of the aggregator, "
        f"{outcome.takeovers} takeovers, {outcome.attacks} attacks, {outcome.alarms} alarms"
    )
    if outcome.takeovers:
        yield f"  lost or counted twice {outcome.orphaned} packets, settled by records that a takeover left behind"
    yield f"  every checker held    {outcome.events} events, digest {outcome.digest[:16]}"
    yield f"  cost                  {cpu_s:.1f} s of CPU, {1000 * cpu_s / turns:.2f} ms a peer-round"
    if settings.values:
        yield (
            f"  The sizes on the links are computed for a model of {settings.values:,} values at k = {settings.k}; the "
            "codec, the merge and the state roots ran on a tiny one."
        )


def _bytes(count: float) -> str:
    power = min(3, int(math.log10(max(count, 1))) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"

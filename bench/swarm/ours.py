"""This client: an aggregator on a server's link and every peer behind its own."""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.swarm.case import AGGREGATOR, SERVER, Case, Point, Went, looked_at
from bench.swarm.links import Network
from bench.swarm.meter import Machine, PacedMachine, Sampler, monotonic_of, peer_of, steps_of
from peer.operator import OperatorFolder
from peer.replay import replay
from peer.solo import Bench
from protocol.ledger import Verdict
from protocol.run import RunConfig
from tests.chaos.training import READY_S, Swarm

ROUND_S_MAX = 600.0


@dataclass(frozen=True)
class Trained:
    """What the other side needs of this one to train on the same windows of the same text."""

    run: RunConfig
    keys: tuple[bytes, ...]
    data: Path


def train(case: Case, folder: Path, *, overlap: bool) -> tuple[Went, Trained]:
    """Train to the end of the run and measure it."""
    settings = dataclasses.replace(case.settings, inner=dataclasses.replace(case.settings.inner, overlap=overlap))
    links = {AGGREGATOR: SERVER} | dict.fromkeys(case.peers, case.link)
    with ExitStack() as stack:
        network = stack.enter_context(Network(links, case.round_trip_s))
        swarm = stack.enter_context(Swarm(folder, settings))
        sampler = stack.enter_context(Sampler(network, case.peers))
        swarm.invite = dataclasses.replace(swarm.invite, addresses=(f"{network.address(AGGREGATOR)}:{swarm.port}",))
        swarm.aggregator(Machine(network.namespace(AGGREGATOR)))
        for name in case.peers:
            spell = PacedMachine(network.namespace(name), folder / f"{name}.steps", case.step_s)
            swarm.peer(name, spell=spell)
        for name in case.peers:
            swarm.children[name].wait_event("state loaded", READY_S)
        for name in case.peers:
            swarm.children[name].wait_event("finished", ROUND_S_MAX * settings.outer.rounds)
    data = OperatorFolder(swarm.path).aggregator_home / "data"
    steps = {name: steps_of(folder / f"{name}.steps") for name in case.peers}
    began_s = min(each[0].began_s for each in steps.values())
    records, bench, curve, tokens = swarm.records(), Bench(swarm.run, data, threads=1), [], 0
    wanted = {0, *looked_at(len(records) - 1, case.points)}
    with swarm.store() as store:
        for round, state in replay(store, swarm.run, 0, len(records) - 1):
            entries = [entry for entry in records[round].entries if entry.verdict == Verdict.ACCEPTED]
            tokens += sum(entry.tokens for entry in entries)
            seconds = monotonic_of(records[round].closed_ms) - began_s if round else 0.0
            if round in wanted:
                curve.append(Point(seconds, tokens, bench.loss_of(state)))
    counted = sum(e.inner_steps for record in records for e in record.entries if e.verdict == Verdict.ACCEPTED)
    done = sum(map(len, steps.values()))
    went = Went(
        f"this client, overlap {'on' if overlap else 'off'}",
        [peer_of(sampler, name, steps[name], settings.inner.steps) for name in case.peers],
        curve,
        f"{counted} of {done} inner steps counted; router {network.router_cpu_s:.1f} CPU s, {network.dropped()} drops",
    )
    return went, Trained(swarm.run, tuple(swarm.key(name) for name in case.peers), data)

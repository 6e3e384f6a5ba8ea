"""hivemind's Optimizer and torchft's DiLoCo: every peer behind its own link; the first is where the others meet."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bench.swarm.case import Case, Point, Went, looked_at
from bench.swarm.links import IP, Network, processes
from bench.swarm.meter import Sampler, peer_of, steps_of
from bench.swarm.ours import Trained
from bench.swarm.plan import HIVEMIND_DELAYED, HIVEMIND_LOCAL, TORCHFT, TORCHFT_STREAMING, Plan
from peer.solo import Bench

LABELS = {
    HIVEMIND_LOCAL: "hivemind, local updates, averaged every round",
    HIVEMIND_DELAYED: "hivemind, gradients of a round averaged in the background",
    TORCHFT: "torchft DiLoCo",
    TORCHFT_STREAMING: "torchft DiLoCo, averaging during half of the steps",
}


def train(case: Case, trained: Trained, folder: Path, side: str) -> Went:
    """Train every peer through all its steps and measure it."""
    folder.mkdir()
    with ExitStack() as stack:
        network = stack.enter_context(Network(dict.fromkeys(case.peers, case.link), case.round_trip_s))
        sampler = stack.enter_context(Sampler(network, case.peers))
        stack.callback(_kill_all, network, case.peers)
        started: list[subprocess.Popen[str]] = []
        first: list[str] = []
        for name, key in zip(case.peers, trained.keys, strict=True):
            plan = Plan(
                run=trained.run.to_json().decode("ascii"),
                key=key.hex(),
                data=str(trained.data),
                address=network.address(name),
                first=first,
                peers=len(case.peers),
                side=side,
                step_s=case.step_s,
                matchmaking_s=case.matchmaking_s,
                steps_path=str(folder / f"{name}.steps"),
                states_path=str(folder / f"{name}.safetensors"),
            )
            plan.save(folder / f"{name}.json")
            started.append(_start(network, name, side, folder / name))
            found = json.loads(_line(started[-1], folder / name))
            first = first or found
        for process in started:
            assert process.stdin is not None
            process.stdin.write("begin\n")
            process.stdin.flush()
        ends = [_line(process, folder / name) for process, name in zip(started, case.peers, strict=True)]
    note = f"averaged {'/'.join(map(str.strip, ends))} times"
    note += f"; router {network.router_cpu_s:.1f} CPU s, {network.dropped()} drops"
    return _told(case, trained, folder, sampler, side, note)


def _told(case: Case, trained: Trained, folder: Path, sampler: Sampler, side: str, note: str) -> Went:
    inner = trained.run.inner
    all_steps = inner.steps * trained.run.outer.rounds
    steps = {name: steps_of(folder / f"{name}.steps")[:all_steps] for name in case.peers}
    began_s = min(each[0].began_s for each in steps.values())
    bench = Bench(trained.run, trained.data, threads=1)
    files = [load_file(folder / f"{name}.safetensors") for name in case.peers]
    states = [file["states"] for file in files]
    times = np.stack([file["times"] for file in files])
    genesis = bench.replica.outer.numpy().copy()
    curve = [Point(0.0, 0, bench.loss_of(genesis))]
    for round in looked_at(trained.run.outer.rounds, case.points):
        # At the same number of steps: averaging in between does not change their mean.
        mean: NDArray[np.float32] = np.stack([each[round - 1] for each in states]).mean(axis=0)  # f32[N]
        tokens = round * trained.run.nominal_tokens * len(case.peers)
        curve.append(Point(float(times[:, round - 1].max()) - began_s, tokens, bench.loss_of(mean)))
    spread = float(np.linalg.norm(states[0][-1] - states[1][-1]) / np.linalg.norm(states[0][-1]))
    note = f"peers apart by {spread:.2%} at the end; {note}"
    peers = [peer_of(sampler, name, steps[name], inner.steps) for name in case.peers]
    return Went(LABELS[side], peers, curve, note)


def _start(network: Network, name: str, side: str, stem: Path) -> subprocess.Popen[str]:
    program = f"bench.swarm.{side.partition('-')[0]}_peer"
    command = [IP, "netns", "exec", network.namespace(name), sys.executable, "-m", program, f"{stem}.json"]
    with Path(f"{stem}.log").open("w") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": network.interface(name)},
        )


def _line(process: subprocess.Popen[str], stem: Path) -> str:
    """The next line that a peer says."""
    assert process.stdout is not None
    line: str = process.stdout.readline()
    assert line, f"{stem.name} has died:\n{Path(f'{stem}.log').read_text()[-3000:]}"
    return line


def _kill_all(network: Network, names: tuple[str, ...]) -> None:
    """End every process in the namespaces: its helpers outlive a hivemind peer."""
    for found in processes([network.namespace(name) for name in names]).values():
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

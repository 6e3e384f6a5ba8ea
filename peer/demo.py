"""The demo: a bootstrap node, an aggregator and some peers as separate processes on this machine, and what came of it.

Nothing here is special: the processes are started by the same commands that volunteers and operators type, and the
figures come from their event logs, the ledger and the stored parameters.
"""

import asyncio
import dataclasses
import json
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from peer.errors import UserCode, UserError
from peer.losses import bits_per_byte, perplexity
from peer.operator import OperatorFolder, RunPlace, new_run, read_settings
from peer.report import Curve, Summary, summary_table, write_report
from peer.store import Home, RunFolder
from peer.telemetry import Progress
from protocol.ledger import RoundRecord
from protocol.run import RunConfig, RunSettings

SETTINGS = Path(__file__).parent / "demo.toml"
CURVE_POINTS = 8
LEAVE_S = 5.0
SAMPLE_TOKENS = 400
PROMPT = "My fellow citizens, "

Event = dict[str, Any]


@dataclass
class Program:
    """One process of the swarm and the events that it has written so far."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    reader: asyncio.Task[None]
    events: list[Event]

    def last(self, name: str) -> Event | None:
        """The newest event of this name."""
        return next((event for event in reversed(self.events) if event["event"] == name), None)


class Swarm:
    """Starts the processes, follows their events and stops them."""

    def __init__(self, folder: Path, run: RunConfig, console: Console) -> None:
        self.folder, self.run, self.console = folder, run, console
        self.programs: dict[str, Program] = {}
        self._progress: Progress | None = None

    async def start(self, name: str, *arguments: str) -> Program:
        """Start `sparseloco-peer ARGUMENTS` with its events on a pipe and everything else in a log file."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "peer.cli",
                *arguments,
                "--json",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                # Ctrl+C reaches the demo alone, which then stops the others in order.
                start_new_session=True,
            )
        events: list[Event] = []
        program = Program(name, process, log, asyncio.create_task(self._read(name, process, events)), events)
        self.programs[name] = program
        self.console.print(f"started {name} (process {process.pid}, log {log})")
        return program

    async def _read(self, name: str, process: asyncio.subprocess.Process, events: list[Event]) -> None:
        assert process.stdout is not None, "the pipe was asked for"
        async for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            events.append(event)
            self._show(name, event)

    def _show(self, name: str, event: Event) -> None:
        """Tell the story on one screen: who found whom, and each round as the aggregator closed it."""
        match event["event"]:
            case "bootstrap ready" | "aggregator ready":
                self.console.print(f"{name}: ready")
            case "dashboard ready":
                self.console.print(f"watch it in a browser: {event['url']}")
            case "found in the directory":
                self.console.print(f"{name}: found the aggregator in the DHT at {event['addresses'][0]}")
            case "state loaded":
                self.console.print(f"{name}: holds the parameters, state root {event['state_root'][:16]}")
            case "round closed":
                losses = [peer.last("round") for peer in self.peers()]
                known = [last["loss"] for last in losses if last and last["loss"] is not None]
                loss = sum(known) / len(known) if known else None
                self.console.print(
                    f"round {event['round']:>3}/{self.run.outer.rounds} closed ({event['reason']}): "
                    f"{event['accepted']} packets, {event['seconds']:.1f} s"
                    + (f", training loss {loss:.3f}" if loss is not None else "")
                    + f", state root {event['state_root'][:16]}"
                )
                if self._progress is not None:
                    tokens = event["accepted"] * self.run.nominal_tokens
                    self._progress.report(round=event["round"], step=self.run.inner.steps, tokens=tokens, loss=loss)

    def peers(self) -> list[Program]:
        """The peers, in the order of their names."""
        return [program for name, program in self.programs.items() if name.startswith("peer-")]

    async def wait_for(self, program: Program, event: str, seconds: float) -> None:
        """Wait until a program says so. Raises UserError when it dies or says nothing."""
        end_s = time.monotonic() + seconds
        while program.last(event) is None:
            if program.process.returncode is not None or time.monotonic() > end_s:
                raise died(program)
            await asyncio.sleep(0.05)

    async def train(self) -> None:
        """Wait until all peers have finished the run, with a progress display."""
        with Progress(self.console, self.run.outer.rounds, self.run.inner.steps) as self._progress:
            peers = self.peers()
            await asyncio.gather(*(peer.process.wait() for peer in peers))
        self._progress = None
        # A process may end before its last events have been read.
        await asyncio.gather(*(peer.reader for peer in peers))
        for peer in peers:
            if peer.process.returncode != 0 or peer.last("finished") is None:
                raise died(peer)

    async def stop(self) -> None:
        """Send Ctrl+C to whoever still runs, aggregator first; kill what does not leave within five seconds."""
        for name in sorted(self.programs, key=lambda name: name == "bootstrap"):
            process = self.programs[name].process
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                try:
                    await asyncio.wait_for(process.wait(), LEAVE_S)
                except TimeoutError:
                    process.kill()
                    await process.wait()
        await asyncio.gather(*(program.reader for program in self.programs.values()), return_exceptions=True)


def died(program: Program) -> UserError:
    """What to say of a process that ended early; its own last words say more than we could."""
    words = program.log.read_text("utf-8", errors="replace").strip().splitlines() if program.log.exists() else []
    errors = [line for line in words if line.startswith("error ")]
    return UserError(
        UserCode.PROGRAM_DIED,
        f"{program.name} ended early: {(errors or words or ['it said nothing'])[-1]}",
        f"read {program.log}",
    )


def free_ports(count: int) -> list[int]:
    """TCP ports that nothing listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def demo(*, out: Path | None, peers: int, settings: Path | None, rounds: int | None) -> int:
    """Run the whole demo and return the exit status. Raises UserError."""
    if not 1 <= peers <= 64 or (rounds is not None and rounds < 1):
        raise UserError(
            UserCode.BAD_ARGUMENT,
            "a demo needs 1 to 64 peers and at least one round",
            "give --peers 1 to 64 and --rounds 1 or more",
        )
    chosen = read_settings(settings or SETTINGS)
    outer = dataclasses.replace(chosen.outer, rounds=rounds or chosen.outer.rounds)
    chosen = dataclasses.replace(chosen, outer=outer, rounds=dataclasses.replace(chosen.rounds, start_peers=peers))
    folder = (out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")).absolute()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    return asyncio.run(_demo(folder, peers, chosen, console))


async def _demo(folder: Path, peers: int, settings: RunSettings, console: Console) -> int:
    began_s = time.monotonic()
    aggregator_port, bootstrap_port = free_ports(2)
    console.print(f"run folder: {folder}")
    invite = new_run(settings, folder / "run", RunPlace("127.0.0.1", aggregator_port, bootstrap_port))
    operator = OperatorFolder(folder / "run")
    signed, _ = operator.load()
    run = signed.config
    swarm = Swarm(folder, run, console)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    work = asyncio.create_task(_swarm(swarm, operator, invite.to_text(), peers))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if not work.done():
            console.print("leaving: all processes are being stopped")
            work.cancel()
            return 130
        work.result()
    finally:
        stopped.cancel()
        await swarm.stop()
    console.print("replaying the ledger to evaluate it, then training one peer alone on as many tokens")
    store = Home(operator.aggregator_home).run(run.run_id)
    with closing(store):
        await asyncio.to_thread(_report, swarm, store, began_s)
    return 0


async def _swarm(swarm: Swarm, operator: OperatorFolder, invite: str, peers: int) -> None:
    bootstrap = await swarm.start("bootstrap", "bootstrap", str(operator.path))
    await swarm.wait_for(bootstrap, "bootstrap ready", 60)
    aggregator = await swarm.start("aggregator", "aggregate", str(operator.path))
    await swarm.wait_for(aggregator, "advertised", 60)
    for index in range(1, peers + 1):
        home = str(swarm.folder / f"peer-{index}")
        # Several peers share this machine's cores, so each takes one thread.
        await swarm.start(
            f"peer-{index}", "join", invite, "--home", home, "--threads", "1", "--device", "cpu", "--dtype", "float32"
        )
    await swarm.train()


@dataclass(frozen=True)
class Losses:
    """Validation losses, nats a token of so many bytes."""

    initial: float
    final: float
    solo: float
    bytes_per_token: float


def _report(swarm: Swarm, store: RunFolder, began_s: float) -> None:
    """Measure the run from outside: replay the ledger, evaluate, train alone, and write everything down."""
    from peer.core.generate import generate  # noqa: PLC0415  torch is not needed before
    from peer.evaluate import bytes_per_token  # noqa: PLC0415
    from peer.export import export_folder  # noqa: PLC0415
    from peer.replay import replay  # noqa: PLC0415
    from peer.solo import Bench  # noqa: PLC0415

    run, console = swarm.run, swarm.console
    bench = Bench(run, store.path.parent.parent / "data", threads=1)
    every = max(1, run.outer.rounds // CURVE_POINTS)
    tokens, losses, final = [], [], None
    head = store.journal.head()
    assert head is not None, "the ledger has records"
    for round, state in replay(store, run, 0, head.round):
        if round % every == 0 or round == run.outer.rounds:
            tokens.append(round * run.nominal_tokens)
            losses.append(bench.loss_of(state))
            console.print(f"validation after round {round}: {losses[-1]:.3f}")
            final = state.copy()
    assert final is not None, "a run has at least its genesis"

    alone = bench.train_alone(
        bytes(32), every, lambda round, point: console.print(f"alone, round {round}: {point.val_loss:.3f}")
    )
    finished = [event for peer in swarm.peers() if (event := peer.last("finished")) is not None]
    roots = {peer.name: str(event["state_root"]) for peer, event in zip(swarm.peers(), finished, strict=True)}
    roots = {"aggregator": head.state_root.hex(), **roots}
    told = Losses(losses[0], losses[-1], alone[-1].val_loss, bytes_per_token(run.data, bench.data))
    summary = _summary(swarm, store, told, finished, roots)
    bench.replica.load_outer(final)
    import torch  # noqa: PLC0415  not needed before

    tokenizer = bench.data.tokenizer
    prompt = torch.from_numpy(tokenizer.encode(PROMPT).astype(np.int64))
    made = generate(bench.replica.model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=1)
    sample = tokenizer.decode(made.numpy())
    curves = [
        Curve(f"swarm of {summary.peers}", tokens, losses),
        Curve("one peer alone", [point.tokens for point in alone], [point.val_loss for point in alone]),
    ]
    write_report(swarm.folder, summary, curves, f"{run.name}: {run.layout.size:,} parameters", sample)
    export_folder(swarm.folder / "model", run.model, final, tokenizer)
    console.print("\nA sample of what the model writes:\n")
    console.print(sample)
    Console(soft_wrap=True).print(summary_table(summary, roots))
    console.print(
        f"\nEverything is in {swarm.folder}: summary.json, loss.png, sample.txt, model/ (Hugging Face format), logs/."
        f"\nThe demo took {time.monotonic() - began_s:.0f} s."
    )
    if not summary.state_roots_equal:
        raise UserError(UserCode.PROGRAM_DIED, "the state roots differ", "keep the run folder and report it")


def _summary(
    swarm: Swarm,
    store: RunFolder,
    losses: Losses,
    finished: Sequence[Event],
    roots: dict[str, str],
) -> Summary:
    run = swarm.run
    head = store.journal.head()
    first, last = store.journal.record(1), head
    assert first is not None and last is not None, "the ledger has rounds"
    opened_ms = RoundRecord.from_bytes(first.data).opened_ms
    closed_ms = RoundRecord.from_bytes(last.data).closed_ms
    rounds, peers = last.round, len(finished)
    broadcasts = [event for event in swarm.programs["aggregator"].events if event["event"] == "broadcast"]
    kernels = [event for peer in swarm.peers() if (event := peer.last("kernels")) is not None]
    return Summary(
        initial_val_loss=losses.initial,
        final_val_loss=losses.final,
        final_perplexity=perplexity(losses.final),
        final_bits_per_byte=bits_per_byte(losses.final, losses.bytes_per_token),
        solo_val_loss=losses.solo,
        rounds=rounds,
        peers=peers,
        tokens=sum(event["tokens"] for event in finished),
        parameters=run.layout.size,
        bytes_up_per_peer_round=sum(event["bytes_up"] for event in finished) / (peers * rounds),
        bytes_down_per_peer_round=sum(event["bytes_down"] for event in finished) / (peers * rounds),
        update_bytes_per_round=sum(event["update_bytes"] for event in broadcasts) / max(len(broadcasts), 1),
        bundle_bytes_per_round=sum(event["bundle_bytes"] for event in broadcasts) / max(len(broadcasts), 1),
        rounds_by_bundle=sum(event["form"] == "bundle" for event in broadcasts),
        bits_per_value=sum(event["bits_per_value"] for event in finished) / peers,
        inner_time_share=sum(event["inner_time_share"] for event in finished) / peers,
        state_roots_equal=len(set(roots.values())) == 1,
        state_root=last.state_root.hex(),
        wall_s=(closed_ms - opened_ms) / 1000,
        kernels=", ".join(sorted({": ".join(filter(None, (event["path"], event["why"]))) for event in kernels})),
    )

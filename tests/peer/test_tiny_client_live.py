"""The client that was written from the specification alone takes part in a swarm of the real programs."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from peer.core.model import Llama, initial_parameters
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.ledger import RoundRecord, Verdict
from protocol.run import ModelConfig
from tests.peer.swarm import Program, Swarm, make_run
from tests.peer.test_swarm import finish, ledger

NODE = shutil.which("node")
ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "protocol" / "tiny_client" / "client.mjs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.net,
    pytest.mark.skipif(NODE is None, reason="the tiny client needs Node.js 20 or newer"),
]


class TinyClient:
    """One process of the client, in a folder of its own."""

    def __init__(self, folder: Path, invite: Path, *options: str) -> None:
        assert NODE is not None
        self.home, self.log = folder / "tiny", folder / "tiny.log"
        text = ROOT / "protocol" / "SPEC.md"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [NODE, str(CLIENT), "join", str(invite), "--home", str(self.home), "--text", str(text), *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                start_new_session=True,
            )

    def wait_end(self, seconds: float) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text()

    @property
    def key(self) -> bytes:
        return PrivateKey.from_bytes(bytes.fromhex((self.home / "peer.key").read_text())).public

    def accepted(self, records: list[RoundRecord]) -> list[int]:
        """The rounds whose records count a packet of this client."""
        return [
            record.round
            for record in records
            if any(entry.peer == self.key and entry.verdict == Verdict.ACCEPTED for entry in record.entries)
        ]

    def check_roots(self, records: list[RoundRecord]) -> None:
        """Every state that the client reached is one of the ledger, and no update led it elsewhere."""
        said = self.log.read_text()
        assert "instead" not in said and "does not fit" not in said, said
        roots = {record.state_root.hex()[:16] for record in records}
        reached = [line.split()[-1] for line in said.splitlines() if "the state has the root" in line]
        assert len(reached) > 1 and set(reached) <= roots


def interrupt(client: TinyClient) -> None:
    os.killpg(client.process.pid, signal.SIGINT)
    client.wait_end(20)


@contextmanager
def tiny_client(folder: Path, invite: Path, *options: str) -> Iterator[TinyClient]:
    client = TinyClient(folder, invite, *options)
    try:
        yield client
    finally:
        if client.process.poll() is None:
            client.process.kill()
            client.process.wait()


def python_peer(swarm: Swarm, *options: str) -> Program:
    home = str(swarm.folder / "python")
    taste = ("--threads", "1", "--dtype", "float32", "--device", "cpu")
    return swarm.start("python", "join", str(swarm.run / "invite.txt"), "--home", home, *taste, *options)


@pytest.mark.parametrize("options", [(), ("--plaintext-local",)], ids=["tls", "plaintext"])
def test_its_packets_count_and_its_parameters_are_those_of_all(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = make_run(tmp_path, rounds=8)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.start("aggregator", "aggregate", str(run), *options)
        aggregator.wait_event("aggregator ready")
        peer = python_peer(swarm, *options)
        with tiny_client(tmp_path, run / "invite.txt", *options) as client:
            finish([peer], aggregator, 8)
            client.wait_end(20)
    records = ledger(run)
    assert client.accepted(records), client.log.read_text()
    contributors = [sum(entry.verdict == Verdict.ACCEPTED for entry in record.entries) for record in records]
    assert 2 in contributors, "in no round was it merged with the other's packet"
    client.check_roots(records)
    assert f"round 8: the state has the root {records[-1].state_root.hex()[:16]}" in client.log.read_text()


def counted_packet(aggregator: Program, client: TinyClient, after: int) -> int:
    """Wait until a round above `after` has closed with a packet of the client in it; return the round."""
    mine = {"event": "packet", "peer": client.key.hex(), "accepted": True}
    number: int = aggregator.wait_for(lambda event: mine.items() <= event.items() and event["round"] > after, 90)[
        "round"
    ]
    aggregator.wait_event("round closed", 60, round=number)
    return number


def test_killed_in_a_round_it_settles_and_goes_on_from_its_stored_state(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=500, steps=20)
    invite = run / "invite.txt"
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        swarm.peer("python")
        with tiny_client(tmp_path, invite) as client:
            aggregator.wait_event("round closed", 60, round=2)
            client.process.kill()
            client.process.wait()
        closed = len(aggregator.all("round closed"))
        aggregator.wait_event("round closed", 60, round=closed + 2)
        with tiny_client(tmp_path, invite) as client:
            number = counted_packet(aggregator, client, closed + 2)
            interrupt(client)
    records = ledger(run)
    assert number in client.accepted(records)
    client.check_roots(records)


def test_a_restarted_aggregator_finds_it_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=500, steps=20)
    with Swarm(tmp_path, run) as swarm:
        first = swarm.aggregator()
        swarm.peer("python")
        with tiny_client(tmp_path, run / "invite.txt") as client:
            first.wait_event("round closed", 60, round=2)
            first.kill()
            second = swarm.aggregator()
            number = counted_packet(second, client, len(first.all("round closed")))
            interrupt(client)
    records = ledger(run)
    assert "trying again" in client.log.read_text()
    assert number in client.accepted(records)
    client.check_roots(records)


def test_it_talks_to_nobody_with_another_certificate(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    invite = Invite.from_text((run / "invite.txt").read_text())
    with Swarm(tmp_path, run) as swarm:
        swarm.aggregator()
        forged = tmp_path / "forged.txt"
        forged.write_text(replace(invite, certificate_sha256=bytes([1]) * 32).to_text())
        with tiny_client(tmp_path, forged) as client:
            assert client.process.wait(30) == 1
    assert "the certificate of" in client.log.read_text()


def test_control_c_leaves_the_swarm(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=500, steps=20)
    with Swarm(tmp_path, run) as swarm:
        aggregator = swarm.aggregator()
        swarm.peer("python")
        with tiny_client(tmp_path, run / "invite.txt") as client:
            aggregator.wait_event("round closed", 60, round=2)
            interrupt(client)
            aggregator.wait_event("peer left", 30, peer=client.key.hex())
    assert "left after" in client.log.read_text()


GRADIENT = """
import { lossAndGradient } from '%s'
import { readFileSync } from 'node:fs'
const { config, tokens, values } = JSON.parse(readFileSync(0))
const w = {}, g = {}
for (const name in values) [w[name], g[name]] = [Float32Array.from(values[name]), new Float32Array(values[name].length)]
const loss = lossAndGradient(config, w, g, tokens)
for (const name in g) g[name] = [...g[name]]
console.log(JSON.stringify({ loss, gradient: g }))
"""


@pytest.mark.parametrize(("tied", "shared"), [(True, 2), (False, 1)], ids=["tied", "untied-shared-heads"])
def test_its_gradient_is_that_of_the_real_model(tied: bool, shared: int) -> None:
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=shared,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Llama(config)
    generator = torch.Generator().manual_seed(7)
    initial = initial_parameters(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)  # so that no norm is one
            parameter.copy_(initial[name] + noise)
    tokens = torch.randint(0, 256, (1, 21), generator=generator)
    loss = model.loss(tokens)
    torch.autograd.backward(loss)
    told = {
        "config": asdict(config),
        "tokens": tokens[0].tolist(),
        "values": {name: parameter.detach().flatten().tolist() for name, parameter in model.named_parameters()},
    }
    assert NODE is not None
    command = [NODE, "--input-type=module", "-e", GRADIENT % CLIENT.as_uri()]
    answer = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        exact = parameter.grad.flatten()
        torch.testing.assert_close(
            torch.tensor(found["gradient"][name]), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item(), msg=name
        )

"""The ruler of `bench.swarm`: links that count and drop, the pacer, and what is told of a side."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.swarm.case import MODELS, Point, Went, looked_at, settings_of
from bench.swarm.links import IP, Link, Network, possible, processes
from bench.swarm.meter import Pacer, Sampler, peer_of, steps_of
from bench.swarm.plan import HIVEMIND_LOCAL, Plan
from peer.core.model import layout_of

PACKET, PACKETS = 1000, 100
HEADERS = 28  # IPv4 and UDP
needs_links = pytest.mark.skipif(not possible(), reason="namespaces and TUN devices need Linux and the rights of root")

SEND = """
import socket
to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range({count}):
    to.sendto(bytes({size}), ("{address}", 5000))
"""
STREAM = """
import socket
with socket.create_server(("{address}", 5000)) as server:
    print("ready", flush=True)
    stream, _ = server.accept()
    print(sum(map(len, iter(lambda: stream.recv(65536), b""))), flush=True)
"""
DIAL = """
import socket
with socket.create_connection(("{address}", 5000)) as stream:
    stream.sendall(bytes({size}))
"""


def inside(network: Network, name: str, program: str, **values: object) -> list[str]:
    return [IP, "netns", "exec", network.namespace(name), sys.executable, "-c", program.format(**values)]


@needs_links
def test_what_a_slow_link_cannot_carry_is_dropped_and_not_counted() -> None:
    slow = Link(80_000, 1e9)  # holds two such packets in its queue
    with Network({"a": slow, "b": Link(1e9, 1e9)}, 0.0) as network:
        subprocess.run(inside(network, "a", SEND, count=PACKETS, size=PACKET, address=network.address("b")), check=True)
        while network.carried("a")[0] // (PACKET + HEADERS) + network.dropped() < PACKETS:
            time.sleep(0.01)
        up, _ = network.carried("a")
        assert network.dropped() > 0
        assert up == (PACKETS - network.dropped()) * (PACKET + HEADERS)


@needs_links
def test_a_stream_crosses_the_links_whole_and_both_ends_count_it() -> None:
    size = 3_000_000
    fast = Link(1e9, 1e9)
    with Network({"a": fast, "b": fast}, 0.002) as network, Sampler(network, ("a", "b")) as sampler:
        command = inside(network, "b", STREAM, address=network.address("b"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            assert processes([network.namespace("b")])[network.namespace("b")] == [server.pid]
            subprocess.run(inside(network, "a", DIAL, size=size, address=network.address("b")), check=True)
            assert int(server.stdout.readline()) == size
        # The last acknowledgements may still be on their way.
        while network.carried("b") != tuple(reversed(network.carried("a"))):
            time.sleep(0.1)
        up, down = network.carried("a")
        # Every segment has its own headers, however large the pieces are that the kernel hands over.
        assert size * (1 + 40 / 1500) < up < size * 1.1
        while (used := sampler.at("a", time.monotonic())).up < up:
            time.sleep(0.1)
        assert (used.up, used.down) == (up, down)


def test_namespaces_are_gone_afterwards() -> None:
    if not possible():
        pytest.skip("needs the rights of root")
    with Network({"a": Link(1e6, 1e6)}, 0.0) as network:
        path = Path("/run/netns", network.namespace("a"))
        assert path.exists()
    assert not path.exists()


@needs_links
def test_the_steady_part_leaves_out_the_first_round_and_the_last(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    # Four rounds of two steps of a second, each round followed by a wait of two; a longer first and last step.
    seconds = ((3, 1), (1, 1), (1, 1), (1, 9))
    lines = [f"{4 * round + place} {seconds[round][place]} 0.25\n" for round in range(4) for place in range(2)]
    path.write_text("".join(lines))
    with Network({"a": Link(1e6, 1e6)}, 0.0) as network, Sampler(network, ("a",)) as sampler:
        time.sleep(1.5)  # two samples
        peer = peer_of(sampler, "a", steps_of(path), 2)
    assert (peer.inner_share, peer.round_s, peer.step_s, peer.step_cpu_s) == (0.5, 4.0, 1.0, 0.25)
    assert (peer.up, peer.down, peer.cpu_s) == (0, 0, -0.5)


def test_a_step_is_not_shorter_than_its_pace_and_holds_what_is_done_elsewhere(tmp_path: Path) -> None:
    pacer = Pacer(tmp_path / "steps", 0.05)
    assert pacer.step(lambda: 3.5, lambda: (0.04, 7.0)) == 3.5
    (step,) = steps_of(tmp_path / "steps")
    assert step.seconds >= 0.05
    assert step.cpu_s >= 7.0


def test_plans_survive_their_file(tmp_path: Path) -> None:
    plan = Plan("{}", "aa", "data", "10.77.0.1", ["/ip4/10.77.0.2"], 2, HIVEMIND_LOCAL, 0.5, 1.5, "steps", "states")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_rounds_looked_at_end_with_the_last() -> None:
    assert looked_at(50, 12) == [*range(4, 50, 4), 50]
    assert looked_at(6, 1) == [6]
    assert looked_at(3, 12) == [1, 2, 3]


@pytest.mark.parametrize(("model", "least", "most"), [("demo", 1.0e6, 1.5e6), ("10m", 1.0e7, 1.1e7)])
def test_models_have_the_size_that_they_say(model: str, least: float, most: float) -> None:
    settings = settings_of(model, peers=3, rounds=7, seed=5)
    assert least < layout_of(settings.model).size < most
    assert (settings.rounds.quorum, settings.outer.rounds, settings.data.seed) == (3, 7, 5)
    assert settings.inner.steps == MODELS[model][0]


def test_the_loss_at_a_time_is_the_last_one_known_by_then() -> None:
    went = Went("x", [], [Point(0, 0, 5.0), Point(10, 1, 4.0), Point(20, 2, 3.0)], "")
    assert [went.at(seconds) for seconds in (-1, 0, 9.9, 10, 25)] == [5.0, 5.0, 5.0, 4.0, 3.0]

"""Late join and healing with whole programs: cut lines, other peers as sources, and a replica that went astray."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from peer.client import Client
from peer.operator import OperatorFolder
from peer.store import load_key
from protocol.ledger import RoundRecord
from protocol.round import ReplicaEvent
from protocol.run import parse_settings
from tests.peer.proxy import Faults, proxy_thread
from tests.peer.room import fields, make_run_folder, swarm
from tests.peer.swarm import SETTINGS, Program, Swarm, free_port, run_cli
from tests.peer.test_swarm import accepted_rounds, ledger

pytestmark = [pytest.mark.slow, pytest.mark.net]

ROUNDS = 60
WIDE = """
name = "wide"
[model]
hidden_size = 448
intermediate_size = 1024
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 64
[data]
sequence_length = 64
[inner]
steps = {steps}
batch_size = 1
[compression]
k = 64
[outer]
rounds = 60
[rounds]
start_peers = 2
grace_s_min = 4.0
grace_s_max = 8.0
deadline_s = 60.0
"""


def make_wide_run(folder: Path, port: int, steps: int) -> Path:
    """A run with several pieces of state, whose aggregator is said to be at this port."""
    settings = folder / "RUN.toml"
    settings.write_text(WIDE.format(steps=steps))
    ports = ("--port", str(port), "--bootstrap-port", str(free_port()))
    made = run_cli("run", "new", str(settings), "--out", str(folder / "run"), *ports)
    assert made.returncode == 0, made.stderr
    return folder / "run"


def state_bytes(run: Path) -> int:
    return 4 * OperatorFolder(run).load()[0].config.layout.size


def assert_joined_well(run: Path, home: Path, joiner: Program) -> None:
    """The joiner's first packet counted in the round after the one whose parameters it loaded, or in the next."""
    loaded = joiner.all("state loaded")[0]
    first = accepted_rounds(ledger(run), home)[0]
    passed = [event["round"] for event in joiner.all("round")]
    newest = max([loaded["round"], *(round for round in passed if round < first)])
    assert first == newest + 1


def test_a_late_joiner_behind_a_line_that_is_cut_again_and_again(tmp_path: Path) -> None:
    port, hidden = free_port(), free_port()
    run = make_wide_run(tmp_path, port, steps=2)
    with Swarm(tmp_path, run) as programs, ExitStack() as proxies:
        aggregator = programs.start("aggregator", "aggregate", str(run), "--listen", f"127.0.0.1:{hidden}")
        aggregator.wait_event("aggregator ready")
        proxy = proxies.enter_context(proxy_thread(hidden, port=port))
        programs.peer("one")
        programs.peer("two")
        aggregator.wait_event("round closed", 120, round=3)
        proxy.faults = Faults(cut_after_bytes=3_000_000, bytes_per_s=2e7)
        joiner = programs.peer("three")
        joiner.wait_event("state loaded", 120)
        proxy.faults = Faults()
        wait_until_counted(aggregator, run, tmp_path / "three")
        needed = state_bytes(run)
        received = [event["received"] for event in joiner.all("downloading")]
        # Each try counts from what it asks for anew, which is nothing when all the pieces are here.
        fetched = sum(now for now, later in zip(received, [*received[1:], -1], strict=True) if later < now)
        assert needed >= 16 << 20 and needed <= fetched <= 1.05 * needed
        assert proxy.cuts >= 4
        assert_joined_well(run, tmp_path / "three", joiner)


def wait_until_counted(aggregator: Program, run: Path, home: Path) -> None:
    """Wait for the first round in which this peer's packet counts."""
    key = load_key(home / "key").public.hex()
    taken = aggregator.wait_for(
        lambda event: event["event"] == "packet" and event["peer"] == key and event["accepted"], 120
    )
    aggregator.wait_event("round closed", 120, round=taken["round"])


def test_a_late_joiner_takes_pieces_from_other_peers(tmp_path: Path) -> None:
    port, hidden = free_port(), free_port()
    run = make_wide_run(tmp_path, port, steps=60)  # the newest state stays long enough to be fetched
    served = f"127.0.0.1:{free_port()}"
    with Swarm(tmp_path, run) as programs, ExitStack() as proxies:
        programs.bootstrap()
        aggregator = programs.start("aggregator", "aggregate", str(run), "--listen", f"127.0.0.1:{hidden}")
        aggregator.wait_event("aggregator ready")
        proxy = proxies.enter_context(proxy_thread(hidden, port=port))
        home = str(tmp_path / "one")
        taste = ("--threads", "1", "--dtype", "float32", "--device", "cpu")
        one = programs.start("one", "join", str(run / "invite.txt"), "--home", home, *taste, "--serve", served)
        programs.peer("two")
        one.wait_event("serving", 60)
        aggregator.wait_event("round closed", 120, round=2)
        one.wait_event("peers in the directory", 60)
        # So slow that nobody would wait for it, but the small things still come from there.
        proxy.faults = Faults(bytes_per_s=3e5)
        joiner = programs.peer("three")
        joiner.wait_event("state loaded", 120)
        sources = joiner.wait_event("sources")["bytes_from"]
        proxy.faults = Faults()
        assert sources.get(served, 0) > sum(sources.values()) / 2, sources
        wait_until_counted(aggregator, run, tmp_path / "three")
        assert_joined_well(run, tmp_path / "three", joiner)


class GoesAstray(Client):
    """One bit of its outer parameters flips when it has applied round 2."""

    async def _apply_update(self, record: RoundRecord) -> ReplicaEvent:
        applied = await super()._apply_update(record)
        if record.round == 2:
            self._replica.outer[7] *= 2
        return applied


async def test_a_replica_that_went_astray_says_so_and_heals(tmp_path: Path) -> None:
    run = make_run_folder(tmp_path, parse_settings(SETTINGS.format(rounds=6, steps=4, grace_s=3.0)), quorum=1)
    events = await swarm(tmp_path / "swarm", run, peers=(Client, GoesAstray))
    assert any("is not what the record says" in why for why in fields(events, "alarm", "why"))
    assert fields(events, "this replica takes no part until it holds the parameters of the run", "round") == [3]
    assert fields(events, "this replica holds the parameters of the run again and takes part", "round") == [3]
    assert set(fields(events, "finished", "state_root")) == {fields(events, "round closed", "state_root")[-1]}
    counted = fields(events, "round closed", "accepted")
    assert counted[-1] == 2, counted

"""`doctor` on real machines and links: what it finds, what it foretells, and that it is right."""

import dataclasses
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from peer.cli import main
from peer.config import PeerConfig
from peer.core.model import layout_of
from peer.doctor import Doctor
from peer.errors import UserCode, UserError
from peer.limits import Limits
from peer.net.link import Link
from peer.net.messages import SERVICE
from peer.net.pb import swarm_pb2 as pb
from protocol.errors import Code
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.run import ModelConfig, RunConfig
from tests.chaos.training import READY_S, Swarm, settings_of
from tests.net.room import AGGREGATOR, RUN
from tests.net.test_lies import Liar
from tests.peer.proxy import HEALTHY, Faults, proxy_thread
from tests.peer.swarm import Event, free_port, run_cli
from tests.peer.test_fit import small_replica

TASTE = ("--threads", "1", "--device", "cpu")


def doctor_of(tmp_path: Path, **settings: Any) -> Doctor:
    return Doctor(PeerConfig(home=tmp_path / "home", device="cpu", threads=1, **settings), lambda _line: None)


def test_without_an_invite_this_machine_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    assert main(["doctor", "--home", str(home), *TASTE]) == 0
    told = capsys.readouterr().out
    for name in ("software", "device", "kernels", "memory", "disk"):
        assert f"\n  {name:<10} " in "\n" + told
    assert told.splitlines()[-1].startswith("Nothing here is in the way.")
    assert not home.exists(), "whoever only asks leaves nothing behind"


def test_a_device_that_is_not_here_is_an_error_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = next(name for name, here in (("mps", torch.backends.mps.is_available()), ("cuda", False)) if not here)
    assert main(["doctor", "--home", str(tmp_path), "--device", absent, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["helps"] and "1 problem" in report["verdict"]
    (finding,) = report["findings"]
    assert (finding["level"], finding["code"]) == ("error", UserCode.NO_DEVICE)
    assert "--device" in finding["remedy"]


def test_an_aggregator_that_is_away_is_an_error_and_a_directory_that_is_away_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invite = Invite(RUN, AGGREGATOR.public, bytes(32), (f"127.0.0.1:{free_port()}",), ())
    assert main(["doctor", invite.to_text(), "--home", str(tmp_path / "home"), *TASTE, "--json"]) == 1
    levels = {finding["code"]: finding["level"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert levels == {UserCode.NO_DIRECTORY: "warning", UserCode.UNREACHABLE: "error"}


@asynccontextmanager
async def link_to(clock_ahead_s: float | None) -> AsyncIterator[Link]:
    """A link to an aggregator whose clock is ahead by so much, None to one that knows no probes."""

    async def probe(_requests: Any, context: Any) -> None:
        while isinstance(question := await context.read(), pb.ProbeRequest):
            now_ms = round(1000 * (time.time() + (clock_ahead_s or 0.0)))
            await context.write(pb.ProbeReply(now_ms=now_ms, padding=bytes(question.down_bytes)))

    serialize = type(pb.ProbeReply()).SerializeToString
    methods: dict[str, Any] = {
        "Join": grpc.stream_stream_rpc_method_handler(Liar().join, pb.JoinRequest.FromString, serialize)
    }
    if clock_ahead_s is not None:
        methods["Probe"] = grpc.stream_stream_rpc_method_handler(probe, pb.ProbeRequest.FromString, serialize)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with await Link.open(
            f"127.0.0.1:{port}",
            run_id=RUN,
            key=PrivateKey.generate(),
            expect_aggregators={AGGREGATOR.public},
            certificate_sha256=None,
            plaintext=True,
        ) as link:
            yield link
    finally:
        await server.stop(0)


@pytest.mark.net
@pytest.mark.parametrize(("ahead_s", "told"), [(-600.0, "ahead of"), (600.0, "behind")])
async def test_a_wrong_clock_is_a_warning(tmp_path: Path, ahead_s: float, told: str) -> None:
    doctor = doctor_of(tmp_path)
    async with link_to(ahead_s) as link:
        line = await doctor._probe(link)
    assert line is not None and abs(line.clock_ahead_s + ahead_s) < 30
    (finding,) = doctor.findings
    assert (finding.level, finding.code) == ("warning", UserCode.CLOCK_WRONG)
    assert f"s {told} the aggregator's" in finding.message
    assert doctor.helps


@pytest.mark.net
async def test_a_right_clock_is_no_finding(tmp_path: Path) -> None:
    doctor = doctor_of(tmp_path)
    async with link_to(0.0) as link:
        assert await doctor._probe(link) is not None
    assert doctor.findings == []


@pytest.mark.net
async def test_an_aggregator_that_cannot_measure_is_a_warning(tmp_path: Path) -> None:
    doctor = doctor_of(tmp_path)
    async with link_to(None) as link:
        assert await doctor._probe(link) is None
    (finding,) = doctor.findings
    assert (finding.level, finding.code) == ("warning", Code.VERSION)
    assert "too old" in finding.message


def huge_run() -> RunConfig:
    """More parameters than any machine has memory for; only their shapes are there."""
    model = ModelConfig(hidden_size=1 << 14, intermediate_size=1 << 16, num_hidden_layers=200)
    return dataclasses.replace(small_replica(2, 32).run, model=model, layout=layout_of(model))


def test_a_model_that_does_not_fit_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    doctor = doctor_of(tmp_path)
    doctor.look_around()
    run = huge_run()
    with pytest.raises(UserError, match=r"this run needs [\d,.]+ GB of memory") as caught:
        doctor._fit(run)
    assert caught.value.code is UserCode.OUT_OF_MEMORY
    doctor._check_disk(run)
    assert [finding.code for finding in doctor.findings] == [UserCode.DISK_FULL]


def test_a_cap_on_the_disk_is_minded(tmp_path: Path) -> None:
    run = small_replica(2, 32).run
    for disk_mb, codes in ((0.0, []), (1000.0, []), (1.0, [UserCode.DISK_FULL])):
        doctor = doctor_of(tmp_path, limits=Limits(disk_mb=disk_mb))
        doctor.look_around()
        doctor._check_disk(run)
        assert [finding.code for finding in doctor.findings] == codes


def at_s(event: Event) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


ROUNDS_MEASURED = 3
MBIT_5 = Faults(bytes_per_s=5e6 / 8)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_time_that_a_round_travels_on_a_slow_line_is_foretold_within_a_fifth(tmp_path: Path) -> None:
    settings = settings_of(steps=2, peers=2, hidden=384, k=2048, grace_s=(30.0, 30.0))
    with Swarm(tmp_path, settings) as swarm:
        aggregator = swarm.aggregator()
        with proxy_thread(swarm.port, HEALTHY) as proxy:
            slow = swarm.peer("slow", proxy)
            swarm.peer("fast")
            slow.wait_event("round", READY_S)
            proxy.faults = MBIT_5
            invite = tmp_path / "slow.invite"
            asked = run_cli("doctor", str(invite), "--home", str(tmp_path / "asker"), *TASTE, "--json", timeout_s=120)
            first = swarm.head() + 2  # a round that is shaped from its beginning, with nobody else on the line
            slow.wait_event("round", READY_S, first + ROUNDS_MEASURED - 1)
        rounds = range(first, first + ROUNDS_MEASURED)
        made, sent = slow.all("stored"), slow.all("receipt")
        closed = {event["round"]: event for event in aggregator.all("round closed")}
        applied = {event["round"]: event for event in slow.all("round")}
    assert asked.returncode == 0, asked.stdout + asked.stderr
    report = json.loads(asked.stdout)
    assert report["helps"]
    assert report["facts"]["round"]["inner_steps"] == 2

    up_s, down_s = list[float](), list[float]()
    for round in rounds:
        begun = next(at_s(event) for event in made if event["round"] == round)
        up_s.append(next(at_s(event) for event in sent if at_s(event) >= begun) - begun)
        down_s.append(at_s(applied[round]) - at_s(closed[round]))
    measured_s = statistics.median(up_s) + statistics.median(down_s)
    foretold = report["facts"]["round"]
    foretold_s = foretold["up_s"] + foretold["down_s"]
    figures = f"measured up {up_s}, down {down_s}; foretold {foretold['up_s']} + {foretold['down_s']}"
    assert 0.8 < foretold_s / measured_s < 1.2, figures

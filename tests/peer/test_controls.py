"""What a peer's owner lets it do: wishes in files, and what speaks against training."""

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from peer import sensors
from peer.cli import main
from peer.controls import Controls, Hold, Machine, Wish, folder_bytes, read_state, read_wish, write_wish
from peer.equip import demand_room
from peer.errors import UserCode, UserError
from peer.limits import Limits
from peer.net.throttle import BYTES_PER_MBIT, Traffic
from peer.store import Home
from tests.peer.test_keep import RUN


class Watched:
    """Controls that watch a home until the block ends."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.traffic, self.changes = Traffic(), 0
        self.home = Home(folder)
        self.controls = Controls(self.home, limits or Limits(), self.traffic, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> "Watched":
        self._task = asyncio.create_task(self.controls.watch())
        await self.until(self._has_spoken)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _has_spoken(self) -> bool:
        state = read_state(self.home.path)
        return state is not None and state.life == self.controls.life

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  the controls look at files on their own
                await asyncio.sleep(0.02)

    def hold(self) -> Hold | None:
        return self.controls.hold

    def asked_to_finish(self) -> bool:
        return self.controls.finish

    def why(self) -> str:
        hold = self.hold()
        return hold.why if hold else ""

    def offline(self) -> bool:
        hold = self.hold()
        return hold is not None and hold.offline


async def test_wishes_reach_a_peer_that_runs_and_its_answer_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def command(*arguments: str) -> str:
        assert await asyncio.to_thread(main, [*arguments, "--home", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    peer = Watched(tmp_path, Limits(down_mbit=10))
    with peer.home.lock():
        async with peer:
            peer.controls.say("training")
            assert f"the peer in {tmp_path}: paused by you" in await command("pause")
            assert peer.why().startswith("by you") and not peer.offline()
            assert f"the peer in {tmp_path}: training" in await command("resume")
            await command("limits", "--up-mbit", "2", "--share", "0.5", "--exclusive-app", "no such program")
            assert peer.controls.limits == Limits(
                up_mbit=2, down_mbit=10, share=0.5, exclusive_apps=("no such program",)
            )
            assert peer.traffic.up.bytes_per_s == 2 * BYTES_PER_MBIT
            assert "share = 0.5" in await command("limits")
            await command("limits", "--up-mbit", "0", "--exclusive-app", "")
            assert peer.controls.limits == Limits(down_mbit=10, share=0.5)
            assert peer.traffic.up.bytes_per_s == 0
            assert not peer.asked_to_finish()
            await command("finish")
            assert peer.asked_to_finish()
    # Pause and limits stay for the next life, the wish to finish does not.
    await command("pause")
    again = Watched(tmp_path)
    async with again:
        await again.until(lambda: again.hold() is not None)
        assert again.controls.limits == Limits(share=0.5) and not again.asked_to_finish()


def test_bad_wishes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        (["limits", "--share", "2"], "SL801"),
        (["limits", "--schedule", "at night"], "SL801"),
        (["finish"], "SL820"),
        (["pause", "--home", str(tmp_path / "nobody")], "SL806"),
    ):
        assert main(arguments if "--home" in arguments else [*arguments, "--home", str(tmp_path)]) == 1
        assert f"error {code}" in capsys.readouterr().err
    assert read_wish(tmp_path) == Wish()
    for damaged in ("", "[]", '{"paused": true, "what": 1}', '{"limits": {"share": 3}}', '{"limits": 3}'):
        (tmp_path / "control.json").write_text(damaged)
        with pytest.raises(UserError) as caught:
            read_wish(tmp_path)
        assert caught.value.code is UserCode.BAD_FILE


async def test_a_damaged_wish_changes_nothing_while_a_peer_runs(tmp_path: Path) -> None:
    write_wish(tmp_path, Wish(paused=True))
    async with Watched(tmp_path) as peer:
        (tmp_path / "control.json").write_text("{")
        await asyncio.sleep(1.2)
        assert peer.why().startswith("by you")


async def test_the_schedule_and_the_megabytes_of_a_day_hold_a_peer(tmp_path: Path) -> None:
    now = datetime.now().astimezone()
    later = now + timedelta(hours=2)
    async with Watched(tmp_path, Limits(schedule=f"{later:%H:%M}-{later + timedelta(minutes=1):%H:%M}")) as peer:
        assert peer.why() == f"by the schedule until {later:%a %H:%M}" and not peer.offline()
    async with Watched(tmp_path, Limits(mb_a_day=2)) as peer:
        assert peer.hold() is None
        peer.traffic.up.total += 1_500_000
        peer.traffic.down.total += 600_000
        await peer.until(lambda: peer.hold() is not None)
        assert peer.why().startswith("the 2 MB of today") and peer.offline()
    assert json.loads((tmp_path / "traffic.json").read_text())["bytes"] == 2_100_000
    async with Watched(tmp_path, Limits(mb_a_day=2)) as peer:
        assert peer.hold() is not None, "another life of the same day counts on"
    yesterday = {"date": (now - timedelta(days=1)).date().isoformat(), "bytes": 2_100_000}
    (tmp_path / "traffic.json").write_text(json.dumps(yesterday))
    async with Watched(tmp_path, Limits(mb_a_day=2)) as peer:
        assert peer.hold() is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
async def test_a_program_that_has_the_machine_for_itself_holds_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.controls.SENSE_S", 0.2)
    game = tmp_path / "a-game-with-a-long-name"
    shutil.copy(shutil.which("sleep") or sys.executable, game)
    async with Watched(tmp_path / "home", Limits(exclusive_apps=("A-Game-With-A-Long-Name",))) as peer:
        assert peer.hold() is None
        process = await asyncio.create_subprocess_exec(game, "60")
        try:
            await peer.until(lambda: peer.hold() is not None)
            assert peer.why() == "while A-Game-With-A-Long-Name runs"
        finally:
            process.kill()
            await process.wait()
        await peer.until(lambda: peer.hold() is None)


def tell(folder: Path, **files: str) -> None:
    """Let a device of the system say this."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_a_hot_device_rests_until_it_has_cooled_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "SYS", tmp_path)
    machine, limits, zone = Machine(tmp_path), Limits(temperature_max=80), tmp_path / "thermal" / "thermal_zone0"
    assert machine.objection(limits, "cpu") is None, "a limit that cannot be kept is no reason not to train"
    tell(tmp_path / "hwmon" / "hwmon0", name="nvme", temp1_input="90000")
    tell(tmp_path / "hwmon" / "hwmon1", name="k10temp", temp1_input="40000")
    told = []
    for degrees in (79, 81, 76, 74, 79):
        tell(zone, temp=str(1000 * degrees))
        assert sensors.temperature("cpu") == degrees
        told.append(machine.objection(limits, "cpu"))
    assert [why is not None for why in told] == [False, True, True, False, False]
    assert told[1] == "until the device has cooled down below 75 °C"


def test_a_laptop_on_battery_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "SYS", tmp_path)
    machine, limits, supplies = Machine(tmp_path), Limits(on_mains=True), tmp_path / "power_supply"
    assert machine.objection(limits, "cpu") is None
    tell(supplies / "mouse", type="Battery", scope="Device", status="Discharging")
    assert sensors.on_mains() is None, "the battery of a mouse says nothing"
    tell(supplies / "BAT0", type="Battery", status="Discharging")
    assert machine.objection(limits, "cpu") == "while the machine is on battery"
    tell(supplies / "AC", type="Mains", online="1")
    assert machine.objection(limits, "cpu") is None
    tell(supplies / "AC", type="Mains", online="0")
    assert machine.objection(limits, "cpu") == "while the machine is on battery"


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_a_machine_in_use_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "PROC", tmp_path)
    monkeypatch.setattr(sensors, "DEV", tmp_path)
    monkeypatch.setenv("PATH", "")
    idleness = sensors.Idleness()
    assert idleness.seconds() is None
    told = []
    # Ticks of other programs and of nothing: the first reading, then little by others, little, and much.
    for others, idle in ((0, 10), (10, 1000), (20, 2000), (5000, 2100)):
        tell(tmp_path, stat=f"cpu {10_000_000 + others} 0 0 {idle} 0 0 0 0 0 0")
        told.append(idleness.seconds() or 0.0)
        time.sleep(0.05)
    assert told[0] < told[1] < told[2] > told[3]
    (tmp_path / "pts").mkdir()
    tell(tmp_path / "pts", **{"0": ""})
    os.utime(tmp_path / "pts" / "0", (time.time() + 60, 0))
    assert idleness.seconds() == 0, "a key was pressed in a terminal"


async def test_a_home_that_grows_over_its_cap_holds_a_peer(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1_500_000))
    assert folder_bytes(tmp_path) >= 1_500_000
    async with Watched(tmp_path, Limits(disk_mb=1)) as peer:
        assert "takes 2 of 1 MB" in peer.why()


def test_a_run_that_does_not_fit_under_the_cap_is_not_begun(tmp_path: Path) -> None:
    home = Home(tmp_path)
    demand_room(RUN, home, Limits())
    demand_room(RUN, home, Limits(disk_mb=1000))
    (tmp_path / "large").write_bytes(bytes(1_500_000))
    with pytest.raises(UserError) as caught:
        demand_room(RUN, home, Limits(disk_mb=2))
    assert caught.value.code is UserCode.DISK_FULL and "limits --disk-mb" in caught.value.remedy


def test_sensors_answer_or_say_that_they_cannot() -> None:
    assert sensors.running(["no such program"]) is None
    idleness = sensors.Idleness()
    for value in (sensors.temperature("cpu"), sensors.temperature("cuda"), idleness.seconds(), idleness.seconds()):
        assert value is None or value >= 0
    assert sensors.on_mains() in (True, False, None)

import io
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from rich.console import Console

from peer.errors import UserCode, UserError
from peer.telemetry import LogFile, Meter, Progress, Telemetry, duration, human_line, json_line

NOON = datetime(2026, 1, 2, 12, 0, 0, 5000, tzinfo=UTC)


def test_an_event_reaches_stderr_the_file_and_stdout(tmp_path: Path) -> None:
    stderr, stdout, path = io.StringIO(), io.StringIO(), tmp_path / "logs" / "log.jsonl"
    with Telemetry("client", file=path, json_stdout=True, stderr=stderr, stdout=stdout):
        log = structlog.get_logger()
        log.info("round closed", round=7, state_root=bytes(range(32)), loss=2.34567)
        log.warning("link lost", reason="the peer [bold]left[/bold]")
    assert stdout.getvalue() == path.read_text()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first.pop("at").endswith("+00:00")
    assert first == {
        "program": "client",
        "level": "info",
        "event": "round closed",
        "round": 7,
        "state_root": bytes(range(32)).hex(),
        "loss": 2.34567,
    }
    assert second["level"] == "warning"
    lines = stderr.getvalue().splitlines()
    assert [line[8:] for line in lines] == [
        " round closed: round=7 state_root=000102030405 loss=2.346",
        ' warning: link lost: reason="the peer [bold]left[/bold]"',
    ]


def test_stdout_stays_silent_without_json_and_nothing_is_logged_afterwards(tmp_path: Path) -> None:
    stderr, stdout = io.StringIO(), io.StringIO()
    with Telemetry("client", file=None, json_stdout=False, stderr=stderr, stdout=stdout):
        structlog.get_logger().info("started")
    assert stdout.getvalue() == ""
    assert stderr.getvalue().endswith(" started\n")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_is_told_with_its_traceback_in_the_file(tmp_path: Path) -> None:
    stderr = io.StringIO()
    with Telemetry("client", file=tmp_path / "log", json_stdout=False, stderr=stderr):
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            structlog.get_logger().exception("unexpected")
    assert "Traceback" in json.loads((tmp_path / "log").read_text())["exception"]
    assert stderr.getvalue().count("\n") == 1


def test_foreign_text_cannot_break_the_line() -> None:
    evil = 'a\nb\x1b[2J\u202e"'
    assert human_line(NOON, "info", "peer left", {"reason": evil}).isprintable()
    line = json_line(NOON, "client", "info", "peer left", {"reason": evil})
    assert line.isascii() and line.count("\n") == 1
    assert json.loads(line)["reason"] == evil


def test_json_lines_hold_only_json() -> None:
    fields = {"bad": float("nan"), "path": Path("x"), "set": {1}, "map": {1: b"\xff"}, "none": None, "yes": True}
    assert json.loads(json_line(NOON, "p", "info", "e", fields)) == {
        "at": "2026-01-02T12:00:00.005+00:00",
        "program": "p",
        "level": "info",
        "event": "e",
        "bad": None,
        "path": "x",
        "set": [1],
        "map": {"1": "ff"},
        "none": None,
        "yes": True,
    }


def test_a_log_that_cannot_be_opened_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        Telemetry("client", file=tmp_path / "file" / "log", json_stdout=False)
    assert caught.value.code is UserCode.NO_SUCH_FILE


def test_a_full_disk_costs_the_log_file_not_the_program() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    stderr = io.StringIO()
    with Telemetry("client", file=Path("/dev/full"), json_stdout=False, stderr=stderr):
        structlog.get_logger().info("first")
        structlog.get_logger().info("second")
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 3
    assert "log file /dev/full is given up" in lines[1]


def test_readers_that_went_away_do_not_stop_the_program(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    gone = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
    path = tmp_path / "log"
    with Telemetry("client", file=path, json_stdout=True, stderr=gone, stdout=gone):
        structlog.get_logger().info("first")
        structlog.get_logger().info("second")
    gone.detach().close()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stderr_does_not_stop_the_program(tmp_path: Path) -> None:
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    path = tmp_path / "log"
    with Telemetry("client", file=path, json_stdout=False, stderr=full) as telemetry:
        structlog.get_logger().info("first")
        structlog.get_logger().info("second")
        assert telemetry.console.quiet
    full.detach().close()
    assert len(path.read_text().splitlines()) == 2


def test_a_log_file_is_bounded(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", bytes_max=100)
    for number in range(50):
        log.write(f"line {number:4}\n")
    log.close()
    assert {path.name: path.stat().st_size <= 100 for path in tmp_path.iterdir()} == {"log": True, "log.1": True}
    kept = (tmp_path / "log.1").read_text() + (tmp_path / "log").read_text()
    assert kept.endswith("line   48\nline   49\n")
    reopened = LogFile(tmp_path / "log", bytes_max=100)
    reopened.write("x" * 90 + "\n")
    reopened.close()
    assert (tmp_path / "log").read_text() == "x" * 90 + "\n", "the size counts what was there before"


def test_the_meter_counts_waiting_and_extrapolates() -> None:
    meter = Meter(rounds=10, steps_per_round=5)
    first = meter.report(100.0, round=1, step=0, tokens=0, loss=None)
    assert (first.tokens_per_s, first.loss, first.eta_s, first.done) == (None, None, None, 0.0)
    second = meter.report(110.0, round=2, step=0, tokens=5000, loss=3.5)
    assert second.tokens_per_s == pytest.approx(500)
    assert second.eta_s == pytest.approx(90)
    third = meter.report(130.0, round=2, step=0, tokens=0, loss=None)
    assert third.tokens_per_s == pytest.approx(5000 / 30), "waiting lowers the speed"
    assert third.eta_s == pytest.approx(270), "and raises the ETA"
    assert third.loss == 3.5
    last = meter.report(200.0, round=10, step=5, tokens=0, loss=1.0)
    assert last.done == 1.0 and last.eta_s == 0


def test_a_late_joiner_does_not_take_credit_for_rounds_of_others() -> None:
    meter = Meter(rounds=100, steps_per_round=1)
    meter.report(0.0, round=51, step=0, tokens=0, loss=None)
    reading = meter.report(10.0, round=52, step=0, tokens=1, loss=None)
    assert reading.eta_s == pytest.approx(490)


def test_plain_progress_prints_at_most_every_few_seconds() -> None:
    times: Iterator[float] = iter(0.5 * number for number in range(41))
    out = io.StringIO()
    with Progress(
        Console(file=out, soft_wrap=True), rounds=4, steps_per_round=10, clock=lambda: next(times)
    ) as progress:
        for number in range(41):
            progress.report(round=1 + number // 10, step=number % 10, tokens=100, loss=2.0)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1] == "progress  25%  round 2/4  step 0/10  200 tokens/s  loss 2.000  ETA 0:15"


def test_a_terminal_gets_a_bar_and_events_above_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, markup=False)
    with Progress(console, rounds=4, steps_per_round=10) as progress:
        progress.report(round=2, step=5, tokens=100, loss=2.0)
        console.print("an event")
    shown = out.getvalue()
    assert "round 2/4" in shown and "loss 2.000" in shown and "an event" in shown and "\x1b[" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00"), (42.4, "0:42"), (725, "12:05"), (11045, "3:04:05")],
)
def test_durations_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text

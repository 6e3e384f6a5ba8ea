"""What a peer shows: live lines on a terminal, plain ones elsewhere, and its phases."""

import io
import json
import time
from pathlib import Path

import structlog
from rich.console import Console

from peer.net.throttle import Traffic
from peer.phases import DOWNLOAD, FIND, FIRST_ACCEPTED, FIRST_STEP, PHASES, REPLAY, VERIFY, Phases
from peer.telemetry import Telemetry
from peer.view import View


def new_view(out: io.StringIO, traffic: Traffic, *, terminal: bool) -> View:
    times = iter(range(1000))
    console = Console(file=out, force_terminal=terminal, width=100, height=20, markup=False, soft_wrap=True)
    return View(console, Phases(time.monotonic(), lambda _: None), traffic, clock=lambda: float(next(times)))


def test_a_terminal_shows_all_that_a_volunteer_asks() -> None:
    out, traffic = io.StringIO(), Traffic()
    with new_view(out, traffic, terminal=True) as view:
        assert view.lines()[0] == "sparseloco-peer: starting  [find]"
        view.say("fetching the parameters")
        view.heard("downloading", {"bytes": 5_000_000, "of": 20_000_000, "bytes_per_s": 1_500_000, "eta_s": 10})
        assert view.lines()[0].endswith("fetching the parameters  [find]  5.0 MB of 20.0 MB, 1.5 MB/s, ETA 0:10")
        view.begin("tiny", 10, 4)
        view.opened(60.0)
        view.say("training")
        view.report(round=3, step=1, tokens=500, loss=2.5)
        view.report(round=3, step=2, tokens=500, loss=2.25)
        for accepted in (True, True, False):
            view.heard("receipt", {"accepted": accepted, "code": 0})
        traffic.up.total = 4_200
        view.heard("round", {"contributors": 7})
        view.heard("something else", {})
        first, place, facts, mine = view.lines()
        assert first == "tiny: training  [find]"
        assert place.startswith("round 3/10  step 2/4  ━━━━━━╌") and "25%  closes within 0:5" in place
        assert "tokens/s  loss 2.250  ETA" in facts
        assert mine == "my packets 2 accepted, 1 not  peers 7  up 4.2 kB  down 0 bytes"
        view.heard("paused", {"why": "while game runs"})
        assert view.lines()[0].startswith("tiny: paused while game runs")
        view.heard("resumed", {})
        assert view.lines()[0].startswith("tiny: training")
    assert "tiny: training" in out.getvalue() and "\x1b[" in out.getvalue()


def test_elsewhere_there_are_plain_lines() -> None:
    out = io.StringIO()
    with new_view(out, Traffic(), terminal=False) as view:
        view.begin("tiny", 10, 4)
        view.report(round=3, step=1, tokens=500, loss=2.5)
        view.report(round=3, step=2, tokens=500, loss=2.5)
    assert out.getvalue() == "progress  22%  round 3/10  step 1/4  - tokens/s  loss 2.500  ETA -\n"


def test_each_phase_is_told_once_in_order_with_its_seconds(tmp_path: Path) -> None:
    out, sentences = io.StringIO(), list[str]()
    with Telemetry("peer", file=tmp_path / "log", json_stdout=False, stderr=out) as telemetry:
        assert structlog.get_logger() is not None
        phases = Phases(time.monotonic() - 100, sentences.append)
        for name in (FIND, VERIFY, REPLAY, DOWNLOAD, REPLAY, FIRST_STEP, FIRST_STEP, FIRST_ACCEPTED, FIRST_ACCEPTED):
            phases.over(name)
            assert phases.current != name
        telemetry.say("a sentence\nfor people")
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event["name"] for event in told] == list(PHASES)
    assert told[0]["seconds"] >= 100 and told[2]["seconds"] == 0, "a phase that was not needed took no time"
    assert phases.current == ""
    assert len(sentences) == 1 and sentences[0].startswith("Your first contribution counts: it was accepted 100")
    assert out.getvalue().endswith("a sentence for people\n")


def test_whoever_listens_hears_every_event(tmp_path: Path) -> None:
    heard = []
    with Telemetry("peer", file=None, json_stdout=False, stderr=io.StringIO()) as telemetry:
        telemetry.listener = lambda name, facts: heard.append((name, dict(facts)))
        structlog.get_logger().info("round", contributors=3)
    assert heard == [("round", {"contributors": 3})]

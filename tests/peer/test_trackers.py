"""Curves of a run in somebody else's display. Those of packages that are not installed here pass over themselves."""

import importlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from peer.cli import main
from peer.config import PeerConfig, parse_config
from peer.errors import UserCode, UserError
from peer.telemetry import Telemetry
from peer.trackers import Tracker, open_tracker

EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("connected", {"address": "127.0.0.1:7700"}),
    ("round", {"round": 1, "loss": None, "tokens": 1000, "mine_counted": False, "form": "update"}),
    ("round closed", {"round": 2, "accepted": 3, "packets": 4, "seconds": 1.5, "kind": "applied"}),
    ("round", {"round": 2, "loss": 2.5, "tokens": 3000, "mine_counted": True, "form": "bundle"}),
    ("evaluated", {"round": 1, "loss": 2.75, "seconds": 0.5}),
]


class Notes:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def write(self, round: int, values: Mapping[str, float]) -> None:
        self.written.append((round, values))

    def close(self) -> None:
        self.closed = True


class Broken(Notes):
    """A sink whose disk is full."""

    def write(self, round: int, values: Mapping[str, float]) -> None:
        super().write(round, values)
        raise RuntimeError("no room\x1b[2J")


def tell(tracker: Tracker, log: Path) -> str:
    """Log the events as a program does; return what people saw."""
    screen = io.StringIO()
    with Telemetry("peer", file=log, json_stdout=False, stderr=screen, tracker=tracker):
        for name, facts in EVENTS:
            structlog.get_logger().info(name, **facts)
    assert len(log.read_text().splitlines()) == len(EVENTS)
    return screen.getvalue()


def test_the_numbers_of_a_round_become_curves(tmp_path: Path) -> None:
    notes = Notes()
    seconds = iter([10.0, 14.0])
    tell(Tracker(notes, lambda: next(seconds)), tmp_path / "log")
    assert notes.written == [
        (1, {"peer/tokens": 1000.0, "peer/mine_counted": 0.0}),
        (2, {"swarm/accepted": 3.0, "swarm/packets": 4.0, "swarm/seconds": 1.5}),
        (2, {"peer/loss": 2.5, "peer/tokens": 3000.0, "peer/mine_counted": 1.0, "peer/tokens_per_s": 500.0}),
        (1, {"validation/loss": 2.75, "validation/seconds": 0.5}),
    ]
    assert notes.closed


def test_a_tracker_that_fails_is_given_up_and_training_goes_on(tmp_path: Path) -> None:
    broken = Broken()
    seen = tell(Tracker(broken), tmp_path / "log")
    assert len(broken.written) == 1
    assert seen.count("warning: the tracker is given up: RuntimeError: no room") == 1 and "\x1b" not in seen


@pytest.mark.parametrize("text", ["tensorboard", "tensorboard:", "mlflow:x", ":", "wandb: "])
def test_a_tracker_that_there_is_not(text: str) -> None:
    for attempt in (lambda: PeerConfig(tracker=text), lambda: open_tracker(text)):
        with pytest.raises(UserError, match=r"SL801.*tracker") as caught:
            attempt()
        assert "tensorboard:FOLDER" in caught.value.remedy
    assert parse_config('tracker = "wandb:my-run"', Path()).tracker == "wandb:my-run"


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_named_with_the_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not installed
    with pytest.raises(UserError) as caught:
        open_tracker(f"{kind}:{tmp_path}")
    assert caught.value.code is UserCode.MISSING_PACKAGE
    assert f"pip install 'sparseloco-peer[{kind}]'" in caught.value.remedy
    run = Path(__file__).parent / "none"
    assert main(["aggregate", str(run), "--tracker", f"{kind}:{tmp_path}"]) == 1
    assert "error SL806" in capfd.readouterr().err


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tell(open_tracker(f"tensorboard:{tmp_path / 'curves'}"), tmp_path / "log")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    curves = reader.EventAccumulator(str(tmp_path / "curves"))
    curves.Reload()
    assert [(each.step, each.value) for each in curves.Scalars("peer/tokens")] == [(1, 1000.0), (2, 3000.0)]
    assert [(each.step, each.value) for each in curves.Scalars("validation/loss")] == [(1, 2.75)]
    assert [each.value for each in curves.Scalars("swarm/accepted")] == [3.0]


def test_wandb_takes_the_curves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    tell(open_tracker("wandb:small"), tmp_path / "log")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = run.glob("*.wandb")
    # A process of its own writes the file.
    end_s, names = time.monotonic() + 30, (b"peer/tokens", b"validation/loss", b"swarm/accepted")
    while not all(name in stored.read_bytes() for name in names):
        assert time.monotonic() < end_s, stored.read_bytes()
        time.sleep(0.1)


def test_trackio_has_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its folder is read when it is imported, so it must not have been before.
    monkeypatch.setenv("TRACKIO_DIR", os.fspath(tmp_path / "curves"))
    pytest.importorskip("trackio")
    tell(open_tracker("trackio:small"), tmp_path / "log")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    (run,) = storage.get_runs("small")
    rows = storage.get_logs("small", run)
    assert {"validation/loss": 2.75}.items() <= next(row for row in rows if "validation/loss" in row).items()
    assert sorted(row["step"] for row in rows) == [1, 1, 2, 2], json.dumps(rows, default=str)

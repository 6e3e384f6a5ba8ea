"""Optional trackers: curves of a run in TensorBoard, Weights & Biases or Trackio, which are extras of this package.

A tracker hears the events of the log and keeps the numbers of those that belong to a round. Whatever it does wrong is
its own affair: `Telemetry` gives it up with a warning, and training goes on.
"""

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from peer.errors import UserCode, UserError

# Which events are kept, and under which name their numbers appear.
TRACKED = {"round": "peer", "round closed": "swarm", "evaluated": "validation"}
FORM = "tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT"


class Sink(Protocol):
    """What is needed of a tracker's library."""

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Keep the values of a round. Rounds may come out of order."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class Tracker:
    """Turns events into curves. `tokens`, counted from the start of the program, become `tokens_per_s`."""

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink, self._clock = sink, clock
        self._tokens: tuple[float, float] | None = None  # when the last round ended, and how many there were

    def heard(self, name: str, facts: Mapping[str, Any]) -> None:
        """Take an event in."""
        group = TRACKED.get(name)
        if group is None:
            return
        values = {
            key: float(value) for key, value in facts.items() if isinstance(value, int | float) and key != "round"
        }
        if "tokens" in values:
            now_s, tokens = self._clock(), values["tokens"]
            if self._tokens is not None and now_s > self._tokens[0]:
                values["tokens_per_s"] = (tokens - self._tokens[1]) / (now_s - self._tokens[0])
            self._tokens = now_s, tokens
        self._sink.write(int(facts["round"]), {f"{group}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Finish, so that what was kept last is there; what does not want to finish is left."""
        with contextlib.suppress(Exception):
            self._sink.close()


def check_tracker(text: str) -> bool:
    """Whether this names a tracker: its kind, a colon, and the folder or project."""
    kind, _, place = text.partition(":")
    return kind in _KINDS and place.strip() != ""


def open_tracker(text: str) -> Tracker:
    """Start the tracker that the settings name. Raises UserError when its package is not installed or refuses."""
    kind, _, place = text.partition(":")
    if not check_tracker(text):
        raise UserError(UserCode.BAD_CONFIG, f"tracker = {text!r} is not accepted", f"set tracker to {FORM}")
    make, package = _KINDS[kind]
    try:
        library = importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            UserCode.MISSING_PACKAGE,
            f"the tracker {kind} needs the package {kind}, which is not installed ({error})",
            f"pip install 'sparseloco-peer[{kind}]', or leave the tracker away",
        ) from error
    try:
        # These libraries greet people on stdout, where our events are read by programs.
        with contextlib.redirect_stdout(sys.stderr):
            return Tracker(make(library, place))
    except Exception as error:  # somebody else's code, which may raise anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            UserCode.BAD_CONFIG,
            f"the tracker {text} did not start ({why})",
            f"do what {kind} says (`{kind} login`, another folder), or leave the tracker away",
        ) from error


class _TensorBoard:
    def __init__(self, library: Any, folder: str) -> None:
        self._writer = library.SummaryWriter(folder)

    def write(self, round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        # A peer that is killed leaves its curves whole.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, library: Any, project: str) -> None:
        settings = library.Settings(console="off", silent=True, init_timeout=30)
        self._run = library.init(project=project, settings=settings)
        # Its own steps only grow, while the loss of a round may come after the next one.
        self._run.define_metric("*", step_metric="round")

    def write(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log({"round": round, **values})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, library: Any, project: str) -> None:
        self._run = library.init(project=project, embed=False)

    def write(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=round)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


_KINDS: dict[str, tuple[Callable[[Any, str], Sink], str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard"),
    "wandb": (_Wandb, "wandb"),
    "trackio": (_Trackio, "trackio"),
}

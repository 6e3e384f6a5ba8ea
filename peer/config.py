"""Local taste: what one peer may choose without asking the others. What all must agree on is protocol.run.RunConfig.

A peer runs well with no file at all. A file is TOML with the keys of `PeerConfig`:

    device = "cuda"
    micro_batch = 4
    [data_paths]
    my-corpus = "/data/my-corpus"
    [limits]
    schedule = "22:00-07:00"
    up_mbit = 5
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peer.errors import UserCode, UserError, os_errors
from peer.limits import Limits
from peer.trackers import FORM, check_tracker
from protocol.invite import check_address

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class PeerConfig:
    """The settings of one peer. Raises UserError BAD_CONFIG on a value that is not accepted."""

    home: Path = field(default_factory=lambda: Path.home() / ".sparseloco-peer")
    """Folder for the key, the log and the runs. Each peer on a machine needs its own."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "mps", or "auto" for the best one here."""
    dtype: str = "auto"
    """Type of the matrix products: "float32", "bfloat16", or "auto" for bfloat16 where the device multiplies it."""
    threads: int = 0
    """CPU threads for training; 0 leaves the choice to torch. Use 1 where several peers share a machine."""
    micro_batch: int = 0
    """Sequences that go through the model at a time; 0 to find by trying what suits the device."""
    data_paths: Mapping[str, Path] = field(default_factory=dict)
    """Folders of token shards, by the name that the run gives to its corpus."""
    log_json: bool = False
    """Whether each event also goes to stdout as a JSON line."""
    serve: str = ""
    """Address ("host:port") under which others may fetch the parameters from this peer; empty to serve nobody."""
    limits: Limits = field(default_factory=Limits)
    """How much of this machine the peer may use: the table `[limits]`."""
    tracker: str = ""
    """Where curves go: "tensorboard:FOLDER", "wandb:PROJECT", "trackio:PROJECT" (each an extra), or "" for nowhere."""

    def __post_init__(self) -> None:
        _demand("device", self.device, "one of " + ", ".join(DEVICES), self.device in DEVICES)
        _demand("dtype", self.dtype, "one of " + ", ".join(DTYPES), self.dtype in DTYPES)
        for name, value, most in (("threads", self.threads, 1024), ("micro_batch", self.micro_batch, 1 << 16)):
            # In Python `true` is an integer, but not a number of threads.
            holds = type(value) is int and 0 <= value <= most
            _demand(name, value, f"a whole number from 0 to {most}", holds)
        _demand("serve", self.serve, 'an address such as "peer.example.org:7710", or ""', _is_address(self.serve))
        _demand("tracker", self.tracker, f'{FORM}, or ""', _is_tracker(self.tracker))
        _demand("log_json", self.log_json, "true or false", type(self.log_json) is bool)


def read_config(path: Path) -> PeerConfig:
    """Read a TOML file; relative paths in it start at its own folder. Raises UserError."""
    with os_errors(path):
        data = path.read_bytes()
    try:
        return parse_config(data.decode("utf-8"), path.parent.absolute())
    except UserError as error:
        raise UserError(error.code, f"{path}: {error.message}", error.remedy) from error
    except UnicodeDecodeError as error:
        raise UserError(UserCode.BAD_CONFIG, f"{path} is not UTF-8 text", "save it as UTF-8") from error


def parse_config(text: str, folder: Path) -> PeerConfig:
    """Read the text of a settings file that lies in `folder`. Raises UserError BAD_CONFIG."""
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(UserCode.BAD_CONFIG, f"this is not TOML: {error}", "mend that line") from error
    known = [setting.name for setting in fields(PeerConfig)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"remove it; the settings are {', '.join(known)}"
            raise UserError(UserCode.BAD_CONFIG, f"there is no setting {key!r}", remedy)
    if "home" in table:
        _demand("home", table["home"], "a path in quotes", isinstance(table["home"], str))
        table["home"] = _path(table["home"], folder)
    if "data_paths" in table:
        paths = table["data_paths"]
        holds = isinstance(paths, dict) and all(isinstance(path, str) for path in paths.values())
        _demand("data_paths", paths, 'a table of lines like my-corpus = "/path"', holds)
        table["data_paths"] = {name: _path(path, folder) for name, path in paths.items()}
    if "limits" in table:
        _demand("limits", table["limits"], "a table such as [limits]", isinstance(table["limits"], dict))
        table["limits"] = Limits.of(table["limits"])
    return PeerConfig(**table)


def _path(text: str, folder: Path) -> Path:
    return folder / Path(text).expanduser()


def _is_address(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        if text:
            check_address(text)
    except ValueError:
        return False
    return True


def _is_tracker(text: object) -> bool:
    return isinstance(text, str) and (text == "" or check_tracker(text))


def _demand(name: str, value: object, accepted: str, holds: bool) -> None:
    if not holds:
        raise UserError(UserCode.BAD_CONFIG, f"{name} = {value!r} is not accepted", f"set {name} to {accepted}")

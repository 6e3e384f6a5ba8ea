"""Whatever is typed after `sparseloco-peer`, nobody sees a traceback: every command of the parser with bad input.

The commands are found by walking the parser, so one that is added later is driven too.
"""

import argparse
import random
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peer.cli import _parser, main
from peer.operator import RunPlace, new_run
from protocol.run import parse_settings
from tests.peer.swarm import SETTINGS, free_port
from tests.peer.test_cli import check_refused, small_disk

Command = tuple[str, ...]
NUMBERS = ("-1", "0", "nan", "-inf", "9" * 40, "1e400")

# What a command without arguments is to refuse. "BAD" stands for each bad path in turn.
OPTIONS_ALONE: dict[Command, list[list[str]]] = {
    ("pause",): [["--home", "BAD"]],
    ("resume",): [["--home", "BAD"]],
    ("finish",): [["--home", "BAD"]],
    ("limits",): [["--config", "BAD"], ["--share", "2"], ["--up-mbit", "nan"], ["--schedule", "yesterday"]],
    ("demo",): [["--settings", "BAD"], ["--peers", "0"], ["--rounds", "-1"], ["--peers", "9" * 40]],
    ("simulate",): [
        *(["--peers", "2", "--rounds", "1", option, "-1"] for option in ("--quorum", "--k")),
        *(["--rounds", "1", "--peers", value] for value in ("0", "-1")),
        *(["--peers", "2", "--rounds", "1", option, "nan"] for option in ("--up", "--loss", "--inner-seconds")),
        *(["--peers", "2", "--rounds", "1", option, "2"] for option in ("--loss", "--stragglers")),
        ["--peers", "2", "--rounds", "0"],
    ],
}
# What looks bad and is good: a file of text is a document, any folder is the home of a peer that never ran, and a file
# without a line holds no limits.
FOLDERS = ("empty folder", "a folder of garbage", "a folder of folders", "no model", "a foreign database")
GOOD = {
    (("corpus",), "text"),
    (("corpus",), "bad TOML"),
    *(((command,), what) for command in ("pause", "resume") for what in (*FOLDERS, "nothing")),
    (("limits",), "empty file"),
}


def leaves(parser: argparse.ArgumentParser, name: Command = ()) -> Iterator[tuple[Command, argparse.ArgumentParser]]:
    """Every command that does something, with its own parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for word, child in action.choices.items():
            yield from leaves(child, (*name, word))
    if not below:
        yield name, parser


COMMANDS = dict(leaves(_parser()))
EVERY_COMMAND = pytest.mark.parametrize("command", COMMANDS, ids=" ".join)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command may find this user's own peer, or leave something in the repository."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Paths that lead to nothing of use, by what is wrong with them."""
    folder = tmp_path / "bad"
    for name in ("empty", "wrong", "run", "binary", "model", "zip"):
        (folder / name).mkdir(parents=True)
    garbage = random.Random(7).randbytes(5000)
    (folder / "file").write_bytes(b"")
    (folder / "garbage").write_bytes(garbage)
    (folder / "text").write_text("hello\nworld\n")
    (folder / "toml").write_text("[[[")
    # Folders as a command may expect them, with garbage in every file that it may open.
    for name in ("run.bin", "invite.txt", "journal.sqlite", "operator.key", "config.json", "model.safetensors", "key"):
        (folder / "wrong" / name).write_bytes(garbage)
        (folder / "run" / name).mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    with closing(sqlite3.connect(folder / "zip" / "journal.sqlite")) as other:
        other.execute("CREATE TABLE records (everything)")
    paths = {
        "missing": "none",
        "empty folder": "empty",
        "empty file": "file",
        "garbage": "garbage",
        "text": "text",
        "bad TOML": "toml",
        "a folder of garbage": "wrong",
        "a folder of folders": "run",
        "no model": "model",
        "a foreign database": "zip",
        "below a file": "file/deeper",
        "too long": "x" * 300,
        "no text": "\udcff\x1b[2J",
    }
    found = {what: str(folder / path) for what, path in paths.items()}
    if Path("/proc/self/mem").exists():
        found["unreadable"] = "/proc/self/mem"
    return {**found, "wrong invite": "slp1AAAA", "nothing": ""}


def needs(parser: argparse.ArgumentParser) -> tuple[list[str], list[argparse.Action]]:
    """Options that must be given, with harmless values, and the arguments."""
    options: list[str] = []
    positional = [action for action in parser._actions if not action.option_strings]
    for action in parser._actions:
        if action.option_strings and action.required:
            value = "out" if action.type is Path else "1" if action.type in (int, float) else "x"
            options += [action.option_strings[0], str(next(iter(action.choices or [value])))]
    return options, positional


def check(arguments: list[str], capfd: pytest.CaptureFixture[str], *, good: bool = False) -> None:
    """Run a command in this process; it ends with a coded error, or says how it is used."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status, usage = int(ended.code or 0), True
    else:
        usage = False
    out, err = capfd.readouterr()
    shown = f"{arguments}\n{out}{err}"
    assert "Traceback" not in out + err, shown
    assert not Path("sparseloco-peer-crash.txt").exists(), shown
    assert status != 0 or good, shown
    errors = re.findall(r"^error (SL\d+ [a-z-]+): \S", err, re.MULTILINE)
    if usage:
        assert status == 2 and "usage: sparseloco-peer" in err, shown
    elif not good:
        assert len(errors) == 1 and err.count("\n  try: ") == 1, shown
    assert "SL821 program-died" not in errors, shown


@EVERY_COMMAND
def test_arguments_that_lead_to_nothing(
    command: Command, bad: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options, positional = needs(COMMANDS[command])
    for what, path in bad.items():
        if positional:
            lines = [[*(path for _ in positional), *options]]
        else:
            assert command in OPTIONS_ALONE, f"say in OPTIONS_ALONE what `{' '.join(command)}` is to refuse"
            lines = [[path if word == "BAD" else word for word in line] for line in OPTIONS_ALONE[command]]
            if path != bad["missing"]:
                lines = [line for line in lines if path in line]
        for line in lines:
            check([*command, *line], capfd, good=(command, what) in GOOD)


@EVERY_COMMAND
def test_options_with_values_of_the_wrong_kind(
    command: Command, bad: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    options, positional = needs(COMMANDS[command])
    start = [*command, *(bad["missing"] for _ in positional), *options]
    for action in COMMANDS[command]._actions:
        name = action.option_strings[0] if action.option_strings else ""
        if not name or action.nargs == 0:
            continue
        if action.type in (int, float):
            check([*start, name, "many"], capfd)
        if action.choices:
            check([*start, name, "abacus"], capfd)
        check([*start, name], capfd)
        if positional:
            # The argument leads nowhere, so nothing is ever started; the option must not crash on the way there.
            for value in NUMBERS if action.type in (int, float) else (bad["garbage"], bad["no text"], "", "-1"):
                check([*start, f"{name}={value}"], capfd)
    check([*start, "--no-such-option"], capfd)
    check([*start, *(["one more"] if not any(action.nargs for action in positional) else ["--none"])], capfd)


def test_numbers_out_of_range_where_everything_else_is_right(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    new_run(
        parse_settings(SETTINGS.format(rounds=2, steps=2, grace_s=3.0)),
        run,
        RunPlace("127.0.0.1", free_port(), free_port()),
    )
    model = ["export", str(run), "--out", str(tmp_path / "model")]
    assert main(model) == 0
    capfd.readouterr()
    for folder in (run, tmp_path / "model"):
        generate = ["generate", str(folder), "--threads", "1"]
        for option in ("--tokens=0", "--tokens=-1", "--top-k=0", "--temperature=nan", "--temperature=-1", "--seed=-1"):
            check([*generate, option], capfd)
        for option in (f"--seed={'9' * 40}", "--threads=-1", "--round=7", "--round=-1", "--prompt=\udcff"):
            check([*generate, option], capfd)
    check([*model, "--round", "1"], capfd)
    check([*model, "--round", "-1"], capfd)
    check([*model, "--every", "2"], capfd)
    check([*model, "--follow", "--every", "0"], capfd)
    check([*model, "--follow", "--round", "0"], capfd)
    check(["export", str(run), "--out", str(run)], capfd)
    for option in ("--from=1", "--to=-1", "--to=1", f"--to={'9' * 40}"):
        check(["audit", str(run), option], capfd)
    for option in ("--rounds=0", "--rounds=-1"):
        check(["status", str(run), option], capfd)
    for option in ("--lease=nan", "--lease=-1", "--standby --take-over"):
        check(["aggregate", str(run), *option.split()], capfd)


def test_export_on_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, disk = tmp_path / "run", small_disk(tmp_path / "disk")
    try:
        new_run(parse_settings(SETTINGS.format(rounds=2, steps=2, grace_s=3.0)), run, RunPlace("127.0.0.1", 7700, 7701))
        check_refused(capfd, "SL803", "export", run, "--out", disk / "model")
        assert not list((disk / "model").glob("*.safetensors"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

"""Every command with bad input: one error line with a code, one remedy, no traceback."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.cli import main
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.store import atomic_write
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.run import parse_settings
from tests.peer.swarm import SETTINGS, free_port

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    new_run(parse_settings(SETTINGS.format(rounds=2, steps=2, grace_s=3.0)), folder, place())
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "RUN.toml"
    path.write_text(SETTINGS.format(rounds=2, steps=2, grace_s=3.0))
    return path


def place() -> RunPlace:
    return RunPlace("127.0.0.1", free_port(), free_port())


def check_told(status: int, text: str, code: str) -> None:
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("error ")]
    assert status != 0
    assert len(errors) == 1 and re.match(rf"error {code} [a-z-]+: \S", errors[0]), text
    assert sum(line.startswith("  try: ") for line in lines) == 1, text
    assert "Traceback" not in text


def check_refused(capfd: pytest.CaptureFixture[str], code: str, *arguments: str | Path) -> None:
    """Run the command in this process, as `main` does it."""
    status = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert not out
    check_told(status, err, code)


# Set inside the new process, not between fork and exec: gRPC's threads in this one do not survive a fork.
_LIMITED = """
import resource, runpy, signal, sys
limit = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("peer.cli", run_name="__main__", alter_sys=True)
"""


def check_process(code: str, *arguments: str | Path, cwd: Path, file_bytes_max: int | None = None) -> None:
    """Run the command in a process of its own, with a limit on the size of files if there should be one.

    Without the signal a write beyond the limit fails with EFBIG, as it does on a disk that is full with ENOSPC.
    """
    program = ["-m", "peer.cli"] if file_bytes_max is None else ["-c", _LIMITED, str(file_bytes_max)]
    ended = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    check_told(ended.returncode, ended.stderr, code)
    assert not (cwd / "sparseloco-peer-crash.txt").exists()


def small_disk(folder: Path) -> Path:
    """A file system of 64 KiB; the test passes over itself where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = small_disk(tmp_path / "disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["join"], ["run"], ["run", "new"], ["inspect"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: sparseloco-peer" in capfd.readouterr().err


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(r"sparseloco-peer \d+\.\d+\.\d+\n", capfd.readouterr().out)


@pytest.mark.parametrize("text", ["", "hello", "slp1", "slp2abcdef", "slp1!!!", "/no/such/invite.txt"])
def test_join_with_what_is_no_invite(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL203", "join", text, "--home", tmp_path / "home")


def test_join_with_a_file_that_stayed_on_the_other_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["join", "my-run/invite.txt", "--home", str(tmp_path / "home")]) == 1
    assert "'my-run/invite.txt' is no file here" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["aggregate"], ["bootstrap"], ["audit"], ["generate"], ["export", "--out", "model"], ["run", "pause"]],
    ids=lambda words: words[0],
)
def test_an_invite_where_a_folder_is_needed(run: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    check_refused(capfd, "SL820", *words, (run / "invite.txt").read_text().strip())


def test_join_with_a_damaged_invite(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (run / "invite.txt").read_text().strip()
    swapped = text[:50] + ("A" if text[50] != "A" else "B") + text[51:]
    for damaged in (text[:-1], swapped, text + "A", text.swapcase()):
        check_refused(capfd, "SL203", "join", damaged, "--home", tmp_path / "home")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    check_refused(capfd, "SL203", "join", tmp_path / "binary", "--home", tmp_path / "home")


@pytest.mark.parametrize(("address", "code"), [("127.0.0.1:PORT", "SL901"), ("no-such-host.invalid:7700", "SL902")])
@pytest.mark.slow
def test_join_when_nobody_is_there(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], address: str, code: str
) -> None:
    good = Invite.from_text((run / "invite.txt").read_text())
    address = address.replace("PORT", str(free_port()))
    invite = Invite(good.run_id, good.aggregator_key, good.certificate_sha256, (address,), ())
    home = tmp_path / "home"
    check_process(code, "join", invite.to_text(), "--home", home, "--patience", "0", cwd=tmp_path)


@pytest.mark.slow
def test_join_where_something_else_answers(run: Path, tmp_path: Path) -> None:
    good = Invite.from_text((run / "invite.txt").read_text())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Connections are taken by the kernel and never answered, as by a firewall that swallows everything.
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        invite = Invite(good.run_id, good.aggregator_key, good.certificate_sha256, (address,), ())
        check_process("SL9..", "join", invite.to_text(), "--home", tmp_path / "home", "--patience", "0", cwd=tmp_path)


@pytest.mark.slow
def test_join_with_a_key_that_others_may_read(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    atomic_write(home / "key", PrivateKey.generate().to_text().encode(), mode=0o644)
    (home / "key").chmod(0o644)
    check_process("SL807", "join", run / "invite.txt", "--home", home, "--patience", "0", cwd=tmp_path)


@pytest.mark.slow
def test_join_with_a_damaged_key(run: Path, tmp_path: Path) -> None:
    atomic_write(tmp_path / "home" / "key", b"sparseloco-peer-key-1 AAAA", mode=0o600)
    check_process("SL808", "join", run / "invite.txt", "--home", tmp_path / "home", cwd=tmp_path)


@pytest.mark.parametrize("text", ["device = ", 'device = "abacus"', "thread = 3", "threads = -1", "\udcff"])
def test_join_with_bad_settings(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    config = tmp_path / "peer.toml"
    config.write_text(text, encoding="utf-8", errors="surrogateescape")
    check_refused(capfd, "SL801", "join", run / "invite.txt", "--config", config)
    check_refused(capfd, "SL806", "join", run / "invite.txt", "--config", tmp_path / "none.toml")


def test_join_with_a_home_that_is_a_file(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("here")
    check_refused(capfd, "SL8..", "join", run / "invite.txt", "--home", tmp_path / "file")
    check_refused(capfd, "SL8..", "join", run / "invite.txt", "--home", tmp_path / "file" / "deeper")


def test_join_with_impossible_numbers(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL801", "join", run / "invite.txt", "--home", tmp_path / "home", "--threads", "-1")


@pytest.mark.parametrize(
    "text",
    ["name = ", "", 'name = "x"\nsurprise = 1', 'name = "x"\n[inner]\nsteps = 0', 'name = "x"\n[inner]\nstep = 5'],
)
def test_run_new_with_bad_toml(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    settings = tmp_path / "RUN.toml"
    settings.write_text(text)
    check_refused(capfd, "SL802", "run", "new", settings, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "run.bin").exists()


def test_run_new_with_bad_places(run: Path, settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL806", "run", "new", tmp_path / "none.toml", "--out", tmp_path / "run")
    check_refused(capfd, "SL820", "run", "new", settings, "--out", run)
    (tmp_path / "file").write_text("here")
    check_refused(capfd, "SL8..", "run", "new", settings, "--out", tmp_path / "file")


@pytest.mark.parametrize("arguments", [["--host", "not a host"], ["--port", "70000"], ["--bootstrap-port", "-4"]])
def test_run_new_with_a_bad_address(
    settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    check_refused(capfd, "SL820", "run", "new", settings, "--out", tmp_path / "run", *arguments)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", "only peers on it can take part. To let others in: sparseloco-peer run invite"),
        ("192.0.2.7", "Others must reach 192.0.2.7 on TCP ports 7700 and 7701"),
    ],
)
def test_run_new_says_who_can_take_part(
    settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], host: str, told: str
) -> None:
    assert main(["run", "new", str(settings), "--out", str(tmp_path / "run"), "--host", host]) == 0
    out, err = capfd.readouterr()
    assert told in err and Invite.from_text(out).addresses == (f"{host}:7700",)


@pytest.mark.parametrize("command", ["aggregate", "bootstrap"])
def test_a_folder_that_is_no_run(command: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL806", command, tmp_path)
    check_refused(capfd, "SL806", command, tmp_path / "nowhere")
    for name in ("run.bin", "invite.txt"):
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(run, broken)
        (broken / name).write_bytes((run / name).read_bytes()[:-9])
        check_refused(capfd, "SL802", command, broken)
        (broken / name).unlink()
        check_refused(capfd, "SL806", command, broken)


@pytest.mark.parametrize("command", ["aggregate", "bootstrap"])
@pytest.mark.slow
def test_a_port_in_use(command: str, run: Path, tmp_path: Path) -> None:
    invite = OperatorFolder(run).load()[1]
    port = int(invite.addresses[0].split(":")[1] if command == "aggregate" else invite.bootstraps[0].split("/")[4])
    with socket.create_server(("0.0.0.0", port)):
        check_process("SL(817|908)", command, run, cwd=tmp_path)


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", "no-such.invalid:7700"])
@pytest.mark.slow
def test_aggregate_with_a_bad_address(listen: str, run: Path, tmp_path: Path) -> None:
    check_process("SL8..", "aggregate", run, "--listen", listen, cwd=tmp_path)


@pytest.mark.slow
def test_aggregate_in_plaintext_is_for_one_machine(run: Path, tmp_path: Path) -> None:
    check_process("SL820", "aggregate", run, "--plaintext-local", "--listen", f"0.0.0.0:{free_port()}", cwd=tmp_path)


def test_inspect_with_bad_files(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign").write_bytes(os.urandom(3).hex().encode())
    check_refused(capfd, "SL819", "inspect", tmp_path / "foreign")
    check_refused(capfd, "SL806", "inspect", tmp_path / "none")
    (tmp_path / "cut").write_bytes((run / "run.bin").read_bytes()[:-1])
    check_refused(capfd, "SL302", "inspect", tmp_path / "cut")
    check_refused(capfd, "SL806", "inspect", run / "run.bin", "--run", tmp_path / "none")


def test_demo_with_bad_arguments(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL806", "demo", "--settings", tmp_path / "none.toml", "--out", tmp_path / "demo")
    check_refused(capfd, "SL820", "demo", "--peers", "0", "--out", tmp_path / "demo0")
    check_refused(capfd, "SL8..", "demo", "--rounds", "0", "--out", tmp_path / "demo1")


def test_run_new_on_a_full_disk(disk: Path, settings: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_refused(capfd, "SL803", "run", "new", settings, "--out", disk / "run")
    assert not (disk / "run" / "run.bin").exists()


@pytest.mark.slow
def test_run_new_with_a_limit_on_the_size_of_files(settings: Path, tmp_path: Path) -> None:
    check_process("SL803", "run", "new", settings, "--out", tmp_path / "run", cwd=tmp_path, file_bytes_max=20_000)


@pytest.mark.slow
def test_join_on_a_full_disk(run: Path, disk: Path, tmp_path: Path) -> None:
    (disk / "filler").write_bytes(bytes(60 << 10))
    with pytest.raises(OSError, match="No space"):
        (disk / "more").write_bytes(bytes(60 << 10))
    check_process("SL803", "join", run / "invite.txt", "--home", disk / "home", "--patience", "0", cwd=tmp_path)

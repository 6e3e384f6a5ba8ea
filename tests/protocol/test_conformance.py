"""The conformance command: it passes the reference as a process, and sees through a client that is broken."""

import sys
from pathlib import Path

import pytest

from protocol.conformance import load, main

REFERENCE = [sys.executable, "-m", "protocol.reference_client"]

# A client that goes wrong in a way of its own for each tree of Merkle leaves. Each file started says so.
BROKEN = """
import json, sys, time
from protocol.reference_client import answer
with open({log!r}, "a") as log:
    log.write("started\\n")
for line in sys.stdin:
    request = json.loads(line)
    found = json.dumps(answer(request))
    match len(request["leaves"]):
        case 1: found = json.dumps({{"ok": {{"root": "00" * 32}}}})
        case 2: sys.exit(3)
        case 3: time.sleep(600)
        case 4: found = "no JSON"
        case 5: found = json.dumps({{"unsupported": True}})
        case 6: found = '"' + "x" * (5 << 20) + '"'
        case 7: found = json.dumps({{"ok": {{**json.loads(found)["ok"], "more": 1}}}})
    print(found, flush=True)
"""
WRONG = [f"merkle/{count}-leaves" for count in range(1, 8)]


@pytest.fixture
def broken(tmp_path: Path) -> list[str]:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(log=str(tmp_path / "log")), "utf-8")
    return [sys.executable, str(path)]


def listed(tmp_path: Path, *names: str) -> list[str]:
    path = tmp_path / "expected.txt"
    path.write_text("# what this client cannot do yet\n\n" + "".join(f"{name}  # why\n" for name in names), "utf-8")
    return ["--expected", str(path)]


def test_the_reference_passes_as_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--", *REFERENCE]) == 0
    told = capsys.readouterr().out
    count = len(list(load()))
    assert f"{count} of {count} vectors pass; 0 surprises" in told and "FAIL" not in told


@pytest.mark.slow
def test_a_broken_client_is_seen_through(broken: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "merkle/", "--timeout", "8", "--", *broken]) == 1
    told = capsys.readouterr().out
    failed = [line.split()[1].rstrip(":") for line in told.splitlines() if line.startswith("FAIL")]
    assert failed == WRONG
    reasons = [line.partition("got    ")[2] for line in told.splitlines() if "got    " in line]
    assert reasons[0].startswith('{"ok": {"root": "0000') and reasons[4] == '{"unsupported": true}'
    assert reasons[1] == "the client ended" and reasons[2] == "no answer within 8 s"
    assert "not a line of JSON" in reasons[3] and "not a line of JSON" in reasons[5] and '"more": 1' in reasons[6]
    assert "identity.json         2 of    9 pass" in told and "2 of 9 vectors pass; 7 surprises" in told
    # It was started at first, and again after it ended, hung, spoke nonsense and spoke too long.
    assert (tmp_path / "log").read_text("utf-8") == "started\n" * 5


def test_failures_may_be_expected(broken: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*listed(tmp_path, *WRONG), "--only", "merkle/1", "--", *broken]) == 0
    assert "0 of 1 vectors pass; 0 surprises" in capsys.readouterr().out


def test_an_expected_failure_that_passes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = listed(tmp_path, "merkle/8-leaves", "weight/*")
    assert main([*expected, "--only", "merkle/", "--", *REFERENCE]) == 1
    assert "PASSES  merkle/8-leaves" in capsys.readouterr().out


def test_a_list_that_names_no_vector_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*listed(tmp_path, "merkle/80-leaves"), "--", *REFERENCE]) == 2
    assert "merkle/80-leaves" in capsys.readouterr().err


def test_no_vector_and_no_client_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing", "--", *REFERENCE]) == 2
    assert main(["--only", "merkle/", "--", "/no/such/client"]) == 2
    assert "does not start" in capsys.readouterr().err


def test_a_command_that_never_answers_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--", sys.executable, "-c", "pass"]) == 1
    told = capsys.readouterr()
    assert "never answered" in told.err and told.out.count("FAIL") == 2

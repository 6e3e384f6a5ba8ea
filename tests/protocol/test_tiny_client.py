"""The client that was written from the specification alone answers every vector, and survives what strangers send."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from protocol.invite import Invite

NODE = shutil.which("node")
ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "protocol" / "tiny_client" / "client.mjs"

pytestmark = pytest.mark.skipif(NODE is None, reason="the tiny client needs Node.js 20 or newer")


def client(*arguments: str, text: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    assert NODE is not None
    command = [NODE, str(CLIENT), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def answers(requests: list[dict[str, Any]]) -> list[Any]:
    told = client("conform", text="".join(json.dumps(request) + "\n" for request in requests))
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_it_passes_every_vector() -> None:
    assert NODE is not None
    command = [sys.executable, "-m", "protocol.conformance", "--", NODE, str(CLIENT), "conform"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]


def test_what_it_does_not_know_is_unsupported() -> None:
    requests = [{"verb": "sing"}, {"verb": "make", "kind": "tea"}, {"verb": "check", "kind": "tea", "bytes": ""}]
    assert answers(requests) == [{"unsupported": True}] * 3


@pytest.mark.parametrize(
    "text",
    ["[" * (1 << 20), '"' + "a" * (1 << 20), '"\\' * (1 << 19), '"' * (1 << 20), '{"a":' * (1 << 17), "-" * (1 << 20)],
    ids=["brackets", "open-text", "escapes", "quotes", "depth", "signs"],
)
def test_a_hostile_json_costs_no_more_than_its_length(text: str) -> None:
    signed = b"SLRN" + (1).to_bytes(2, "little") + len(text).to_bytes(4, "little") + text.encode("ascii") + bytes(64)
    assert len(signed) > len(text)
    request = {"verb": "check", "kind": "run", "run_id": None, "bytes": signed.hex()}
    assert answers([request]) == [{"refused": 201}]


def test_it_imports_nothing_but_node() -> None:
    imports = [line for line in CLIENT.read_text().splitlines() if line.startswith("import ")]
    assert imports and all(" from 'node:" in line for line in imports), imports
    assert "import(" not in CLIENT.read_text() and "require(" not in CLIENT.read_text()


def test_errors_say_what_happened(tmp_path: Path) -> None:
    nowhere = Invite(
        bytes(32),
        bytes.fromhex("3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29"),
        bytes(32),
        ("127.0.0.1:1",),
        (),
    )
    home = ("--home", str(tmp_path / "home"), "--text", str(CLIENT))
    for arguments, words in (
        (("join",), "usage: "),
        (("join", "slp1nonsense", *home), "SL203 BAD_INVITE"),
        (("join", nowhere.to_text(), *home), "--plaintext-local"),
        (("join", nowhere.to_text(), *home, "--rounds", "0"), "--rounds is a number from 1"),
        (("join", nowhere.to_text(), *home[:2], "--text", str(tmp_path / "none.txt"), "--plaintext-local"), "none.txt"),
    ):
        ended = client(*arguments, cwd=tmp_path)
        assert ended.returncode == 1 and words in ended.stderr, (arguments, ended.stderr)

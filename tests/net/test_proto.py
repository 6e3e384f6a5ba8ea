"""The generated code is what proto/swarm.proto says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("swarm_pb2.py", "swarm_pb2.pyi")


def test_hivemind_and_torch_are_imported_only_where_a_directory_is_opened() -> None:
    look = "import sys, peer.net.link, peer.net.service, peer.net.directory\n"
    look += "print({'torch', 'hivemind'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    plugin = Path(sys.executable).with_name("protoc-gen-mypy")
    if not plugin.exists():
        pytest.skip("protoc-gen-mypy is not installed")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Ipeer/net/pb=proto", f"--python_out={tmp_path}"]
    command += [f"--mypy_out={tmp_path}", f"--plugin=protoc-gen-mypy={plugin}", "peer/net/pb/swarm.proto"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=dict(os.environ))
    for name in NAMES:
        made = (tmp_path / "peer" / "net" / "pb" / name).read_text(encoding="utf-8")
        assert made == (ROOT / "peer" / "net" / "pb" / name).read_text(encoding="utf-8"), f"run `make proto`: {name}"

"""Generated files are those that their sources give."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    # As `make proto` does: the plug-in for the types lies beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = [f"--python_out={tmp_path}", f"--mypy_out={tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        "peer/net/pb=proto",
        *outputs,
        "peer/net/pb/swarm.proto",
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=True, timeout=60)
    made = sorted(tmp_path.rglob("*.py*"))
    assert [file.name for file in made] == ["swarm_pb2.py", "swarm_pb2.pyi"]
    for file in made:
        kept = ROOT / file.relative_to(tmp_path)
        assert kept.read_text() == file.read_text(), f"{kept.name} is out of date: run `make proto`"

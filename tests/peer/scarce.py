"""A process of a test's own with little memory: what other tests freed would still serve this one."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_alone(function: Callable[[], None]) -> None:
    """Call a function of a module in a new Python, which gives what it frees back to the system at once."""
    code = f"import torch; torch.set_num_threads(1)\nfrom {function.__module__} import {function.__name__} as f; f()"
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def leave_memory(more: int) -> None:
    """Let this process have only so many more bytes than it has now; its allocators then fail as on a full machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more,) * 2)

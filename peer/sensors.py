"""What can be known of the machine that a peer runs on: temperature, power, other programs, whether it is in use.

Each answers None where this machine does not tell. Linux tells through files, macOS and NVIDIA through small programs.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

_ASK_S = 3.0  # no small program takes longer, unless the machine hangs
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
SYS = Path("/sys/class")
PROC = Path("/proc")
DEV = Path("/dev")
BUSY_SHARE = 0.25  # of the processors; when others take more, the machine is in use


def temperature(device: str) -> float | None:
    """Degrees Celsius of the device ("cpu", "cuda", "mps") that trains."""
    return _gpu_temperature() if device == "cuda" else _cpu_temperature()


def _gpu_temperature() -> float | None:
    asked = _ask("nvidia-smi", "--query-gpu=temperature.gpu", "--format=csv,noheader,nounits")
    return max((float(line) for line in asked.split() if line.isdecimal()), default=None)


def _cpu_temperature() -> float | None:
    zones = (SYS / "thermal").glob("thermal_zone*/temp")
    chips = (chip for chip in (SYS / "hwmon").glob("hwmon*") if _read(chip / "name") in _CPU_SENSORS)
    found = [_read(path) for path in [*zones, *(path for chip in chips for path in chip.glob("temp*_input"))]]
    degrees = [int(text) / 1000 for text in found if text.lstrip("-").isdecimal()]
    return max((value for value in degrees if 0 < value < 150), default=None)


def on_mains() -> bool | None:
    """Whether the machine draws no battery down."""
    if sys.platform == "darwin":
        asked = _ask("pmset", "-g", "batt")
        return "Battery Power" not in asked if asked else None
    supplies = list((SYS / "power_supply").glob("*"))
    mains = [_read(supply / "online") == "1" for supply in supplies if _read(supply / "type") == "Mains"]
    # Batteries of mice and headsets have the scope Device.
    batteries = [
        _read(supply / "status")
        for supply in supplies
        if _read(supply / "type") == "Battery" and _read(supply / "scope") != "Device"
    ]
    if mains:
        return any(mains)
    return "Discharging" not in batteries if batteries else None


def running(names: Collection[str]) -> str | None:
    """The first of these programs that runs at the moment; names count as they are shown by `ps`, or as files."""
    wanted = {name.lower(): name for name in names}
    return next((wanted[name] for name in _programs() if name in wanted), None)


def _programs() -> Iterable[str]:
    own = str(os.getpid())
    folders = [folder for folder in PROC.glob("[0-9]*") if folder.name != own]
    if not folders:
        yield from (line.strip().rpartition("/")[2].lower() for line in _ask("ps", "-A", "-o", "comm=").splitlines())
    for folder in folders:
        # The kernel keeps 15 characters of a name; what was started says the whole one.
        yield _read(folder / "comm").lower()
        yield _read(folder / "cmdline").partition("\0")[0].rpartition("/")[2].lower()


class Idleness:
    """How long nobody has used this machine: no key, no mouse, and no other program that computes much."""

    def __init__(self) -> None:
        self._busy_s = time.monotonic()  # when others were last seen to compute much
        self._before: tuple[float, float] | None = None

    def seconds(self) -> float | None:
        """The shortest of what the terminals, the desktop and the processors tell; None where nothing tells."""
        told = (_since_terminals(), _since_desktop(), self._since_others())
        return min((seconds for seconds in told if seconds is not None), default=None)

    def _since_others(self) -> float | None:
        """Seconds since other programs last took much of the processors, as seen from call to call."""
        times = _read(PROC / "stat").partition("\n")[0].split()[1:]
        if len(times) < 5:
            return None
        ticks = [int(text) for text in times[:8]]
        own = os.times()
        total = float(sum(ticks))
        others = total - ticks[3] - ticks[4] - (own.user + own.system) * os.sysconf("SC_CLK_TCK")
        before, self._before = self._before, (total, others)
        if before is None or (total > before[0] and (others - before[1]) / (total - before[0]) > BUSY_SHARE):
            self._busy_s = time.monotonic()
        return time.monotonic() - self._busy_s


def _since_terminals() -> float | None:
    """Seconds since a key was pressed in any terminal, as `w` counts them."""
    pressed = []
    for path in [*(DEV / "pts").glob("[0-9]*"), *DEV.glob("tty[0-9]*")]:
        with contextlib.suppress(OSError):
            pressed.append(path.stat().st_atime)
    return max(0.0, time.time() - max(pressed)) if pressed else None


def _since_desktop() -> float | None:
    """Seconds since the desktop saw a key or the mouse."""
    if sys.platform == "darwin":
        for line in _ask("ioreg", "-c", "IOHIDSystem").splitlines():
            if "HIDIdleTime" in line:
                return int(line.rpartition("=")[2]) / 1e9
        return None
    told = dict(
        line.split("=", 1)
        for line in _ask("loginctl", "show-seat", "seat0", "-p", "IdleHint", "-p", "IdleSinceHint").splitlines()
        if "=" in line
    )
    since_us = int(told.get("IdleSinceHint") or 0)
    if told.get("IdleHint") == "yes":
        # With nobody at the seat there is no moment since when.
        return max(0.0, time.time() - since_us / 1e6) if since_us else None
    return 0.0 if told.get("IdleHint") == "no" else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _ask(*command: str) -> str:
    """What a small program prints; nothing when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""

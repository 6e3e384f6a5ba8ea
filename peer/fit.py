"""How much of a batch goes through the model at a time, and in which type, found by trying it on this device.

Each try is a real forward and backward pass of the run's model. It writes the gradients alone, which every inner step
begins by clearing: parameters, moments and the state of the random numbers stay as they are, bit for bit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.core.device import pick_dtype
from peer.core.replica import Replica
from peer.errors import UserCode, UserError
from protocol.run import RunConfig

BUDGET_S = 4.0  # for all tries together; the smallest one is made whatever it takes
REPLICA_BYTES = 24  # of each parameter: local and outer value, residual, gradient and two moments, four bytes each
_AHEAD_BYTES = 4  # more with overlap: where the steps ahead began
_FREE_SHARE = 0.8  # of the memory that is free may be used
_PEAK = 1.5  # what the backward pass holds at most, by what the forward pass saved for it
_WORSE = 1.1  # so much slower a sequence, and larger micro-batches are not tried

_SMALLER = "close other programs that use this device, take a smaller micro_batch, or join a run with a smaller model"


@dataclass(frozen=True)
class Fitted:
    """What suits this device. `micro_batch` counts sequences; `activation_bytes` are those of one of them.

    `step_s` is the measured time of one inner step's forward and backward passes, its whole batch, in seconds.
    """

    micro_batch: int
    dtype: torch.dtype
    step_s: float
    activation_bytes: int
    why: str

    def apply(self, replica: Replica) -> None:
        """Let this replica train so from its next inner step on."""
        replica.micro_batch = self.micro_batch
        replica.dtype = replica.inner.dtype = self.dtype


def fit_micro_batch(
    replica: Replica,
    batch: NDArray[np.int64],  # i64[B, T + 1]
    *,
    dtype: str = "auto",
    micro_batch: int = 0,
    budget_s: float = BUDGET_S,
) -> Fitted:
    """Find the micro-batch and the type of the matrix products with which a batch of the run is done soonest.

    Micro-batches double from one sequence up to the whole batch, for as long as they fit into memory, get faster and
    there is time left. `dtype` and `micro_batch` are those of PeerConfig: "auto" tries both types where the device
    multiplies bfloat16, and 0 all sizes; other values are tried alone. Raises UserError OUT_OF_MEMORY when not even
    that fits, ValueError on a type that is not known.
    """
    wanted = pick_dtype(dtype, replica.device)
    trial = _Trial(replica, torch.from_numpy(batch), time.monotonic() + budget_s)
    with _nothing_changed(replica):
        best = trial.fit(wanted, micro_batch)
        if dtype == "auto" and wanted != torch.float32:
            best = trial.compare(best, torch.float32)
    return best


def state_bytes(run: RunConfig) -> int:
    """What a replica of this run holds in memory without activations."""
    return (REPLICA_BYTES + (_AHEAD_BYTES if run.inner.overlap else 0)) * run.layout.size


def free_bytes(device: torch.device) -> int | None:
    """How much memory is free for this program on the device, None where that cannot be known."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _least(_available_bytes(), _left_of_group())


@contextmanager
def out_of_memory(replica: Replica) -> Iterator[None]:
    """Within this block an error because memory ran out becomes a UserError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _says_out_of_memory(error):
            raise
        size = replica.micro_batch or replica.run.inner.batch_size
        message = f"the memory of {replica.device} is used up with {size} sequences of the batch at a time"
        raise UserError(UserCode.OUT_OF_MEMORY, message, _SMALLER) from error


class _Trial:
    def __init__(self, replica: Replica, batch: Tensor, deadline_s: float) -> None:
        self._replica, self._batch, self._deadline_s = replica, batch, deadline_s

    def affords(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self._deadline_s

    def fit(self, dtype: torch.dtype, only: int) -> Fitted:
        """The fastest micro-batch in this type, or the given one."""
        count = len(self._batch)
        size = min(only, count) or 1
        first_s, activations = self._first(size, dtype)
        passed_s = self._time(size, dtype) if self.affords(first_s) else first_s
        best, best_s = size, float("inf")
        while passed_s is not None:
            if passed_s / size < best_s:
                best, best_s = size, passed_s / size
            following = min(2 * size, count)
            stopped = "as was asked for" if only else self._why_stop(size, following, passed_s, best_s, activations)
            if stopped:
                break
            size = following
            passed_s = self._time(size, dtype)
        else:
            stopped = f"{size} do not fit into memory"
        if best_s == float("inf"):
            self._give_up(size)
        why = f"{_choice(best, count, dtype)}: {stopped}"
        return Fitted(best, dtype, best_s * count, activations, why)

    def compare(self, best: Fitted, dtype: torch.dtype) -> Fitted:
        """The better of what was found and the same micro-batch in another type."""
        if not self.affords(4 * best.step_s):
            return replace(best, why=f"{best.why}; there was no time to try {_name(dtype)}")
        other = self.fit(dtype, best.micro_batch)
        slow, fast = sorted((best, other), key=lambda fitted: fitted.step_s, reverse=True)
        times = slow.step_s / fast.step_s
        _, _, stopped = best.why.partition(": ")
        why = f"{_choice(fast.micro_batch, len(self._batch), fast.dtype)}: {stopped}"
        return replace(fast, why=f"{why}; {_name(slow.dtype)} takes {times:.2f} times as long")

    def _why_stop(self, size: int, following: int, passed_s: float, best_s: float, activations: int) -> str:
        if following == size:
            return "the whole batch was tried"
        if passed_s / size > _WORSE * best_s:
            return f"{size} at a time are slower"
        if not self._has_room(activations * following):
            return f"{following} would take more memory than is free"
        return "" if self.affords(2 * passed_s * following / size) else f"to try {following} takes too long"

    def _first(self, size: int, dtype: torch.dtype) -> tuple[float, int]:
        """The seconds of the first pass, which is slow for once, and the bytes that one sequence needs at the peak."""
        parameters = self._replica.flat.values.untyped_storage().data_ptr()
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            # What is returned stays alive until the backward pass, so no two of them share an address.
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def run() -> None:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                self._backward(size, dtype)

        began_s = time.perf_counter()
        if not self._runs(run):
            self._give_up(size)
        saved.pop(parameters, None)
        return time.perf_counter() - began_s, round(_PEAK * sum(saved.values()) / size)

    def _time(self, size: int, dtype: torch.dtype) -> float | None:
        """The better of two tries in seconds, None when it does not fit. A try that takes long is made once."""
        tries: list[float] = []
        while len(tries) < 2 and (not tries or self.affords(tries[0])):
            began_s = time.perf_counter()
            if not self._runs(lambda: self._backward(size, dtype)):
                return None
            tries.append(time.perf_counter() - began_s)
        return min(tries)

    def _backward(self, size: int, dtype: torch.dtype) -> None:
        self._replica.inner.backward(self._batch[:size], 0, dtype)
        # Every inner step reads the norm, and with it waits for the device.
        float(torch.linalg.vector_norm(self._replica.flat.gradients))

    def _runs(self, work: Callable[[], None]) -> bool:
        """Do it; whether there was enough memory."""
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            if not _says_out_of_memory(error):
                raise
        else:
            return True
        # Only now is the error gone, which held on to what the failed pass had made.
        if self._replica.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _has_room(self, size: int) -> bool:
        """CUDA says itself what does not fit; elsewhere the system would rather end a program, perhaps another one."""
        free = None if self._replica.device.type == "cuda" else free_bytes(self._replica.device)
        return free is None or size <= _FREE_SHARE * free

    def _give_up(self, size: int) -> NoReturn:
        message = f"{size} sequences at a time do not fit into the memory of {self._replica.device}"
        raise UserError(UserCode.OUT_OF_MEMORY, message, _SMALLER)


@contextmanager
def _nothing_changed(replica: Replica) -> Iterator[None]:
    devices = [replica.device] if replica.device.type == "cuda" else []
    training = replica.model.training
    with torch.random.fork_rng(devices):
        replica.model.train()
        try:
            yield
        finally:
            replica.model.train(training)
            replica.flat.gradients.zero_()


def _says_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # CUDA has an error of its own; on the CPU and on MPS only the text tells.
    told = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in told)


def _choice(size: int, count: int, dtype: torch.dtype) -> str:
    return f"{size} of {count} sequences at a time in {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _available_bytes() -> int | None:
    """What Linux would give without swapping."""
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _left_of_group() -> int | None:
    """What a container may still take. What it holds of files that nobody uses is given up before anything fails."""
    forms = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    )
    for most, used, details, idle_files in forms:
        limit, usage = (_lines(f"/sys/fs/cgroup/{name}") for name in (most, used))
        if limit and usage and limit[0].isdecimal():
            idle = dict(line.split() for line in _lines(f"/sys/fs/cgroup/{details}"))
            return max(0, int(limit[0]) - int(usage[0]) + int(idle.get(idle_files, 0)))
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii").splitlines()
    except (OSError, ValueError):
        return []

"""The floor: what it costs to read and write the memory that error feedback must read and write, and nothing else.

residual = beta * residual + delta, in place, over two float32 arrays. Both torch and a C++ loop made for this very
processor do it; whichever is faster is the floor.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = """
extern "C" void axpy(float *e, const float *d, float b, long n) {
    for (long i = 0; i < n; i++) e[i] = b * e[i] + d[i];
}
"""

Axpy = Callable[[Tensor, Tensor, float], None]  # residual f32[N] in place, delta f32[N], beta


def torch_axpy(residual: Tensor, delta: Tensor, beta: float) -> None:  # f32[N] in place, f32[N]
    """One fused pass in torch, with as many threads as torch has."""
    torch.add(delta, residual, alpha=beta, out=residual)


def cpp_axpy() -> Axpy | None:
    """The same loop in C++ on one thread, or None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        subprocess.run([compiler, *options], input=_SOURCE.encode("ascii"), check=True)
        axpy = ctypes.CDLL(str(library)).axpy
    axpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_long]
    axpy.restype = None

    def run(residual: Tensor, delta: Tensor, beta: float) -> None:
        axpy(residual.data_ptr(), delta.data_ptr(), beta, residual.numel())

    return run

"""The floor: what it costs to read and write the memory that error feedback must read and write, and nothing else.

residual = beta * residual + (outer - local), in place, over the three float32 arrays that the encoder is given. A C++
loop made for this very processor does it, and torch where there is no compiler. Beside it stands the axpy over two
arrays, residual = beta * residual + delta, for those who have the pseudo-gradient ready.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

_SOURCE = """
extern "C" void three(float *e, const float *o, const float *l, float b, long n) {
    for (long i = 0; i < n; i++) e[i] = b * e[i] + (o[i] - l[i]);
}
extern "C" void two(float *e, const float *d, float b, long n) {
    for (long i = 0; i < n; i++) e[i] = b * e[i] + d[i];
}
"""


class Floor:
    """Both loops on one thread in C++, or in torch with as many threads as torch has."""

    def __init__(self, *, in_torch: bool = False) -> None:
        """Compile the loops, unless torch is wanted or there is no compiler."""
        compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        self._library: ctypes.CDLL | None = None
        if compiler is None or in_torch:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "floor.so"
            options = ["-O3", "-march=native", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
            subprocess.run([compiler, *options], input=_SOURCE.encode("ascii"), check=True)
            self._library = ctypes.CDLL(str(path))
        for function, arrays in ((self._library.three, 3), (self._library.two, 2)):
            function.argtypes = [*[ctypes.c_void_p] * arrays, ctypes.c_float, ctypes.c_long]
            function.restype = None

    def three(self, residual: Tensor, outer: Tensor, local: Tensor, beta: float) -> None:  # f32[N] each
        """residual = beta * residual + (outer - local), in place."""
        if self._library is None:
            residual.mul_(beta).add_(outer).sub_(local)
        else:
            addresses = (residual.data_ptr(), outer.data_ptr(), local.data_ptr())
            self._library.three(*addresses, beta, residual.numel())

    def two(self, residual: Tensor, delta: Tensor, beta: float) -> None:  # f32[N] each
        """residual = beta * residual + delta, in place."""
        if self._library is None:
            residual.mul_(beta).add_(delta)
        else:
            self._library.two(residual.data_ptr(), delta.data_ptr(), beta, residual.numel())

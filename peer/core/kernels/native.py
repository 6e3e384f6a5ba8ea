"""The C++ kernels of the CPU: numpy arrays and bytes in and out, the same bits as the numpy reference in `protocol`.

`load` finds the shared library that the installation built beside this file. Calls release the GIL.
"""

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.arithmetic import RULES
from protocol.errors import Code, ProtocolError
from protocol.layout import kept
from protocol.limits import ALPHA_MAX, BLOCK_CHUNKS, CHUNK, CLIP_ONE, CONTRIBUTORS_MAX, WEIGHT_MAX
from protocol.packing import SectionForm, SparseTensor

_NOT_FINITE = -1
_NO_MEMORY = -2

_DETAILS = {
    Code.TRUNCATED: "the section ends before its tables or values do",
    Code.TOO_LARGE: "the section is longer than any of this tensor can be",
    Code.BAD_RATIO: "a ratio is above 63, or does not fit its chunk",
    Code.BAD_BLOCKS: "the gaps of a block of chunks do not end where the block ends",
    Code.BAD_INDEX: "an index lies outside its chunk",
    Code.BAD_CODE: "a value is low in a chunk whose ratio is 0",
    Code.BAD_PADDING: "the bits after the last code are not zero",
    Code.BAD_COUNT: "a chunk claims more values than it holds",
    Code.BAD_EXPONENT: "an exponent is above what its chunk needs",
    Code.BAD_VALUE: "a value is 0 or -128",
}

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "sl_set_isa": [_i32],
    "sl_compress": [*[_pointer] * 3, _i64, _f32, *[_i32] * 3, *[_pointer] * 8],
    "sl_encode": [*[_pointer] * 3, _i64, _i64, _i32, _i32, *[_pointer] * 4],
    "sl_check_section": [_pointer, _i64, _i64, _i32, _i32, _pointer],
    "sl_check_update_section": [_pointer, _i64, _i64, _pointer],
    "sl_merge": [*[_pointer] * 4, _i32, _i64, *[_i32] * 3, _i64, _i64, _i32, *[_pointer] * 6],
    "sl_outer_step": [_pointer, _i64, _pointer, _i64, _i32],
}


def load() -> "Native | None":
    """The kernels, or None where the installation could not build them."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return Native(path)
    return None


class Native:
    """The functions of one shared library. Each works on one tensor, and the number of threads changes no bit."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library.sl_isa.argtypes, self._library.sl_isa.restype = [], ctypes.c_char_p

    @property
    def instructions(self) -> str:
        """The instruction set in use: portable, AVX2 or AVX-512."""
        name: bytes = self._library.sl_isa()
        return name.decode("ascii")

    def use_instructions(self, number: int) -> bool:
        """Use portable code (0), AVX2 (1), AVX-512 (2) or the best there is (-1); False where this machine lacks it.

        It holds for the whole process, so that tests and measurements reach every path on one machine.
        """
        return bool(self._library.sl_set_isa(number))

    def compress(
        self,
        residual: NDArray[np.float32],  # f32[N], becomes the new residual in place
        outer: NDArray[np.float32],  # f32[N]
        local: NDArray[np.float32],  # f32[N]
        beta: float,
        k: int,
        code_bits: int,
        threads: int = 1,
    ) -> tuple[bytes, NDArray[np.int64], NDArray[np.float32]]:
        """Error feedback, selection, quantization and encoding of one tensor in one pass over the memory.

        Returns the section, the positions that it sends, and what acc was there. Raises ValueError on NaN or infinity;
        then the residual is worthless.
        """
        size = residual.size
        form = SectionForm(k, code_bits)
        for array in (residual, outer, local):
            assert array.dtype == np.float32 and array.shape == (size,) and array.flags.c_contiguous
        tables = _Tables(size, np.dtype(np.uint8))
        # The parts of several threads lie apart until all are done, each as long as it can be.
        most = tables.chunks * kept(CHUNK, k)
        gaps = np.empty(tables.chunks * form.gap_bytes_max(CHUNK), np.uint8)
        codes = np.empty(form.value_bytes(most), np.uint8)
        positions, originals = np.empty(most, np.int64), np.empty(most, np.float32)
        sizes = np.zeros(3, np.int64)
        inputs = _addresses(residual, outer, local)
        outputs = _addresses(tables.heads, tables.extras, tables.blocks, gaps, codes, positions, originals, sizes)
        status = self._library.sl_compress(*inputs, size, beta, k, code_bits, threads, *outputs)
        if status == _NOT_FINITE:
            raise ValueError("the pseudo-gradient holds NaN or infinity: training diverged; lower the learning rate")
        _raise_unless_ok(status)
        count, gap_bytes, code_bytes = map(int, sizes)
        section = tables.join(gaps[:gap_bytes], codes[:code_bytes], with_extras=code_bits == 2)
        return section, positions[:count], originals[:count]

    def encode(self, sparse: SparseTensor, k: int, code_bits: int) -> bytes:
        """The canonical bytes of one tensor's part of a packet."""
        form = SectionForm(k, code_bits)
        tables = _Tables(sparse.size, np.dtype(np.uint8))
        scales, ratios = (np.ascontiguousarray(array, np.uint8) for array in (sparse.scales, sparse.ratios))
        indices = np.ascontiguousarray(sparse.indices, np.int64)
        codes = np.ascontiguousarray(sparse.codes, np.uint8)
        assert len(scales) == len(ratios) == tables.chunks and len(codes) == len(indices)
        gaps = np.empty(form.gap_bytes_max(sparse.size), np.uint8)
        packed = np.empty(form.value_bytes(len(codes)), np.uint8)
        sizes = np.zeros(2, np.int64)
        inputs = _addresses(scales, indices, codes)
        outputs = _addresses(tables.blocks, gaps, packed, sizes)
        status = self._library.sl_encode(*inputs, len(codes), sparse.size, k, code_bits, *outputs)
        _raise_unless_ok(status)
        tables.heads, tables.extras = scales, ratios
        return tables.join(gaps[: sizes[0]], packed, with_extras=code_bits == 2)

    def check_section(self, data: bytes, size: int, k: int, code_bits: int) -> int:
        """Check a packet's section, and count its values. Raises ProtocolError like `protocol.packing`."""
        values = ctypes.c_int64()
        status = self._library.sl_check_section(data, len(data), size, k, code_bits, ctypes.byref(values))
        _raise_unless_ok(status)
        return values.value

    def check_update_section(self, data: bytes, size: int) -> int:
        """Check an update's section, and count its values. Raises ProtocolError like `protocol.update`."""
        values = ctypes.c_int64()
        _raise_unless_ok(self._library.sl_check_update_section(data, len(data), size, ctypes.byref(values)))
        return values.value

    def merge(  # noqa: PLR0913, PLR0917  what a merge depends on, each named where it is passed
        self,
        sections: Sequence[bytes],
        weights: Sequence[int],
        clips: Sequence[int],
        size: int,
        k: int,
        code_bits: int,
        rule: str,
        total_weight: int,
        alpha_q16: int,
        threads: int = 1,
    ) -> bytes:
        """Merge one tensor's sections of the accepted packets into the section of the update.

        `total_weight` is the sum of the weights. Raises ProtocolError with the code of a malformed section.
        """
        assert rule in RULES and 1 <= len(sections) <= CONTRIBUTORS_MAX and 1 <= alpha_q16 <= ALPHA_MAX
        assert len(sections) == len(weights) == len(clips) and sum(weights) <= total_weight
        assert all(1 <= weight <= WEIGHT_MAX for weight in weights) and all(1 <= clip <= CLIP_ONE for clip in clips)
        tables = _Tables(size, np.dtype(np.uint16))
        # Never more than a byte for each value of the tensor; what is not needed is never touched, so takes no memory.
        gaps, values = np.empty(size, np.uint8), np.empty(size, np.uint8)
        sizes = np.zeros(2, np.int64)
        count = len(sections)
        parts, numbers = (ctypes.c_char_p * count)(*sections), _i64 * count
        inputs = parts, numbers(*map(len, sections)), numbers(*weights), numbers(*clips), count
        rules = size, k, code_bits, rule == "mean_of_senders", total_weight, alpha_q16
        outputs = _addresses(tables.heads, tables.extras, tables.blocks, gaps, values, sizes)
        status = self._library.sl_merge(*inputs, *rules, threads, *outputs)
        _raise_unless_ok(status)
        return tables.join(gaps[: sizes[1]], values[: sizes[0]], with_extras=True)

    def outer_step(self, outer: NDArray[np.float32], section: bytes, threads: int = 1) -> None:  # outer: f32[N]
        """Subtract an update's section from one tensor in place, once at each position present.

        Raises ProtocolError, before anything is changed, when the section breaks a rule.
        """
        assert outer.dtype == np.float32 and outer.ndim == 1 and outer.flags.c_contiguous
        _raise_unless_ok(self._library.sl_outer_step(*_addresses(outer), outer.size, section, len(section), threads))


class _Tables:
    """What stands at the front of a section, as the kernels fill it in; they count the bytes of the last block too."""

    def __init__(self, size: int, head_type: np.dtype[Any]) -> None:
        self.chunks = -(-size // CHUNK)
        self.heads: NDArray[Any] = np.empty(self.chunks, head_type)
        self.extras: NDArray[np.uint8] = np.empty(self.chunks, np.uint8)
        self.blocks = np.empty(-(-self.chunks // BLOCK_CHUNKS), np.uint32)

    def join(self, gaps: NDArray[np.uint8], values: NDArray[np.uint8], *, with_extras: bool) -> bytes:
        """The section with these gaps and values."""
        extras = self.extras if with_extras else self.extras[:0]
        return b"".join(part.data for part in (self.heads, extras, self.blocks[:-1], gaps, values))


def _addresses(*arrays: NDArray[Any]) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _raise_unless_ok(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError
    assert status >= 0, "the kernel was called with what does not belong together"
    if status > 0:
        raise ProtocolError(Code(status), _DETAILS[Code(status)])

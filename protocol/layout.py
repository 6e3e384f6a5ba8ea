"""Where every value of the model lives: tensors in order, chunks of 4096, pieces of the state (SPEC 3)."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protocol.identity import leaf_hash, merkle_root_of_hashes
from protocol.limits import (
    CHUNK,
    DIMENSIONS_MAX,
    PIECE_BYTES,
    TENSOR_NAME_BYTES_MAX,
    TENSOR_VALUES_MAX,
    TENSORS_MAX,
    VALUES_MAX,
)

_NAME = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one tensor. Raises ValueError when either is outside what SPEC 3 admits."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > TENSOR_NAME_BYTES_MAX:
            raise ValueError(
                f"tensor name {self.name[:40]!r} is not accepted; "
                f"it has 1 to {TENSOR_NAME_BYTES_MAX} printable ASCII characters without blanks"
            )
        if len(self.shape) > DIMENSIONS_MAX:
            raise ValueError(
                f"tensor {self.name} has {len(self.shape)} dimensions; at most {DIMENSIONS_MAX} are allowed"
            )
        if not all(1 <= extent <= TENSOR_VALUES_MAX for extent in self.shape) or self.size > TENSOR_VALUES_MAX:
            raise ValueError(
                f"tensor {self.name} has shape {self.shape}; "
                f"every dimension must be at least 1, and their product at most {TENSOR_VALUES_MAX}"
            )

    @cached_property
    def size(self) -> int:
        """Number of values; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def chunks(self) -> int:
        """Number of chunks; the last may be short."""
        return -(-self.size // CHUNK)


@dataclass(frozen=True)
class Layout:
    """All tensors in the order of their names. Raises ValueError unless sorted, distinct and within the limits."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.tensors) <= TENSORS_MAX:
            raise ValueError(f"a layout has 1 to {TENSORS_MAX} tensors, this one {len(self.tensors)}")
        names = [tensor.name for tensor in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("the tensors of a layout must be sorted by name, each name once")
        if self.size > VALUES_MAX:
            raise ValueError(f"a layout has at most {VALUES_MAX} values, this one {self.size}")

    @classmethod
    def of(cls, names_and_shapes: Iterable[tuple[str, Iterable[int]]]) -> "Layout":
        """Make the layout of a model from its parameters in any order."""
        return cls(
            tuple(TensorSpec(name, tuple(shape)) for name, shape in sorted(names_and_shapes, key=lambda pair: pair[0]))
        )

    @cached_property
    def size(self) -> int:
        """Number of values in all tensors together."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat parameters; one more entry than tensors, the last is `size`."""
        starts = [0]
        for tensor in self.tensors:
            starts.append(starts[-1] + tensor.size)
        return tuple(starts)


def kept(length: int, k: int) -> int:
    """How many values a chunk of `length` keeps when a full chunk keeps k."""
    return min(length, -(-k * length // CHUNK))


def chunk_lengths(size: int) -> NDArray[np.int64]:  # i64[ceil(size / 4096)]
    """The lengths of the chunks of a tensor of `size` values."""
    lengths = np.full(-(-size // CHUNK), CHUNK, dtype=np.int64)
    lengths[-1] = size - CHUNK * (len(lengths) - 1)
    return lengths


def kept_per_chunk(size: int, k: int) -> NDArray[np.int64]:  # i64[ceil(size / 4096)]
    """How many values each chunk of a tensor of `size` values keeps."""
    counts = np.full(-(-size // CHUNK), kept(CHUNK, k), dtype=np.int64)
    counts[-1] = kept(size - CHUNK * (len(counts) - 1), k)
    return counts


def state_pieces(flat: NDArray[np.float32]) -> list[memoryview]:  # flat: f32[N], contiguous
    """Views of the state's bytes, 4 MiB each and a short last one."""
    assert flat.dtype == np.dtype("<f4"), "the state is little-endian float32"
    assert flat.ndim == 1, "the state is one flat array"
    assert flat.size > 0, "the state has at least one value"
    data = memoryview(flat.data).cast("B")
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]


def piece_hashes(flat: NDArray[np.float32]) -> list[bytes]:  # flat: f32[N], contiguous
    """The leaf hash of every piece; their Merkle root is the state root."""
    return [leaf_hash(piece) for piece in state_pieces(flat)]


def state_root(flat: NDArray[np.float32]) -> bytes:  # flat: f32[N], contiguous
    """The 32 bytes that name these outer parameters: equal roots mean equal bits."""
    return merkle_root_of_hashes(piece_hashes(flat))

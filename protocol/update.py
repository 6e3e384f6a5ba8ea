"""The canonical update that every replica applies to its outer parameters (SPEC 7)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protocol.compress import bit_length
from protocol.errors import Code, ProtocolError
from protocol.identity import Buffer, digest, merkle_root
from protocol.layout import Layout
from protocol.limits import CHUNK, EXPONENT_MAX, GRID_BITS, VERSION
from protocol.packing import (
    Section,
    SectionForm,
    check_header,
    check_sections,
    encode_gaps,
    split_section,
    sums_by_chunk,
)
from protocol.run import RunConfig

UPDATE_FORM = SectionForm(CHUNK, 8)

_MAGIC = b"SLUP"
_HEADER = struct.Struct("<4sHH32sI32s32s32s")
UPDATE_HEADER_BYTES = _HEADER.size
_VALUE_MAX = 127


@dataclass(frozen=True, eq=False)
class UpdateTensor:
    """The merged step of one tensor: per chunk an exponent, per position a signed byte; value = m * 2^(e - 38)."""

    size: int
    counts: NDArray[np.uint16]  # u16[n]
    exponents: NDArray[np.uint8]  # u8[n], 0 for an empty chunk
    indices: NDArray[np.int64]  # i64[m] position in the flat tensor, ascending
    values: NDArray[np.int8]  # i8[m], from -127 to 127 without 0


def _round_shift(values: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """values / 2^shifts, half up."""
    return (values + ((1 << shifts) >> 1)) >> shifts


def to_update_tensor(step: NDArray[np.int64]) -> UpdateTensor:  # i64[N], magnitudes below 2^42
    """Round a merged step in grid units to the update: the one place where the merge rounds."""
    chunks = -(-step.size // CHUNK)
    magnitudes = np.abs(step)
    largest = np.maximum.reduceat(magnitudes, np.arange(0, step.size, CHUNK))
    exponents = np.maximum(bit_length(largest) - 7, 0)
    exponents += _round_shift(largest, exponents) > _VALUE_MAX
    assert exponents.max() <= EXPONENT_MAX, "a merged value is above what the limits admit"
    indices = np.flatnonzero(step)
    shifts = exponents[indices // CHUNK]
    rounded = _round_shift(magnitudes[indices], shifts)
    indices, rounded = indices[rounded > 0], rounded[rounded > 0]
    counts = np.bincount(indices // CHUNK, minlength=chunks).astype(np.uint16)
    values = np.where(step[indices] < 0, -rounded, rounded).astype(np.int8)
    return UpdateTensor(step.size, counts, exponents.astype(np.uint8), indices, values)


def join_update_tensors(parts: Sequence[UpdateTensor]) -> UpdateTensor:
    """Put the updates of consecutive pieces of one tensor together; all but the last are whole chunks."""
    offsets = np.cumsum([0, *(part.size for part in parts)])
    return UpdateTensor(
        int(offsets[-1]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.exponents for part in parts]),
        np.concatenate([part.indices + offset for part, offset in zip(parts, offsets[:-1], strict=True)]),
        np.concatenate([part.values for part in parts]),
    )


def update_values(update: UpdateTensor) -> NDArray[np.float32]:  # -> f32[m]
    """The values to subtract, exact in float32."""
    exponents = update.exponents[update.indices // CHUNK].astype(np.int32) - GRID_BITS
    return np.ldexp(update.values.astype(np.float32), exponents)


def apply_update(flat: NDArray[np.float32], layout: Layout, tensors: Sequence[UpdateTensor]) -> None:  # flat: f32[N]
    """Subtract the update from the outer parameters in place: one float32 subtraction at each position present."""
    assert flat.dtype == np.float32 and flat.size == layout.size and len(tensors) == len(layout.tensors)
    for tensor, start in zip(tensors, layout.offsets[:-1], strict=True):
        flat[start : start + tensor.size][tensor.indices] -= update_values(tensor)


def update_section_bytes_max(size: int) -> int:
    """The most bytes that an update's section for a tensor of `size` values can have."""
    return UPDATE_FORM.section_bytes_max(size)


def encode_update_section(update: UpdateTensor) -> bytes:
    """The canonical bytes of one tensor's part of an update."""
    blocks, gaps = encode_gaps(update.indices, update.size)
    values = update.values.view(np.uint8)
    return Section(UPDATE_FORM, update.size, update.counts, update.exponents, blocks, gaps, values).to_bytes()


def check_update_section(data: Buffer, size: int) -> int:
    """Check an update's section for a tensor of `size` values and return how many of them it changes.

    Accepts only canonical bytes, and takes memory for a few chunks, whatever the size. Raises ProtocolError with the
    code of the first rule that is broken, in the order of SPEC 7.
    """
    return len(_checked_section(data, size).values)


def decode_update_section(data: Buffer, size: int) -> UpdateTensor:
    """Read an update's section for a tensor of `size` values: what it returns encodes to `data` again.

    Raises ProtocolError like `check_update_section`, before it allocates anything for the values.
    """
    section = _checked_section(data, size)
    counts = section.heads.astype(np.uint16, copy=False)
    return UpdateTensor(size, counts, section.extras, section.indices(), section.values.view(np.int8))


def _checked_section(data: Buffer, size: int) -> Section:
    section = split_section(data, size, UPDATE_FORM)
    for span, _, counts in section.batches():
        exponents = section.extras[span]
        if np.any(exponents > EXPONENT_MAX) or np.any(exponents[counts == 0]):
            raise ProtocolError(Code.BAD_EXPONENT, f"an exponent is above {EXPONENT_MAX}, or an empty chunk has one")
    section.check_gaps()
    too_coarse = False
    for span, which, counts in section.batches():
        values = section.values[which].view(np.int8)
        if np.any(values == 0) or np.any(values == -128):
            raise ProtocolError(Code.BAD_VALUE, "a value is 0 or -128")
        large = sums_by_chunk(np.abs(values) > _VALUE_MAX // 2, counts)
        too_coarse |= bool(np.any((section.extras[span] > 0) & (large == 0)))
    if too_coarse:
        raise ProtocolError(Code.BAD_EXPONENT, "an exponent is larger than its chunk needs")
    return section


@dataclass(frozen=True)
class UpdateHeader:
    """What an update claims; its digest stands in the signed round record."""

    run_id: bytes
    round: int
    base_root: bytes
    new_root: bytes
    sections_root: bytes

    def to_bytes(self) -> bytes:
        """The 140 bytes of SPEC 7."""
        return _HEADER.pack(
            _MAGIC, VERSION, 0, self.run_id, self.round, self.base_root, self.new_root, self.sections_root
        )

    @classmethod
    def from_bytes(cls, data: Buffer) -> "UpdateHeader":
        """Read a header. Raises ProtocolError TRUNCATED, TRAILING, BAD_MAGIC, VERSION or RESERVED."""
        check_header(data, _MAGIC, UPDATE_HEADER_BYTES)
        return cls(*_HEADER.unpack(data)[3:])

    @cached_property
    def digest(self) -> bytes:
        """The 32 bytes that name this update."""
        return digest("update", self.to_bytes())


@dataclass(frozen=True)
class Update:
    """An update in canonical form: one section per tensor, in the order of the layout."""

    header: UpdateHeader
    sections: tuple[bytes, ...]


def make_update(
    run: RunConfig,
    round: int,
    base_root: bytes,
    new_root: bytes,
    sections: Sequence[bytes],
) -> Update:
    """The update of a round; one canonical section per tensor, in the order of the layout."""
    assert len(sections) == len(run.layout.tensors)
    return Update(UpdateHeader(run.run_id, round, base_root, new_root, merkle_root(sections)), tuple(sections))


def check_update_claims(update: Update, run: RunConfig, *, digest: bytes) -> None:
    """Check that this is the update with this digest: everything but the contents of the sections.

    Raises ProtocolError: WRONG_DIGEST, OTHER_RUN, TRUNCATED, TRAILING, TOO_LARGE or BAD_MERKLE.
    """
    if update.header.digest != digest:
        raise ProtocolError(Code.WRONG_DIGEST, "this is not the update that the round record names")
    if update.header.run_id != run.run_id:
        raise ProtocolError(Code.OTHER_RUN, "the update belongs to another run")
    check_sections(update.sections, run.layout, UPDATE_FORM, update.header.sections_root)


def check_update(update: Update, run: RunConfig, *, digest: bytes) -> list[UpdateTensor]:
    """Return the tensors of the update that has this digest. Nothing is decoded before everything is checked.

    Raises ProtocolError like `check_update_claims`, or with a section's code.
    """
    check_update_claims(update, run, digest=digest)
    pairs = [*zip(update.sections, run.layout.tensors, strict=True)]
    for section, tensor in pairs:
        check_update_section(section, tensor.size)
    return [decode_update_section(section, tensor.size) for section, tensor in pairs]

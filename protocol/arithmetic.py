"""The exact merge: sums of integers, so that any order and any tree of aggregators gives the same bits (SPEC 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.compress import dequantize
from protocol.layout import Layout
from protocol.limits import (
    ALPHA_MAX,
    ALPHA_ONE,
    CHUNK,
    CLIP_ONE,
    CONTRIBUTORS_MAX,
    WEIGHT_MAX,
    WEIGHT_UNIT,
)
from protocol.packing import SparseTensor
from protocol.update import UpdateTensor, join_update_tensors, to_update_tensor

RULES = ("mean", "mean_of_senders")

_SPAN_CHUNKS = 256  # a million values at a time: 16 MiB of sums, whatever the size of the tensor


@dataclass(frozen=True, eq=False)
class Contribution:
    """One accepted packet with the weight and the clip factor that its round record gives it."""

    tensors: Sequence[SparseTensor]
    weight: int
    clip: int


@dataclass(frozen=True, eq=False)
class TensorSum:
    """The merge of any number of packets, for one tensor, before the division. Sums add up in any order."""

    num: NDArray[np.int64]  # i64[N] sum of weight * clipped value, in units of 2^-38
    den: NDArray[np.int64]  # i64[N] sum of the weights of the packets that sent the position

    def __add__(self, other: "TensorSum") -> "TensorSum":
        return TensorSum(self.num + other.num, self.den + other.den)


def zero(size: int) -> TensorSum:
    """The merge of no packets."""
    return TensorSum(np.zeros(size, np.int64), np.zeros(size, np.int64))


def add(total: TensorSum, sparse: SparseTensor, weight: int, clip: int) -> None:
    """Add one packet's tensor to a sum in place. At most 1024 packets fit without overflow."""
    assert 1 <= weight <= WEIGHT_MAX and 1 <= clip <= CLIP_ONE and sparse.size == total.num.size
    grid = dequantize(sparse)
    clipped = np.sign(grid) * ((np.abs(grid) * clip) >> 16)
    total.num[sparse.indices] += weight * clipped
    total.den[sparse.indices] += weight


def weight_of(tokens: int, nominal: int) -> int:
    """The weight of a packet of so many tokens in a run with so many nominal tokens a round; 1024 when they agree."""
    return max(1, min(tokens * WEIGHT_UNIT // nominal, WEIGHT_MAX))


def quotient(total: TensorSum, rule: str, total_weight: int, alpha_q16: int) -> NDArray[np.int64]:  # -> i64[N]
    """The outer step in grid units, alpha included: the sum divided by all weights or by those of the senders."""
    assert rule in RULES and total_weight >= 1 and 1 <= alpha_q16 <= ALPHA_MAX
    sent = np.flatnonzero(total.den)
    num = total.num[sent]
    divisor = total.den[sent] if rule == "mean_of_senders" else total_weight
    step = np.zeros(total.num.size, np.int64)
    step[sent] = np.sign(num) * ((np.abs(num) // divisor * alpha_q16) // ALPHA_ONE)
    return step


def merge(contributions: Sequence[Contribution], layout: Layout, rule: str, alpha_q16: int) -> list[UpdateTensor]:
    """Merge the accepted packets of a round into its update, one tensor after the other and in bounded memory."""
    assert 1 <= len(contributions) <= CONTRIBUTORS_MAX, "a round without packets is a null round, not a merge"
    total_weight = sum(contribution.weight for contribution in contributions)
    update = []
    for number, tensor in enumerate(layout.tensors):
        parts = []
        for first in range(0, tensor.chunks, _SPAN_CHUNKS):
            stop = min(first + _SPAN_CHUNKS, tensor.chunks)
            total = zero(min(stop * CHUNK, tensor.size) - first * CHUNK)
            for contribution in contributions:
                add(total, contribution.tensors[number].span(first, stop), contribution.weight, contribution.clip)
            parts.append(to_update_tensor(quotient(total, rule, total_weight, alpha_q16)))
        update.append(join_update_tensors(parts))
    return update

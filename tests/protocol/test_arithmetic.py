import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.arithmetic import Contribution, TensorSum, add, merge, quotient, weight_of, zero
from protocol.compress import dequantize, to_float32
from protocol.layout import Layout
from protocol.limits import ALPHA_MAX, CONTRIBUTORS_MAX, WEIGHT_MAX
from protocol.packing import SparseTensor
from protocol.run import RunConfig
from protocol.update import Update, UpdateTensor, make_update, to_update_tensor, update_values
from tests.protocol.codec_samples import BASE, make_run, same, sparse_tensors, update_sections

RULES = ("mean", "mean_of_senders")
NEW = bytes([9]) * 32


def contributions_of(run: RunConfig, count: int, seed: int) -> list[Contribution]:
    """Packets with random weights and clips; some are 1.0 and some extreme."""
    rng = random.Random(seed)
    return [
        Contribution(
            sparse_tensors(run, rng.randrange(2**31)),
            rng.choice([1, 1024, WEIGHT_MAX, rng.randint(1, WEIGHT_MAX)]),
            rng.choice([1, 65536, 65536, rng.randint(1, 65536)]),
        )
        for _ in range(count)
    ]


def summed(run: RunConfig, contribution: Contribution) -> list[TensorSum]:
    """One packet alone, as a leaf of a merge tree."""
    totals = [zero(tensor.size) for tensor in run.layout.tensors]
    for total, sparse in zip(totals, contribution.tensors, strict=True):
        add(total, sparse, contribution.weight, contribution.clip)
    return totals


def merged_by_a_random_tree(
    run: RunConfig, contributions: list[Contribution], rule: str, alpha_q16: int, rng: random.Random
) -> list[UpdateTensor]:
    """Sum any two partial sums until one is left: every tree of aggregators is one such sequence."""
    nodes = [summed(run, contribution) for contribution in contributions]
    while len(nodes) > 1:
        left, right = (nodes.pop(rng.randrange(len(nodes))) for _ in range(2))
        nodes.append([a + b for a, b in zip(left, right, strict=True)])
    weight = sum(contribution.weight for contribution in contributions)
    return [to_update_tensor(quotient(total, rule, weight, alpha_q16)) for total in nodes[0]]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(RULES),
    st.integers(1, 7),
    st.sampled_from([1, 64, 700]),
    st.sampled_from([1, 2]),
    st.one_of(st.integers(1, ALPHA_MAX), st.just(65536)),
    st.integers(0, 2**31),
)
def test_any_order_and_any_tree_give_the_same_bytes(
    rule: str, count: int, k: int, code_bits: int, alpha_q16: int, seed: int
) -> None:
    run = make_run(k, code_bits)
    rng = random.Random(seed)
    contributions = contributions_of(run, count, seed)

    def update_of(tensors: list[UpdateTensor]) -> Update:
        return make_update(run, 1, BASE, NEW, update_sections(tensors))

    first = update_of(merge(contributions, run.layout, rule, alpha_q16))
    for _ in range(3):
        rng.shuffle(contributions)
        in_order = update_of(merge(contributions, run.layout, rule, alpha_q16))
        by_tree = update_of(merged_by_a_random_tree(run, contributions, rule, alpha_q16, rng))
        assert in_order == first == by_tree
        assert in_order.header.digest == first.header.digest == by_tree.header.digest


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RULES), st.integers(1, 6), st.integers(1, ALPHA_MAX), st.integers(0, 2**31))
def test_merge_equals_the_rules_in_fractions(rule: str, count: int, alpha_q16: int, seed: int) -> None:
    """Every division of SPEC 7 truncates towards zero, which is what int() of a fraction does."""
    run = make_run(300, 2, [("w", (500,))])
    contributions = contributions_of(run, count, seed)
    num, den, total = [0] * 500, [0] * 500, zero(500)
    for contribution in contributions:
        sparse = contribution.tensors[0]
        add(total, sparse, contribution.weight, contribution.clip)
        for index, grid in zip(sparse.indices.tolist(), dequantize(sparse).tolist(), strict=True):
            num[index] += contribution.weight * int(Fraction(grid * contribution.clip, 65536))
            den[index] += contribution.weight
    assert (total.num.tolist(), total.den.tolist()) == (num, den)
    weight = sum(contribution.weight for contribution in contributions)
    divisors = [max(d, 1) for d in den] if rule == "mean_of_senders" else [weight] * 500
    divided = [int(Fraction(n, d)) for n, d in zip(num, divisors, strict=True)]
    step = [int(Fraction(q * alpha_q16, 65536)) for q in divided]
    assert quotient(total, rule, weight, alpha_q16).tolist() == step
    (update,) = merge(contributions, run.layout, rule, alpha_q16)
    assert same(update, to_update_tensor(np.array(step)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(RULES), st.integers(1, 6), st.integers(1, ALPHA_MAX), st.integers(0, 2**31))
def test_merge_is_within_rounding_of_floating_point(rule: str, count: int, alpha_q16: int, seed: int) -> None:
    """Computed again in float64 from what is defined, not from how it is computed."""
    run = make_run(64, 2, [("w", (9000,))])
    contributions = contributions_of(run, count, seed)
    num, den = np.zeros(9000), np.zeros(9000)
    for contribution in contributions:
        sparse = contribution.tensors[0]
        values = to_float32(dequantize(sparse)).astype(np.float64) * contribution.clip / 65536
        num[sparse.indices] += contribution.weight * values
        den[sparse.indices] += contribution.weight
    divisor = np.maximum(den, 1) if rule == "mean_of_senders" else sum(c.weight for c in contributions)
    wanted = num / divisor * alpha_q16 / 65536
    (update,) = merge(contributions, run.layout, rule, alpha_q16)
    got = np.zeros(9000)
    got[update.indices] = update_values(update)
    # Truncations: one grid unit for each clip, one for the division, one for alpha; then half a step of the update.
    units = (count + 1) * max(1.0, alpha_q16 / 65536) + 1
    steps = np.repeat(2.0 ** (update.exponents.astype(np.float64) - 38), 4096)[:9000]
    # A tiny alpha on a tiny clip may leave nothing of a step, but only within that rounding.
    assert np.all(np.abs(got - wanted) <= units * 2.0**-38 + steps / 2 + np.abs(wanted) * 2.0**-50)
    assert np.any(got) or np.abs(wanted).max() <= units * 2.0**-38


@settings(deadline=None, max_examples=60)
@given(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(1, 1 << 22), st.integers(1, 1 << 18), st.sampled_from(RULES))
def test_quotient_truncates_towards_zero_twice(num: int, weight: int, alpha_q16: int, rule: str) -> None:
    """Against fractions, for every sum that honest limits allow: |num| is at most (15 << 36) * weight."""
    num = max(-(15 << 36) * weight, min(num, (15 << 36) * weight))
    other = 1 if rule == "mean_of_senders" else weight
    total = TensorSum(np.array([num, 0]), np.array([weight if rule == "mean_of_senders" else 1, 0]))
    divided = int(Fraction(num, weight))
    assert quotient(total, rule, other, alpha_q16).tolist() == [int(Fraction(divided * alpha_q16, 65536)), 0]


def largest_sparse(negative: int) -> SparseTensor:
    """One value at the top of the grid: 15 * 2^-2."""
    scales, ratios = np.array([255], np.uint8), np.zeros(1, np.uint8)
    return SparseTensor(1, scales, ratios, np.array([0]), np.array([negative], np.uint8))


@pytest.mark.parametrize("negative", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_sums_do_not_overflow_at_the_limits(rule: str, negative: int) -> None:
    contributions = [Contribution([largest_sparse(negative)], WEIGHT_MAX, 65536)] * CONTRIBUTORS_MAX
    total = zero(1)
    for contribution in contributions:
        add(total, contribution.tensors[0], contribution.weight, contribution.clip)
    sign = -1 if negative else 1
    exact = sign * CONTRIBUTORS_MAX * WEIGHT_MAX * (15 << 36)
    assert abs(exact) < 2**63
    assert total.num.tolist() == [exact]
    assert total.den.tolist() == [CONTRIBUTORS_MAX * WEIGHT_MAX]
    (update,) = merge(contributions, Layout.of([("x", ())]), rule, ALPHA_MAX)
    assert update_values(update).tolist() == [sign * 15.0]
    with pytest.raises(AssertionError):
        merge([*contributions, contributions[0]], Layout.of([("x", ())]), rule, ALPHA_MAX)


def test_the_two_rules_differ_where_not_everybody_sent() -> None:
    sender = Contribution([largest_sparse(0)], 1024, 65536)
    nothing = SparseTensor(
        1, np.zeros(1, np.uint8), np.zeros(1, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    )
    absent = Contribution([nothing], 3 * 1024, 65536)
    layout = Layout.of([("x", ())])
    steps = {rule: update_values(merge([sender, absent], layout, rule, 65536)[0]).tolist() for rule in RULES}
    assert steps == {"mean": [0.9375], "mean_of_senders": [3.75]}


def test_a_clipped_packet_counts_fully_in_the_divisor() -> None:
    half = Contribution([largest_sparse(0)], 1024, 32768)
    whole = Contribution([largest_sparse(1)], 1024, 65536)
    total = zero(1)
    for contribution in (half, whole):
        add(total, contribution.tensors[0], contribution.weight, contribution.clip)
    assert total.den.tolist() == [2048]
    assert total.num.tolist() == [1024 * ((15 << 35) - (15 << 36))]


@pytest.mark.parametrize("rule", RULES)
def test_merging_in_spans_gives_the_merge_of_the_whole_tensor(rule: str) -> None:
    run = make_run(16, 2, [("big", (600 * 4096 + 9,))])
    contributions = contributions_of(run, 3, seed=12)
    (update,) = merge(contributions, run.layout, rule, 65536)
    (whole,) = merged_by_a_random_tree(run, contributions, rule, 65536, random.Random(0))
    assert same(update, whole)


def test_merging_leaves_the_contributions_alone() -> None:
    run = make_run()
    (contribution,) = contributions_of(run, 1, seed=3)
    copies = [replace(sparse, indices=sparse.indices.copy()) for sparse in contribution.tensors]
    merge([contribution], run.layout, "mean", 65536)
    assert all(same(left, right) for left, right in zip(contribution.tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("tokens", "nominal", "weight"),
    [(1000, 1000, 1024), (1, 10**9, 1), (0, 10, 1), (3999, 1000, 4094), (10**15, 1000, 4096), (500, 1000, 512)],
)
def test_weight_of(tokens: int, nominal: int, weight: int) -> None:
    assert weight_of(tokens, nominal) == weight

"""Error feedback and compression, as a sender does them (SPEC 4)."""

import struct
from collections.abc import Iterator, Sequence

from protocol.cases.vector import Fields, Row, Vector, noise, table

INFINITY, QUIET, SIGNALLING = 0x7F800000, 0x7FC00000, 0x7F800001
NEGATIVE = 1 << 31


def f32(*values: float) -> bytes:
    """The bytes of these numbers as float32."""
    return struct.pack(f"<{len(values)}f", *values)


def words(*bits: int) -> bytes:
    """The bytes of float32 numbers with these bits."""
    return struct.pack(f"<{len(bits)}I", *bits)


def spread(seed: str, count: int, low: int, high: int) -> bytes:
    """Numbers that look random, of both signs, with exponent fields from low to high."""
    raw = struct.unpack(f"<{count}Q", noise(seed, 8 * count))
    return words(*((item & 0x807FFFFF) | (low + (item >> 32) % (high - low + 1)) << 23 for item in raw))


def acc_rows() -> Iterator[Row]:
    """Three roundings, never fused."""

    def fields(beta: float, residual: bytes, outer: bytes, local: bytes) -> Fields:
        return {"beta": beta, "residual": residual, "outer": outer, "local": local}

    why = "Product, difference and sum are rounded one by one; a fused multiply-add gives other bits."
    three = [spread(name, 64, 115, 122) for name in ("residual", "outer", "local")]
    for beta in (0.95, 0.1, 1.0):
        yield f"beta-{beta}", why, fields(beta, *three), None
    tiny = [spread(f"tiny {name}", 16, 0, 3) for name in ("residual", "outer", "local")]
    yield "denormals", "Denormals are kept, never flushed to zero.", fields(0.95, *tiny), None
    even = [words(0x00000001, 0x00000003, 0x00000005, 0x00800001), bytes(16), bytes(16)]
    yield "half-to-even", "Half of an odd denormal rounds to even.", fields(0.5, *even), None
    zeros = [f32(-0.0, -0.0, 5.0, -5.0), f32(-0.0, 0.0, -0.0, -0.0), f32(0.0, 0.0, 0.0, 0.0)]
    yield "zeros", "The sign of a zero is what IEEE 754 says.", fields(0.0, *zeros), None
    large = [f32(3e38, -3e38), f32(3e38, 3e38), f32(-3e38, 3e38)]
    yield "overflow", "A sum beyond float32 is infinite; only then nothing is sent.", fields(1.0, *large), None


def small_rows() -> Iterator[tuple[str, str, bytes, int, int]]:
    """Chunks of a few values: name, why, acc, k, code_bits."""
    k = 4096  # keeps every value
    cases: list[tuple[str, str, Sequence[float], int]] = [
        ("one-value", "A scalar is a chunk of its own.", [-0.3], 1),
        ("ties", "Of equal magnitudes the lowest index is kept.", [0.1, -0.5, 0.5, 0.5, -0.5, 0.2], 2048),
        ("ties-zeros", "Zeros are kept when nothing larger is left.", [0.0, -0.0, 0.5, 0.0, -0.0, 0.0], 3000),
        ("all-equal", "No value is above the mean, so all are high.", [0.7, -0.7, 0.7], k),
        ("two-levels", "High and low.", [1.0, 1.1, -0.4, 0.5], k),
        ("second-look", "The second look moves values between high and low.", [8.0, 1.0, 1.0, 1.0, 2.6, 2.6], k),
        ("low-near-high", "When the ratio rounds to 0 every value is high.", [1.0, 1.0, 1.0, 0.995], k),
        ("low-above-scale", "The low mean is above the rounded scale: ratio 0.", [1.06, 1.06, 1.03], k),
        ("low-far-below", "A ratio is at most 63.", [1.0, 1.0, 0.001], k),
        ("zero-low", "The low mean is 0: the ratio is 63, and zeros are sent as low.", [1.0, 1.0, 0.0, -0.0], k),
        ("none-nearer", "No value is nearer to the rounded scale: step 4 stands.", [1.07, 1.07, 1.06], k),
        ("nearer", "The rounded scale and ratio move a value.", [1.0, 0.3, 0.3, 0.62, 0.66, 0.29, 1.2], k),
        ("carry", "15.5 eighths round to 16: the exponent carries.", [1.95, 1.95, 1.95], k),
        ("half-up", "A half rounds up: 1.0625 becomes 1.125.", [1.0625, 1.0625], k),
        ("below-half", "Less than a half rounds down.", [1.0624999, 1.0624999], k),
        ("shifted-out", "f is 0 when the exponents differ by 30.", [1.0, 2.0**-30, 2.0**-31, 2.0**-29], k),
        ("largest", "Scales end at 255, whatever is above: 3.75.", [1e30, 2e30, -1e30], k),
        ("four", "4.0 is the first value above the scales.", [4.0, 4.0], k),
        ("scale-255", "3.75 is the largest scale.", [3.75, -3.75], k),
        ("scale-254", "3.5 is the one before.", [3.5, -3.5], k),
        ("scale-1", "The least scale: 9/8 * 2^-30.", [9 * 2.0**-33, -9 * 2.0**-33], k),
        ("scale-0", "2^-30 would be scale 0: the chunk is absent.", [2.0**-30, -(2.0**-30)], k),
        ("scale-rounds-to-1", "What rounds up to 9/8 * 2^-30 is sent.", [8.5 * 2.0**-33, 8.5 * 2.0**-33], k),
        ("scale-rounds-to-0", "What rounds down to 2^-30 is not.", [8.4 * 2.0**-33, 8.4 * 2.0**-33], k),
        ("below-scales", "Far below the least scale.", [1e-20, -1e-21], k),
        ("denormals", "Denormals have no hidden bit; their chunk is absent.", [1e-40, -1e-42], k),
        ("zeros", "A chunk of zeros is absent.", [0.0, -0.0, 0.0], k),
    ]
    for name, why, values, keep in cases:
        for code_bits in (1, 2):
            yield f"{name}-{code_bits}-bit", why, f32(*values), keep, code_bits


def large_rows() -> Iterator[tuple[str, str, bytes, int, int]]:
    """Longer chunks, and more of them."""
    for number in range(8):
        k, code_bits = (512, 1024, 64, 3000)[number % 4], 1 + number % 2
        acc = spread(f"values {number}", 300, 116 - number, 118 + number)
        yield f"spread-{number}", "Values of many magnitudes.", acc, k, code_bits
    acc = spread("chunks", 4096 + 37, 112, 118)
    for code_bits in (1, 2):
        why = "A chunk and a short one, which keeps one value as its share is less."
        yield f"two-chunks-{code_bits}-bit", why, acc, 64, code_bits
    absent = bytes(4 * 4096) + spread("after zeros", 20, 112, 118)
    yield "absent-first", "A chunk of zeros is absent; the next one is not.", absent, 400, 2
    tied = f32(*[0.25] * 5000)
    yield "all-tied", "The first of each chunk are kept.", tied, 3, 2


def compress_rows() -> Iterator[Row]:
    """What is sent, and what stays."""
    for name, why, acc, k, code_bits in (*small_rows(), *large_rows()):
        yield name, why, {"acc": acc, "k": k, "code_bits": code_bits}, None


def refused_rows() -> Iterator[Row]:
    """A peer that diverged sends nothing."""
    bad = {
        "infinity": INFINITY,
        "minus-infinity": INFINITY | NEGATIVE,
        "nan": QUIET,
        "minus-nan": QUIET | NEGATIVE,
        "signalling-nan": SIGNALLING,
    }
    for name, bits in bad.items():
        fields = {"acc": f32(1.0, 0.5) + words(bits) + f32(0.25), "k": 4096, "code_bits": 2}
        yield name, "An infinity or NaN anywhere is an error of the sender.", fields, 0
    late = {"acc": bytes(4 * 4096) + words(QUIET), "k": 64, "code_bits": 1}
    yield "nan-in-the-last-chunk", "Anywhere, in a later chunk too.", late, 0


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("acc", "make acc", acc_rows())
    yield from table("compress", "make compress", compress_rows())
    yield from table("compress-refused", "make compress", refused_rows())

"""The exact merge, the outer step and the state root (SPEC 3 and 7)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from protocol.cases.compress import f32, spread, words
from protocol.cases.sections import LONG, Part, UpdatePart, gap_bytes, pack
from protocol.cases.vector import Fields, Row, Vector, noise, table
from protocol.layout import kept

RULES = ("mean", "mean_of_senders")


def weight_rows() -> Iterator[Row]:
    """Weights by tokens."""
    cases: dict[str, tuple[int, int, str]] = {
        "nominal": (64, 64, "A full round weighs 1024."),
        "half": (32, 64, "Half a round weighs half."),
        "rounds-down": (999, 1024 * 1000, "A fraction is dropped, but a weight is at least 1."),
        "one-token": (1, 2**40, "At least 1."),
        "floor": (2047, 2048, "1023.5 becomes 1023."),
        "four-rounds": (256, 64, "4096 is the largest."),
        "more": (2**48, 64, "At most 4096."),
        "wide": (2**48, 2**48 + 2**38, "The product needs 58 bits."),
    }
    for name, (tokens, nominal, why) in cases.items():
        yield name, why, {"tokens": tokens, "nominal": nominal}, None


def part(size: int, k: int, code_bits: int, seed: str, *, scale: int | None = None) -> Part:
    """A section with all chunks present, at positions that look random."""
    scales, ratios, gaps, codes = b"", b"", b"", []
    for start in range(0, size, 4096):
        length = min(4096, size - start)
        count = kept(length, k)
        order = sorted(range(length), key=lambda place: noise(f"{seed} {start} {place}", 8))
        gaps += gap_bytes(sorted(order[:count]))
        drawn = noise(f"{seed} {start}", count + 2)
        scales += bytes([150 + drawn[-1] % 8 if scale is None else scale])
        low = code_bits == 2 and count > 1
        ratios += bytes([1 + drawn[-2] % 63 if low else 0]) if code_bits == 2 else b""
        chunk = [octet % (4 if low else 2) for octet in drawn[:count]]
        codes += [chunk[0] % 2, chunk[1] | 2, *chunk[2:]] if low else chunk
    return Part(size, k, code_bits, scales, ratios, (), gaps, pack(codes, code_bits))


def one(scale: int, code: int, *, ratio: int = 0) -> Part:
    """The section of a scalar."""
    return Part(1, 1, 2, bytes([scale]), bytes([ratio]), (), b"\0", bytes([code]))


def merged(parts: Sequence[Part], rule: str = "mean", alpha_q16: int = 65536, **given: Sequence[int]) -> Fields:
    """The fields of a request; weights are 1024 and nothing is clipped unless said otherwise."""
    count = len(parts)
    first = parts[0]
    shape: dict[str, Any] = {"size": first.size, "k": first.k, "code_bits": first.code_bits}
    numbers = {"weights": given.get("weights", [1024] * count), "clips": given.get("clips", [65536] * count)}
    return {**shape, "rule": rule, "alpha_q16": alpha_q16, **numbers, "sections": [each.data for each in parts]}


def scalar_rows() -> Iterator[Row]:
    """One value, so that each rounding stands by itself."""
    for rule in RULES:
        yield f"alone-{rule}", "One packet is its own mean.", merged([one(128, 0)], rule), None
        against = [one(128, 0), one(128, 1)]
        yield f"cancel-{rule}", "What cancels is not in the update.", merged(against, rule), None
        weights = merged([one(128, 0), one(136, 1)], rule, weights=[1, 4096])
        yield f"weights-{rule}", "Each packet counts by its weight.", weights, None
        thirds = merged([one(8, 1), one(9, 1), one(10, 1)], rule, weights=[1, 1, 1])
        yield f"negative-{rule}", "Division drops the fraction of the magnitude, whatever the sign.", thirds, None
    clips = {"1": 1, "half": 32768, "odd": 12345, "one-less": 65535}
    for name, clip in clips.items():
        yield (
            f"clip-{name}",
            "The clip scales the magnitude and drops the fraction.",
            merged([one(130, 1)], clips=[clip]),
            None,
        )
    gone = merged([one(1, 0), one(129, 0)], "mean_of_senders", clips=[1, 65536])
    yield "clip-to-0", "A value that the clip makes 0 still counts as sent.", gone, None
    for name, alpha in {"1": 1, "half": 32768, "odd": 54321, "4": 2**18}.items():
        yield (
            f"alpha-{name}",
            "Alpha scales the magnitude and drops the fraction.",
            merged([one(131, 0)], alpha_q16=alpha),
            None,
        )
    yield "alpha-to-0", "Nothing is left, so the update is empty.", merged([one(1, 0)], alpha_q16=1), None
    largest = merged([one(255, 0)] * 3, alpha_q16=2**18, weights=[4096] * 3)
    yield "largest", "The largest step of all: exponent 35.", largest, None
    crowd = merged([one(255, number % 2) for number in range(1023)], weights=[4096] * 1023)
    yield "1023-packets", "Sums of a crowd stay below 2^63.", crowd, None
    smallest = merged([one(1, 1)])
    yield "smallest", "The least scale alone.", smallest, None


def rounding_rows() -> Iterator[Row]:
    """From the sum to a signed byte: alpha_q16 = 65536 leaves the grid integers of one packet as they are."""
    # The scale 1 is 9 << 5 = 288 units: with clips any smaller magnitude can be made of it.
    for magnitude in (126, 127, 128, 254, 255, 256, 287, 288):
        clip = -(-magnitude * 65536 // 288)
        assert clip * 288 >> 16 == magnitude, magnitude
        why = f"A = {magnitude}: the least exponent with which the rounded magnitude is at most 127."
        yield f"exponent-of-{magnitude}", why, merged([one(1, 0)], clips=[clip]), None
    # Two values of a chunk: a large one sets the exponent, a small one is rounded by it.
    for ratio, why in ((63, "A small value keeps what a half-up rounding leaves."), (1, "Two large values.")):
        pair = Part(2, 4096, 2, b"\xa7", bytes([ratio]), (), b"\0\0", pack([0, 3], 2))
        yield f"pair-ratio-{ratio}", why, merged([pair]), None
    both = Part(2, 4096, 2, b"\xff", b"\0", (), b"\0\0", pack([0, 0], 2))
    weak = replace(both, scales=b"\1", codes=pack([0, 1], 2))
    left = merged([both, weak], "mean_of_senders", weights=[4096, 1])
    yield "dominated", "A small packet moves no rounded value.", left, None
    # Scale 1 sets exponent 2; these ratios make the low value 274, 270 and 265 units.
    for ratio, why in ((3, "68.5 becomes 69."), (4, "67.5 becomes 68."), (5, "66.25 becomes 66.")):
        for sign in (0, 1):
            pair = Part(2, 4096, 2, b"\1", bytes([ratio]), (), b"\0\0", pack([sign, 2 + sign], 2))
            yield f"half-up-ratio-{ratio}-sign-{sign}", f"{why} The sign does not matter.", merged([pair]), None
    chunks = Part(4097, 1, 1, b"\x10\1", b"", (), b"\0\0", b"\0")
    yield "two-chunks", "Each chunk has its own exponent.", merged([chunks]), None


def large_rows() -> Iterator[Row]:
    """Tensors of several chunks and packets that overlap in part."""
    for rule in RULES:
        for code_bits in (1, 2):
            parts = [part(4096 + 77, 60, code_bits, f"{rule} {number}") for number in range(5)]
            given = {"weights": [1024, 1, 4096, 700, 2048], "clips": [65536, 65536, 20000, 65535, 1]}
            name = f"five-packets-{rule}-{code_bits}-bit"
            yield name, "Five packets, two chunks.", merged(parts, rule, 50000, **given), None
    dense = [part(200, 4096, 2, f"dense {number}") for number in range(3)]
    yield "dense", "All send every position.", merged(dense, "mean_of_senders"), None
    reverse = merged(dense[::-1], "mean_of_senders")
    yield "dense-reversed", "The order of the packets changes nothing.", reverse, None
    absent = replace(dense[0], scales=b"\0", ratios=b"\0", gaps=b"", codes=b"")
    yield "one-absent", "A packet without the chunk weighs in the mean of all.", merged([absent, dense[1]]), None
    senders = merged([absent, dense[1]], "mean_of_senders")
    yield "one-absent-senders", "It does not weigh in the mean of the senders.", senders, None
    yield "all-absent", "Nobody sent the chunk.", merged([absent, absent]), None
    yield "blocks", "A tensor of more than 1024 chunks.", merged([LONG, LONG], "mean_of_senders"), None


def apply_rows() -> Iterator[Row]:
    """One float32 subtraction at each position present."""

    def fields(outer: bytes, update: UpdatePart) -> Fields:
        return {"outer": outer, "section": update.data}

    values = bytes([1, 255, 127, 129, 64])
    update = UpdatePart(12, (5,), b"\x1c", (), gap_bytes([0, 1, 5, 6, 11]), values)
    yield "usual", "Five of twelve values.", fields(spread("outer", 12, 118, 126), update), None
    zeros = f32(*[0.0, -0.0] * 6)
    yield "zeros", "0 - v; a position that is not there keeps its bits, and -0 with it.", fields(zeros, update), None
    same = f32(*[2.0**-10] * 12)
    to_zero = replace(update, values=bytes([1, 1, 2, 255, 64]))
    yield "to-zero", "x - x is +0.", fields(same, to_zero), None
    tiny = words(*range(1, 13))
    small = replace(update, exponents=b"\0", values=bytes([1, 255, 2, 254, 3]))
    yield "denormals", "Denormals are kept, never flushed to zero.", fields(tiny, small), None
    large = f32(*[1e10, -1e10] * 6)
    yield "absorbed", "A small step is lost in a large value.", fields(large, small), None
    coarse = replace(update, exponents=b"\x23")
    yield "largest-step", "The largest exponent.", fields(spread("outer", 12, 118, 126), coarse), None
    rounded = spread("outer two", 300, 110, 130)
    full = UpdatePart(300, (300,), b"\x1a", (), bytes(300), bytes(1 + octet % 127 for octet in noise("steps", 300)))
    yield "full", "Every value, each difference rounded once.", fields(rounded, full), None
    two = UpdatePart(4099, (1, 2), b"\x1e\x02", (), b"\7\0\1", bytes([100, 127, 129]))
    yield "two-chunks", "Each chunk has its own exponent.", fields(spread("chunks", 4099, 120, 120), two), None


def state_rows() -> Iterator[Row]:
    """The name of a state."""
    values = spread("state", 8, 110, 130)
    yield "one-value", "The least of states.", {"values": f32(1.0), "repeat": 1}, None
    yield "one-piece", "A short piece.", {"values": values, "repeat": 1000}, None
    yield "negative-zero", "+0 and -0 differ.", {"values": f32(-0.0), "repeat": 1}, None
    yield "zero", "+0 and -0 differ.", {"values": f32(0.0), "repeat": 1}, None
    yield "full-piece", "Exactly 4 MiB.", {"values": values, "repeat": 1 << 17}, None
    three = {"values": spread("odd", 7, 110, 130), "repeat": 300_000}
    yield "three-pieces", "Two pieces of 4 MiB and a short one.", three, None


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("weight", "make weight", weight_rows())
    yield from table("merge", "make merge", scalar_rows())
    yield from table("merge-rounding", "make merge", rounding_rows())
    yield from table("merge-large", "make merge", large_rows())
    yield from table("apply", "make apply", apply_rows())
    yield from table("state-root", "make state-root", state_rows())

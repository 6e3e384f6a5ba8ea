"""Keys, signatures and Merkle trees (SPEC 1): above all what libraries disagree about."""

import hashlib
from collections.abc import Iterator
from typing import Any

from protocol.cases.vector import PEER, STRANGER, Fields, Row, Vector, noise, table
from protocol.errors import Code
from protocol.identity import DOMAINS

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT = pow(2, (P - 1) // 4, P)  # a square root of -1
SMALL_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826

Point = tuple[int, int]
IDENTITY: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    """The sum of two points of the curve."""
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def times(scalar: int, point: Point) -> Point:
    """A point added to itself so many times."""
    total = IDENTITY
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point, scalar = add(point, point), scalar >> 1
    return total


def point_of(y: int, odd: int) -> Point:
    """The point with this y whose x has this lowest bit."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * ROOT % P
    assert x * x % P == square, "no point has this y"
    return (x if x & 1 == odd else P - x), y


def encode(point: Point) -> bytes:
    """The 32 bytes of a point."""
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


GENERATOR = point_of(4 * pow(5, -1, P) % P, 0)
TORSION = point_of(SMALL_ORDER_8, 0)


def tagged(domain: str, message: bytes) -> bytes:
    """What a signature covers."""
    return b"sparseloco-peer/1\0" + domain.encode("ascii") + b"\0" + message


def challenge(r: bytes, key: bytes, message: bytes) -> int:
    """The number that binds a signature to its key and message, in the domain `packet`."""
    return int.from_bytes(hashlib.sha512(r + key + tagged("packet", message)).digest(), "little") % L


def key_rows() -> Iterator[Row]:
    """Keys alone."""
    yield "usual", "An ordinary key.", {"bytes": PEER.public}, None
    yield "odd-x", "The highest bit is the sign of x, not a part of y.", {"bytes": encode(point_of(9, 1))}, None
    mixed = encode(add(times(5, GENERATOR), TORSION))
    yield "mixed-order", "A point outside the prime-order group is admitted.", {"bytes": mixed}, None
    ys = {
        "y-is-p": (P, "y must be below p, here it is p."),
        "y-is-p-plus-1": (P + 1, "A second encoding of the neutral point."),
        "y-is-p-plus-3": (P + 3, "A second encoding of y = 3, which is on the curve."),
        "y-is-p-plus-18": (P + 18, "The largest y that 255 bits hold."),
        "not-on-the-curve": (2, "No point of the curve has y = 2."),
        "not-on-the-curve-either": (P - 2, "No point of the curve has y = p - 2."),
        "order-4": (0, "y = 0 has order 4."),
        "order-1": (1, "The neutral point."),
        "order-2": (P - 1, "y = p - 1 has order 2."),
        "order-8": (SMALL_ORDER_8, "A root of d*y^4 + 2*y^2 = 1 has order 8."),
        "order-8-other": (P - SMALL_ORDER_8, "The other root of d*y^4 + 2*y^2 = 1 has order 8 too."),
    }
    for name, (y, why) in ys.items():
        yield name, why, {"bytes": y.to_bytes(32, "little")}, Code.BAD_KEY
        negative = (y | 1 << 255).to_bytes(32, "little")
        yield f"{name}-negative", f"{why} The sign of x changes nothing.", {"bytes": negative}, Code.BAD_KEY
    for length in (0, 31, 33, 64):
        yield f"{length}-bytes", "A key has 32 bytes.", {"bytes": noise("key", length)}, Code.BAD_KEY


def signature_rows() -> Iterator[Row]:
    """Signatures as keys make them, and damaged ones."""
    fields: dict[str, Any] = {"key": PEER.public, "domain": "packet", "message": b"a message"}
    signature = PEER.sign("packet", b"a message")
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    for domain in sorted(DOMAINS):
        each = {**fields, "domain": domain, "bytes": PEER.sign(domain, b"a message")}
        yield domain, "Every kind of message has its domain.", each, None
    empty = {**fields, "message": b"", "bytes": PEER.sign("packet", b"")}
    yield "empty", "An empty message is signed like any other.", empty, None
    damaged: list[tuple[str, str, Fields]] = [
        ("other-message", "The message differs in one bit.", {"message": b"b message"}),
        ("other-domain", "A signature counts in its own domain alone.", {"domain": "update"}),
        ("other-key", "Somebody else's key.", {"key": STRANGER.public}),
        ("r-changed", "One bit of R differs.", {"bytes": bytes([r[0] ^ 1]) + signature[1:]}),
        ("s-changed", "S is one more.", {"bytes": r + (s + 1).to_bytes(32, "little")}),
        (
            "s-plus-order",
            "S + L solves the equation too, but S must be below L.",
            {"bytes": r + (s + L).to_bytes(32, "little")},
        ),
        ("s-is-order", "S must be below L.", {"bytes": r + L.to_bytes(32, "little")}),
        ("s-high-bit", "The three highest bits of S are zero.", {"bytes": signature[:63] + b"\x80"}),
        ("zeros", "64 zero bytes sign nothing.", {"bytes": bytes(64)}),
        ("63-bytes", "A signature has 64 bytes.", {"bytes": signature[:63]}),
        ("65-bytes", "A signature has 64 bytes.", {"bytes": signature + b"\0"}),
        ("no-bytes", "A signature has 64 bytes.", {"bytes": b""}),
    ]
    for name, why, change in damaged:
        yield name, why, {**fields, "bytes": signature, **change}, Code.BAD_SIGNATURE
    short = {**fields, "key": bytes(32), "bytes": signature[:63]}
    yield "key-first", "The key is checked before the length of the signature.", short, Code.BAD_KEY
    small = {**fields, "key": encode(TORSION), "bytes": encode(IDENTITY) + bytes(32)}
    yield "small-order-key", "With a key of small order everything may seem signed.", small, Code.BAD_KEY


def strict_rows() -> Iterator[Row]:
    """Signatures about which verifiers in the wild disagree."""
    secret, nonce = 123456789, 987654321
    key, r = encode(times(secret, GENERATOR)), encode(times(nonce, GENERATOR))
    mixed = encode(add(times(secret, GENERATOR), TORSION))
    mixed_r, neutral = encode(add(times(nonce, GENERATOR), TORSION)), encode(IDENTITY)

    def signed(r: bytes, key: bytes, nonce: int, message: bytes) -> dict[str, Any]:
        s = (nonce + challenge(r, key, message) * secret) % L
        return {"key": key, "domain": "packet", "message": message, "bytes": r + s.to_bytes(32, "little")}

    messages = [b"message %d" % number for number in range(64)]
    whole = next(message for message in messages if challenge(r, mixed, message) % 8 == 0)
    part = next(message for message in messages if challenge(r, mixed, message) % 8)
    yield "mixed-key", "Without the cofactor this holds, because H is 0 mod 8.", signed(r, mixed, nonce, whole), None
    yield "neutral-r", "R may be the neutral point, in its one encoding.", signed(neutral, key, 0, part), None
    refused = [
        (
            "cofactor-key",
            "Only a check with the cofactor would accept this: A has mixed order.",
            signed(r, mixed, nonce, part),
        ),
        (
            "cofactor-r",
            "Only a check with the cofactor would accept this: R has mixed order.",
            signed(mixed_r, key, nonce, part),
        ),
    ]
    for name, other in {"p-plus-1": P + 1, "negative": 1 | 1 << 255}.items():
        why = "Bytes are compared: another encoding of the same point is refused."
        refused.append((f"neutral-r-{name}", why, signed(other.to_bytes(32, "little"), key, 0, part)))
    untagged = int.from_bytes(hashlib.sha512(r + key + part).digest(), "little")
    signature = r + ((nonce + untagged * secret) % L).to_bytes(32, "little")
    bare = {**signed(r, key, nonce, part), "bytes": signature}
    refused.append(("without-domain", "The tag of the domain is a part of what is signed.", bare))
    for name, why, fields in refused:
        yield name, why, fields, Code.BAD_SIGNATURE


def merkle_rows() -> Iterator[Row]:
    """Trees of every shape up to nine leaves."""
    for count in range(1, 10):
        leaves = [noise(f"leaf {number}", 5 * number) for number in range(count)]
        why = "n leaves split at the largest power of two below n; a leaf may be empty."
        yield f"{count}-leaves", why, {"leaves": leaves}, None


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("key", "check key", key_rows())
    yield from table("signature", "check signature", signature_rows())
    yield from table("strict", "check signature", strict_rows())
    yield from table("merkle", "make merkle", merkle_rows())

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, check_key, digest, leaf_hash, merkle_root, merkle_root_of_hashes, verify
from tests.protocol.codec_samples import refused

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
KEY = PrivateKey.from_bytes(bytes(range(32)))

Point = tuple[int, int]


def add(left: Point, right: Point) -> Point:
    """The edwards25519 group law in plain integers (RFC 8032, section 5.1)."""
    (x1, y1), (x2, y2) = left, right
    k = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P


def times(scalar: int, point: Point) -> Point:
    result = (0, 1)
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point = add(point, point)
        scalar >>= 1
    return result


def x_of(y: int) -> int | None:
    squared = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(squared, (P + 3) // 8, P)
    if x * x % P != squared:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if x * x % P == squared else None


def encode(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def decode(data: bytes) -> Point:
    value = int.from_bytes(data, "little")
    y = value & (2**255 - 1)
    x = x_of(y)
    assert x is not None
    return (x if x & 1 == value >> 255 else P - x), y


def order_eight() -> Point:
    """A generator of the eight points of small order: any point times L, when it is not of smaller order."""
    for y in range(2, 100):
        x = x_of(y)
        if x is not None:
            point = times(L, (x, y))
            if times(4, point) != (0, 1):
                return point
    raise AssertionError


def tagged(domain: str, data: bytes) -> bytes:
    return b"sparseloco-peer/1\0" + domain.encode() + b"\0" + data


def test_a_digest_is_sha256_over_the_tag_and_the_data() -> None:
    assert digest("run", b"data") == hashlib.sha256(tagged("run", b"data")).digest()
    assert digest("run", b"data") != digest("packet", b"data")


def test_a_signature_is_ed25519_over_the_tag_and_the_data() -> None:
    # RFC 8032's equation, computed here from the seed.
    hashed = hashlib.sha512(bytes(range(32))).digest()
    secret = int.from_bytes(hashed[:32], "little") & ((1 << 254) - 8) | (1 << 254)
    base = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    message = tagged("record", b"data")
    nonce = int.from_bytes(hashlib.sha512(hashed[32:] + message).digest(), "little") % L
    r = encode(times(nonce, base))
    challenge = int.from_bytes(hashlib.sha512(r + KEY.public + message).digest(), "little")
    assert encode(times(secret, base)) == KEY.public
    assert KEY.sign("record", b"data") == r + ((nonce + challenge * secret) % L).to_bytes(32, "little")
    verify(KEY.public, "record", b"data", KEY.sign("record", b"data"))


@given(st.binary(max_size=40), st.integers(0, 511))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_a_signature_with_any_bit_changed_is_refused(data: bytes, bit: int) -> None:
    signature = bytearray(KEY.sign("dht", data))
    signature[bit // 8] ^= 1 << bit % 8
    with refused(Code.BAD_SIGNATURE):
        verify(KEY.public, "dht", data, bytes(signature))


def test_a_signature_holds_for_one_domain_key_and_message() -> None:
    signature = KEY.sign("join-peer", b"data")
    other = PrivateKey.generate()
    for public, domain, data in (
        (KEY.public, "join-aggregator", b"data"),
        (other.public, "join-peer", b"data"),
        (KEY.public, "join-peer", b"date"),
    ):
        with refused(Code.BAD_SIGNATURE):
            verify(public, domain, data, signature)
    for length in (0, 63, 65):
        with refused(Code.BAD_SIGNATURE):
            verify(KEY.public, "join-peer", b"data", (signature + b"\0")[:length])


def test_s_must_be_below_the_group_order() -> None:
    signature = KEY.sign("run", b"data")
    s = int.from_bytes(signature[32:], "little") + L
    assert s < 2**256
    with refused(Code.BAD_SIGNATURE):
        verify(KEY.public, "run", b"data", signature[:32] + s.to_bytes(32, "little"))


def test_the_equation_is_checked_without_the_cofactor() -> None:
    # With R moved by a point of order 8 and S made to fit, the equation holds times 8, and only so.
    hashed = hashlib.sha512(bytes(range(32))).digest()
    secret = int.from_bytes(hashed[:32], "little") & ((1 << 254) - 8) | (1 << 254)
    base = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    nonce, torsion = 123456789, order_eight()
    r = encode(add(times(nonce, base), torsion))
    challenge = int.from_bytes(hashlib.sha512(r + KEY.public + tagged("run", b"m")).digest(), "little") % L
    s = (nonce + challenge * secret) % L
    difference = add(times(s, base), times(L - challenge, decode(KEY.public)))
    assert times(8, difference) == times(8, decode(r))
    with refused(Code.BAD_SIGNATURE):
        verify(KEY.public, "run", b"m", r + s.to_bytes(32, "little"))


def test_every_key_of_small_order_is_refused_in_every_encoding() -> None:
    generator = order_eight()
    points = {times(i, generator) for i in range(8)}
    assert len(points) == 8
    encodings = {encode(point) for point in points}
    for _, y in points:
        for value in (y, y + P):
            if value < 2**255:
                encodings |= {value.to_bytes(32, "little"), (value | 1 << 255).to_bytes(32, "little")}
    assert len(encodings) == 14
    # For the neutral element as key, this signature fits every message under the bare equation.
    forged = encode((0, 1)) + bytes(32)
    for public in encodings:
        with refused(Code.BAD_KEY):
            verify(public, "run", b"data", forged)


def test_keys_that_are_not_canonical_are_refused() -> None:
    for y in range(P, 2**255):
        for sign in (0, 1):
            with refused(Code.BAD_KEY):
                check_key((y | sign << 255).to_bytes(32, "little"))


def test_keys_off_the_curve_or_of_another_length_are_refused() -> None:
    off = next(y for y in range(2, 100) if x_of(y) is None)
    for public in (off.to_bytes(32, "little"), b"", KEY.public[:31], KEY.public + b"\0"):
        with refused(Code.BAD_KEY):
            check_key(public)


def test_a_key_of_full_and_one_of_mixed_order_are_admitted() -> None:
    check_key(KEY.public)
    check_key(encode(add(decode(KEY.public), order_eight())))


def test_a_private_key_survives_its_text_form_and_nothing_else_is_one() -> None:
    key = PrivateKey.generate()
    text = key.to_text()
    assert PrivateKey.from_text(f" {text}\n").to_bytes() == key.to_bytes()
    assert key.to_bytes().hex() not in repr(key)
    last = "A" if text[-2] != "A" else "B"
    for bad in ("", text[:-1], text + "A", text.replace("key-1", "key-2"), text + " x", text[:-2] + last + "!"):
        with pytest.raises(ValueError, match="restore it from a backup"):
            PrivateKey.from_text(bad)
    with pytest.raises(ValueError, match="32 bytes"):
        PrivateKey.from_bytes(bytes(31))


def test_the_text_of_a_key_has_one_form() -> None:
    # 32 bytes leave two spare bits in base64; set, they would be a second form of the same key.
    text = PrivateKey.from_bytes(bytes(32)).to_text()
    assert text.endswith("A=")
    with pytest.raises(ValueError, match="damaged"):
        PrivateKey.from_text(text[:-2] + "B=")


def rfc_6962(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + rfc_6962(leaves[:split]) + rfc_6962(leaves[split:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 33, 100])
def test_the_merkle_root_has_the_shape_of_rfc_6962(count: int) -> None:
    leaves = [bytes([i]) * i for i in range(count)]
    assert merkle_root(leaves) == rfc_6962(leaves)
    assert merkle_root_of_hashes([leaf_hash(leaf) for leaf in leaves]) == rfc_6962(leaves)


def test_an_error_names_its_code() -> None:
    with pytest.raises(ProtocolError, match="SL101 bad-key: "):
        check_key(b"")

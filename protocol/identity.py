"""Who says what: domain-separated hashes, Ed25519 keys and signatures, Merkle roots (SPEC 1)."""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import Code, ProtocolError

Buffer = bytes | bytearray | memoryview

KEY_BYTES = 32
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)
DOMAINS = frozenset({"run", "packet", "update", "record", "dht", "invite", "join-aggregator", "join-peer", "amendment"})

_KEY_TEXT = "sparseloco-peer-key-1"
_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
# The y coordinates of the eight points whose order divides 8. Whatever the sign of x, they are refused.
_SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    }
)


def _tag(domain: str) -> bytes:
    assert domain in DOMAINS, f"{domain!r} is not a domain of SPEC 1"
    return b"sparseloco-peer/1\0" + domain.encode("ascii") + b"\0"


def digest(domain: str, data: Buffer) -> bytes:
    """SHA-256 of data, separated by domain so that a hash of one kind never passes for another. 32 bytes."""
    state = hashlib.sha256(_tag(domain))
    state.update(data)
    return state.digest()


class PrivateKey:
    """An Ed25519 key pair. Its public half, 32 bytes, is the identity of a peer, an aggregator or an operator."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> "PrivateKey":
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> "PrivateKey":
        """Make the key whose RFC 8032 seed is these 32 bytes. Raises ValueError on another length."""
        if len(seed) != KEY_BYTES:
            raise ValueError(f"a private key has {KEY_BYTES} bytes, these are {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def to_bytes(self) -> bytes:
        """Return the 32-byte seed. Whoever has it is this identity."""
        return self._key.private_bytes_raw()

    def to_text(self) -> str:
        """Return the one-line form for a key file, without a line end."""
        return f"{_KEY_TEXT} {base64.urlsafe_b64encode(self.to_bytes()).decode('ascii')}"

    @classmethod
    def from_text(cls, text: str) -> "PrivateKey":
        """Read what `to_text` wrote, blanks around it allowed. Raises ValueError with the remedy."""
        remedy = (
            f'a key file is one line "{_KEY_TEXT} <44 characters>"; '
            "restore it from a backup, or delete it to get a new identity"
        )
        words = text.split()
        if len(words) != 2 or words[0] != _KEY_TEXT:
            raise ValueError(f"this is not a private key: {remedy}")
        try:
            key = cls.from_bytes(base64.b64decode(words[1], altchars=b"-_", validate=True))
        except ValueError:
            raise ValueError(f"this private key is damaged: {remedy}") from None
        if key.to_text().split() != words:
            raise ValueError(f"this private key is damaged: {remedy}")
        return key

    def sign(self, domain: str, data: bytes) -> bytes:
        """Sign data for one domain. 64 bytes."""
        return self._key.sign(_tag(domain) + data)

    def __repr__(self) -> str:
        return f"PrivateKey(public={self.public.hex()})"


@lru_cache(maxsize=8192)
def _key_problem(public: bytes) -> str:
    """Say why these bytes are no public key, or nothing when they are one."""
    if len(public) != KEY_BYTES:
        return f"a public key has {KEY_BYTES} bytes, this one {len(public)}"
    y = int.from_bytes(public, "little") & (2**255 - 1)
    if y >= _P:
        return "the public key is not in canonical form"
    if y in _SMALL_ORDER_Y:
        return "the public key is a point of small order, for which anybody can sign"
    x_squared = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    if pow(x_squared, (_P - 1) // 2, _P) != 1:
        return "the public key is not a point of the curve"
    return ""


def check_key(public: bytes) -> None:
    """Raise ProtocolError BAD_KEY unless these bytes are a public key that SPEC 1 admits."""
    problem = _key_problem(public)
    if problem:
        raise ProtocolError(Code.BAD_KEY, problem)


def verify(public: bytes, domain: str, data: bytes, signature: bytes) -> None:
    """Check a signature by the exact rule of SPEC 1; raise ProtocolError BAD_KEY or BAD_SIGNATURE.

    OpenSSL checks S < L, ignores the cofactor and compares R byte for byte, but takes keys that are not canonical
    or of small order, so those are refused here. S < L is checked here too, lest a build of it be more lenient.
    """
    check_key(public)
    if len(signature) != SIGNATURE_BYTES:
        raise ProtocolError(Code.BAD_SIGNATURE, f"a signature has {SIGNATURE_BYTES} bytes, this one {len(signature)}")
    if int.from_bytes(signature[32:], "little") >= _ORDER:
        raise ProtocolError(Code.BAD_SIGNATURE, "the signature's S is not below the group order")
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _tag(domain) + data)
    except InvalidSignature:
        raise ProtocolError(Code.BAD_SIGNATURE, f"the signature does not fit this {domain} and key") from None


def leaf_hash(data: Buffer) -> bytes:
    """The Merkle hash of one leaf's data. 32 bytes."""
    state = hashlib.sha256(b"\0")
    state.update(data)
    return state.digest()


def merkle_root_of_hashes(hashes: Sequence[bytes]) -> bytes:
    """The Merkle root (RFC 6962 shape) over leaf hashes of 32 bytes each; at least one."""
    assert hashes, "a Merkle tree has at least one leaf"
    return _subtree(hashes, 0, len(hashes))


def _subtree(hashes: Sequence[bytes], start: int, stop: int) -> bytes:
    if stop - start == 1:
        return hashes[start]
    split = start + (1 << ((stop - start - 1).bit_length() - 1))
    return hashlib.sha256(b"\1" + _subtree(hashes, start, split) + _subtree(hashes, split, stop)).digest()


def merkle_root(leaves: Sequence[Buffer]) -> bytes:
    """The Merkle root over the data of the leaves; at least one."""
    return merkle_root_of_hashes([leaf_hash(leaf) for leaf in leaves])

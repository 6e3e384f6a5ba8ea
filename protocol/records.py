"""Signed, expiring records in the DHT, by which participants find each other (SPEC 10)."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from protocol.errors import Code, ProtocolError
from protocol.identity import SIGNATURE_BYTES, PrivateKey, verify
from protocol.invite import check_address, pack_texts, unpack_texts
from protocol.limits import DHT_TTL_S_MAX, DHT_TTL_S_MIN, DHT_VALUE_BYTES_MAX, VERSION

_MAGIC = b"SLDR"
_HEAD = struct.Struct("<4sHBQH")
_AD = struct.Struct("<32sI32s")
DHT_PAYLOAD_BYTES_MAX = DHT_VALUE_BYTES_MAX - _HEAD.size - SIGNATURE_BYTES


class DhtKind(IntEnum):
    """Who a record is about."""

    AGGREGATOR = 1
    PEER = 2


@dataclass(frozen=True)
class DhtRecord:
    """A record whose signature, key and expiry have been checked. expires_s is Unix seconds."""

    kind: DhtKind
    expires_s: int
    payload: bytes


@dataclass(frozen=True)
class Ad:
    """What a record says: where its signer can be dialled ("host:port", possibly nowhere) and what it has.

    certificate_sha256 is 32 zero bytes when the signer does not serve over TLS."""

    addresses: tuple[str, ...]
    certificate_sha256: bytes
    head_round: int
    head_digest: bytes

    def to_payload(self) -> bytes:
        """The payload of SPEC 10. Raises ValueError on a bad address or when it is too long for a record."""
        for address in self.addresses:
            check_address(address)
        assert len(self.certificate_sha256) == len(self.head_digest) == 32, "both are hashes"
        payload = _AD.pack(self.certificate_sha256, self.head_round, self.head_digest) + pack_texts(self.addresses)
        if len(payload) > DHT_PAYLOAD_BYTES_MAX:
            raise ValueError(f"{len(self.addresses)} addresses do not fit into a DHT record; announce fewer")
        return payload

    @classmethod
    def from_payload(cls, payload: bytes) -> "Ad":
        """Read a payload. Raises ProtocolError BAD_DHT_RECORD."""
        try:
            certificate, head_round, head_digest = _AD.unpack_from(payload)
            addresses, rest = unpack_texts(payload[_AD.size :])
            for address in addresses:
                check_address(address)
        except (struct.error, ValueError) as error:
            raise ProtocolError(Code.BAD_DHT_RECORD, f"the record's payload is damaged: {error}") from None
        if rest:
            raise ProtocolError(Code.BAD_DHT_RECORD, "the record's payload goes on after its end")
        return cls(addresses, certificate, head_round, head_digest)


def aggregators_key(run_id: bytes) -> bytes:
    """The DHT key under which the aggregators of a run are found."""
    return b"slp/" + run_id.hex().encode("ascii") + b"/aggregators"


def peers_key(run_id: bytes) -> bytes:
    """The DHT key under which the peers of a run are found."""
    return b"slp/" + run_id.hex().encode("ascii") + b"/peers"


def make_dht_record(key: PrivateKey, dht_key: bytes, kind: DhtKind, payload: bytes, expires_s: int) -> bytes:
    """Sign a value for `dht_key` and the subkey that is our public key. expires_s is Unix seconds."""
    assert len(payload) <= DHT_PAYLOAD_BYTES_MAX, "the payload fits into a record"
    assert _KIND_OF_KEY[dht_key.rpartition(b"/")[2]] == kind, "the kind fits the key"
    unsigned = _HEAD.pack(_MAGIC, VERSION, kind, expires_s, len(payload)) + payload
    return unsigned + key.sign("dht", _signed(dht_key, key.public, unsigned))


def check_dht_record(dht_key: bytes, subkey: bytes, value: bytes, expiration_s: float, now_s: float) -> DhtRecord:
    """Check a value that somebody wants stored now under these keys with this DHT expiration (both Unix seconds).

    Raises ProtocolError BAD_DHT_KEY, BAD_DHT_RECORD, VERSION, BAD_EXPIRY, BAD_KEY or BAD_SIGNATURE.
    """
    kind_of_key = _kind_of(dht_key)
    if not _HEAD.size + SIGNATURE_BYTES <= len(value) <= DHT_VALUE_BYTES_MAX:
        raise ProtocolError(Code.BAD_DHT_RECORD, f"a record of {len(value)} bytes is too short or too long")
    magic, version, kind, expires_s, length = _HEAD.unpack_from(value)
    if magic != _MAGIC or len(value) != _HEAD.size + length + SIGNATURE_BYTES:
        raise ProtocolError(Code.BAD_DHT_RECORD, "these bytes are not a record")
    if version != VERSION:
        raise ProtocolError(Code.VERSION, f"the record has version {version}, this program reads {VERSION}")
    if kind != kind_of_key:
        raise ProtocolError(Code.BAD_DHT_RECORD, f"a record of kind {kind} does not belong under this key")
    if expiration_s != expires_s or not DHT_TTL_S_MIN <= expires_s - now_s <= DHT_TTL_S_MAX:
        raise ProtocolError(
            Code.BAD_EXPIRY, f"a record expires between {DHT_TTL_S_MIN} and {DHT_TTL_S_MAX} s after it is stored"
        )
    verify(subkey, "dht", _signed(dht_key, subkey, value[:-SIGNATURE_BYTES]), value[-SIGNATURE_BYTES:])
    return DhtRecord(kind_of_key, expires_s, value[_HEAD.size : -SIGNATURE_BYTES])


_KIND_OF_KEY = {b"aggregators": DhtKind.AGGREGATOR, b"peers": DhtKind.PEER}


def _kind_of(dht_key: bytes) -> DhtKind:
    parts = dht_key.split(b"/")
    hexadecimal = len(parts) == 3 and len(parts[1]) == 64 and not parts[1].strip(b"0123456789abcdef")
    if not hexadecimal or parts[0] != b"slp" or parts[2] not in _KIND_OF_KEY:
        raise ProtocolError(Code.BAD_DHT_KEY, "this is no DHT key of a run")
    return _KIND_OF_KEY[parts[2]]


def _signed(dht_key: bytes, subkey: bytes, unsigned: bytes) -> bytes:
    return dht_key + b"\0" + subkey + unsigned


def payload_of(value: bytes) -> bytes:
    """The payload of a record that `check_dht_record` has admitted, also when it is about to expire."""
    return value[_HEAD.size : -SIGNATURE_BYTES]

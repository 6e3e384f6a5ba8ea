import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.limits import DHT_VALUE_BYTES_MAX
from protocol.records import (
    DHT_PAYLOAD_BYTES_MAX,
    Ad,
    DhtKind,
    aggregators_key,
    check_dht_record,
    make_dht_record,
    peers_key,
)
from tests.protocol.codec_samples import refused

KEY = PrivateKey.from_bytes(bytes(range(32)))
RUN_ID = bytes(range(32))
NOW = 1_800_000_000
DHT_KEY = peers_key(RUN_ID)
VALUE = make_dht_record(KEY, DHT_KEY, DhtKind.PEER, b"payload", NOW + 600)


def forged(
    *, magic: bytes = b"SLDR", version: int = 1, kind: int = 2, length: int = 7, payload: bytes = b"payload"
) -> bytes:
    unsigned = struct.pack("<4sHBQH", magic, version, kind, NOW + 600, length) + payload
    return unsigned + KEY.sign("dht", DHT_KEY + b"\0" + KEY.public + unsigned)


def test_a_record_has_the_bytes_of_the_specification() -> None:
    assert b"slp/" + RUN_ID.hex().encode() + b"/peers" == DHT_KEY
    assert aggregators_key(RUN_ID) == b"slp/" + RUN_ID.hex().encode() + b"/aggregators"
    assert forged() == VALUE


def test_a_record_is_believed_under_its_own_key_and_signer() -> None:
    record = check_dht_record(DHT_KEY, KEY.public, VALUE, NOW + 600, NOW)
    assert (record.kind, record.expires_s, record.payload) == (DhtKind.PEER, NOW + 600, b"payload")
    with refused(Code.BAD_SIGNATURE):
        check_dht_record(DHT_KEY, PrivateKey.generate().public, VALUE, NOW + 600, NOW)
    with refused(Code.BAD_SIGNATURE):
        check_dht_record(peers_key(bytes(32)), KEY.public, VALUE, NOW + 600, NOW)
    with refused(Code.BAD_DHT_RECORD):
        check_dht_record(aggregators_key(RUN_ID), KEY.public, VALUE, NOW + 600, NOW)
    with refused(Code.BAD_KEY):
        check_dht_record(DHT_KEY, bytes(32), VALUE, NOW + 600, NOW)


@pytest.mark.parametrize(
    "dht_key",
    [
        b"",
        b"slp",
        DHT_KEY + b"/x",
        DHT_KEY[1:],
        DHT_KEY.replace(b"peers", b"bootstraps"),
        b"slp/" + RUN_ID.hex().upper().encode() + b"/peers",
        b"slp/" + RUN_ID.hex().encode()[1:] + b"/peers",
    ],
)
def test_no_other_key_is_a_key(dht_key: bytes) -> None:
    with refused(Code.BAD_DHT_KEY):
        check_dht_record(dht_key, KEY.public, VALUE, NOW + 600, NOW)


@pytest.mark.parametrize(("ttl_s", "good"), [(29, False), (30, True), (1800, True), (1801, False), (-1, False)])
def test_a_record_expires_within_the_band(ttl_s: int, good: bool) -> None:
    value = make_dht_record(KEY, DHT_KEY, DhtKind.PEER, b"", NOW + ttl_s)
    if good:
        assert check_dht_record(DHT_KEY, KEY.public, value, NOW + ttl_s, NOW).payload == b""
    else:
        with refused(Code.BAD_EXPIRY):
            check_dht_record(DHT_KEY, KEY.public, value, NOW + ttl_s, NOW)


@pytest.mark.parametrize("expiration_s", [NOW + 599, NOW + 601, NOW + 600.5, float("nan"), float("inf")])
def test_the_expiration_is_the_signed_one(expiration_s: float) -> None:
    with refused(Code.BAD_EXPIRY):
        check_dht_record(DHT_KEY, KEY.public, VALUE, expiration_s, NOW)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"", Code.BAD_DHT_RECORD),
        (VALUE[:-1], Code.BAD_DHT_RECORD),
        (VALUE + b"\0", Code.BAD_DHT_RECORD),
        (forged(magic=b"SLRR"), Code.BAD_DHT_RECORD),
        (forged(version=2), Code.VERSION),
        (forged(kind=1), Code.BAD_DHT_RECORD),
        (forged(kind=3), Code.BAD_DHT_RECORD),
        (forged(length=8), Code.BAD_DHT_RECORD),
        (forged(length=944, payload=bytes(944)), Code.BAD_DHT_RECORD),
        (VALUE[:-1] + bytes([VALUE[-1] ^ 1]), Code.BAD_SIGNATURE),
    ],
)
def test_a_record_of_wrong_form_is_refused(value: bytes, code: Code) -> None:
    with refused(code):
        check_dht_record(DHT_KEY, KEY.public, value, NOW + 600, NOW)


def test_the_largest_record_fits() -> None:
    value = make_dht_record(KEY, DHT_KEY, DhtKind.PEER, bytes(DHT_PAYLOAD_BYTES_MAX), NOW + 600)
    assert len(value) == DHT_VALUE_BYTES_MAX
    check_dht_record(DHT_KEY, KEY.public, value, NOW + 600, NOW)


def test_an_ad_travels() -> None:
    ad = Ad(("swarm.example.org:7700", "[::1]:7"), bytes([1]) * 32, 17, bytes([2]) * 32)
    payload = ad.to_payload()
    assert (
        payload == bytes([1]) * 32 + struct.pack("<I", 17) + bytes([2]) * 32 + b"\2\x16swarm.example.org:7700\7[::1]:7"
    )
    assert Ad.from_payload(payload) == ad
    nowhere = Ad((), bytes(32), 0, bytes(32))
    assert Ad.from_payload(nowhere.to_payload()) == nowhere
    with pytest.raises(ValueError, match="announce fewer"):
        Ad(tuple(f"{'a' * 100}:{i}" for i in range(1, 10)), bytes(32), 0, bytes(32)).to_payload()
    with pytest.raises(ValueError, match="host:port"):
        Ad(("nowhere",), bytes(32), 0, bytes(32)).to_payload()


@pytest.mark.parametrize("tail", [b"", b"\1", b"\1\3a:", b"\1\4host", b"\1\3\xff:1", b"\0\0"])
def test_a_damaged_ad_is_refused(tail: bytes) -> None:
    with refused(Code.BAD_DHT_RECORD):
        Ad.from_payload(bytes(68) + tail)
    with refused(Code.BAD_DHT_RECORD):
        Ad.from_payload(bytes(67))


@given(st.binary(max_size=300))
@settings(derandomize=True, max_examples=200)
def test_no_bytes_do_more_than_raise(data: bytes) -> None:
    for read in (Ad.from_payload, lambda value: check_dht_record(DHT_KEY, KEY.public, value, NOW + 600, NOW)):
        try:
            read(data)
        except ProtocolError:
            continue

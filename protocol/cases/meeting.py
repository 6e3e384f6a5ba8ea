"""How peers find and greet each other: DHT records, invites, the signatures of joining (SPEC 9, 10, 13)."""

import base64
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from protocol.cases.vector import AGGREGATOR, PEER, STRANGER, Fields, Row, Vector, noise, table
from protocol.errors import Code
from protocol.identity import PrivateKey, digest

RUN_ID = noise("run", 32)
CERTIFICATE, HEAD = noise("certificate", 32), noise("head", 32)
ADDRESSES = ("198.51.100.7:4242", "[2001:db8::1]:1", "host.example.org:65535")
BOOTSTRAP = "/dns4/boot.example.org/tcp/4100/p2p/12D3KooWExample"
AGGREGATORS = f"slp/{RUN_ID.hex()}/aggregators"
PEERS = f"slp/{RUN_ID.hex()}/peers"
NOW = 1_700_000_000
EXPIRES = NOW + 600


def texts(items: Sequence[str | bytes]) -> bytes:
    """Count, then length and bytes of each."""
    data = [item.encode("ascii") if isinstance(item, str) else item for item in items]
    return bytes([len(data)]) + b"".join(bytes([len(item)]) + item for item in data)


def payload(addresses: Sequence[str | bytes] = ADDRESSES) -> bytes:
    """What a DHT record says."""
    return CERTIFICATE + struct.pack("<I", 3) + HEAD + texts(addresses)


def value(
    said: bytes,
    *,
    key: str = AGGREGATORS,
    kind: int = 1,
    expires: int = EXPIRES,
    version: int = 1,
    length: int | None = None,
    signer: PrivateKey = AGGREGATOR,
) -> bytes:
    """A DHT record of any content, signed as it stands."""
    size = len(said) if length is None else length
    unsigned = b"SLDR" + struct.pack("<HBQH", version, kind, expires, size) + said
    return unsigned + signer.sign("dht", key.encode("ascii") + b"\0" + signer.public + unsigned)


def stored(data: bytes, **changes: Any) -> Fields:
    """The fields of a request."""
    fields: Fields = {
        "key": AGGREGATORS,
        "subkey": AGGREGATOR.public,
        "expiration": EXPIRES,
        "now": NOW,
        "bytes": data,
    }
    return {**fields, **changes}


def good_dht_rows() -> Iterator[Row]:
    """DHT records in order."""
    data = value(payload())
    yield "aggregator", "An aggregator that can be dialled in three ways.", stored(data), None
    peer = value(payload(()), key=PEERS, kind=2, signer=PEER)
    fields = stored(peer, key=PEERS, subkey=PEER.public)
    yield "peer", "A peer that only dials out has no address.", fields, None
    yield "earliest", "It may expire after 30 s.", stored(data, now=EXPIRES - 30), None
    yield "latest", "It may expire after 1,800 s.", stored(data, now=EXPIRES - 1800), None
    full = value(payload(["a" * 249 + ":65535"] * 3 + ["b" * 103 + ":4"]))
    assert len(full) == 1024, len(full)
    yield "1024-bytes", "A value has at most 1 KiB.", stored(full), None


def bad_dht_rows() -> Iterator[Row]:
    """DHT records that a store refuses."""
    data, run = value(payload()), RUN_ID.hex()
    keys = {
        "other-word": f"slp/{run}/people",
        "capitals": f"slp/{run.upper()}/aggregators",
        "short": f"slp/{run[:-1]}/aggregators",
        "prefix": f"slq/{run}/aggregators",
        "slash": f"slp/{run}/aggregators/",
        "no-slash": f"slp{run}aggregators",
        "empty": "",
    }
    for name, key in keys.items():
        yield f"key-{name}", "No key of a run.", stored(value(payload(), key=key), key=key), Code.BAD_DHT_KEY
    damaged: dict[str, tuple[str, bytes]] = {
        "empty": ("No bytes.", b""),
        "short": ("Too short for head and signature.", data[:80]),
        "1025-bytes": ("A value has at most 1 KiB.", value(payload(["a" * 249 + ":65535"] * 3 + ["b" * 104 + ":4"]))),
        "magic": ("It begins with SLDR.", b"SLDS" + data[4:]),
        "length-less": ("The payload is longer than declared.", value(payload(), length=len(payload()) - 1)),
        "length-more": ("The payload is shorter than declared.", value(payload(), length=len(payload()) + 1)),
        "length-hostile": ("A declared length is believed of nobody.", value(payload(), length=65535)),
        "kind-of-peers": ("A peer's record does not belong under aggregators.", value(payload(), kind=2)),
        "kind-0": ("No kind 0.", value(payload(), kind=0)),
        "payload-short": ("The payload ends in its digest.", value(payload()[:60])),
        "payload-without-count": ("The payload ends before its addresses.", value(payload()[:68])),
        "payload-address-cut": ("The last address ends early.", value(payload()[:-1])),
        "payload-trailing": ("A byte follows the addresses.", value(payload() + b"\0")),
        "payload-count": ("It claims more addresses than it has.", value(payload()[:68] + b"\xff" + payload()[69:])),
        "address-no-port": ("An address has a port.", value(payload(["host"]))),
        "address-port-0": ("Port 0 is none.", value(payload(["host:0"]))),
        "address-port-65536": ("A port has 16 bits.", value(payload(["host:65536"]))),
        "address-port-zeros": ("A port has no leading zeros.", value(payload(["host:080"]))),
        "address-empty": ("An address has characters.", value(payload([""]))),
        "address-blank": ("An address has no blanks.", value(payload(["host :1"]))),
        "address-line-end": ("An address has no line end.", value(payload(["host:1\n"]))),
        "address-not-ascii": ("An address is ASCII.", value(payload([b"h\xf6st:1"]))),
        "address-bare-ipv6": ("An IPv6 address stands in brackets.", value(payload(["2001:db8::1:80"]))),
    }
    for name, (why, each) in damaged.items():
        yield name, why, stored(each), Code.BAD_DHT_RECORD
    yield "version", "Version 2 is not this one.", stored(value(payload(), version=2)), Code.VERSION
    expiries = {
        "29-s": ("It expires after 30 s at the earliest.", {"now": EXPIRES - 29}),
        "1801-s": ("It expires after 1,800 s at the latest.", {"now": EXPIRES - 1801}),
        "past": ("It has expired.", {"now": EXPIRES + 1}),
        "other": ("The DHT's expiration is not the record's.", {"expiration": EXPIRES + 1}),
    }
    for name, (why, changes) in expiries.items():
        yield f"expiry-{name}", why, stored(data, **changes), Code.BAD_EXPIRY
    forever = value(payload(), expires=2**64 - 1)
    yield "expiry-largest", "Far beyond the band.", stored(forever), Code.BAD_EXPIRY


def signed_dht_rows() -> Iterator[Row]:
    """Whose record it is, and the order of the rules."""
    data = value(payload())
    yield "subkey-short", "The subkey is a key.", stored(data, subkey=AGGREGATOR.public[:31]), Code.BAD_KEY
    yield "subkey-small-order", "The subkey is a usable key.", stored(data, subkey=bytes(32)), Code.BAD_KEY
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    bad: dict[str, tuple[str, Fields]] = {
        "signature": ("One bit of the signature differs.", stored(flipped)),
        "other-subkey": ("Under the subkey of its signer alone.", stored(data, subkey=STRANGER.public)),
        "other-run": ("Under its own key alone.", stored(data, key=f"slp/{'0' * 64}/aggregators")),
        "payload-changed": ("The signature covers the payload.", stored(data[:20] + b"\0" + data[21:])),
    }
    for name, (why, fields) in bad.items():
        yield name, why, fields, Code.BAD_SIGNATURE
    key = stored(b"", key="slp/x/peers")
    yield "key-first", "The key is checked before the value.", key, Code.BAD_DHT_KEY
    both = stored(value(payload(), version=2, kind=2))
    yield "version-before-kind", "Another version's kinds are unknown.", both, Code.VERSION
    late = stored(flipped, now=EXPIRES)
    yield "expiry-before-signature", "Cheap checks come first.", late, Code.BAD_EXPIRY


def make_dht_rows() -> Iterator[Row]:
    """DHT records as their signers make them."""
    said = {"certificate": CERTIFICATE, "round": 3, "digest": HEAD}
    aggregator = {"key": AGGREGATORS, "seed": AGGREGATOR.to_bytes(), "expires": EXPIRES, "addresses": ADDRESSES}
    yield "aggregator", "What an aggregator stores.", {**aggregator, **said}, None
    peer = {"key": PEERS, "seed": PEER.to_bytes(), "expires": EXPIRES, "addresses": []}
    yield "peer", "What a peer stores.", {**peer, **said, "certificate": bytes(32)}, None


def invite(body: bytes, checksum: bytes | None = None) -> str:
    """An invite of any content."""
    data = body + (digest("invite", body)[:4] if checksum is None else checksum)
    return "slp1" + base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def body(addresses: Sequence[str | bytes] = ADDRESSES, bootstraps: Sequence[str] = (BOOTSTRAP,)) -> bytes:
    """What an invite says, before its checksum."""
    return RUN_ID + AGGREGATOR.public + CERTIFICATE + texts(addresses) + texts(bootstraps)


def good_invite_rows() -> Iterator[Row]:
    """Invites in order."""
    text = invite(body())
    yield "usual", "Three addresses and a bootstrap.", {"text": text}, None
    yield "address-only", "An address is enough.", {"text": invite(body(ADDRESSES[:1], ()))}, None
    yield "bootstrap-only", "A bootstrap is enough.", {"text": invite(body(()))}, None
    longest = invite(body(["a" * 249 + ":65535"] * 5, ["/dns4/" + "b" * 132 + "/tcp/1/p2p/Q"]))
    assert len(longest) == 2048, len(longest)
    yield "2048-characters", "At most 2048 characters.", {"text": longest}, None
    folded = f"  {text[:60]}\r\n\t{text[60:120]} {text[120:]}\n"
    yield "folded", "Blanks and line breaks are taken out first.", {"text": folded}, None


def bad_invite_rows() -> Iterator[Row]:
    """Damaged invites; there is one code for all of them."""
    text = invite(body())
    other = "A" if text[50] != "A" else "B"
    standard = "slp1" + base64.b64encode(body() + digest("invite", body())[:4]).decode("ascii")
    assert "+" in standard or "/" in standard, "the alphabets differ"
    damaged: dict[str, tuple[str, str]] = {
        "empty": ("No characters.", ""),
        "prefix-alone": ("The prefix and nothing else.", "slp1"),
        "version-2": ("Another version.", "slp2" + text[4:]),
        "capitals": ("The prefix is lower case.", "SLP1" + text[4:]),
        "character": ("One character differs.", text[:50] + other + text[51:]),
        "cut": ("The end is missing.", text[:-5]),
        "cut-one": ("The last character is missing.", text[:-1]),
        "twice": ("Pasted twice.", text + text),
        "padded": ("There is no padding.", invite(body(bootstraps=[BOOTSTRAP + "x"])) + "="),
        "standard-alphabet": ("Base64url, not base64.", standard.rstrip("=")),
        "foreign-character": ("A character outside the alphabet.", text[:50] + "!" + text[51:]),
        "not-ascii": ("A character that looks like one of the alphabet.", text[:50] + "\u0430" + text[51:]),
        "checksum": ("The checksum is wrong.", invite(body(), bytes(4))),
        "nowhere": ("It names no place.", invite(body((), ()))),
        "trailing": ("A byte follows the bootstraps.", invite(body() + b"\0")),
        "without-bootstraps": ("The count of bootstraps is missing.", invite(body()[: -1 - 1 - len(BOOTSTRAP)])),
        "count": ("It claims more addresses than it has.", invite(body()[:96] + b"\xff" + body()[97:])),
        "short": ("It ends in the fingerprint.", invite(body()[:90])),
        "key": ("The aggregator's key is of small order.", invite(RUN_ID + bytes(32) + body()[64:])),
        "address": ("An address without a port.", invite(body(["host"]))),
        "address-host": ("A host does not begin with a hyphen.", invite(body(["-host:1"]))),
        "address-port": ("A port is at most 65535.", invite(body(["host:70000"]))),
        "address-not-ascii": ("An address is ASCII.", invite(body([b"h\xf6st:1"]))),
        "bootstrap": ("A bootstrap ends in /p2p/NAME.", invite(body(bootstraps=["/ip4/1.2.3.4/tcp/4"]))),
        "bootstrap-relative": ("A bootstrap begins with a slash.", invite(body(bootstraps=["ip4/1.2.3.4/p2p/Q"]))),
        "4097-characters": ("At most 4096 characters, blanks included.", text + " " * (4097 - len(text))),
        "2049-characters": ("At most 2048 characters.", invite(body(["a" * 249 + ":65535"] * 6))),
    }
    for name, (why, each) in damaged.items():
        yield name, why, {"text": each}, Code.BAD_INVITE
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    loose = invite(body(bootstraps=[BOOTSTRAP + "x"]))
    assert len(loose) % 4, "the last character has bits to spare"
    changed = loose[:-1] + last[last.index(loose[-1]) + 1]
    yield "loose-bits", "The bits after the last byte are zero.", {"text": changed}, Code.BAD_INVITE


def make_invite_rows() -> Iterator[Row]:
    """Invites as an operator makes them."""
    fields = {"run_id": RUN_ID, "aggregator": AGGREGATOR.public, "certificate": CERTIFICATE}
    yield (
        "usual",
        "Three addresses and a bootstrap.",
        {**fields, "addresses": ADDRESSES, "bootstraps": [BOOTSTRAP]},
        None,
    )
    yield (
        "plaintext",
        "Without TLS the fingerprint is zero.",
        {**fields, "certificate": bytes(32), "addresses": ["127.0.0.1:4242"], "bootstraps": []},
        None,
    )


def join_fields() -> dict[str, Any]:
    """What both sides of a join know."""
    nonces = {"client_nonce": noise("client", 32), "server_nonce": noise("server", 32)}
    return {"run_id": RUN_ID, **nonces, "certificate": CERTIFICATE, "aggregator": AGGREGATOR.public}


def transcript(fields: Fields, peer: bytes) -> bytes:
    """T of SPEC 9."""
    joined: bytes = fields["run_id"] + peer + fields["client_nonce"] + fields["server_nonce"] + fields["certificate"]
    return joined


def challenge_rows() -> Iterator[Row]:
    """The aggregator's signature, which proves to whom the connection leads."""
    fields = {**join_fields(), "peer": PEER.public}
    signed = transcript(fields, PEER.public)
    signature = AGGREGATOR.sign("join-aggregator", signed)
    yield "usual", "The aggregator signs the connection.", {**fields, "bytes": signature}, None
    plain = {**fields, "certificate": bytes(32)}
    data = AGGREGATOR.sign("join-aggregator", transcript(plain, PEER.public))
    yield "plaintext", "In plaintext the fingerprint is zero.", {**plain, "bytes": data}, None
    wrong: dict[str, tuple[str, Fields]] = {
        "certificate": ("Somebody in between has another certificate.", {"certificate": bytes(32)}),
        "nonce": ("A signature from an earlier connection.", {"client_nonce": bytes(32)}),
        "peer": ("A signature for another peer.", {"peer": STRANGER.public}),
        "run": ("A signature for another run.", {"run_id": bytes(32)}),
        "domain": ("A signature of the other side's domain.", {"bytes": AGGREGATOR.sign("join-peer", signed)}),
        "signer": ("Somebody else's signature.", {"bytes": STRANGER.sign("join-aggregator", signed)}),
        "short": ("A signature has 64 bytes.", {"bytes": signature[:-1]}),
    }
    for name, (why, changes) in wrong.items():
        yield name, why, {**fields, "bytes": signature, **changes}, Code.BAD_SIGNATURE


def proof_rows() -> Iterator[Row]:
    """The peer's answer."""
    yield (
        "usual",
        "The peer signs the connection and whom it takes it to lead to.",
        {**join_fields(), "seed": PEER.to_bytes()},
        None,
    )


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("dht", "check dht", good_dht_rows())
    yield from table("dht-refused", "check dht", bad_dht_rows())
    yield from table("dht-signer", "check dht", signed_dht_rows())
    yield from table("make-dht", "make dht", make_dht_rows())
    yield from table("invite", "check invite", good_invite_rows())
    yield from table("invite-refused", "check invite", bad_invite_rows())
    yield from table("make-invite", "make invite", make_invite_rows())
    yield from table("challenge", "check challenge", challenge_rows())
    yield from table("proof", "make proof", proof_rows())

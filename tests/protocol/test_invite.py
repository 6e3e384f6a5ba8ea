import base64

import pytest

from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey, digest
from protocol.invite import Invite, pack_texts
from protocol.limits import INVITE_CHARS_MAX
from tests.protocol.codec_samples import refused

KEY = PrivateKey.from_bytes(bytes(range(32))).public
RUN_ID, CERTIFICATE = bytes([1]) * 32, bytes([2]) * 32
ADDRESSES = ("swarm.example.org:7700", "203.0.113.9:443", "[2001:db8::1]:7700")
BOOTSTRAPS = ("/dns4/swarm.example.org/tcp/7701/p2p/12D3KooWabc", "/ip6/2001:db8::1/tcp/7701/p2p/12D3KooWdef")
INVITE = Invite(RUN_ID, KEY, CERTIFICATE, ADDRESSES, BOOTSTRAPS)


def encode(body: bytes) -> str:
    data = body + digest("invite", body)[:4]
    return "slp1" + base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_an_invite_travels_as_one_word() -> None:
    text = INVITE.to_text()
    assert text == encode(RUN_ID + KEY + CERTIFICATE + pack_texts(ADDRESSES) + pack_texts(BOOTSTRAPS))
    assert text.isascii()
    assert len(text.split()) == 1
    assert Invite.from_text(text) == INVITE


def test_blanks_and_line_breaks_from_a_mail_are_no_harm() -> None:
    text = INVITE.to_text()
    assert Invite.from_text(f"  {text[:70]}\r\n> {text[70:]}\n".replace("> ", "")) == INVITE


def test_each_single_damaged_or_missing_character_is_noticed() -> None:
    text = INVITE.to_text()
    for i in range(len(text)):
        other = "B" if text[i] != "B" else "C"
        for damaged in (text[:i] + other + text[i + 1 :], text[:i] + text[i + 1 :], text[:i]):
            with pytest.raises(ProtocolError, match=r"SL203 bad-invite: .*(copy the whole line|update this program)"):
                Invite.from_text(damaged)


@pytest.mark.parametrize(
    "text", ["", "slp1", "hello", "slp1ä", "slp1====", INVITE.to_text() + "A", "slp1" + "A" * 5000]
)
def test_what_is_no_invite_is_refused(text: str) -> None:
    with refused(Code.BAD_INVITE):
        Invite.from_text(text)


def test_an_invite_of_another_version_says_to_update() -> None:
    with pytest.raises(ProtocolError, match="update this program"):
        Invite.from_text("slp2abc")


@pytest.mark.parametrize(
    "body",
    [
        RUN_ID + KEY + CERTIFICATE + pack_texts(ADDRESSES) + pack_texts(BOOTSTRAPS) + b"\0",
        RUN_ID + KEY + CERTIFICATE + pack_texts(ADDRESSES) + b"\1",
        RUN_ID + KEY + CERTIFICATE + pack_texts(ADDRESSES) + b"\1\5ab",
        RUN_ID + KEY + CERTIFICATE + pack_texts(ADDRESSES),
        RUN_ID + KEY + CERTIFICATE + pack_texts(()) + pack_texts(()),
        RUN_ID + bytes(32) + CERTIFICATE + pack_texts(ADDRESSES) + pack_texts(()),
        RUN_ID + KEY + CERTIFICATE + b"\1\3\xff:1" + pack_texts(()),
        RUN_ID + KEY + CERTIFICATE + pack_texts(("no-port",)) + pack_texts(()),
    ],
)
def test_a_wrong_body_is_refused_even_when_its_checksum_fits(body: bytes) -> None:
    with refused(Code.BAD_INVITE):
        Invite.from_text(encode(body))


def test_spare_bits_of_the_last_character_are_zero() -> None:
    invite = next(
        invite
        for length in range(3)
        if len((invite := Invite(RUN_ID, KEY, CERTIFICATE, ("a" * (length + 1) + ":1",), ())).to_text()) % 4 == 2
    )
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    text = invite.to_text()
    assert alphabet.index(text[-1]) & 1 == 0
    with refused(Code.BAD_INVITE):
        Invite.from_text(text[:-1] + alphabet[alphabet.index(text[-1]) + 1])


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:0", "host:65536", "host:01", ":1", "ho st:1", "2001:db8::1:77", "[::1]", "a" * 255 + ":1"],
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Invite(RUN_ID, KEY, CERTIFICATE, (address,), ())


@pytest.mark.parametrize(
    "bootstrap", ["", "host:1", "/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/", "/dns4/a b/p2p/x"]
)
def test_a_bootstrap_is_a_multiaddr_with_an_identity(bootstrap: str) -> None:
    with pytest.raises(ValueError, match="/p2p/NAME"):
        Invite(RUN_ID, KEY, CERTIFICATE, ADDRESSES, (bootstrap,))


def test_an_invite_is_never_too_long_to_be_read() -> None:
    with pytest.raises(ValueError, match="name fewer addresses"):
        Invite(RUN_ID, KEY, CERTIFICATE, tuple(f"{'a' * 200}.example:{i}" for i in range(1, 9)), ())
    long = Invite(RUN_ID, KEY, CERTIFICATE, tuple(f"{'a' * 200}.example:{i}" for i in range(1, 7)), ())
    assert len(long.to_text()) <= INVITE_CHARS_MAX
    assert Invite.from_text(long.to_text()) == long

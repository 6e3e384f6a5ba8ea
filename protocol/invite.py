"""The one line that a volunteer needs: which run, whom to trust, where to dial (SPEC "Invites and addresses")."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import Code, ProtocolError
from protocol.identity import check_key, digest
from protocol.limits import INVITE_CHARS_MAX

_PREFIX = "slp1"
_CHECKSUM_BYTES = 4
_AGAIN = "copy the whole line again, from slp1 to its last character, or ask the operator for a new invite"
_ADDRESS = re.compile(r"([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]):([1-9][0-9]{0,4})")
_MULTIADDR = re.compile(r"(/[A-Za-z0-9.:_-]+)+/p2p/[A-Za-z0-9]+")
ADDRESS_CHARS_MAX = 255


def check_address(text: str) -> None:
    """Raise ValueError unless this is "host:port" with a name, an IPv4 address or an IPv6 address in brackets."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[3]) > 65535 or len(text) > ADDRESS_CHARS_MAX:
        raise ValueError(f'{text[:80]!r} is not an address; write it as "host:port", an IPv6 host in brackets')


def pack_texts(texts: Sequence[str]) -> bytes:
    """Count u8, then length u8 and ASCII bytes of each."""
    data = bytearray([len(texts)])
    for text in texts:
        data.append(len(text))
        data += text.encode("ascii")
    return bytes(data)


def unpack_texts(data: bytes) -> tuple[tuple[str, ...], bytes]:
    """Read what `pack_texts` wrote, and return what follows it. Raises ValueError on damage."""
    if not data:
        raise ValueError("it is cut off")
    count, data = data[0], data[1:]
    texts = []
    for _ in range(count):
        if not data or len(data) < 1 + data[0]:
            raise ValueError("it is cut off")
        texts.append(data[1 : 1 + data[0]].decode("ascii"))
        data = data[1 + data[0] :]
    return tuple(texts), data


@dataclass(frozen=True)
class Invite:
    """What `join` starts from. Raises ValueError when a field is not what it should be.

    certificate_sha256 is 32 zero bytes for a plaintext aggregator on one machine.
    """

    run_id: bytes
    aggregator_key: bytes
    certificate_sha256: bytes
    addresses: tuple[str, ...]  # of the aggregator, "host:port"
    bootstraps: tuple[str, ...]  # of the directory, libp2p multiaddrs

    def __post_init__(self) -> None:
        if len(self.run_id) != 32 or len(self.certificate_sha256) != 32:
            raise ValueError("a run_id and a certificate fingerprint have 32 bytes each")
        try:
            check_key(self.aggregator_key)
        except ProtocolError as error:
            raise ValueError(error.detail) from None
        if not self.addresses and not self.bootstraps:
            raise ValueError("it names no place to dial")
        for address in self.addresses:
            check_address(address)
        for bootstrap in self.bootstraps:
            if not _MULTIADDR.fullmatch(bootstrap) or len(bootstrap) > ADDRESS_CHARS_MAX:
                raise ValueError(f'{bootstrap[:80]!r} is not a bootstrap; write it as "/dns4/HOST/tcp/PORT/p2p/NAME"')
        if len(self._encoded()) > INVITE_CHARS_MAX:
            raise ValueError(f"an invite has at most {INVITE_CHARS_MAX} characters; name fewer addresses")

    def _encoded(self) -> str:
        body = self.run_id + self.aggregator_key + self.certificate_sha256
        body += pack_texts(self.addresses) + pack_texts(self.bootstraps)
        body += digest("invite", body)[:_CHECKSUM_BYTES]
        return _PREFIX + base64.urlsafe_b64encode(body).decode("ascii").rstrip("=")

    def to_text(self) -> str:
        """The invite as one word."""
        return self._encoded()

    @classmethod
    def from_text(cls, text: str) -> "Invite":
        """Read an invite; blanks and line breaks from a mail are no harm. Raises ProtocolError BAD_INVITE."""
        if len(text) > 2 * INVITE_CHARS_MAX:
            raise ProtocolError(Code.BAD_INVITE, f"this is too long for an invite; {_AGAIN}")
        word = "".join(text.split())
        if not word.startswith(_PREFIX):
            other = re.match(r"slp[0-9]+", word)
            remedy = "update this program or ask for an invite of version 1" if other else _AGAIN
            raise ProtocolError(Code.BAD_INVITE, f"this is not an invite that starts with {_PREFIX}; {remedy}")
        try:
            invite = cls._decoded(word.removeprefix(_PREFIX))
        except ValueError as error:
            raise ProtocolError(Code.BAD_INVITE, f"the invite is damaged ({error}); {_AGAIN}") from None
        if invite.to_text() != word:
            raise ProtocolError(Code.BAD_INVITE, f"the invite is not written in its one form; {_AGAIN}")
        return invite

    @classmethod
    def _decoded(cls, encoded: str) -> "Invite":
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if len(body) < 98 or digest("invite", body)[:_CHECKSUM_BYTES] != checksum:
            raise ValueError("its checksum does not fit")
        addresses, rest = unpack_texts(body[96:])
        bootstraps, rest = unpack_texts(rest)
        if rest:
            raise ValueError("it goes on after its end")
        return cls(body[:32], body[32:64], body[64:96], addresses, bootstraps)

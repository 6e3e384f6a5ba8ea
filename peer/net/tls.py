"""Self-signed TLS certificates pinned by fingerprint: signatures, not authorities, say whose they are."""

import asyncio
import errno
import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from peer.net.errors import LinkError, LinkFailure

NAME = "sparseloco-peer"  # the name in every certificate; it identifies nobody, but gRPC insists on one
# Fixed dates, because a peer whose clock is wrong must still be able to join: the pin decides, not the calendar.
_VALID_FROM = datetime(2020, 1, 1, tzinfo=UTC)
_VALID_TO = datetime(2120, 1, 1, tzinfo=UTC)
_KEY_MARK = b"-----BEGIN PRIVATE KEY-----"


@dataclass(frozen=True)
class TlsIdentity:
    """A certificate and its private key, both PEM. `fingerprint` is the SHA-256 of the certificate's DER form."""

    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)

    @property
    def fingerprint(self) -> bytes:
        """By which peers pin the certificate. 32 bytes."""
        return fingerprint_of(ssl.PEM_cert_to_DER_cert(self.certificate_pem.decode("ascii")))

    def to_bytes(self) -> bytes:
        """One PEM file with both. It holds a secret: store it with mode 0600."""
        return self.certificate_pem + self.private_key_pem

    @classmethod
    def from_bytes(cls, data: bytes) -> "TlsIdentity":
        """Read what `to_bytes` gave. Raises ValueError with the remedy when the file is damaged."""
        remedy = "delete the file to get a new certificate; peers then need a new invite"
        at = data.find(_KEY_MARK)
        if at < 0:
            raise ValueError(f"this is not a TLS identity: {remedy}")
        try:
            certificate = x509.load_pem_x509_certificate(data[:at])
            key = serialization.load_pem_private_key(data[at:], password=None)
        except ValueError:
            raise ValueError(f"this TLS identity is damaged: {remedy}") from None
        if key.public_key() != certificate.public_key():
            raise ValueError(f"this TLS identity's key is not that of its certificate: {remedy}")
        return cls(data[:at], data[at:])


def make_tls_identity() -> TlsIdentity:
    """Make a new ECDSA P-256 key and a certificate for it, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_TO)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return TlsIdentity(certificate.public_bytes(serialization.Encoding.PEM), pem)


def fingerprint_of(certificate_der: bytes) -> bytes:
    """The SHA-256 by which a certificate is pinned. 32 bytes."""
    return hashlib.sha256(certificate_der).digest()


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port". Raises LinkError ADDRESS."""
    host, colon, port_text = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    good_port = port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 0 < int(port_text) < 65536
    if not colon or not host or not good_port or (":" in host and not bracketed):
        reason = f"{address!r} is not an address: write host:port, or [host]:port for IPv6"
        raise LinkError(LinkFailure.ADDRESS, reason, retryable=False)
    return host, int(port_text)


def is_loopback(host: str) -> bool:
    """Whether this host can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Endpoint:
    """What answered at an address: a gRPC target that names its IP, and its certificate when it speaks TLS."""

    target: str
    certificate_der: bytes | None


async def probe(address: str, *, plaintext: bool, timeout_s: float) -> Endpoint:
    """Connect once to learn who answers at `address`, and with which certificate. Raises LinkError with the reason."""
    host, port = split_address(address)
    if plaintext and not is_loopback(host):
        reason = f"plaintext is for this machine only, and {host} may be another one: use TLS"
        raise LinkError(LinkFailure.ADDRESS, reason, retryable=False)
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=None if plaintext else _any_certificate())
    except (OSError, ValueError) as error:  # TimeoutError and ssl.SSLError are kinds of OSError
        raise _connect_error(error, address, host, timeout_s) from None
    try:
        ip, ip_port = writer.get_extra_info("peername")[:2]
        family = "ipv6" if ":" in ip else "ipv4"
        target = f"{family}:[{ip}]:{ip_port}" if family == "ipv6" else f"{family}:{ip}:{ip_port}"
        if plaintext:
            return Endpoint(target, None)
        tls = writer.get_extra_info("ssl_object")
        return Endpoint(target, cast(bytes, tls.getpeercert(binary_form=True)))
    finally:
        writer.transport.abort()  # no farewell: a peer that does not answer it must not hold us


def _any_certificate() -> ssl.SSLContext:
    """TLS that accepts any certificate, since the point of the probe is to see which one it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _connect_error(error: Exception, address: str, host: str, timeout_s: float) -> LinkError:
    if isinstance(error, TimeoutError):
        reason = f"{address} did not answer within {timeout_s:g} s: it is down, or a firewall drops the packets"
        return LinkError(LinkFailure.TIMEOUT, reason, retryable=True)
    if isinstance(error, socket.gaierror | ValueError):
        return LinkError(LinkFailure.DNS, f"the name {host!r} does not resolve", retryable=True)
    if isinstance(error, ssl.SSLError):
        reason = f"something listens at {address} but it does not speak TLS: check the port"
        return LinkError(LinkFailure.NOT_OURS, reason, retryable=True)
    if isinstance(error, ConnectionRefusedError) or (isinstance(error, OSError) and "refused" in str(error).lower()):
        if is_loopback(host):
            reason = f"nothing listens at {address}, which is this machine itself"
            return LinkError(LinkFailure.HERE, reason, retryable=True)
        return LinkError(LinkFailure.REFUSED, f"nothing listens at {address}", retryable=True)
    if isinstance(error, ConnectionResetError):
        reason = f"{address} closed the connection at once: it is shutting down, or something else listens there"
        return LinkError(LinkFailure.CUT, reason, retryable=True)
    number = error.errno if isinstance(error, OSError) else None
    word = errno.errorcode.get(number, "") if number is not None else ""
    return LinkError(LinkFailure.UNREACHABLE, f"{address} cannot be reached: {word or error}", retryable=True)

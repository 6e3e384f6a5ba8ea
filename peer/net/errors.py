"""What can go wrong between two machines, and how a ProtocolError crosses a gRPC connection."""

from enum import StrEnum

import grpc
import grpc.aio

from protocol.errors import Code, ProtocolError

_CODE_KEY = "sl-code"
_DETAIL_CHARS_MAX = 400
# What grpc.aio puts in the place of the server's status when it learns of the end of a call by a write that fails.
_LOST_STATUS = "Internal error from Core"


class LinkFailure(StrEnum):
    """Why a link could not be made or was lost, one word for each remedy that people need."""

    ADDRESS = "address"  # not host:port, or plaintext to a machine that is not this one
    DNS = "dns"  # the name does not resolve
    REFUSED = "refused"  # the machine answers, nothing listens on the port
    HERE = "here"  # nothing listens on the port of this machine itself, which is what the address means
    UNREACHABLE = "unreachable"  # no route, or the network is down
    TIMEOUT = "timeout"  # no answer in time
    CERTIFICATE = "certificate"  # not the certificate that was promised
    NOT_OURS = "not-ours"  # something else listens there
    CUT = "cut"  # the connection broke, or the aggregator is shutting down
    SERVER = "server"  # the aggregator failed inside


class LinkError(Exception):
    """The link could not be made or was lost.

    `reason` is a sentence; `retryable` says whether the same call may succeed later.
    """

    def __init__(self, failure: LinkFailure, reason: str, *, retryable: bool, partial: bytes = b"") -> None:
        super().__init__(reason)
        self.failure = failure
        self.reason = reason
        self.retryable = retryable
        self.partial = partial  # what a broken fetch had received, to be passed on as `resume`


_STATUS = {
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.BAD_KEY: grpc.StatusCode.UNAUTHENTICATED,
    Code.BAD_SIGNATURE: grpc.StatusCode.UNAUTHENTICATED,
    Code.BAD_SESSION: grpc.StatusCode.UNAUTHENTICATED,
}


def status_of(error: ProtocolError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """The gRPC status, details and trailing metadata that carry this error to a peer."""
    status = _STATUS.get(error.code, grpc.StatusCode.INVALID_ARGUMENT)
    return status, clean(error.detail), ((_CODE_KEY, str(error.code.value)),)


def clean(text: str) -> str:
    """Foreign text made fit for a terminal and a log: printable, one line, short."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:_DETAIL_CHARS_MAX])
    return printable if len(text) <= _DETAIL_CHARS_MAX else printable + "..."


def from_rpc(error: grpc.aio.AioRpcError, address: str, partial: bytes = b"") -> LinkError | ProtocolError:
    """What a failed call means: the aggregator's verdict on our bytes (ProtocolError), or a link that failed."""
    detail = clean(error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key == _CODE_KEY:
            try:
                return ProtocolError(Code(int(value)), detail)
            except ValueError:
                break
    status = error.code()
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkError(LinkFailure.TIMEOUT, f"{address} did not answer in time", retryable=True, partial=partial)
    if status is grpc.StatusCode.INTERNAL and detail == _LOST_STATUS:
        reason = f"the aggregator at {address} ended the call in the middle: it is busy, or you joined it elsewhere"
        return LinkError(LinkFailure.CUT, reason, retryable=True, partial=partial)
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return LinkError(
            LinkFailure.CUT, f"the connection to {address} broke: {detail}", retryable=True, partial=partial
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        reason = f"{address} speaks gRPC but is no sparseloco-peer aggregator, or one of another version"
        return LinkError(LinkFailure.NOT_OURS, reason, retryable=False, partial=partial)
    reason = f"the aggregator at {address} failed: {status.name.lower()} {detail}"
    return LinkError(LinkFailure.SERVER, reason, retryable=True, partial=partial)

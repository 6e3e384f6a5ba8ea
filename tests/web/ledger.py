"""A ledger that tests write round by round, with verdicts and losses of their choice, while a dashboard shows it."""

import dataclasses
import time

from peer.evaluate import micronats
from protocol.identity import NO_DIGEST
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, sign_record
from protocol.limits import CLIP_ONE
from tests.peer.test_audit import Maker


def close_round(
    maker: Maker,
    round: int,
    *,
    entries: tuple[Entry, ...] = (),
    reason: CloseReason = CloseReason.DEADLINE,
    loss: float = 0.0,
    closed_ms: int | None = None,
    epoch: int = 0,
    amendment: bytes = NO_DIGEST,
) -> RoundRecord:
    """Close a round without making its packets: it is a null round unless an entry is accepted."""
    applied = any(entry.verdict == Verdict.ACCEPTED for entry in entries)
    now_ms = time.time_ns() // 1_000_000 if closed_ms is None else closed_ms
    record = RoundRecord(
        maker.run.run_id,
        round,
        epoch,
        maker.record.digest,
        Kind.APPLIED if applied else Kind.NULL,
        reason,
        maker.record.state_root,
        bytes([round % 255 + 1] * 32) if applied else bytes(32),
        now_ms - 2500,
        now_ms,
        tuple(sorted(entries, key=lambda entry: (entry.peer, entry.packet_digest))),
        amendment=amendment,
    )
    if loss:
        record = dataclasses.replace(record, evaluated_round=round - 1, loss_micronats=micronats(loss))
    maker.append(sign_record(record, maker.key))
    return maker.record


def entry(peer: int, round: int, verdict: Verdict = Verdict.ACCEPTED, code: int = 0) -> Entry:
    """What became of the packet of the peer with this number."""
    accepted = verdict == Verdict.ACCEPTED
    digest = bytes([peer, round % 256]) + bytes(30)
    return Entry(bytes([peer] * 32), digest, verdict, code, 640, 5, 1024 * accepted, CLIP_ONE * accepted)

"""What a peer can expect of a run before it joins: from measured speeds and the ledger, by arithmetic alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.layout import kept
from protocol.ledger import CloseReason, Kind, RoundRecord
from protocol.limits import CHUNK
from protocol.packet import PACKET_HEADER_BYTES
from protocol.run import RunConfig
from protocol.wire import packet_wire_bytes_max, update_wire_bytes_max

_HEAD_BITS = 16  # of a chunk: its scale and its ratio
_SUBMIT_TRIPS = 2  # the go-ahead, then the receipt
_FETCH_TRIPS = 1
_SAFE_SHARE = 0.9  # of a round's length that is planned with, as a peer does that came late


@dataclass(frozen=True)
class Traffic:
    """What travels in a round, in bytes: our packet up, and the update (or the round's packets) down."""

    packet_bytes: float
    down_bytes: float


@dataclass(frozen=True)
class Speeds:
    """What this machine does: seconds an inner step, bytes a second each way, seconds of a round trip."""

    step_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True)
class Forecast:
    """A usual round of this peer. All times are seconds; `inner_steps` of the run's are done in time, 0 is none."""

    inner_steps: int
    train_s: float
    up_s: float
    down_s: float
    open_s: float
    """How long a round takes packets."""
    round_s: float
    """From one round to the next, with this peer in the swarm."""
    accepted_per_hour: float


def expected_packet_bytes(run: RunConfig) -> float:
    """The size of a packet in transport form if the values kept lie anywhere in their chunks, each place as likely.

    What one value costs is then the entropy of its place and its code; zstd comes within a few percent of it.
    """
    bits = 0.0
    for tensor in run.layout.tensors:
        full, rest = divmod(tensor.size, CHUNK)
        for width, chunks in ((CHUNK, full), (rest, 1 if rest else 0)):
            if chunks:
                count = kept(width, run.compression.k)
                bits += chunks * (width * _entropy(count / width) + count * run.compression.code_bits + _HEAD_BITS)
    return min(PACKET_HEADER_BYTES + bits / 8, packet_wire_bytes_max(run))


def _entropy(share: float) -> float:
    """Bits of one place that is taken with this chance."""
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def expected_traffic(run: RunConfig, contributors: int, update_bytes: int, bundle_bytes: int) -> Traffic:
    """What travels in a round like the newest one, whose sizes are 0 where there is no such round or no such form."""
    packet_bytes = expected_packet_bytes(run)
    if not update_bytes:
        count = max(run.rounds.start_peers, run.rounds.quorum)
        return Traffic(packet_bytes, min(count * packet_bytes, update_wire_bytes_max(run)))
    if not bundle_bytes:
        return Traffic(packet_bytes, update_bytes)
    return Traffic(bundle_bytes / max(contributors, 1), min(bundle_bytes, update_bytes))


def forecast(
    run: RunConfig, inner_steps: int, speeds: Speeds, traffic: Traffic, records: Sequence[RoundRecord]
) -> Forecast:
    """A usual round of a peer that is asked for `inner_steps`, in a run whose last rounds were those of `records`."""
    up_s = traffic.packet_bytes / speeds.up_bytes_per_s + _SUBMIT_TRIPS * speeds.round_trip_s
    down_s = traffic.down_bytes / speeds.down_bytes_per_s + _FETCH_TRIPS * speeds.round_trip_s
    open_s = _open_s(run, records)

    def mine_s(steps: int) -> float:
        train_s, travel_s = steps * speeds.step_s, up_s + down_s
        return max(train_s, travel_s) if run.inner.overlap else train_s + travel_s

    steps = inner_steps
    if mine_s(steps) > open_s:
        travel_s = 0.0 if run.inner.overlap else up_s + down_s
        steps = min(inner_steps, max(0, math.floor((_SAFE_SHARE * open_s - travel_s) / speeds.step_s)))
        if mine_s(steps) > open_s:
            steps = 0
    lengths = [_length_s(record) for record in records if record.kind == Kind.APPLIED]
    round_s = max(mine_s(steps), statistics.median(lengths) if lengths else 0.0)
    return Forecast(steps, steps * speeds.step_s, up_s, down_s, open_s, round_s, 3600 / round_s if steps else 0.0)


def _open_s(run: RunConfig, records: Sequence[RoundRecord]) -> float:
    """How long a round will take our packet. One that closed complete would have waited for one more peer."""
    rules = run.rounds
    waits = [
        min(_length_s(record) + (rules.grace_s_max if record.reason == CloseReason.COMPLETE else 0.0), rules.deadline_s)
        for record in records
        if record.kind == Kind.APPLIED
    ]
    return statistics.median(waits) if waits else rules.deadline_s


def _length_s(record: RoundRecord) -> float:
    return (record.closed_ms - record.opened_ms) / 1000

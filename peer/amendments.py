"""A run's amendments as a program has them: traced back from what a record names, kept as blobs, and those to come.

Whoever loads a record fetches the amendments that it names before anything else, for they say by which settings the
rounds after it go. An aggregator also keeps those that no record names yet: they are durable before their sender hears
so, and come back after a crash.
"""

from collections.abc import Awaitable, Callable, Generator, Sequence
from itertools import pairwise

import structlog

from peer.store import BlobStore, RunFolder
from protocol.amendment import Amendment, Amendments, Ban, ChangeSettings, Pause, Resume, Rollback, Unban
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.ledger import RoundRecord
from protocol.limits import AMENDMENT_BYTES_MAX
from protocol.run import RunConfig

log = structlog.get_logger()

KIND = "amendment"  # of blobs, here and at others
NEWEST = "amendment"  # in the journal of an aggregator: the newest that came, whether a record names it yet or not

Fetch = Callable[[str, bytes, int], Awaitable[bytes]]  # kind, digest, the most bytes


def _trace(known: Amendments, head: bytes) -> Generator[bytes, bytes, Amendments]:
    """Follow the chain back from the amendment of this digest: yields the digest of each whose bytes are to be sent."""
    found: list[Amendment] = []
    heads = [NO_DIGEST, *(item.digest for item in known.chain)]
    while head not in heads:
        amendment = Amendment.from_bytes((yield head), known.run)
        if amendment.digest != head:
            raise ProtocolError(Code.WRONG_DIGEST, "the amendment is another than the one asked for")
        found.append(amendment)
        head = amendment.previous if amendment.number > 1 else NO_DIGEST
    chain = Amendments(known.run, known.chain[: heads.index(head)])
    for amendment in reversed(found):
        chain = chain.append(amendment)
    return chain


def stored_amendments(blobs: BlobStore, known: Amendments, head: bytes) -> Amendments:
    """The chain up to the amendment of this digest (zero: none), from `known` ones and the disk.

    Raises ProtocolError NOT_FOUND when one is not here, and whatever is wrong with one.
    """
    trace = _trace(known, head)
    try:
        wanted = next(trace)
        while True:
            data = blobs.get(KIND, wanted.hex())
            if data is None:
                raise ProtocolError(Code.NOT_FOUND, f"amendment {wanted.hex()[:16]} is not here")
            wanted = trace.send(data)
    except StopIteration as end:
        chain: Amendments = end.value
        return chain


async def fetched_amendments(known: Amendments, head: bytes, fetch: Fetch, blobs: BlobStore | None) -> Amendments:
    """The same, with those that are not on the disk fetched from others and kept there, if there is a disk."""
    trace, fetched = _trace(known, head), dict[bytes, bytes]()
    try:
        wanted = next(trace)
        while True:
            data = None if blobs is None else blobs.get(KIND, wanted.hex())
            if data is None:
                data = fetched[wanted] = await fetch(KIND, wanted, AMENDMENT_BYTES_MAX)
            wanted = trace.send(data)
    except StopIteration as end:
        chain: Amendments = end.value
    # Every one of them was checked, for the chain is complete.
    for digest, data in fetched.items():
        if blobs is not None:
            blobs.put(KIND, digest.hex(), data)
    return chain


def up_to(chain: Amendments, head: bytes) -> Amendments:
    """The beginning of a chain that ends with the amendment of this digest. Raises ProtocolError BAD_AMENDMENT."""
    return Amendments(chain.run, chain.chain[: len(chain.chain) - len(chain.after(head))])


def follow(before: Amendments, record: RoundRecord, newest: Amendments) -> Amendments:
    """Go on from the chain of the record before to that of `record`, out of the chain of some later record or its own.

    Raises ProtocolError BAD_AMENDMENT or BANNED when the record does not keep to its amendments.
    """
    return before.follow(record, up_to(newest, record.amendment).after(before.head))


# Those that wait for a record


def with_waiting(folder: RunFolder, named: Amendments, record_round: int) -> Amendments:
    """What a record named, and those that came since, as far as the record of this round can still bring them in."""
    chain, newest = named, folder.journal.meta(NEWEST) or NO_DIGEST
    try:
        waiting = stored_amendments(folder.blobs, named, newest).after(named.head)
    except ProtocolError:
        return named  # they belong to a branch that was given up
    for amendment in waiting:
        try:
            chain = chain.bring_in(amendment, record_round)
        except ProtocolError as error:
            log.warning("amendment dropped", number=amendment.number, says=describe(amendment), why=error.detail)
            break
    return chain


def keep_waiting(folder: RunFolder, amendment: Amendment) -> None:
    """Keep the newest amendment durably until a record names it."""
    folder.blobs.put(KIND, amendment.digest.hex(), amendment.to_bytes())
    folder.journal.set_meta(NEWEST, amendment.digest)


# What a peer makes of them


class AmendedRun:
    """A run with its amendments as a peer follows them; they are kept on its disk."""

    def __init__(self, run: RunConfig, blobs: BlobStore) -> None:
        self.amendments = Amendments(run)
        self._blobs = blobs
        self._record: RoundRecord | None = None

    def settings(self, round: int) -> RunConfig:
        """The run with the settings of this round, which are known since the record before it."""
        return self.amendments.config_at(round)

    async def learn(self, record: RoundRecord, fetch: Fetch) -> None:
        """Bring in the amendments of a record, and check that it keeps to them. Raises LinkError and ProtocolError."""
        before, last = self.amendments, self._record
        chain = await fetched_amendments(before, record.amendment, fetch, self._blobs)
        if last is not None and record.previous == last.digest:
            follow(before, record, chain)
        else:
            chain.check(record)
        for amendment in chain.chain:
            if amendment not in before.chain:
                log.info("amendment", number=amendment.number, says=describe(amendment))
        self.amendments, self._record = chain, record

    def check(self, before: RoundRecord, records: Sequence[RoundRecord]) -> None:
        """Check that records that lead on from `before` keep to the amendments. Raises ProtocolError."""
        for previous, record in pairwise([before, *records]):
            if record.previous == previous.digest:
                follow(up_to(self.amendments, previous.amendment), record, self.amendments)


def describe(amendment: Amendment) -> str:
    """What an amendment does, in a few words."""
    match amendment.action:
        case ChangeSettings(changes):
            what = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
        case Pause():
            what = "the run is paused"
        case Resume():
            what = "the run goes on"
        case Rollback(to_round):
            return f"round {amendment.round} takes the run back to the state after round {to_round}"
        case Ban(peer):
            what = f"packets of peer {peer.hex()[:16]} do not count"
        case Unban(peer):
            what = f"packets of peer {peer.hex()[:16]} count again"
    return f"from round {amendment.round} on {what}"

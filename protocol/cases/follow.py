"""What a replica makes of the records that it is shown (SPEC 12)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from protocol.cases.amendments import Amendment, amend
from protocol.cases.records import APPLIED, GENESIS, NULL, ROLLBACK, STATE_1, STATE_2, TEXT, Entry, Record, ordered
from protocol.cases.vector import BASE, STRANGER, Fields, Row, Vector, noise, table

STATE_3 = bytes([0x53]) * 32
MINE = noise("mine", 32)

# A chain of three rounds, the middle one null; the packet MINE is accepted in round 1.
ONE = replace(APPLIED, entries=ordered(Entry(packet=MINE), Entry(STRANGER.public)))
TWO = replace(NULL, round=2, previous=ONE.digest, state_root=STATE_1)
THREE = replace(APPLIED, round=3, previous=TWO.digest, state_root=STATE_3)
# Others of the same rounds: one more of this epoch, and a branch of the next.
WITHOUT = replace(APPLIED, state_root=STATE_2)
BRANCH_1 = replace(WITHOUT, epoch=1)
BRANCH_2 = replace(BRANCH_1, round=2, previous=BRANCH_1.digest, state_root=STATE_3)


# Amendments that the first two records bring in.
SLOWER = amend(None, 2, "settings", changes={"inner.steps": 2, "outer.rounds": 3})
LONGER = amend(SLOWER, 3, "settings", changes={"inner.steps": 9})
AMENDED_1 = replace(ONE, amendment=SLOWER.digest)
AMENDED_2 = replace(TWO, previous=AMENDED_1.digest, amendment=LONGER.digest)


def told(
    *events: Record | dict[str, Any],
    held: Record = GENESIS,
    packets: dict[int, bytes] | None = None,
    amendments: Sequence[Amendment] = (),
) -> Fields:
    """The fields of a request."""
    return {
        "run": TEXT,
        "held": held.data,
        "packets": [[round, digest] for round, digest in (packets or {}).items()],
        "amendments": [amendment.data for amendment in amendments],
        "events": [{"record": event.data} if isinstance(event, Record) else event for event in events],
    }


def opened(round: int, base_root: bytes, inner_steps: int = 4) -> dict[str, Any]:
    """An aggregator says that a round is open."""
    return {"opened": {"round": round, "base_root": base_root, "inner_steps": inner_steps}}


def settle_rows() -> Iterator[Row]:
    """What becomes of packets."""
    one, mine = ordered(Entry(packet=MINE))[0], {1: MINE}
    yield "accepted", "The record lists the packet as accepted.", told(ONE, packets=mine), None
    yield "absent", "A packet that no record lists is undone.", told(APPLIED, packets=mine), None
    for verdict, code, name in ((1, 319, "late"), (2, 302, "refused")):
        entry = replace(one, verdict=verdict, code=code, weight=0, clip=0)
        record = replace(ONE, entries=ordered(entry, Entry(STRANGER.public)))
        yield name, f"A packet that the record lists as {name} is undone.", told(record, packets=mine), None
    entry = replace(one, verdict=2, code=321, weight=0, clip=0)
    yield "null", "In a null round every packet is undone.", told(replace(NULL, entries=(entry,)), packets=mine), None
    yield "null-absent", "In a null round every packet is undone.", told(NULL, packets=mine), None
    yield "other-digest", "Another packet of ours is accepted, not this one.", told(ONE, packets={1: bytes(32)}), None
    why = "Round by round: one accepted, one in a null round, one accepted."
    packets = {1: MINE, 2: noise("second", 32), 3: APPLIED.entries[0].packet}
    yield "three-rounds", why, told(ONE, TWO, THREE, packets=packets), None
    yield "no-packet", "Without a packet there is nothing to settle.", told(ONE, TWO, THREE), None
    yield "only-second", "A packet of a later round waits for its own record.", told(ONE, TWO, packets={2: MINE}), None
    yield "waiting", "Nothing is settled before the record is there.", told(packets=mine), None
    yield "again", "A record that comes again settles nothing.", told(ONE, ONE, packets={**mine, 2: MINE}), None
    why = "A receipt says only that sending again is needless; the record decides."
    yield "receipt-and-absent", why, told({"receipt": 0}, APPLIED, packets=mine), None
    yield "refused-but-recorded", why, told({"receipt": 318}, ONE, packets=mine), None


def receipt_rows() -> Iterator[Row]:
    """Which refusals are worth another try."""
    again = {704: "BUSY", 705: "WRONG_DIGEST", 702: "BAD_SESSION"}
    for code in (0, 102, 302, 305, 316, 318, 319, 320, 321, *again):
        why = f"{again[code]} is worth another try." if code in again else f"{code} ends the sending."
        yield str(code), why, told({"receipt": code}, packets={1: MINE}), None


def chain_rows() -> Iterator[Row]:
    """Records in and out of order."""
    yield "in-order", "Each record follows the one before.", told(ONE, TWO, THREE), None
    yield "head-again", "A watch begins with the newest record, which may be known.", told(GENESIS, ONE, ONE), None
    yield "older-again", "A record that was the head before changes nothing.", told(ONE, TWO, ONE), None
    yield "gap", "The records between have to be fetched before the head moves.", told(ONE, THREE), None
    yield "gap-filled", "Once they are there the chain goes on.", told(ONE, THREE, TWO, THREE), None
    why = "Nothing is settled by a record beyond a gap."
    yield "gap-unsettled", why, told(TWO, packets={1: MINE}), None
    yield (
        "gap-settled",
        "The records of the gap settle the packet.",
        told(THREE, ONE, TWO, THREE, packets={1: MINE}),
        None,
    )
    yield "before-held", "A record from before the held one tells nothing.", told(ONE, GENESIS, held=TWO), None
    yield "epoch-within", "An epoch may rise from one record to the next.", told(ONE, replace(TWO, epoch=5)), None
    second = replace(APPLIED, state_root=STATE_2)
    yield "second", "Of two records of one round and epoch the first holds.", told(ONE, second), None
    why = "It does not matter how much later the second comes."
    yield "second-later", why, told(ONE, TWO, THREE, second), None
    yield "second-unsettled", "The second settles nothing.", told(ONE, second, packets={1: MINE, 2: MINE}), None
    unfit = replace(TWO, previous=second.digest)
    yield "unfit", "The next record names another predecessor, in one epoch.", told(ONE, unfit), None
    moved = replace(TWO, state_root=STATE_2)
    yield "null-moved", "A null round that changes the state does not follow.", told(ONE, moved), None


def branch_rows() -> Iterator[Row]:
    """Two branches: the higher epoch is followed."""
    yield "same-round", "Another record of the head's round, of a higher epoch.", told(ONE, BRANCH_1), None
    yield "and-on", "The new branch goes on.", told(ONE, BRANCH_1, BRANCH_2), None
    yield "back", "A branch may start far behind the head.", told(ONE, TWO, THREE, BRANCH_1), None
    orphan = replace(BRANCH_2, previous=noise("unknown", 32))
    yield "next-round", "The round after the head, but of another past.", told(ONE, orphan), None
    why = "After the branch the old chain's records are of a lower epoch."
    yield "lower", why, told(ONE, BRANCH_1, TWO), None
    yield "lower-gap", "A lower epoch is ignored, however high its round.", told(BRANCH_1, THREE), None
    yield "lower-same-round", "A lower epoch is ignored.", told(BRANCH_1, WITHOUT), None
    yield "higher-gap", "A higher epoch beyond a gap is fetched first.", told(ONE, replace(THREE, epoch=2)), None
    yield (
        "undone-far-back",
        "A branch from before the packet's round undoes it.",
        told(ONE, replace(TWO, epoch=1), replace(BRANCH_1, epoch=2, entries=ONE.entries), packets={2: MINE}),
        None,
    )
    held = replace(TWO, epoch=1)
    taken = replace(BRANCH_2, previous=noise("unknown", 32), entries=(Entry(packet=MINE),))
    yield "accepted-there", "The branch accepts the packet of its round.", told(ONE, taken, packets={2: MINE}), None
    yield "undone", "A branch that skips the packet's round undoes it.", told(ONE, BRANCH_1, packets={2: MINE}), None
    yield (
        "unknown-past",
        "After a branch its own past is not held.",
        told(
            ONE,
            held,
            replace(THREE, epoch=2),
            replace(TWO, epoch=2, previous=noise("unknown", 32)),
            replace(ONE, epoch=2),
        ),
        None,
    )


def refused_rows() -> Iterator[Row]:
    """Records that section 8 refuses: the code stands for them, and nothing else changes."""
    data = ONE.data
    signature = {"record": data[:-1] + bytes([data[-1] ^ 1])}
    yield "signature", "Nobody signed this.", told(signature, ONE), None
    stranger = replace(ONE, key=STRANGER)
    yield (
        "stranger",
        "A stranger's record changes nothing, however high its epoch.",
        told(replace(stranger, epoch=9)),
        None,
    )
    yield "cut", "A record cut short.", told({"record": data[:-1]}, packets={1: MINE}), None
    yield "other-run", "A record of another run.", told(replace(ONE, run_id=bytes(32))), None
    yield "meaning", "A record whose fields do not fit.", told(ONE, replace(TWO, reason=1)), None


def opened_rows() -> Iterator[Row]:
    """What an unsigned opening of a round may lead to."""
    yield "usual", "It trains from the state of the record that it holds.", told(opened(1, BASE)), None
    yield "other-base", "It never trains on a state that no record names.", told(opened(1, STATE_1)), None
    yield "too-early", "Not for a round before its record is there.", told(opened(2, BASE)), None
    yield "over", "Not for a round that is over.", told(ONE, opened(1, BASE), opened(1, STATE_1)), None
    yield "null-before", "After a null round the state is that of before.", told(ONE, TWO, opened(3, STATE_1)), None
    yield "too-many-steps", "Never more than inner.steps.", told(opened(1, BASE, 2**32 - 1)), None
    yield "fewer-steps", "An aggregator may ask for fewer.", told(opened(1, BASE, 3)), None
    yield "no-steps", "At least one.", told(opened(1, BASE, 0)), None
    yield "packet-made", "At most one packet a round.", told(opened(1, BASE), packets={1: MINE}), None
    last = replace(ONE, round=8, previous=noise("unknown", 32))
    yield "finished", "The last round of the run is over.", told(opened(9, STATE_1), held=last), None
    yield "last", "The last round of the run.", told(opened(8, STATE_1), held=replace(last, round=7)), None
    yield (
        "after-branch",
        "After a branch it trains from the branch's state.",
        told(ONE, BRANCH_1, opened(2, STATE_2)),
        None,
    )
    old = told(ONE, BRANCH_1, opened(2, STATE_1))
    yield "abandoned-state", "After a branch it does not train from the state that it left.", old, None


def amended_rows() -> Iterator[Row]:
    """Amendments that records bring in."""
    slower, longer, one, two = SLOWER, LONGER, AMENDED_1, AMENDED_2
    both = (slower, longer)

    yield (
        "steps",
        "The settings of each round.",
        told(opened(1, BASE, 99), one, opened(2, STATE_1, 99), two, opened(3, STATE_1, 99), amendments=both),
        None,
    )
    third = replace(THREE, previous=two.digest, amendment=longer.digest)
    yield (
        "fewer-rounds",
        "The run is over sooner.",
        told(one, two, third, opened(4, STATE_3, 99), amendments=both),
        None,
    )
    yield "held", "It begins at an amended record.", told(opened(3, STATE_1, 99), held=two, amendments=both), None
    late = replace(APPLIED, round=9, amendment=longer.digest, previous=noise("unknown", 32))
    yield (
        "held-late",
        "It begins when the amendments are long in force.",
        told(opened(10, STATE_1, 99), held=late, amendments=both),
        None,
    )
    why = "Without the amendment that it names a record is not followed; it may be there later."
    yield "missing", why, told(one, opened(2, STATE_1, 99)), None
    yield (
        "missing-first",
        "Each of them has to be there.",
        told(one, two, opened(3, STATE_1, 99), amendments=(longer,)),
        None,
    )
    why = "Nothing is settled by a record that breaks a rule of its amendments."
    early = amend(None, 1, "settings", changes={"inner.steps": 2})
    yield "too-late", why, told(replace(ONE, amendment=early.digest), packets={1: MINE}, amendments=(early,)), None
    forged = replace(slower, key=STRANGER)
    yield (
        "forged",
        "Nobody but the operator amends.",
        told(replace(ONE, amendment=forged.digest), amendments=(forged,)),
        None,
    )
    damaged = Amendment(text=b"{}")
    yield (
        "damaged",
        "What the record names is no amendment.",
        told(replace(ONE, amendment=damaged.digest), amendments=(damaged,)),
        None,
    )
    yield (
        "forgotten",
        "A record forgets no amendment.",
        told(one, replace(TWO, previous=one.digest), amendments=both),
        None,
    )


def branch_amended_rows() -> Iterator[Row]:
    """Chains that do not go on, and those of other branches."""
    slower, one = SLOWER, AMENDED_1
    both = (slower, LONGER)
    other = amend(None, 4, "settings", changes={"inner.steps": 7})
    swapped = replace(TWO, previous=one.digest, amendment=other.digest)
    yield "swapped", "Nor does it put another in its place.", told(one, swapped, amendments=(slower, other)), None
    branch = replace(BRANCH_1, amendment=other.digest)
    why = "Another branch may know other amendments."
    yield "branch", why, told(one, branch, opened(2, STATE_2, 99), amendments=(slower, other)), None
    plain = replace(BRANCH_1, amendment=bytes(32))
    yield (
        "branch-without",
        "Another branch may know none.",
        told(one, plain, opened(2, STATE_2, 99), amendments=both),
        None,
    )
    yield "branch-missing", "A branch whose amendments are not there.", told(one, branch, amendments=both), None


def action_rows() -> Iterator[Row]:
    """Pauses, rollbacks and bans."""
    slower, one, two = SLOWER, AMENDED_1, AMENDED_2
    pause = amend(slower, 3, "pause")
    resume = amend(pause, 3, "resume")
    held_shut = replace(two, amendment=pause.digest)
    opens = replace(THREE, previous=held_shut.digest, amendment=resume.digest)
    pauses = (slower, pause, resume)
    yield (
        "pause-and-resume",
        "The record that follows brings in the resume.",
        told(one, held_shut, opens, amendments=pauses),
        None,
    )
    yield (
        "paused",
        "Nothing follows while the run is paused.",
        told(one, held_shut, replace(opens, amendment=pause.digest), amendments=pauses),
        None,
    )
    yield from _rollback_rows()
    ban = amend(slower, 3, "ban", peer=ONE.entries[0].peer.hex())
    banned = replace(two, amendment=ban.digest)
    accepts = replace(THREE, previous=banned.digest, amendment=ban.digest, entries=ONE.entries)
    yield (
        "banned",
        "No record that accepts a banned peer is followed.",
        told(one, banned, accepts, amendments=(slower, ban)),
        None,
    )
    without = replace(
        accepts, entries=tuple(entry for entry in ONE.entries if entry.peer.hex() != ban.document["peer"])
    )
    yield "banned-left-out", "Others may go on.", told(one, banned, without, amendments=(slower, ban)), None


def _rollback_rows() -> Iterator[Row]:
    slower = amend(None, 2, "settings", changes={"inner.steps": 2})
    back = amend(slower, 3, "rollback", to_round=0)
    one = replace(ONE, amendment=slower.digest)
    two = replace(TWO, previous=one.digest, amendment=back.digest)
    taken = replace(ROLLBACK, round=3, previous=two.digest, state_root=BASE, amendment=back.digest)
    chain = (slower, back)
    yield "rollback", "Its state is loaded.", told(one, two, taken, opened(4, BASE), amendments=chain), None
    packets = {1: MINE, 3: noise("third", 32)}
    yield "rollback-settles", "Its packets are undone.", told(one, two, taken, packets=packets, amendments=chain), None
    on = replace(APPLIED, round=4, previous=taken.digest, amendment=back.digest)
    yield "rollback-and-on", "The chain goes on from there.", told(one, two, taken, on, amendments=chain), None
    unordered = replace(ROLLBACK, round=2, previous=one.digest, amendment=slower.digest)
    yield "rollback-unordered", "Nobody ordered it.", told(one, unordered, amendments=chain), None
    instead = replace(THREE, previous=two.digest, amendment=back.digest)
    yield "rollback-missing", "The round was to be a rollback.", told(one, two, instead, amendments=chain), None
    yield "rollback-gap", "Beyond a gap it waits like any record.", told(one, taken, amendments=chain), None
    branch = replace(taken, epoch=1, previous=noise("unknown", 32))
    why = "A branch may begin with one, of another past."
    yield "rollback-branch", why, told(one, two, branch, opened(4, BASE), amendments=chain), None


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("settle", "follow", settle_rows())
    yield from table("receipt", "follow", receipt_rows())
    yield from table("chain", "follow", chain_rows())
    yield from table("branch", "follow", branch_rows())
    yield from table("refused", "follow", refused_rows())
    yield from table("opened", "follow", opened_rows())
    yield from table("amended", "follow", amended_rows())
    yield from table("amended-branch", "follow", branch_amended_rows())
    yield from table("amended-action", "follow", action_rows())

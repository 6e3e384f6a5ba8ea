"""The parameters after a round, from whatever holds them: a ledger with updates, a peer's home, a stored state.

Nothing is changed or locked, so a checkpoint can be taken while the program that writes there is running. What is
returned has the state root that the ledger (or, where there is none, the file's name) promises.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from peer.amendments import stored_amendments
from peer.core import codec
from peer.errors import UserCode, UserError, os_errors
from peer.merge import sections_of_update
from peer.store import StateStore
from peer.stored import FOLDERS_DEEP, RUN_FILE, Stored, find_stores
from protocol.amendment import Amendments
from protocol.errors import ProtocolError
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import Kind, RoundRecord, Verdict, check_link, check_record
from protocol.limits import RUN_BYTES_MAX
from protocol.run import RunConfig, SignedRun

Flat = NDArray[np.float32]  # f32[N]
REPLICA_FILE = "replica.safetensors"


@dataclass
class Contribution:
    """What one peer has given to a run."""

    rounds: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """Outer parameters after a round.

    `head` is the round's record, None where there is no ledger; `evaluated` is the newest validation loss that the
    ledger knows, as (round, nats a token).
    """

    run: RunConfig
    round: int
    state: Flat
    source: Path
    head: RoundRecord | None = None
    contributors: dict[bytes, Contribution] = field(default_factory=dict)
    evaluated: tuple[int, float] | None = None
    amendments: Amendments | None = None

    @property
    def rounds(self) -> int:
        """After how many rounds the run ends, as far as is known."""
        run = self.run if self.amendments is None else self.amendments.config_at(self.round + 1)
        return run.outer.rounds


def open_checkpoint(source: Path, round: int | None = None) -> Checkpoint:
    """The parameters after a round (the newest without one) that a folder or a state's file holds.

    Raises UserError when they are not there, and ProtocolError when the ledger is damaged.
    """
    with os_errors(source):
        is_file = source.is_file()
    if is_file:
        return _from_state_file(source, round)
    paths = find_stores(source)
    if not paths:
        raise UserError(
            UserCode.NO_SUCH_FILE,
            f"there is neither a ledger nor a peer's home in {source}",
            "name the folder of a run, of an aggregator or of a mirror, a peer's home, or a state's .safetensors file",
        )
    path, run, head = _choose(source, paths)
    if head < 0:
        return _from_peer(path, run, round)
    if round is not None and not 0 <= round <= head:
        raise UserError(
            UserCode.BAD_ARGUMENT, f"{path} has the rounds 0 to {head}, not {round}", "name one of these with --round"
        )
    with closing(Stored(path)) as store:
        return _from_ledger(store, run, head if round is None else round)


def newest_round(source: Path) -> tuple[int, bool]:
    """The newest round of the ledger in a folder (-1 while there is none) and whether it is the run's last."""
    paths = find_stores(source)
    if not paths:
        return -1, False
    path, run, head = _choose(source, paths)
    with closing(Stored(path)) as store:
        row = store.record(head)
        if row is not None:
            # The operator may have amended how many rounds there are.
            named = RoundRecord.from_bytes(row.data).amendment
            run = stored_amendments(store.blobs, Amendments(run), named).config_at(head + 1)
    return head, head >= run.outer.rounds


def _stores(paths: Sequence[Path]) -> list[tuple[Path, RunConfig, int]]:
    found = []
    for path in paths:
        with closing(Stored(path)) as store:
            found.append((path, store.run(), store.head()))
    return found


def _choose(source: Path, paths: Sequence[Path]) -> tuple[Path, RunConfig, int]:
    """The store with the longest ledger. Several runs in one folder are the user's to tell apart."""
    found = _stores(paths)
    if len({run.run_id for _, run, _ in found}) > 1:
        names = ", ".join(f"{path} ({run.name})" for path, run, _ in found)
        raise UserError(
            UserCode.BAD_ARGUMENT, f"{source} holds several runs: {names}", "name the folder of one of them"
        )
    return max(found, key=lambda entry: entry[2])


def _from_ledger(store: Stored, run: RunConfig, round: int) -> Checkpoint:
    way = _way(_records(store, run, round))
    contributors: dict[bytes, Contribution] = {}
    evaluated = None
    for record in reversed(way):
        if record.loss_micronats:
            evaluated = record.evaluated_round, record.loss_micronats / 1e6
        for entry in record.entries:
            if entry.verdict == Verdict.ACCEPTED:
                given = contributors.setdefault(entry.peer, Contribution())
                given.rounds += 1
                given.tokens += entry.tokens
    amendments = stored_amendments(store.blobs, Amendments(run), way[0].amendment)
    flat = _state_after(store, run, way)
    return Checkpoint(run, round, flat, store.path, way[0], contributors, evaluated, amendments)


def _way(records: Sequence[RoundRecord]) -> list[RoundRecord]:
    """The records that the newest state comes from, newest first; what a rollback undid is no part of it."""
    way, index = [], len(records) - 1
    while index >= 0:
        record = records[index]
        way.append(record)
        index -= 1
        if record.kind == Kind.ROLLBACK:
            while index >= 0 and records[index].state_root != record.state_root:
                index -= 1
    return way


def _records(store: Stored, run: RunConfig, last: int) -> list[RoundRecord]:
    """The checked records of the rounds 0 to `last`."""
    records: list[RoundRecord] = []
    for round in range(last + 1):
        row = store.record(round)
        if row is None:
            raise UserError(
                UserCode.DAMAGED_STORE,
                f"the journal {store.journal} has no record of round {round}",
                "name another copy of the run; `sparseloco-peer audit` says what is wrong with this one",
            )
        record = RoundRecord.from_bytes(row.data)
        check_record(record, run)
        if records:
            check_link(records[-1], record)
        records.append(record)
    return records


def _state_after(store: Stored, run: RunConfig, way: Sequence[RoundRecord]) -> Flat:
    """The parameters after the first record: from the newest stored state that leads there, and the updates since."""
    newest = way[0]
    start = next((i for i, record in enumerate(way) if store.states.has(record.state_root)), None)
    if start is None:
        raise _not_here(store, newest.round)
    flat = store.states.load(way[start].state_root, run.layout)
    for record in reversed(way[:start]):
        if record.update_digest != NO_DIGEST:
            data = store.blobs.get("update", record.update_digest.hex())
            if data is None:
                raise _not_here(store, newest.round)
            codec.outer_step(torch.from_numpy(flat), run.layout, sections_of_update(data, record, run))
    if state_root(flat) != newest.state_root:
        raise UserError(
            UserCode.DAMAGED_STORE,
            f"the updates in {store.path} do not lead to the state of round {newest.round}",
            f"`sparseloco-peer audit {store.path}` finds out why; take another copy of the run",
        )
    return flat


def _not_here(store: Stored, round: int) -> UserError:
    return UserError(
        UserCode.NO_SUCH_FILE,
        f"{store.path} no longer holds what leads to the parameters of round {round}",
        "name a later round, or a mirror that has followed the run from the beginning",
    )


def _from_peer(path: Path, run: RunConfig, round: int | None) -> Checkpoint:
    """What a peer holds: the parameters of the end of the run, else those that it stored with its last packet."""
    states = StateStore(path / "states")
    found: Checkpoint | None = None
    for root in states.roots():
        candidate = _from_state_file(states.folder / f"{root.hex()}.safetensors", None)
        if found is None or candidate.round > found.round:
            found = candidate
    replica = path / REPLICA_FILE
    if found is None and replica.exists():
        found = _from_replica(replica, run)
    if found is None:
        raise UserError(
            UserCode.NO_SUCH_FILE,
            f"the peer in {path} holds no parameters yet",
            "wait for its first packet, or name the folder of an aggregator or of a mirror",
        )
    if round is not None and round != found.round:
        raise UserError(
            UserCode.BAD_ARGUMENT,
            f"the peer in {path} holds the parameters of round {found.round} alone, not those of round {round}",
            "leave --round away, or name the folder of an aggregator or of a mirror",
        )
    return found


def _from_replica(path: Path, run: RunConfig) -> Checkpoint:
    with os_errors(path):
        try:
            with safe_open(path, framework="numpy") as file:
                state = np.array(file.get_tensor("outer"), dtype=np.float32)
                record = RoundRecord.from_bytes(file.get_tensor("record").tobytes())
            check_record(record, run)
        except (SafetensorError, ProtocolError, ValueError) as error:
            raise _damaged(path, str(error)) from error
    if state.shape != (run.layout.size,) or state_root(state) != record.state_root:
        raise _damaged(path, "its parameters are not those of its record")
    return Checkpoint(run, record.round, state, path, record)


def _from_state_file(path: Path, round: int | None) -> Checkpoint:
    """A file of a folder `states`; its name is its state root, and the signed run lies above it."""
    run = run_near(path)
    try:
        root = bytes.fromhex(path.stem)
        with os_errors(path), safe_open(path, framework="numpy") as file:
            written = (file.metadata() or {}).get("round", "")
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, "it is not a state whose name is its root") from error
    stored = int(written) if written.isascii() and written.isdigit() else 0
    if round not in (None, stored):
        raise UserError(UserCode.BAD_ARGUMENT, f"{path} is the state of round {stored}", "leave --round away")
    return Checkpoint(run, stored, StateStore(path.parent).load(root, run.layout), path)


def run_near(path: Path) -> RunConfig:
    """The signed run in the nearest folder above a file. Raises UserError, or ProtocolError when it is forged."""
    for folder in list(path.absolute().parents)[:FOLDERS_DEEP]:
        file = folder / RUN_FILE
        if file.is_file():
            with os_errors(file), file.open("rb") as opened:
                return SignedRun.from_bytes(opened.read(RUN_BYTES_MAX + 1024), run_id=None).config
    raise UserError(
        UserCode.NO_SUCH_FILE,
        f"there is no {RUN_FILE} near {path}",
        f"leave the state in the folder where it was written, or copy the run's {RUN_FILE} beside it",
    )


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        UserCode.BAD_FILE, f"{path} cannot be read as parameters of a run: {why}", "take another copy of it"
    )

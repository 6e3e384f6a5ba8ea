"""From stored updates back to the parameters: how an aggregator recovers and how anybody follows a run afterwards."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from peer.core import codec
from peer.journal import RecordRow
from peer.merge import sections_of_update
from peer.store import RunFolder
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import RoundRecord
from protocol.run import RunConfig


def replay(
    store: RunFolder, run: RunConfig, first: int, last: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:  # (round, f32[N])
    """Load the state after round `first`, which is stored, and follow the updates to round `last`.

    Yields (round, parameters) for first..last; the array is the same each time and changes in place. Raises
    ProtocolError BAD_STATE when the parameters at the end are not those of the record, NOT_FOUND when an update is
    gone, and UserError when the disk fails.
    """
    rows = store.journal.records(first, last)
    flat = store.states.load(rows[0].state_root, run.layout)
    yield first, flat
    for before, row in pairwise(rows):
        if row.update_digest != NO_DIGEST:
            _step(store, run, flat, row)
        elif row.state_root != before.state_root:
            # The operator took the run back here.
            flat[:] = stored_state(store, run, row.round)
        yield row.round, flat
    _demand_root(flat, rows[-1])


def stored_state(store: RunFolder, run: RunConfig, round: int) -> NDArray[np.float32]:  # f32[N]
    """The state after a round, from the newest stored one that leads to it and the updates since.

    Raises ProtocolError BAD_STATE or NOT_FOUND as `replay` does, and UserError when the disk fails.
    """
    target = row = _row(store, round)
    updates: list[RecordRow] = []
    while not store.states.has(row.state_root):
        if row.update_digest != NO_DIGEST:
            updates.append(row)
            row = _row(store, row.round - 1)
        else:
            # It changed nothing, or took the run back: an earlier round led to this state.
            before = store.journal.first_with_state(row.state_root)
            if before is None or before.round >= row.round:
                raise ProtocolError(Code.NOT_FOUND, f"nothing here leads to the state of round {row.round}")
            row = before
    flat = store.states.load(row.state_root, run.layout)
    for update in reversed(updates):
        _step(store, run, flat, update)
    _demand_root(flat, target)
    return flat


def _row(store: RunFolder, round: int) -> RecordRow:
    row = store.journal.record(round)
    if row is None:
        raise ProtocolError(Code.NOT_FOUND, f"the record of round {round} is not here")
    return row


def _step(store: RunFolder, run: RunConfig, flat: NDArray[np.float32], row: RecordRow) -> None:  # flat: f32[N]
    data = store.blobs.get("update", row.update_digest.hex())
    if data is None:
        raise ProtocolError(Code.NOT_FOUND, f"the update of round {row.round} is no longer here")
    sections = sections_of_update(data, RoundRecord.from_bytes(row.data), run)
    codec.outer_step(torch.from_numpy(flat), run.layout, sections)


def _demand_root(flat: NDArray[np.float32], row: RecordRow) -> None:  # flat: f32[N]
    if state_root(flat) != row.state_root:
        raise ProtocolError(Code.BAD_STATE, f"the stored updates do not lead to the state of round {row.round}")
